"""An error is found, and traced to the node where it appears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from bksdm.checkpoint import Checkpoint
from bksdm_export import graphs, precision, to_onnx
from bksdm_export.divergence import first_divergence, values
from bksdm_export.reference import Case, Reference
from bksdm_export.wrappers import wrap

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2}


def graph(checkpoint: Checkpoint, component: str, kind: str) -> ir.Model:
    spec = graphs.components(graphs.model_facts(checkpoint), kind)[component]
    module = wrap(checkpoint, component)
    if kind == "fp16":
        precision.to_half(module, ())
    return to_onnx.to_onnx(to_onnx.to_exported_program(module, spec), spec)


def find(checkpoint: Checkpoint, component: str, path: Path, case: Case, kind: str = "fp32") -> str | None:
    spec = graphs.components(graphs.model_facts(checkpoint), "fp32")[component]
    found = first_divergence(path, wrap(checkpoint, component), spec, case, TOLERANCES[kind])
    return found and found.node


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("weight", "node"),
    [
        ("decoder.up_blocks.1.resnets.0.conv2.weight", "decoder.up_blocks.1.resnets.0.conv2/Conv"),
        ("decoder.mid_block.attentions.0.to_k.weight_transposed", "decoder.mid_block.attentions.0.to_k/MatMul"),
        ("decoder.conv_norm_out.bias", "decoder.conv_norm_out/Add"),
    ],
)
def test_a_changed_weight_is_found_at_its_node(
    build_mini: Callable[..., Checkpoint], mini_reference: Reference, tmp_path: Path, kind: str, weight: str, node: str
) -> None:
    model = graph(build_mini(), "vae_decoder", kind)
    value = model.graph.initializers[weight]
    assert value.const_value is not None
    changed = value.const_value.numpy().copy()
    changed.flat[0] += 1
    value.const_value = ir.Tensor(changed)
    to_onnx.save(model, tmp_path / "model.onnx")
    case = mini_reference.cases["vae_decoder"][0]
    assert find(build_mini(), "vae_decoder", tmp_path / "model.onnx", case, kind) == node


def test_a_changed_node_is_found(
    build_smallest: Callable[..., Checkpoint], mini_reference: Reference, tmp_path: Path
) -> None:
    model = graph(build_smallest(), "text_encoder", "fp32")
    # below "text_model." in transformers 4, which 5 has no more
    [node] = [n for n in model.graph if str(n.name).endswith("encoder.layers.0.mlp.activation_fn/Sigmoid")]
    node.op_type = "Tanh"
    to_onnx.save(model, tmp_path / "model.onnx")
    case = mini_reference.cases["text_encoder"][0]
    assert find(build_smallest(), "text_encoder", tmp_path / "model.onnx", case) == node.name


def test_an_overflow_in_fp16_is_found(
    build_mini: Callable[..., Checkpoint], mini_reference: Reference, tmp_path: Path
) -> None:
    def scaled() -> Checkpoint:
        checkpoint = build_mini()
        convolution = checkpoint.vae.decoder.up_blocks[0].resnets[1].conv1  # pyright: ignore
        for parameter in convolution.parameters():
            parameter.data *= 1e5  # the norm behind it undoes this, where it does not overflow
        return checkpoint

    to_onnx.save(graph(scaled(), "vae_decoder", "fp16"), tmp_path / "model.onnx")
    case = mini_reference.cases["vae_decoder"][0]
    found = find(scaled(), "vae_decoder", tmp_path / "model.onnx", case, "fp16")
    assert found == "decoder.up_blocks.0.resnets.1.conv1/Conv"


def test_an_error_of_the_exporter_itself_is_found_in_the_traced_program(
    build_mini: Callable[..., Checkpoint], mini_reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that is exported wrongly every time has no right twin: it is compared with torch's own values."""
    right = to_onnx._attention

    def unscaled(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        return right(query, key, value, attn_mask, dropout_p, is_causal, 3.0, enable_gqa)

    monkeypatch.setattr(to_onnx, "_attention", unscaled)
    to_onnx.save(graph(build_mini(), "text_encoder", "fp32"), tmp_path / "model.onnx")
    case = mini_reference.cases["text_encoder"][0]
    found = find(build_mini(), "text_encoder", tmp_path / "model.onnx", case)
    assert str(found).removeprefix("text_model.") == "encoder.layers.0.self_attn/MatMul_1"


def test_nothing_is_logged_and_onnxruntimes_log_is_as_it_was(
    build_smallest: Callable[..., Checkpoint],
    mini_reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The log was silenced for everyone, for the rest of the process."""
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", lambda _: pytest.fail("it is everyone's"))
    to_onnx.save(graph(build_smallest(), "text_encoder", "fp32"), tmp_path / "model.onnx")
    assert list(values(tmp_path / "model.onnx", mini_reference.cases["text_encoder"][0]))
    assert capfd.readouterr().err == ""


def test_a_right_graph_has_no_divergence(
    build_smallest: Callable[..., Checkpoint], mini_reference: Reference, tmp_path: Path
) -> None:
    to_onnx.save(graph(build_smallest(), "text_encoder", "fp32"), tmp_path / "model.onnx")
    case = mini_reference.cases["text_encoder"][1]
    assert find(build_smallest(), "text_encoder", tmp_path / "model.onnx", case) is None
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert np.isfinite(case.outputs["last_hidden_state"]).all()
