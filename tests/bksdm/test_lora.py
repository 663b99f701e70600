"""Every layout of a file against diffusers' loader and PEFT's own merge; and files that cannot be merged."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import PNDMScheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from bksdm import block_removal, checkpoint
from bksdm.checkpoint import Checkpoint
from bksdm.components import with_clip_prefix
from bksdm.errors import CheckpointError
from bksdm.lora import FILE, merge
from bksdm.variants import VARIANTS

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYWHERE = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv_shortcut", "time_emb_proj")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
RANK = 4


def _adapters(model: torch.nn.Module, targets: tuple[str, ...], seed: int = 0) -> dict[str, Tensor]:
    """PEFT's tensors of random adapters of `model`, large enough to matter."""
    adapted = copy.deepcopy(model)
    adapted.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(seed)
    tensors = get_peft_model_state_dict(adapted, adapter_name="default")
    return {key: 0.1 * torch.randn(value.shape, generator=generator) for key, value in sorted(tensors.items())}


def _prefixed(unet: dict[str, Tensor], text: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**{f"unet.{k}": v for k, v in unet.items()}, **{f"text_encoder.{k}": v for k, v in text.items()}}


def _peft(whole: Checkpoint) -> dict[str, Tensor]:
    text = {with_clip_prefix(key): value for key, value in _adapters(whole.text_encoder, TEXT, 1).items()}
    return _prefixed(_adapters(whole.unet, ATTENTION), text)


def _diffusers(whole: Checkpoint) -> dict[str, Tensor]:
    return convert_state_dict_to_diffusers(_peft(whole))


def _old(whole: Checkpoint) -> dict[str, Tensor]:
    """diffusers' attention processors, before 0.22."""
    renamed = {}
    for key, value in _peft(whole).items():
        key = re.sub(r"\.(attn\d)\.(to_[qkv]|to_out)(?:\.0)?\.lora_", r".\1.processor.\2_lora.", key)
        key = re.sub(r"\.([qkv]|out)_proj\.lora_", r".to_\1_lora.", key)
        renamed[key.replace("_lora.A.", "_lora.down.").replace("_lora.B.", "_lora.up.")] = value
    return renamed


def _kohya(whole: Checkpoint) -> dict[str, Tensor]:
    """Convolutions too, in half precision, and an alpha that is not the rank."""
    tensors = {}
    text = {with_clip_prefix(key): value for key, value in _adapters(whole.text_encoder, (*TEXT, "fc1"), 1).items()}
    for prefix, own in (("lora_unet_", _adapters(whole.unet, EVERYWHERE)), ("lora_te_", text)):
        for key, value in own.items():
            module, _, role = key.removesuffix(".weight").rpartition(".")
            name = prefix + module.replace(".", "_")
            tensors[f"{name}.{'lora_down' if role == 'lora_A' else 'lora_up'}.weight"] = value.half()
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


@pytest.fixture(scope="module")
def tensors_once(mini_checkpoint: Checkpoint) -> dict[str, Tensor]:
    return _diffusers(mini_checkpoint)


@pytest.fixture
def tensors(tensors_once: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' layout, to spoil."""
    return {key: value.clone() for key, value in tensors_once.items()}


def _written(tensors: dict[str, Tensor], folder: Path, **metadata: str) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / FILE, {"format": "pt", **metadata})
    return folder / FILE


def _pipeline(whole: Checkpoint, folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        copy.deepcopy(whole.vae),
        copy.deepcopy(whole.text_encoder),
        whole.tokenizer,
        copy.deepcopy(whole.unet),
        PNDMScheduler.from_config(whole.scheduler_config),
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(folder))
    return pipeline


@torch.no_grad()
def _outputs(unet: torch.nn.Module, text_encoder: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """eps [2, 4, 8, 8] and the context that it was made with [2, 77, 32]."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 49408, (2, 77), generator=generator)
    context = text_encoder(ids).last_hidden_state
    noise = torch.randn((2, 4, 8, 8), generator=generator)
    return unet(noise, torch.tensor([3, 800]), context).sample, context


# Largest difference of eps and context, up to 2.7, measured: 1.3e-6, and 1.0e-6 of kohya's layout
@pytest.mark.parametrize("layout", [_peft, _diffusers, _old, _kohya])
def test_a_file_does_what_it_does_in_diffusers(
    layout: Callable[[Checkpoint], dict[str, Tensor]], mini_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = _written(layout(mini_checkpoint), tmp_path / "lora")
    theirs = _pipeline(mini_checkpoint, tmp_path / "lora")
    merged = merge(mini_checkpoint, file)
    expected = _outputs(theirs.unet, theirs.text_encoder)
    plain = _outputs(mini_checkpoint.unet, mini_checkpoint.text_encoder)
    for found, wanted, before in zip(_outputs(merged.unet, merged.text_encoder), expected, plain, strict=True):
        assert (wanted - before).abs().max() > 0.1  # the adapters matter
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_weights_are_those_that_peft_merges(mini_checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = _written(_kohya(mini_checkpoint), tmp_path / "lora")
    pipeline = _pipeline(mini_checkpoint, tmp_path / "lora")
    pipeline.fuse_lora(lora_scale=0.7)
    merged = merge(mini_checkpoint, file, 0.7)
    for ours, theirs in ((merged.unet, pipeline.unet), (merged.text_encoder, pipeline.text_encoder)):
        fused = {key.replace(".base_layer.", "."): value for key, value in theirs.state_dict().items()}
        for key, value in ours.state_dict().items():
            torch.testing.assert_close(value, fused[key], rtol=0, atol=1e-7, msg=key)  # measured 0


def test_scale_0_gives_identical_weights_and_the_original_stays(
    mini_checkpoint: Checkpoint, tmp_path: Path, assert_same_tensors: Callable[[Checkpoint, Checkpoint], None]
) -> None:
    before = copy.deepcopy(mini_checkpoint.unet.state_dict())
    file = _written(_diffusers(mini_checkpoint), tmp_path / "lora")
    assert_same_tensors(merge(mini_checkpoint, file, 0.0), mini_checkpoint)
    merged = merge(mini_checkpoint, file, 1.0)
    assert all(value.equal(before[key]) for key, value in mini_checkpoint.unet.state_dict().items())
    # only what was adapted takes memory again
    assert merged.unet.conv_in.weight is mini_checkpoint.unet.conv_in.weight
    assert merged.vae is mini_checkpoint.vae


def test_the_opposite_scale_takes_it_out_again(
    tensors: dict[str, Tensor], mini_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = _written(tensors, tmp_path / "lora")
    again = merge(merge(mini_checkpoint, file, 1.0), file, -1.0)
    for key, value in again.unet.state_dict().items():
        torch.testing.assert_close(value, mini_checkpoint.unet.state_dict()[key], rtol=0, atol=1e-7)  # measured 1.5e-8


@pytest.mark.parametrize(
    "settings",
    [
        {"r": RANK, "lora_alpha": 8},
        {"r": RANK, "lora_alpha": 8, "use_rslora": True},
        {"r": RANK, "lora_alpha": 8, "alpha_pattern": {r"attn1\.to_q": 1, "down_blocks.0.*": 2}},
    ],
)
def test_alphas_in_the_header_count_as_for_diffusers(
    settings: dict[str, object], mini_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    header = {f"unet.{key}": value for key, value in settings.items()}
    header.update({"unet.rank_pattern": {}, "unet.target_modules": list(ATTENTION)})
    unet = {f"unet.{key}": value for key, value in _adapters(mini_checkpoint.unet, ATTENTION).items()}
    file = _written(unet, tmp_path / "lora", lora_adapter_metadata=json.dumps(header))
    pipeline = _pipeline(mini_checkpoint, tmp_path / "lora")
    found = _outputs(merge(mini_checkpoint, file).unet, mini_checkpoint.text_encoder)[0]
    expected = _outputs(pipeline.unet, mini_checkpoint.text_encoder)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=8e-6)  # measured 8.4e-7


def test_what_was_merged_is_said(tensors: dict[str, Tensor], mini_checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = _written(tensors, tmp_path / "dog")
    merged = merge(mini_checkpoint, file, 0.5)
    assert merged.source == f"mini(seed=0), with LoRA dog/{FILE} at scale 0.5"
    assert merged.licence.notice.startswith(
        f"Changed: the LoRA dog/{FILE} was merged at scale 0.5 into the weights of mini(seed=0)."
    )
    assert mini_checkpoint.licence.notice.strip() in merged.licence.notice
    assert f"No licence file came with these weights (dog/{FILE})" in merged.licence.notice
    (tmp_path / "dog" / "LICENSE").write_text("Dogs: public domain.\n")
    assert "Dogs: public domain." in merge(mini_checkpoint, tmp_path / "dog").licence.notice
    assert merged.variant == mini_checkpoint.variant
    checkpoint.save(merged, tmp_path / "saved")
    assert checkpoint.load(str(tmp_path / "saved")).source == "saved"


def test_the_header_names_a_licence(tensors: dict[str, Tensor], mini_checkpoint: Checkpoint, tmp_path: Path) -> None:
    entries = {"modelspec.license": "CreativeML OpenRAIL-M", "modelspec.author": "Ann"}
    file = _written(tensors, tmp_path / "dog", **entries)
    merged = merge(mini_checkpoint, file)
    assert merged.licence.name.endswith("CreativeML OpenRAIL-M")
    assert "by Ann names its licence" in merged.licence.notice


@pytest.mark.parametrize(
    ("variant", "layout"), [("base", _diffusers), ("small", _kohya), ("tiny", _diffusers), ("tiny", _kohya)]
)
def test_a_lora_of_the_full_model_is_refused_or_put_where_its_blocks_went(
    variant: str, layout: Callable[[Checkpoint], dict[str, Tensor]], mini_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Merging commutes with removing blocks: names alone would put an up stage's adapters on another layer."""
    removal = VARIANTS[variant].removal
    student = replace(mini_checkpoint, unet=block_removal.compress(mini_checkpoint.unet, removal))
    tensors = layout(mini_checkpoint)
    file = _written(tensors, tmp_path / "lora")
    with pytest.raises(CheckpointError, match=rf"of {len(tensors)} tensors have no place .*--lora-partial merges"):
        merge(student, file)
    found = merge(student, file, partial=True)
    expected = block_removal.compress(merge(mini_checkpoint, file).unet, removal).state_dict()
    for key, value in found.unet.state_dict().items():
        assert value.equal(expected[key]), key
    [counted] = re.findall(r"at scale 1 \((\d+) of (\d+) tensors, the others are of removed blocks\)", found.source)
    assert int(counted[0]) < int(counted[1]) == len(tensors)


QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({"unet.x.dora_scale": torch.ones(3)}), r"unet\.x\.dora_scale is no tensor of a LoRA"),
        (lambda t: t.update({"lora_te2_a.lora_up.weight": torch.ones(3)}), "lora_te2_a.lora_up.weight is no tensor"),
        (lambda t: t.update({f"{QUERY}.down.bias": torch.ones(3)}), "to_q.lora.down.bias is no tensor of a LoRA"),
        (lambda t: t.pop(f"{QUERY}.up.weight"), r"to_q\.lora\.down\.weight comes without its up tensor"),
        (lambda t: t.pop(f"{QUERY}.down.weight"), r"to_q\.lora\.up\.weight comes without its down tensor"),
        (lambda t: t[f"{QUERY}.up.weight"].fill_(torch.nan), r"to_q\.lora\.up\.weight holds NaN"),
        (lambda t: t[f"{QUERY}.up.weight"].fill_(torch.inf), r"to_q\.lora\.up\.weight holds NaN, infinite"),
        (lambda t: t.update({f"{QUERY}.up.weight": torch.ones(32, 4, dtype=torch.int32)}), "no real numbers"),
        (
            lambda t: t.update({f"{QUERY}.up.weight": torch.ones(320, 4)}),
            r"to_q\.lora\.up\.weight is \(320, 4\), which",
        ),
        (lambda t: t.update({f"{QUERY}.up.weight": torch.ones(32, 5)}), r"\(32, 5\), which does not fit .* at rank 4"),
        (lambda t: t.update({f"{QUERY}.down.weight": torch.ones(4, 32, 3, 3)}), r"is \(4, 32, 3, 3\), which does not"),
        (lambda t: t.update({f"{QUERY}.up.weight": torch.ones(())}), r"is \(\), which does not fit"),
        (
            lambda t: t.update({QUERY.replace(".lora", ".alpha"): torch.ones(2)}),
            r"alpha is \(2,\), expected one number",
        ),
        (
            lambda t: t.update({QUERY.replace(".lora", ".lora_A.weight"): torch.ones(4, 32)}),
            "which are the same: it is damaged",
        ),
        (
            lambda t: t.update({f"unet.down_blocks.9.{x}.lora_{x}.weight": torch.ones(1, 1) for x in "AB"}),
            r"comes without",
        ),
        (
            lambda t: t.update({f"unet.down_blocks.9.q.lora_{x}.weight": torch.ones(1, 1) for x in "AB"}),
            r"2 of \d+ tensors have no place in mini\(seed=0\), unet.down_blocks.9.q.lora_A.weight first",
        ),
        (lambda t: t.clear(), "holds no tensors"),
        (
            lambda t: [t[f"{QUERY}.{role}.weight"].fill_(1e20) for role in ("down", "up")],
            r"makes down_blocks.* NaN or infinite",
        ),
    ],
)
def test_what_cannot_be_merged_is_one_sentence_that_names_it(
    change: Callable[[dict[str, Tensor]], object],
    said: str,
    tensors: dict[str, Tensor],
    mini_checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    change(tensors)
    file = _written(tensors, tmp_path / "lora")
    with pytest.raises(CheckpointError, match=said) as raised:
        merge(mini_checkpoint, file)
    assert str(file) in str(raised.value)
    with pytest.raises(CheckpointError, match=said):
        merge(mini_checkpoint, file, partial=True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("lora.bin", b"\x80\x02", "is a pickle, which can run code"),
        ("lora.pt", b"\x80\x02", "is a pickle, which can run code"),
        ("lora.safetensors", b"cut", "is damaged or cut short"),
        ("lora.txt", b"", "is not a weights file"),
        ("lora.safetensors", None, "there is no "),
    ],
)
def test_files_that_are_none(
    name: str, content: bytes | None, said: str, mini_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        merge(mini_checkpoint, tmp_path / name)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("{", "its header's lora_adapter_metadata is damaged"),
        ("[1]", "its header's lora_adapter_metadata is damaged"),
        ('{"unet.lora_alpha": "x"}', "its header's lora_adapter_metadata is damaged"),
        ('{"unet.alpha_pattern": {"(": 1}}', "its header's lora_adapter_metadata is damaged"),
        ('{"unet.use_dora": true}', "is a DoRA"),
    ],
)
def test_headers_that_do_not_say_what_they_should(
    header: str, said: str, tensors: dict[str, Tensor], mini_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = _written(tensors, tmp_path / "lora", lora_adapter_metadata=header)
    with pytest.raises(CheckpointError, match=said):
        merge(mini_checkpoint, file)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_is_a_number(
    scale: float, tensors: dict[str, Tensor], mini_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = _written(tensors, tmp_path / "lora")
    with pytest.raises(CheckpointError, match="give a finite number"):
        merge(mini_checkpoint, file, scale)
