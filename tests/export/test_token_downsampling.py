"""Self-attention that sees one token of n squared: against attention written out, and a whole export of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from bksdm.checkpoint import Checkpoint
from bksdm_export import cli, likeness
from bksdm_export.errors import ExportError
from bksdm_export.recipe import export_variant
from bksdm_export.request import ExportRequest
from bksdm_export.step_cache import ShallowUNet, UNetWithFeatures
from bksdm_export.token_downsampling import downsample_tokens
from bksdm_runtime import bundle as bundles
from bksdm_runtime import cli as run_cli

CALL = (torch.randn(2, 4, 9, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([301.0]))
CONTEXT = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(1))


def outermost(unet: Any) -> Any:
    return unet.down_blocks[0].attentions[0]


@pytest.mark.parametrize("factor", [2, 3])
@torch.no_grad()
def test_all_tokens_ask_and_those_of_a_grid_answer(build_smallest: Callable[..., Checkpoint], factor: int) -> None:
    """In numpy, float64, from the layer's own input; 9 by 6 tokens, which neither factor divides both of."""
    unet = build_smallest().unet.eval()
    assert downsample_tokens(unet, factor) == 3  # one going down, two coming up
    attention = outermost(unet).transformer_blocks[0].attn1
    seen: list[torch.Tensor] = []
    attention.register_forward_hook(
        lambda _module, args, kwargs, output: seen.extend([args[0] if args else kwargs["hidden_states"], output]),
        with_kwargs=True,
    )
    unet(CALL[0], CALL[1], CONTEXT)
    tokens, found = (one.double().numpy() for one in seen)
    answering = tokens.reshape(2, 9, 6, -1)[:, ::factor, ::factor].reshape(2, -1, tokens.shape[-1])

    def heads(of: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
        projected = of @ layer.weight.double().numpy().T
        return projected.reshape(*of.shape[:2], attention.heads, -1).transpose(0, 2, 1, 3)

    query, key, value = (
        heads(tokens, attention.to_q),
        heads(answering, attention.to_k),
        heads(answering, attention.to_v),
    )
    logits = query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True) @ value).transpose(0, 2, 1, 3).reshape(tokens.shape)
    out = attention.to_out[0]
    expected = mixed @ out.weight.double().numpy().T + out.bias.double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)  # measured 1.2e-7


@torch.no_grad()
def test_inner_stages_attend_to_all_tokens(build_mini: Callable[..., Checkpoint]) -> None:
    unet = build_mini().unet
    before = {name: type(processor) for name, processor in unet.attn_processors.items()}
    changed = downsample_tokens(unet, 2)
    after = {name: type(processor) for name, processor in unet.attn_processors.items()}
    different = {name for name in before if before[name] is not after[name]}
    assert len(different) == changed > 0
    assert all(name.startswith(("down_blocks.0.", "up_blocks.3.")) for name in different)
    assert all(".attn1." in name for name in different)


def test_stages_without_attention_are_left_and_said(build_mini: Callable[..., Checkpoint], tmp_path: Path) -> None:
    plain = {"down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4}
    unet = build_mini(unet=plain).unet
    assert downsample_tokens(unet, 2) == 0


@torch.no_grad()
def test_the_shallow_unet_downsamples_as_the_whole_one_does(build_smallest: Callable[..., Checkpoint]) -> None:
    unet = build_smallest().unet.eval()
    exact = unet(CALL[0], CALL[1], CONTEXT).sample
    downsample_tokens(unet, 2)
    shallow = ShallowUNet(unet)  # a copy, which must find its own sizes
    expected = unet(CALL[0], CALL[1], CONTEXT).sample
    _, deep = UNetWithFeatures(unet)(CALL[0], CALL[1], CONTEXT)
    unet(CALL[0][:, :, :4], CALL[1], CONTEXT)  # another size, which the copy must not remember
    assert torch.equal(shallow(CALL[0], CALL[1], CONTEXT, deep), expected)
    assert not torch.equal(expected, exact)


@pytest.fixture(scope="module")
def bundle(smallest_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("downsampled") / "bundle"
    request = ExportRequest(folder, weights=str(smallest_folder), step_cache=True, token_downsampling=2)
    return export_variant(request)


def test_an_export_is_compared_with_the_same_attention_and_judged_by_exact_pictures(bundle: Path) -> None:
    assert bundles.load(bundle).manifest.token_downsampling == 2
    figures = json.loads((bundle / "parity.json").read_text())
    for name in ("unet", "unet_shallow"):
        graph = figures["components"][name]
        assert graph["error"] <= graph["tolerance"] == 1e-5
    assert figures["pictures"][0]["mean_difference"] <= 0.1  # against PyTorch with the same attention
    assert len(figures["pictures"]) == 8  # as for int8: judged by many
    assert {one["backend"] for one in figures["likeness"]} >= {"onnxruntime"}
    for one in figures["likeness"]:
        assert likeness.PSNR_BOUND <= one["psnr"]["mean"] < 99  # of exact ones, which these are not
    assert "Against exact pictures" in (bundle / "parity.html").read_text()


def test_pictures_say_that_they_are_not_exact(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    order = ["a red apple", "--bundle", str(bundle), "--backend", "onnxruntime", "--steps", "2", "-o", str(picture)]
    assert run_cli.run([*order, "-v"]) == 0
    assert "not exact: the outermost self-attentions see one token of 4" in capsys.readouterr().err
    with Image.open(picture) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        assert image.text["token_downsampling"] == "2"
        assert "Token downsampling: 2" in str(image.text["parameters"])
    again = tmp_path / "again.png"
    assert run_cli.run(["--from-png", str(picture), "--bundle", str(bundle), "-o", str(again)]) == 0
    assert picture.read_bytes() == again.read_bytes()


def test_past_the_bound_nothing_is_left_and_the_factor_is_named(
    smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likeness, "PSNR_BOUND", 98.0)
    request = ExportRequest(tmp_path / "bundle", weights=str(smallest_folder), token_downsampling=4)
    why = r"pictures on onnxruntime are too far .*; a --token-downsampling below 4 leaves more tokens"
    with pytest.raises(ExportError, match=why):
        export_variant(request)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("factor", [0, 9])
def test_a_factor_that_makes_no_sense_is_refused(factor: int, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"token downsampling is by 1 .none. to 8, not by {factor}"):
        ExportRequest(tmp_path, token_downsampling=factor)


def test_the_default_folder_is_named_after_it() -> None:
    assert cli.default_output("tiny", None, token_downsampling=2) == Path("out/bk-sdm-tiny-tokens-by-2")
