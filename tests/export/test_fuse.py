"""The fused graphs compute what the plain ones do: each operator of ONNX Runtime's is written out here in numpy, from
its docs/ContribOperators.md. What this does not show: the CUDA provider's own kernels (`make gpu-check`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_conv import Conv
from scipy.special import erf

from bksdm import checkpoint as checkpoints
from bksdm.checkpoint import Checkpoint
from bksdm_export import fuse, graphs, precision, to_onnx
from bksdm_export.wrappers import wrap
from bksdm_runtime import bundle as bundles
from bksdm_runtime.backends import cuda
from bksdm_runtime.backends.ort import open_session
from bksdm_runtime.engine import EngineSettings, has_cuda
from bksdm_runtime.pipeline import Images, Pipeline, Step
from bksdm_runtime.request import Request

NAMES = ("MultiHeadAttention", "BiasSplitGelu", "NhwcConv", "GroupNorm with SiLU", "GroupNorm")


class MultiHeadAttention(OpRun):
    op_domain = fuse.DOMAIN

    def _run(self, query: Any, key: Any, value: Any, num_heads: int = 0, scale: float = 0.0) -> tuple[np.ndarray]:
        def split(x: np.ndarray) -> np.ndarray:
            return x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3).astype(np.float64)

        logits = split(query) * scale @ split(key).transpose(0, 1, 3, 2)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return ((weights @ split(value)).transpose(0, 2, 1, 3).reshape(query.shape).astype(query.dtype),)


class BiasSplitGelu(OpRun):
    op_domain = fuse.DOMAIN

    def _run(self, x: Any, bias: Any) -> tuple[np.ndarray]:
        hidden, gate = np.split((x + bias).astype(np.float64), 2, axis=-1)
        return ((hidden * gate * (1 + erf(gate / np.sqrt(2))) / 2).astype(x.dtype),)


class NhwcConv(OpRun):
    op_domain = fuse.DOMAIN

    def _run(self, x: Any, weight: Any, bias: Any, **attributes: Any) -> tuple[np.ndarray]:
        assert attributes.pop("group") == 1
        kept = {name: torch.tensor(attributes[name]).tolist() for name in ("strides", "dilations")}
        top, left, bottom, right = attributes["pads"]
        assert list(attributes["kernel_shape"]) == list(weight.shape[1:3])
        inputs = (
            torch.from_numpy(np.array(a)).float() for a in (x.transpose(0, 3, 1, 2), weight.transpose(0, 3, 1, 2), bias)
        )
        picture, kernel, offset = inputs
        padded = torch.nn.functional.pad(picture, (left, right, top, bottom))
        out = torch.nn.functional.conv2d(padded, kernel, offset, kept["strides"], 0, kept["dilations"])
        return (out.permute(0, 2, 3, 1).numpy().astype(x.dtype),)


class GroupNorm(OpRun):
    op_domain = fuse.DOMAIN

    def _run(self, x: Any, gamma: Any, beta: Any, **attributes: Any) -> tuple[np.ndarray]:
        assert attributes["channels_last"] == 1
        assert gamma.dtype == beta.dtype == np.float32
        out = torch.nn.functional.group_norm(
            torch.from_numpy(x.astype(np.float64).transpose(0, 3, 1, 2)),
            attributes["groups"],
            torch.from_numpy(gamma.astype(np.float64)),
            torch.from_numpy(beta.astype(np.float64)),
            attributes["epsilon"],
        )
        out = torch.nn.functional.silu(out) if attributes["activation"] else out
        return (out.permute(0, 2, 3, 1).numpy().astype(x.dtype),)


class FasterConv(Conv):
    """onnx's own walks through pixels in Python."""

    def _run(self, x: Any, weight: Any, bias: Any = None, **attributes: Any) -> tuple[np.ndarray]:
        last, kernel = x.transpose(0, 2, 3, 1), weight.transpose(0, 2, 3, 1)
        kept = {name: attributes[name] for name in ("pads", "strides", "dilations", "kernel_shape", "group")}
        [out] = NhwcConv._run(None, last, kernel, bias, **kept)  # pyright: ignore[reportArgumentType]
        return (out.transpose(0, 3, 1, 2),)


OPERATORS = [MultiHeadAttention, BiasSplitGelu, NhwcConv, GroupNorm, FasterConv]


@pytest.fixture
def any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were kernels for the widths of the mini models."""
    everything = type("Everything", (), {"__contains__": lambda *_: True})()
    monkeypatch.setattr(fuse, "_NORMED", everything)
    monkeypatch.setattr(fuse, "_GATED", everything)


def graph(checkpoint: Checkpoint, component: str, kind: str = "fp32") -> ir.Model:
    facts = graphs.components(graphs.model_facts(checkpoint), kind)[component]
    module = wrap(checkpoint, component)
    if kind == "fp16":
        precision.to_half(module, ())
    return to_onnx.to_onnx(to_onnx.to_exported_program(module, facts), facts)


@pytest.fixture(scope="module")
def unet(build_smallest: Callable[..., Checkpoint]) -> Callable[[], ir.Model]:
    """A small U-Net's graph, a new one at each call."""
    proto = ir.to_proto(graph(build_smallest(), "unet"))
    return lambda: ir.from_proto(proto)


def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=OPERATORS)
    [output, *_] = evaluator.run(None, inputs)
    return np.asarray(output)


def unet_inputs(model: ir.Model) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    shape = model.graph.inputs[2].shape
    assert shape is not None
    context = int(shape[2])  # pyright: ignore[reportArgumentType]
    return {
        "sample": random.standard_normal((2, 4, 9, 8)).astype(np.float32),
        "timestep": np.array([500, 3], np.float32),
        "encoder_hidden_states": random.standard_normal((2, 77, context)).astype(np.float32),
    }


@pytest.mark.usefixtures("any_width")
def test_a_fused_unet_is_the_plain_one(unet: Callable[[], ir.Model]) -> None:
    model = unet()
    inputs = unet_inputs(model)
    before = {kind: sum(node.op_type == kind for node in model.graph) for kind in ("Conv", "Softmax", "Erf")}
    plain = run(model, inputs)
    made = fuse.fuse(model)
    assert tuple(made) == NAMES
    assert all(made.values())
    assert (made["NhwcConv"], made["MultiHeadAttention"], made["BiasSplitGelu"]) == tuple(before.values())
    left = {node.op_type for node in model.graph}
    assert not left & {"Conv", "Softmax", "Erf", "InstanceNormalization"}
    # measured: 9.4e-7
    np.testing.assert_allclose(run(model, inputs), plain, rtol=0, atol=1e-5 * np.abs(plain).max())


@pytest.mark.usefixtures("any_width")
@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_a_fused_autoencoder_is_the_plain_one(build_mini: Callable[..., Checkpoint], component: str) -> None:
    model = graph(build_mini(), component)
    shape = (1, 4, 5, 6) if component == "vae_decoder" else (1, 3, 16, 24)
    inputs = {model.graph.inputs[0].name or "": np.random.default_rng(5).standard_normal(shape).astype(np.float32)}
    plain = run(model, inputs)
    made = fuse.fuse(model)
    assert made["NhwcConv"]
    assert made["GroupNorm with SiLU"]
    # measured: 2e-6; the attention norms [B, C, tokens], which stays as it is written
    np.testing.assert_allclose(run(model, inputs), plain, rtol=0, atol=2e-5 * np.abs(plain).max())


def test_widths_without_a_kernel_stay_as_they_are_written(
    unet: Callable[[], ir.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse, "_NORMED", (320,))
    made = fuse.fuse(unet())
    assert made["GroupNorm"] == made["GroupNorm with SiLU"] == made["BiasSplitGelu"] == 0
    assert made["NhwcConv"] > 0


def test_a_masked_attention_stays_as_it_is_written(build_mini: Callable[..., Checkpoint]) -> None:
    model = graph(build_mini(), "text_encoder")
    assert not any(fuse.fuse(model).values())
    assert fuse.DOMAIN not in model.opset_imports


def test_an_fp16_bundle_has_both_and_one_file_of_weights(exported: Callable[..., Path]) -> None:
    bundle = bundles.load(exported("fp16"))
    for name in bundle.manifest.components:
        plain, fused = bundle.component_path(name), bundle.fused_path(name)
        assert fused == fuse.fused_path(plain)
        weights = {
            key
            for path in (plain, fused)
            for tensor in onnx.load(path, load_external_data=False).graph.initializer
            for key in [entry.value for entry in tensor.external_data if entry.key == "location"]
        }
        assert weights == {"model.onnx_data"}
        assert fused.stat().st_size < 1e6


SAME = "pads=[1,1,1,1], strides=[1,1], dilations=[1,1]"
NEARLY = {
    "grouped": ("float[1,4,8,8] x", f"y = Conv <group=2, kernel_shape=[3,3], {SAME}> (x, w, b)",
                {"w": (4, 2, 3, 3), "b": (4,)}),
    "1-D": ("float[1,4,8] x", "y = Conv <kernel_shape=[3], pads=[1,1], strides=[1], dilations=[1]> (x, w, b)",
            {"w": (4, 4, 3), "b": (4,)}),
    "defaults": ("float[1,4,8,8] x", "y = Conv (x, w, b)", {"w": (4, 4, 3, 3), "b": (4,)}),
    "other norm": ("float[1,4,8,8] x", """
        s = Constant <value_ints=[0,2,-1]> ()
        f = Constant <value_ints=[1,4,8,8]> ()
        two = Constant <value_floats=[2.0,2.0]> ()
        none = Constant <value_floats=[0.0,0.0]> ()
        r = Reshape (x, s)
        n = InstanceNormalization (r, two, none)
        q = Reshape (n, f)
        m = Mul (q, w)
        y = Add (m, b)""", {"w": (4, 1, 1), "b": (4, 1, 1)}),
    "other gate": ("float[1,3,8] x", """
        two = Constant <value_float=2.0> ()
        one = Constant <value_float=1.0> ()
        half = Constant <value_float=0.5> ()
        t = Add (x, b)
        h, g = Split <axis=-1, num_outputs=2> (t)
        d = Div (g, two)
        e = Erf (d)
        a = Add (e, one)
        c = Mul (half, a)
        v = Mul (g, c)
        y = Mul (h, v)""", {"b": (8,)}),
}  # fmt: skip


@pytest.mark.parametrize("name", NEARLY)
@pytest.mark.usefixtures("any_width")
def test_what_only_nearly_matches_stays_as_written(name: str) -> None:
    given, body, weights = NEARLY[name]
    text = f'<ir_version: 8, opset_import: ["" : 18]> g ({given}) => (float[] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    random = np.random.default_rng(0)
    for weight, shape in weights.items():
        array = random.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, weight))
    model = ir.from_proto(proto)
    before = [node.op_type for node in model.graph]
    assert not any(fuse.fuse(model).values())
    assert [node.op_type for node in model.graph] == before


def test_an_fp32_bundle_has_the_plain_graphs_alone(exported: Callable[..., Path]) -> None:
    bundle = bundles.load(exported("fp32"))
    assert bundle.fused_path("unet") == bundle.component_path("unet")


def test_attention_is_ort_s_own_on_a_cpu_too(unet: Callable[[], ir.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """The one operator with a kernel there: the real one against the plain graph."""
    monkeypatch.setattr(fuse, "_RULES", {"MultiHeadAttention": fuse._RULES["MultiHeadAttention"]})
    plain, fused = unet(), unet()
    assert fuse.fuse(fused)["MultiHeadAttention"]
    inputs = unet_inputs(plain)
    wanted, found = (
        onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, inputs
        )[0]
        for model in (plain, fused)
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())  # measured: 4e-7


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs onnxruntime-gpu and a CUDA device")
@pytest.mark.parametrize("component", ["unet", "vae_decoder", "vae_encoder", "text_encoder"])
@pytest.mark.parametrize("weights", ["demo", "random"])
def test_fused_kernels_compute_the_plain_graph(weights: str, component: str, tmp_path: Path) -> None:
    """On the CUDA provider, in fp16: the demo, whose widths have few kernels, and tiny at true architecture."""
    checkpoint = checkpoints.load(weights, variant=None if weights == "demo" else "tiny")
    facts = graphs.model_facts(checkpoint)
    specs = graphs.components(facts, "fp16")[component]
    module = wrap(checkpoint, component)
    precision.to_half(module, ())
    model = to_onnx.to_onnx(to_onnx.to_exported_program(module, specs), specs)
    path = tmp_path / "model.onnx"
    to_onnx.save(model, path, path)
    made = fuse.fuse(model)
    to_onnx.save(model, fuse.fused_path(path), path)
    if weights == "random" and component == "unet":
        assert all(made.values())
    random = np.random.default_rng(5)
    sizes = {"batch": 2, "height": 32, "width": 48, "image_height": 128, "image_width": 192, graphs.TIMESTEPS: 2}
    inputs: dict[str, np.ndarray] = {}
    for spec in specs.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes]
        values = random.integers(0, 4000, shape) if spec.dtype == "int32" else random.standard_normal(shape)
        inputs[spec.name] = values.astype(spec.dtype)
    outputs: list[np.ndarray] = []
    for file in (path, fuse.fused_path(path)):
        session = open_session(component, str(file), "cuda", cuda.CUDA.provider, None)
        bound = cuda.CudaEngine(component, specs, session, cuda.CUDA, EngineSettings("cuda"), "f16")
        for _ in range(3):  # as it is, and as a captured graph
            [output, *_] = bound(inputs).values()
        outputs.append(output)
    plain, fused = outputs
    assert np.isfinite(fused).all()
    assert np.abs(fused - plain).max() < 1e-2 * np.abs(plain).max()  # measured: 2.9e-3, tiny's U-Net at 512 px


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs onnxruntime-gpu and a CUDA device")
def test_a_fused_bundle_draws_what_pytorch_draws(tmp_path: Path) -> None:
    """The demo, fp16 on the CUDA provider, against PyTorch in fp32: pictures, and latents along the way."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import gpu_make

    demo = checkpoints.load("demo")
    scheduler = PNDMScheduler.from_config(demo.scheduler_config)
    parts = {"unet": demo.unet, "vae": demo.vae, "text_encoder": demo.text_encoder, "tokenizer": demo.tokenizer}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    torch_pipe: Any = StableDiffusionPipeline(**parts, **none, scheduler=scheduler).to("cuda")
    size, prompt = demo.image_size, "a red apple"
    kept: list[np.ndarray] = []

    def keep(_: Any, __: int, ___: Any, given: dict[str, Any]) -> dict[str, Any]:
        kept.append(given["latents"].float().cpu().numpy())
        return given

    seed = torch.Generator().manual_seed(1)
    given = {"height": size, "width": size, "num_inference_steps": 25, "guidance_scale": 7.5, "negative_prompt": ""}
    picture = torch_pipe(prompt, **given, generator=seed, callback_on_step_end=keep).images[0]
    gpu_make.write_bundle(checkpoints.load("demo"), tmp_path / "bundle")
    ours = Pipeline.open(tmp_path / "bundle", EngineSettings("cuda"))
    request = Request(prompt, seed=1, steps=25, guidance_scale=7.5, height=size, width=size)
    items = list(ours.generate([request]))
    latents = [item.latents for item in items if isinstance(item, Step)]
    [pixels] = [item.pixels[0] for item in items if isinstance(item, Images)]
    error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(latents, kept, strict=True))
    psnr = 10 * np.log10(255**2 / np.mean((pixels.astype(float) - np.asarray(picture).astype(float)) ** 2))
    print(f"latents along the way: {error:.1e}; picture: {psnr:.1f} dB")
    assert psnr >= 30
    assert error < 0.2
