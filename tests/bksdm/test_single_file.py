"""Single files under LDM keys: converted there by rules typed out here, and back by the loader, tensors equal."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from bksdm import checkpoint, random_weights, single_file
from bksdm.architecture import SD_V1_4, SD_V2_1, SD_V2_1_BASE, Architecture
from bksdm.block_removal import compress
from bksdm.checkpoint import Checkpoint, CheckpointError
from bksdm.cli import main
from bksdm.licence import published
from bksdm.unet import build_unet, unet_config
from bksdm.variants import BASE, SMALL, TINY, Removal

Tensors = dict[str, torch.Tensor]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_unet(unet: UNet2DConditionModel, *, gaps: bool) -> Tensors:
    """LDM keys, numbered without gaps, or (as diffusers' script numbers students) with those of the full U-Net."""
    layers = 2 if gaps else unet.config["layers_per_block"]
    result: Tensors = {}
    for key, tensor in unet.state_dict().items():
        words = key.split(".")
        if words[0] in ("down_blocks", "up_blocks", "mid_block"):
            mid = words[0] == "mid_block"
            stage = 0 if mid else int(words[1])
            kind, number, *rest = words[1:] if mid else words[2:]
            number = int(number)
            if kind == "resnets":
                rest[0] = RESNET[rest[0]]
            tail = ".".join(rest)
            if mid:
                place = f"middle_block.{2 * number if kind == 'resnets' else 1}"
            elif kind == "downsamplers":
                place, tail = f"input_blocks.{(layers + 1) * (stage + 1)}.0", tail.replace("conv", "op")
            elif kind == "upsamplers":
                attention = unet.config["up_block_types"][stage].startswith("Cross")
                slot = (0 if stage == 0 else 1) + 1 if gaps else 1 + attention
                place = f"output_blocks.{(layers + 1) * stage + layers}.{slot}"
            elif words[0] == "down_blocks":
                place = f"input_blocks.{(layers + 1) * stage + number + 1}.{0 if kind == 'resnets' else 1}"
            else:
                place = f"output_blocks.{(layers + 1) * stage + number}.{0 if kind == 'resnets' else 1}"
            name = f"{place}.{tail}"
        else:
            start = next(prefix for prefix in OUTSIDE if key.startswith(prefix + "."))
            name = OUTSIDE[start] + key.removeprefix(start)
        result[f"model.diffusion_model.{name}"] = tensor
    return result


def ldm_vae(vae: AutoencoderKL) -> Tensors:
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    result: Tensors = {}
    for key, tensor in vae.state_dict().items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        for i in range(4):
            name = name.replace(f"down_blocks.{i}.resnets.", f"down.{i}.block.")
            name = name.replace(f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample.")
            name = name.replace(f"up_blocks.{i}.resnets.", f"up.{3 - i}.block.")
            name = name.replace(f"up_blocks.{i}.upsamplers.0.", f"up.{3 - i}.upsample.")
        name = name.replace("mid_block.resnets.0.", "mid.block_1.").replace("mid_block.resnets.1.", "mid.block_2.")
        if "attentions" in name:
            for ours, theirs in attention.items():
                name = name.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
            name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
            if tensor.dim() == 2:
                tensor = tensor[:, :, None, None]  # LDM's are 1x1 convolutions
        result[f"first_stage_model.{name}"] = tensor
    return result


def ldm_text(whole: Checkpoint, *, prefix: str = "text_model.") -> Tensors:
    tensors = whole.text_encoder.state_dict()
    return {
        f"cond_stage_model.transformer.{prefix}{key.removeprefix('text_model.')}": tensor
        for key, tensor in tensors.items()
    }


def open_clip_text(whole: Checkpoint) -> Tensors:
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    layer["self_attn.out_proj"] = "attn.out_proj"
    tensors = {key.removeprefix("text_model."): value for key, value in whole.text_encoder.state_dict().items()}
    result: Tensors = {}
    for key, tensor in tensors.items():
        if key in names:
            result[names[key]] = tensor
            continue
        _, _, number, rest = key.split(".", 3)
        for ours, theirs in layer.items():
            if rest.startswith(ours + "."):
                result[f"transformer.resblocks.{number}.{theirs}{rest.removeprefix(ours)}"] = tensor
        if rest.startswith("self_attn.q_proj."):
            kind = rest.rsplit(".", 1)[1]
            three = [tensors[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            result[f"transformer.resblocks.{number}.attn.in_proj_{kind}"] = torch.cat(three)
    width = whole.text_encoder.config.hidden_size
    result["text_projection"] = torch.eye(width)
    # SD 2 files carry the layer that is never run.
    for key in [key for key in result if "resblocks.1." in key]:
        result[key.replace("resblocks.1.", "resblocks.23.")] = torch.full_like(result[key], 7.0)
    return {f"cond_stage_model.model.{key}": tensor for key, tensor in result.items()}


@pytest.fixture(scope="module")
def shaped(build_mini: Callable[..., Checkpoint]) -> Checkpoint:
    """A mini model whose untold settings (32 norm groups, heads of 64 in CLIP) are the ones that LDM files imply."""
    wide = {"block_out_channels": [32, 64, 64, 64], "norm_num_groups": 32}
    text = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128}
    return build_mini(seed=11, unet={**wide, "cross_attention_dim": 64}, vae=wide, text_encoder=text)


def write(path: Path, *parts: Tensors, metadata: dict[str, str] | None = None) -> Path:
    merged = {key: tensor.contiguous() for part in parts for key, tensor in part.items()}
    save_file(merged, path, metadata=metadata)
    return path


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    theirs, ours = expected.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "numbered as the full U-Net"])
@pytest.mark.parametrize("removal", [None, BASE, SMALL, TINY], ids=["teacher", "base", "small", "tiny"])
def test_there_and_back(shaped: Checkpoint, tmp_path: Path, removal: Removal | None, gaps: bool) -> None:
    unet = shaped.unet if removal is None else compress(shaped.unet, removal)
    path = write(tmp_path / "m.safetensors", ldm_unet(unet, gaps=gaps), ldm_vae(shaped.vae), ldm_text(shaped))
    loaded = checkpoint.load(str(path))
    assert_same(loaded.unet, unet)
    assert_same(loaded.vae, shaped.vae)
    assert_same(loaded.text_encoder, shaped.text_encoder)
    for setting in unet_config(SD_V1_4.unet, TINY):
        if setting != "sample_size":
            assert loaded.unet.config[setting] == unet.config[setting], setting
    assert (loaded.variant, loaded.image_size, loaded.source) == ("custom", 512, "m.safetensors")
    with torch.no_grad():
        arguments = torch.ones(1, 4, 8, 8), torch.tensor([7.0]), torch.ones(1, 77, 64)
        difference = (loaded.unet(*arguments).sample - unet(*arguments).sample).abs().max().item()
    # The tensors are equal; a mapped file is aligned otherwise, and other kernels sum in another order.
    assert difference < 3e-5  # measured: 5.1e-6 at values of about 0.5


@pytest.fixture(scope="module")
def v2(build_mini: Callable[..., Checkpoint]) -> Checkpoint:
    wide = {"block_out_channels": [64, 128, 128, 128], "norm_num_groups": 32}
    v2 = {**wide, "attention_head_dim": [1, 2, 2, 2], "use_linear_projection": True, "cross_attention_dim": 64}
    text = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128, "hidden_act": "gelu"}
    return build_mini(seed=4, unet=v2, vae=wide, text_encoder=text)


def v2_parts(whole: Checkpoint) -> tuple[Tensors, ...]:
    return ldm_unet(whole.unet, gaps=False), ldm_vae(whole.vae), open_clip_text(whole)


def test_sd2_file_with_open_clip_text_encoder(v2: Checkpoint, tmp_path: Path) -> None:
    whole = v2
    path = write(tmp_path / "v2.safetensors", *v2_parts(whole))
    with pytest.raises(CheckpointError, match=r"whether it predicts noise or velocity.*sd-v2\.1-base.*sd-v2\.1"):
        checkpoint.load(str(path))
    loaded = single_file.load(path, architecture=SD_V2_1)
    assert_same(loaded.unet, whole.unet)
    assert_same(loaded.text_encoder, whole.text_encoder)
    assert loaded.text_encoder.config.hidden_act == "gelu"
    assert loaded.scheduler_config["prediction_type"] == "v_prediction"
    assert list(loaded.unet.config["attention_head_dim"]) == [1, 2, 2, 2]
    assert loaded.unet.config["upcast_attention"] is True
    assert loaded.tokenizer("a", padding="max_length", max_length=77).input_ids[-1] == 0
    with pytest.raises(CheckpointError, match=r"is not 'sd-v2\.1-base': its U-Net has block_out_channels"):
        checkpoint.load(str(path), variant="sd-v2.1-base")


VELOCITY = {"modelspec.prediction_type": "v"}
NOISE = {"modelspec.prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("header", "like"),
    [
        (VELOCITY, SD_V2_1_BASE),
        (NOISE, SD_V2_1),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, SD_V2_1_BASE),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, SD_V2_1),
    ],
)
def test_a_header_that_contradicts_the_named_variant_is_believed(
    v2: Checkpoint, tmp_path: Path, header: dict[str, str], like: Architecture
) -> None:
    path = write(tmp_path / "v2.safetensors", *v2_parts(v2), metadata=header)
    said, other = ("epsilon", "v_prediction") if like is SD_V2_1 else ("v_prediction", "epsilon")
    with pytest.raises(CheckpointError, match=f"says in its header that it predicts {said}, .* predicts {other}"):
        single_file.load(path, architecture=like)
    right = SD_V2_1_BASE if like is SD_V2_1 else SD_V2_1
    assert single_file.load(path, architecture=right).scheduler_config["prediction_type"] == said


def test_an_sd1_file_that_predicts_velocity_is_not_sampled_as_noise(parts: dict[str, Tensors], tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", *parts.values(), metadata=VELOCITY)
    with pytest.raises(CheckpointError, match="says in its header that it predicts v_prediction"):
        checkpoint.load(str(path))


@pytest.mark.usefixtures("mini_is_small")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("student", ["v2-tiny", "tiny"])
def test_bksdm_compress_asks_what_an_sd2_file_predicts(
    v2: Checkpoint, tmp_path: Path, suffix: str, student: str
) -> None:
    path = tmp_path / f"sd21{suffix}"
    if suffix == ".ckpt":
        torch.save({key: tensor for part in v2_parts(v2) for key, tensor in part.items()}, path)
    else:
        write(path, *v2_parts(v2))
    arguments = ["--teacher", str(path), "--allow-pickle", "--variant", student, "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert "whether it predicts noise or velocity" in refused.stderr
    assert refused.stderr.endswith(" (--teacher-variant)\n")
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, [*arguments, "--teacher-variant", "sd-v2.1"])
    assert done.exit_code == 0, done.output
    loaded = checkpoint.load(str(tmp_path / "out"))
    assert loaded.scheduler_config["prediction_type"] == "v_prediction"
    assert loaded.unet.config["upcast_attention"] is True
    assert loaded.image_size == 768


@pytest.mark.parametrize(
    ("teacher", "removal"),
    [(SD_V1_4, Removal()), (SD_V1_4, TINY), (SD_V2_1_BASE, Removal()), (SD_V2_1_BASE, SMALL)],
    ids=["sd-v1.4", "tiny", "sd-v2.1-base", "v2-small"],
)
def test_full_size_architecture_is_read_off_the_keys(teacher: Architecture, removal: Removal) -> None:
    config = unet_config(teacher.unet, removal)
    with torch.device("meta"):
        unet, vae = build_unet(config), AutoencoderKL(**teacher.vae)
    shapes = {key: tuple(tensor.shape) for key, tensor in {**ldm_unet(unet, gaps=False), **ldm_vae(vae)}.items()}
    found = single_file.unet_config(shapes, teacher)
    assert {key: found[key] for key in config} == config
    found = single_file.vae_config(shapes, teacher)
    assert {key: found[key] for key in teacher.vae} == dict(teacher.vae)


def test_full_size_text_encoder_is_read_off_the_keys() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(**SD_V1_4.text_encoder))
    prefix = "cond_stage_model.transformer.text_model."
    shapes = {prefix + key.removeprefix("text_model."): tuple(t.shape) for key, t in clip.state_dict().items()}
    assert single_file.text_config(shapes, SD_V1_4) == dict(SD_V1_4.text_encoder)


def test_text_encoder_keys_without_text_model_are_taken_too(shaped: Checkpoint, tmp_path: Path) -> None:
    parts = ldm_unet(shaped.unet, gaps=False), ldm_vae(shaped.vae), ldm_text(shaped, prefix="")
    assert_same(checkpoint.load(str(write(tmp_path / "m.safetensors", *parts))).text_encoder, shaped.text_encoder)


@pytest.fixture
def parts(shaped: Checkpoint) -> dict[str, Tensors]:
    return {"unet": ldm_unet(shaped.unet, gaps=False), "vae": ldm_vae(shaped.vae), "text": ldm_text(shaped)}


@pytest.mark.parametrize(("part", "what"), [("vae", "VAE"), ("text", "text encoder"), ("unet", "diffusion_model")])
def test_missing_part_is_named(parts: dict[str, Tensors], tmp_path: Path, part: str, what: str) -> None:
    path = write(tmp_path / "m.safetensors", *(tensors for name, tensors in parts.items() if name != part))
    with pytest.raises(CheckpointError, match=f"it has no .*{what}"):
        checkpoint.load(str(path))


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.time_embed.0.weight",
        "model.diffusion_model.output_blocks.4.0.in_layers.0.weight",
        "model.diffusion_model.input_blocks.1.1.proj_in.weight",
        "first_stage_model.decoder.mid.attn_1.q.weight",
        "first_stage_model.quant_conv.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ],
)
def test_a_missing_tensor_is_named_never_left_random(parts: dict[str, Tensors], tmp_path: Path, key: str) -> None:
    whole = {name: tensor for tensors in parts.values() for name, tensor in tensors.items()}
    del whole[key]
    with pytest.raises(CheckpointError, match=r"m\.safetensors.*(lacks|missing|converted)") as error:
        checkpoint.load(str(write(tmp_path / "m.safetensors", whole)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("embeddings.token_embedding.weight", torch.zeros(49408), r"is not a Stable Diffusion checkpoint: not enough"),
        ("encoder.layers.x.mlp.fc1.weight", torch.zeros(1), r"is not a Stable Diffusion checkpoint: invalid literal"),
    ],
)
def test_keys_and_shapes_of_nonsense_are_refused(
    parts: dict[str, Tensors], tmp_path: Path, key: str, tensor: torch.Tensor, message: str
) -> None:
    parts["text"][f"cond_stage_model.transformer.text_model.{key}"] = tensor
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(str(write(tmp_path / "m.safetensors", *parts.values())))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"garbage", b"PK\x03\x04garbage", b"\x80\x02}q\x00.", b"\x80\x04\x95"])
def test_bytes_that_are_no_pickle_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.ckpt (cannot be read as plain tensors|holds no tensors)") as error:
        checkpoint.load(str(tmp_path / "m.ckpt"), allow_pickle=True)
    assert "\n" not in str(error.value)


def test_nan_truncation_and_foreign_files_are_refused(parts: dict[str, Tensors], tmp_path: Path) -> None:
    key = "model.diffusion_model.out.2.bias"
    parts["unet"][key] = torch.full((4,), float("nan"))
    path = write(tmp_path / "nan.safetensors", *parts.values())
    with pytest.raises(CheckpointError, match=r"conv_out\.bias holds 4 NaN"):
        checkpoint.load(str(path))
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        checkpoint.load(str(tmp_path / "cut.safetensors"))
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    with pytest.raises(CheckpointError, match=r"model\.onnx is not a weights file: expected \.safetensors"):
        checkpoint.load(str(tmp_path / "model.onnx"))
    lora = write(tmp_path / "l.safetensors", {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="is a LoRA"):
        checkpoint.load(str(lora))
    sdxl = write(tmp_path / "x.safetensors", parts["unet"], {"conditioner.embedders.0.x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="Stable Diffusion XL"):
        checkpoint.load(str(sdxl))


def test_a_part_of_a_diffusers_folder_is_not_a_single_file(mini_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="one part of a diffusers checkpoint"):
        checkpoint.load(str(mini_folder / "unet" / "diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickled_single_files_are_refused_and_then_read_as_tensors(
    parts: dict[str, Tensors], shaped: Checkpoint, tmp_path: Path, suffix: str
) -> None:
    whole = {name: tensor for tensors in parts.values() for name, tensor in tensors.items()}
    path = tmp_path / f"m{suffix}"
    torch.save({"state_dict": whole, "global_step": 470_000}, path)
    with pytest.raises(CheckpointError, match=rf"m\{suffix} is a pickle.*--allow-pickle"):
        checkpoint.load(str(path))
    assert_same(checkpoint.load(str(path), allow_pickle=True).unet, shaped.unet)


def test_the_printed_conversion_works_for_a_training_state_under_an_awkward_name(
    parts: dict[str, Tensors], shaped: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / 'Ada\'s "best" $HOME').mkdir()
    path = tmp_path / 'Ada\'s "best" $HOME' / "m.ckpt"
    whole = {name: tensor for tensors in parts.values() for name, tensor in tensors.items()}
    whole["model_ema.decay"] = whole["model_ema.decay2"] = torch.ones(2)  # in one memory
    torch.save({"state_dict": whole, "global_step": 470_000}, path)
    with pytest.raises(CheckpointError, match="convert it to safetensors") as error:
        checkpoint.load(str(path))
    assert "\n" not in str(error.value)
    python, *arguments = shlex.split(str(error.value).split("safetensors with ")[1].split(", or pass")[0])
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    assert_same(checkpoint.load(str(path.with_suffix(".safetensors"))).unet, shaped.unet)


def test_a_state_with_callbacks_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "callbacks": {"checkpoint": Path("last.ckpt")}}, tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match=r"callbacks\): look for a \.safetensors file of the same model"):
        checkpoint.load(str(tmp_path / "m.ckpt"), allow_pickle=True)


def test_licence_in_the_header_is_read(parts: dict[str, Tensors], tmp_path: Path) -> None:
    header = {"modelspec.license": "CreativeML OpenRAIL-M", "modelspec.author": "Ada"}
    loaded = checkpoint.load(str(write(tmp_path / "m.safetensors", *parts.values(), metadata=header)))
    assert loaded.licence.name == "CreativeML OpenRAIL-M"
    assert loaded.licence.notice.startswith("m.safetensors by Ada names its licence in its header")
    assert loaded.licence.notice.endswith(published("CreativeML OpenRAIL-M").notice)  # paragraph 4: a copy for everyone
    assert checkpoint.load(str(write(tmp_path / "n.safetensors", *parts.values()))).licence.name == "unknown"


def test_a_single_file_becomes_a_folder(parts: dict[str, Tensors], shaped: Checkpoint, tmp_path: Path) -> None:
    loaded = checkpoint.load(str(write(tmp_path / "m.safetensors", *parts.values())))
    checkpoint.save(loaded, tmp_path / "folder")
    assert_same(checkpoint.load(str(tmp_path / "folder")).unet, shaped.unet)
    assert load_file(tmp_path / "folder" / "text_encoder" / "model.safetensors").keys() >= {
        "text_model.final_layer_norm.bias"
    }


@pytest.mark.slow
def test_full_size_sd14_file_is_recognised(mini_checkpoint: Checkpoint, tmp_path: Path) -> None:
    text_encoder, unet, vae = random_weights.build(SD_V1_4, 0)
    whole = replace(mini_checkpoint, text_encoder=text_encoder, unet=unet, vae=vae)
    path = write(tmp_path / "sd14.safetensors", ldm_unet(unet, gaps=False), ldm_vae(vae), ldm_text(whole))
    loaded = checkpoint.load(str(path))
    assert (loaded.variant, loaded.image_size) == ("sd-v1.4", 512)
    assert_same(loaded.unet, unet)
