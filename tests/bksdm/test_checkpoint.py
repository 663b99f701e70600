"""Checkpoints as folders: what is written is read back bit for bit, and what is wrong is said in one sentence."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, CLIPTokenizerFast

from bksdm import checkpoint, vocabulary
from bksdm.block_removal import compress
from bksdm.checkpoint import Checkpoint, CheckpointError
from bksdm.unet import build_unet, unet_config
from bksdm.variants import BASE, SMALL, TINY, VARIANTS, Removal, VariantError

SameTensors = Callable[[Checkpoint, Checkpoint], None]
UNET = "unet/diffusion_pytorch_model.safetensors"
DESCRIBES_NONE = r"text_encoder/config\.json does not describe a CLIP text model"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def edit(path: Path, **changes: object) -> None:
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_a_saved_checkpoint_loads_bit_for_bit(
    mini_folder: Path, mini_checkpoint: Checkpoint, assert_same_tensors: SameTensors
) -> None:
    loaded = checkpoint.load(str(mini_folder))
    assert_same_tensors(loaded, mini_checkpoint)
    assert (loaded.variant, loaded.source, loaded.image_size) == ("custom", mini_folder.name, 64)
    assert loaded.scheduler_config == mini_checkpoint.scheduler_config
    assert loaded.licence == mini_checkpoint.licence
    for model in (loaded.text_encoder, loaded.unet, loaded.vae):
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert dict(loaded.unet.config)["block_out_channels"] == [32, 64, 64, 64]


@pytest.mark.parametrize("removal", [BASE, SMALL, TINY], ids=["base", "small", "tiny"])
def test_block_removed_students_load(
    mini_checkpoint: Checkpoint, tmp_path: Path, removal: Removal, assert_same_tensors: SameTensors
) -> None:
    student = replace(mini_checkpoint, unet=compress(mini_checkpoint.unet, removal))
    checkpoint.save(student, tmp_path / "student")
    assert_same_tensors(checkpoint.load(str(tmp_path / "student")), student)


def test_a_saved_checkpoint_opens_in_diffusers_pipeline(mini_folder: Path, mini_checkpoint: Checkpoint) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(mini_folder)
    pipeline.set_progress_bar_config(disable=True)
    pixels = pipeline("a red apple", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert pixels.shape == (1, 64, 64, 3)
    for key, tensor in mini_checkpoint.text_encoder.state_dict().items():
        assert torch.equal(pipeline.text_encoder.state_dict()[key], tensor)


def test_half_precision_storage_loads_as_float32(mini_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.save(mini_checkpoint, tmp_path / "half", dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / UNET).values()} == {torch.float16}
    loaded = checkpoint.load(str(tmp_path / "half"))
    for key, tensor in mini_checkpoint.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[key], tensor.half().float())
    assert next(mini_checkpoint.unet.parameters()).dtype == torch.float32  # saving changes nothing in memory


def test_a_weight_beyond_half_precision_is_not_stored_as_infinity(
    build_mini: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    whole = build_mini()
    whole.unet.conv_in.bias.data[2] = 1e5
    with pytest.raises(CheckpointError, match=r"conv_in\.bias of the unet holds 100000, which float16 cannot store"):
        checkpoint.save(whole, tmp_path / "half", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    checkpoint.save(whole, tmp_path / "full")


def test_tied_weights_are_stored_each_for_itself(build_mini: Callable[..., Checkpoint], tmp_path: Path) -> None:
    whole = build_mini()
    whole.unet.time_embedding.linear_2.bias = whole.unet.time_embedding.linear_1.bias
    checkpoint.save(whole, tmp_path / "tied")
    loaded = checkpoint.load(str(tmp_path / "tied")).unet.time_embedding
    assert loaded.linear_2.bias.equal(loaded.linear_1.bias)


def test_files_are_safetensors_tokenizer_in_every_form_and_licence(mini_folder: Path) -> None:
    files = {str(path.relative_to(mini_folder)) for path in mini_folder.rglob("*") if path.is_file()}
    assert files == {
        "LICENSE",
        "bksdm.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        TEXT,
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        UNET,
        "vae/config.json",
        VAE,
    }
    configs = [json.loads((mini_folder / part / "config.json").read_text()) for part in ("unet", "vae", "text_encoder")]
    assert not any("_name_or_path" in config for config in configs)  # a path on the machine that wrote it
    modes = {(mini_folder / file).stat().st_mode & 0o777 for file in files}
    assert len(modes) == 1  # safetensors alone would make its files unreadable to everyone else


def test_saved_tokenizer_gives_clips_ids(mini_folder: Path) -> None:
    slow = CLIPTokenizer.from_pretrained(mini_folder / "tokenizer")
    fast = CLIPTokenizerFast(tokenizer_file=str(mini_folder / "tokenizer" / "tokenizer.json"))
    ours = checkpoint.tokenizer()
    # transformers' two CLIP tokenizers disagree with each other on some characters: each is held to its own kind.
    ours_fast = CLIPTokenizerFast.from_pretrained(vocabulary.CLIP_FOLDER)
    for text in ("a golden vase with different flowers", "naïve café №5, 東京!", "  \n ", "x" * 300):
        assert slow(text).input_ids == ours(text).input_ids
        assert fast(text).input_ids == ours_fast(text).input_ids
    padded = ours("a cat", padding="max_length", max_length=77).input_ids
    assert padded == [49406, 320, 2368, *[49407] * 74]


def test_sd2_tokenizer_pads_with_token_zero_and_keeps_doing_so(mini_checkpoint: Checkpoint, tmp_path: Path) -> None:
    v2 = replace(mini_checkpoint, tokenizer=checkpoint.tokenizer("!"))
    checkpoint.save(v2, tmp_path / "v2")
    loaded = checkpoint.load(str(tmp_path / "v2")).tokenizer
    assert loaded("a cat", padding="max_length", max_length=77).input_ids == [49406, 320, 2368, 49407, *[0] * 73]


# The text_model. prefix: transformers >= 5.6 saves CLIPTextModel without it, transformers 4 then ran random weights.


def test_text_encoder_is_saved_with_its_prefix(mini_folder: Path) -> None:
    assert all(key.startswith("text_model.") for key in load_file(mini_folder / TEXT))


def test_text_encoder_without_its_prefix_loads_in_full(
    copy: Path, mini_checkpoint: Checkpoint, assert_same_tensors: SameTensors
) -> None:
    tensors = load_file(copy / TEXT)
    bare = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    save_file(bare, copy / TEXT, metadata={"format": "pt"})
    assert_same_tensors(checkpoint.load(str(copy)), mini_checkpoint)


def test_text_encoder_with_foreign_keys_is_refused_not_left_random(copy: Path) -> None:
    foreign = {f"encoder_of_another.{key}": tensor for key, tensor in load_file(copy / TEXT).items()}
    save_file(foreign, copy / TEXT, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text_encoder.*token_embedding\.weight \(49408, 32\) is missing"):
        checkpoint.load(str(copy))


def test_position_ids_of_old_checkpoints_are_passed_over(copy: Path) -> None:
    tensors = load_file(copy / TEXT)
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, copy / TEXT, metadata={"format": "pt"})
    assert checkpoint.load(str(copy)).image_size == 64


def test_tokenizer_json_alone_is_enough(copy: Path) -> None:
    (copy / "tokenizer" / "vocab.json").unlink()
    (copy / "tokenizer" / "merges.txt").unlink()
    text = "a golden vase with different flowers, 東京"
    assert checkpoint.load(str(copy)).tokenizer(text).input_ids == checkpoint.tokenizer()(text).input_ids


def test_vae_with_the_attention_names_of_old_diffusers_loads(
    copy: Path, mini_checkpoint: Checkpoint, assert_same_tensors: SameTensors
) -> None:
    # CompVis/stable-diffusion-v1-4 is stored so.
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in load_file(copy / VAE).items():
        for new_name, old_name in old.items():
            if ".attentions." in key:
                key = key.replace(f".{new_name}.", f".{old_name}.")
        renamed[key] = tensor
    assert sum(".query." in key for key in renamed) == 4
    save_file(renamed, copy / VAE, metadata={"format": "pt"})
    assert_same_tensors(checkpoint.load(str(copy)), mini_checkpoint)


# What is wrong is said in one sentence.


def one_sentence(error: pytest.ExceptionInfo[CheckpointError]) -> None:
    assert "\n" not in str(error.value)


def test_the_guidance_scale_travels_and_is_stable_diffusions_where_nothing_is_said(
    mini_checkpoint: Checkpoint, copy: Path, tmp_path: Path
) -> None:
    checkpoint.save(replace(mini_checkpoint, guidance_scale=2.0), tmp_path / "two")
    assert checkpoint.load(str(tmp_path / "two")).guidance_scale == 2.0
    (copy / "bksdm.json").unlink()
    assert checkpoint.load(str(copy)).guidance_scale == 7.5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: (at / "model_index.json").unlink(), r"holds a U-Net alone|not a diffusers checkpoint"),
        (lambda at: (at / UNET).unlink(), r"unet has no weights \(a \.safetensors file\)"),
        (lambda at: (at / "vae" / "config.json").unlink(), r"vae/config\.json is missing"),
        (lambda at: (at / "tokenizer").rename(at / "elsewhere"), r"not whole: it has no tokenizer/"),
        (lambda at: (at / "unet" / "config.json").write_text("{"), r"unet/config\.json is not readable JSON"),
        (lambda at: (at / "unet" / "config.json").write_text("[1]"), r"unet/config\.json holds no JSON object"),
        (lambda at: (at / "scheduler" / "scheduler_config.json").write_text("{}"), r"names no _class_name"),
        (
            lambda at: edit(at / "unet/config.json", _class_name="FluxTransformer"),
            r"is a FluxTransformer, not a UNet2D",
        ),
        (lambda at: edit(at / "text_encoder/config.json", model_type="t5"), r"is a t5, not a CLIP text model"),
        (lambda at: edit(at / "model_index.json", text_encoder_2=["transformers", "X"]), r"it has text_encoder_2"),
        (lambda at: edit(at / "unet/config.json", layers_per_block=1), r"unet does not hold what .*up_blocks"),
        (lambda at: edit(at / "unet/config.json", layers_per_block=3), r"unet does not hold what .*missing"),
        (
            lambda at: edit(at / "unet/config.json", block_out_channels=[32, 64, 64, 128]),
            r"down_blocks\.3\.\S+ is \(64,.*\), expected \(128,.*\)",
        ),
        (lambda at: edit(at / "unet/config.json", block_out_channels="wide"), r"does not describe a UNet2DCondition"),
        (lambda at: edit(at / "unet/config.json", sample_size=None), r"sample_size is None"),
        (lambda at: edit(at / "bksdm.json", guidance_scale="2"), r"says guidance_scale 2, not 1 or more"),
        (lambda at: edit(at / "bksdm.json", guidance_scale=0.5), r"says guidance_scale 0\.5, not 1 or more"),
        (lambda at: edit(at / "text_encoder/config.json", hidden_size=64), r"text_encoder does not hold"),
        *(
            (lambda at, part=part, key=key, value=value: edit(at / f"{part}/config.json", **{key: value}), message)
            for part, key, value, message in (
                ("unet", "norm_num_groups", 0, r"unet/config\.json does not describe a UNet2DCondition"),
                ("unet", "attention_head_dim", 0, r"unet/config\.json does not describe a UNet2DCondition"),
                ("vae", "norm_num_groups", 0, r"vae/config\.json does not describe a AutoencoderKL"),
                ("text_encoder", "num_attention_heads", 5, DESCRIBES_NONE),
                ("text_encoder", "num_attention_heads", 0, DESCRIBES_NONE),
                ("text_encoder", "hidden_act", "foo", DESCRIBES_NONE),
                ("text_encoder", "hidden_size", "x", DESCRIBES_NONE),
                ("text_encoder", "vocab_size", -1, DESCRIBES_NONE),
            )
        ),
        (
            lambda at: (at / f"{UNET}.index.json").write_text('{"weight_map": {"a": 1}}') and (at / UNET).unlink(),
            r"index\.json is not an index of shards",
        ),
        # transformers 5 reads the second of the two alone
        (
            lambda at: [(at / "tokenizer" / name).write_text("no") for name in ("vocab.json", "tokenizer.json")],
            r"not a readable CLIP tokenizer",
        ),
    ],
)
def test_a_spoilt_folder_is_refused(copy: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(copy)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(str(copy))
    one_sentence(error)


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_weights_are_refused(copy: Path, file: str, kept: int) -> None:
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=r"safetensors is damaged or cut short \(\d+ bytes") as error:
        checkpoint.load(str(copy))
    one_sentence(error)


def test_what_may_not_be_read_is_not_said_to_be_missing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(real: Callable[..., object]) -> Callable[..., object]:
        def look(self: Path, *arguments: object, **options: object) -> object:
            if self.suffix == ".safetensors" or self.name == "copy":
                raise PermissionError(13, "Permission denied", str(self))
            return real(self, *arguments, **options)

        return look

    monkeypatch.setattr(Path, "open", closed(Path.open))  # tests may run as root, whom no mode of a file stops
    with pytest.raises(CheckpointError, match=r"safetensors cannot be read \(Permission denied\)"):
        checkpoint.load(str(copy))
    monkeypatch.setattr(Path, "exists", closed(Path.exists))
    with pytest.raises(CheckpointError, match=r"copy cannot be read \(Permission denied\)"):
        checkpoint.load(str(copy))


def test_a_path_that_is_too_long_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"x cannot be read \(File name too long\)|there is no x"):
        checkpoint.load("x" * 5000)


def test_a_git_lfs_pointer_is_called_by_its_name(copy: Path) -> None:
    (copy / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        checkpoint.load(str(copy))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_weights_that_are_not_finite_are_refused(copy: Path, file: str, value: float) -> None:
    tensors = load_file(copy / file)
    key = sorted(tensors)[3]
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[0] = value
    save_file(tensors, copy / file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{key.split('.')[-2]}\.\w+ holds 1 NaN or infinite value") as error:
        checkpoint.load(str(copy))
    one_sentence(error)


def test_parts_of_different_models_are_refused(
    build_mini: Callable[..., Checkpoint], mini_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = build_mini(unet={"cross_attention_dim": 48}).unet
    checkpoint.save(replace(mini_checkpoint, unet=other), tmp_path / "mixed")
    with pytest.raises(CheckpointError, match="expects a context 48 wide, the text encoder gives 32"):
        checkpoint.load(str(tmp_path / "mixed"))


def test_inpainting_is_refused(
    build_mini: Callable[..., Checkpoint], mini_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    inpainting = build_mini(unet={"in_channels": 9}).unet
    checkpoint.save(replace(mini_checkpoint, unet=inpainting), tmp_path / "inpainting")
    with pytest.raises(CheckpointError, match="takes 9 channels and gives 4"):
        checkpoint.load(str(tmp_path / "inpainting"))


def test_a_path_that_does_not_exist_names_the_ways(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no .*nowhere: .*FOLDER.*\.safetensors.*demo.*random"):
        checkpoint.load(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"there is no small \(a variant's name"):
        checkpoint.load("small")


def test_a_claimed_variant_is_checked(mini_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not 'small': its U-Net has \w+ .*, small has"):
        checkpoint.load(str(mini_folder), variant="small")
    with pytest.raises(VariantError, match="no variant 'smal'"):
        checkpoint.load(str(mini_folder), variant="smal")


def test_variant_is_read_off_the_unet_and_a_record_decides_between_twins() -> None:
    for name, row in VARIANTS.items():
        with torch.device("meta"):
            unet = build_unet(unet_config(row.architecture.unet, row.removal))
        assert checkpoint.variant_of(unet) == name.removesuffix("-2m")
        assert checkpoint.variant_of(unet, claimed=name) == name
        assert checkpoint.variant_of(unet, claimed="no such row") == name.removesuffix("-2m")
    assert checkpoint.variant_of(unet, claimed="tiny-2m") == "v2-tiny"  # a record that does not fit is not believed


def test_a_revision_belongs_to_the_hub(mini_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="a revision names a commit on the Hub"):
        checkpoint.load(str(mini_folder), revision="main")


@pytest.mark.parametrize("weights", [None, "random"])
def test_hub_and_random_need_a_variant(weights: str | None) -> None:
    with pytest.raises(CheckpointError, match=r"need a variant: choose from sd-v1\.4, base, small"):
        checkpoint.load(weights)


# Pickles.


class Bomb:
    """Unpickled by anything but weights_only, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_hostile_single_file_never_runs(tmp_path: Path) -> None:
    torch.save({"state_dict": {"model.diffusion_model.out.2.bias": Bomb(tmp_path / "exploded")}}, tmp_path / "m.ckpt")
    for allow in (False, True):
        with pytest.raises(CheckpointError) as error:
            checkpoint.load(str(tmp_path / "m.ckpt"), allow_pickle=allow)
        one_sentence(error)
    assert not (tmp_path / "exploded").exists()


def pickled(at: Path, part: str, name: str, *extra: object) -> Path:
    (file,) = (at / part).glob("*.safetensors")
    tensors = load_file(file)
    torch.save({**tensors, **{f"extra{i}": value for i, value in enumerate(extra)}}, at / part / name)
    file.unlink()
    return at / part / name


@pytest.mark.parametrize(
    ("part", "name", "safe"),
    [
        ("unet", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "pytorch_model.bin", "model.safetensors"),
    ],
)
def test_pickles_are_refused_with_the_reason_and_the_way_out(
    copy: Path, part: str, name: str, safe: str, assert_same_tensors: SameTensors, mini_checkpoint: Checkpoint
) -> None:
    pickled(copy, part, name)
    with pytest.raises(CheckpointError, match=r"is a pickle, which can run code.*python -c.*--allow-pickle") as error:
        checkpoint.load(str(copy))
    one_sentence(error)
    assert_same_tensors(checkpoint.load(str(copy), allow_pickle=True), mini_checkpoint)
    # The command in the message works as printed.
    python, *arguments = shlex.split(str(error.value).split("safetensors with ")[1].split(", or pass")[0])
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    assert (copy / part / safe).is_file()
    (copy / part / name).unlink()
    assert_same_tensors(checkpoint.load(str(copy)), mini_checkpoint)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ],
)
def test_a_hostile_pickle_never_runs(copy: Path, tmp_path: Path, part: str, name: str) -> None:
    pickled(copy, part, name, Bomb(tmp_path / "exploded"))
    for allow in (False, True):
        with pytest.raises(CheckpointError) as error:
            checkpoint.load(str(copy), allow_pickle=allow)
        one_sentence(error)
    assert not (tmp_path / "exploded").exists()


def test_safetensors_win_over_pickles(copy: Path, tmp_path: Path) -> None:
    torch.save({"bomb": Bomb(tmp_path / "exploded")}, copy / "unet" / "diffusion_pytorch_model.bin")
    assert checkpoint.load(str(copy), allow_pickle=True).image_size == 64
    assert not (tmp_path / "exploded").exists()


# A trained U-Net laid over a base.


@pytest.mark.parametrize("layout", ["unet alone", "whole checkpoint"])
def test_trained_unet_is_laid_over_a_base(
    mini_folder: Path,
    build_mini: Callable[..., Checkpoint],
    tmp_path: Path,
    layout: str,
    assert_same_tensors: SameTensors,
    mini_checkpoint: Checkpoint,
) -> None:
    trained = build_mini(seed=7)
    checkpoint.save(trained, tmp_path / "trained")
    at = tmp_path / "trained" / "unet" if layout == "unet alone" else tmp_path / "trained"
    loaded = checkpoint.load(str(mini_folder), unet=str(at))
    assert_same_tensors(loaded, replace(mini_checkpoint, unet=trained.unet))
    # A name that travels with the weights says nothing about this machine's folders.
    called = "trained/unet" if layout == "unet alone" else "trained"
    assert loaded.source == f"{mini_folder.name} with the U-Net of {called}"


def test_a_unet_that_does_not_fit_its_base_is_refused(
    mini_folder: Path, build_mini: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint.save(build_mini(unet={"cross_attention_dim": 48}), tmp_path / "wide")
    with pytest.raises(CheckpointError, match="context 48 wide"):
        checkpoint.load(str(mini_folder), unet=str(tmp_path / "wide"))


def test_a_unet_alone_is_not_a_checkpoint(mini_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a U-Net alone: name the whole model"):
        checkpoint.load(str(mini_folder / "unet"))
    with pytest.raises(CheckpointError, match="holds no U-Net"):
        checkpoint.load(str(mini_folder), unet=str(mini_folder / "scheduler"))
    with pytest.raises(CheckpointError, match="there is no lost: expected a folder with a trained U-Net"):
        checkpoint.load(str(mini_folder), unet="lost")


# Saving.


def test_save_replaces_a_checkpoint_and_nothing_else(
    build_mini: Callable[..., Checkpoint], copy: Path, tmp_path: Path, assert_same_tensors: SameTensors
) -> None:
    new = build_mini(seed=5)
    (copy / "unet" / "stale.txt").write_text("from the checkpoint before")
    checkpoint.save(new, copy)
    assert_same_tensors(checkpoint.load(str(copy)), new)
    assert not (copy / "unet" / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_save_refuses_a_folder_that_holds_something_else(mini_checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds something that is not a checkpoint"):
        checkpoint.save(mini_checkpoint, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    (tmp_path / "note").write_text("a file")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        checkpoint.save(mini_checkpoint, tmp_path / "note")


def test_save_into_an_empty_folder_and_below_missing_ones(mini_checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    checkpoint.save(mini_checkpoint, tmp_path / "empty")
    checkpoint.save(mini_checkpoint, tmp_path / "a" / "b" / "c")
    assert checkpoint.load(str(tmp_path / "a" / "b" / "c")).image_size == 64


def test_a_checkpoint_can_be_saved_over_the_folder_it_was_loaded_from(
    copy: Path, mini_checkpoint: Checkpoint, assert_same_tensors: SameTensors
) -> None:
    checkpoint.save(checkpoint.load(str(copy)), copy)  # its tensors are mapped from the file that is replaced
    assert_same_tensors(checkpoint.load(str(copy)), mini_checkpoint)


def test_a_failed_save_keeps_the_old_checkpoint(
    copy: Path,
    build_mini: Callable[..., Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    assert_same_tensors: SameTensors,
    mini_checkpoint: Checkpoint,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bksdm.diffusers_folder.save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*: No space left on device"):
        checkpoint.save(build_mini(seed=5), copy)
    monkeypatch.undo()
    assert_same_tensors(checkpoint.load(str(copy)), mini_checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_a_failed_rename_puts_the_old_checkpoint_back(
    copy: Path, mini_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointError, match=r"cannot write .*: Input/output error"):
        checkpoint.save(mini_checkpoint, copy)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    assert checkpoint.load(str(copy)).image_size == 64


KILLED = """
import sys, time
from pathlib import Path
from bksdm import checkpoint, diffusers_folder
whole = checkpoint.load(sys.argv[1])
real = diffusers_folder.save_file
def slow(*args, **kwargs):
    real(*args, **kwargs)
    time.sleep(float(sys.argv[3]))
diffusers_folder.save_file = slow
print("saving", flush=True)
checkpoint.save(whole, Path(sys.argv[2]))
"""


@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_a_kill_while_saving_leaves_no_half_checkpoint(
    mini_folder: Path,
    copy: Path,
    tmp_path: Path,
    existing: bool,
    mini_checkpoint: Checkpoint,
    assert_same_tensors: SameTensors,
) -> None:
    target = copy if existing else tmp_path / "new"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(mini_folder), str(target), "30"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n"
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.partial-*/unet/*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    if existing:
        assert_same_tensors(checkpoint.load(str(target)), mini_checkpoint)
    else:
        assert not target.exists()
    checkpoint.save(mini_checkpoint, target)  # which also sweeps what the killed process left
    assert not list(tmp_path.glob("*.partial-*"))


# Demo.


def test_demo_is_the_repositorys_checkpoint(mini_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "bksdm" / "checkpoint.py"))
    with pytest.raises(CheckpointError, match="ships with the repository, not with the wheel"):
        checkpoint.load("demo")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "demo").symlink_to(mini_folder)
    assert checkpoint.load("demo").source == "demo"
