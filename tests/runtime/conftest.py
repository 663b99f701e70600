"""A toy bundle: true to the contract and to the real tokenizer, deterministic, and milliseconds to run."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bksdm_runtime import bundle as bundles
from bksdm_runtime import engine as engines

TOKENS, CONTEXT, LATENTS, HIDDEN, VOCABULARY = 77, 16, 4, 8, 49_408
SCALING_FACTOR = 0.18215
CLIP_TOKENIZER = Path(__file__).parents[2] / "bksdm" / "clip_tokenizer"
SCHEDULER_CONFIG: dict[str, object] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.39.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}


# TensorRT-RTX and its companions have wheels for x86-64 alone: elsewhere these are not there.
if importlib.util.find_spec("tensorrt_rtx") is None:
    collect_ignore = ["test_plan_engine.py", "test_plans.py", "test_step_kernel.py", "test_standin.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_reference: needs the CLIPTokenizer of transformers 4 without ftfy")


def pytest_runtest_setup(item: pytest.Item) -> None:
    # transformers 5 has only the other implementation, and ftfy changes the one of transformers 4
    there = metadata.version("transformers").startswith("4.") and importlib.util.find_spec("ftfy") is None
    if item.get_closest_marker("needs_reference") and not there:
        pytest.skip("needs transformers 4 and no ftfy")


@dataclass(frozen=True)
class ToyWeights:
    """The toy model's numbers, so that a test can compute the same model without ONNX."""

    embedding: NDArray[np.float32]  # [49408, D]
    conv_in: NDArray[np.float32]  # [C, 4, 3, 3]
    time: NDArray[np.float32]  # [C]
    context: NDArray[np.float32]  # [D, C]
    conv_out: NDArray[np.float32]  # [4, C, 3, 3]
    decoder: NDArray[np.float32]  # [3, 4, 1, 1]
    encoder: NDArray[np.float32]  # [8, 3, 8, 8]


def draw_weights() -> ToyWeights:
    random = np.random.default_rng(0)

    def draw(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    return ToyWeights(
        embedding=draw(VOCABULARY, CONTEXT),
        conv_in=draw(HIDDEN, LATENTS, 3, 3, scale=0.2),
        time=draw(HIDDEN),
        context=draw(CONTEXT, HIDDEN, scale=0.5),
        conv_out=draw(LATENTS, HIDDEN, 3, 3, scale=0.2),
        decoder=draw(3, LATENTS, 1, 1, scale=0.01),
        encoder=draw(2 * LATENTS, 3, 8, 8, scale=0.02),
    )


def write_toy_bundle(
    folder: Path, *, dtype: str = "float32", vae_encoder: bool = True, step_cache: bool = False
) -> Path:
    """Write the toy model as a bundle. dtype: of the graphs' arithmetic and of their inputs and outputs.

    step_cache: with a shallow U-Net, which is the last convolution on the features before it.
    """
    weights = draw_weights()
    writers: dict[str, Callable[[ToyWeights, str], onnx.GraphProto]] = {
        "text_encoder": _text_encoder,
        "unet": _unet_with_features if step_cache else _unet,
        "vae_decoder": _vae_decoder,
    }
    if vae_encoder:
        writers["vae_encoder"] = _vae_encoder
    if step_cache:
        writers["unet_shallow"] = _unet_shallow
    components: dict[str, bundles.Component] = {}
    for name, write in writers.items():
        graph = write(weights, dtype)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model)
        path = "unet/shallow.onnx" if name == "unet_shallow" else f"{name}/model.onnx"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, folder / path)
        components[name] = bundles.Component(path, _specs(graph.input), _specs(graph.output))
    shutil.copytree(CLIP_TOKENIZER, folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER_CONFIG))
    (folder / "LICENSE").write_text("A toy: do what you like.\n")
    precision = "fp16" if dtype == "float16" else "fp32"
    manifest = bundles.Manifest(
        variant="toy",
        source="tests",
        precision=precision,
        storage=precision,
        model=bundles.ModelFacts(TOKENS, CONTEXT, LATENTS, 8, SCALING_FACTOR, 64, 64, 64, 7.5),
        components=components,
        files=bundles.file_records(folder),
        parity={},
        licence=bundles.Licence("CC0-1.0", "LICENSE"),
        tools={"onnx": onnx.__version__},
    )
    (folder / "bundle.json").write_text(manifest.to_json())
    return folder


@pytest.fixture(scope="session")
def rewrite_manifest() -> Callable[[Path, Callable[[dict[str, Any]], object]], None]:
    """A function that applies a change to the parsed bundle.json of a folder and writes it back."""

    def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
        path = folder / "bundle.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return rewrite


@pytest.fixture(scope="session")
def toy_weights() -> ToyWeights:
    return draw_weights()


@pytest.fixture(scope="session")
def make_toy_bundle() -> Callable[..., Path]:
    return write_toy_bundle


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle; read-only by agreement (see `toy_copy`)."""
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def toy_copy(toy_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the toy bundle that a test may damage."""
    return shutil.copytree(toy_bundle, tmp_path / "bundle")


def _text_encoder(weights: ToyWeights, dtype: str) -> onnx.GraphProto:
    nodes = [helper.make_node("Gather", ["embedding", "input_ids"], ["last_hidden_state"], axis=0)]
    return _graph(
        nodes,
        [_tensor("input_ids", "int32", ["batch", TOKENS])],
        [_tensor("last_hidden_state", dtype, ["batch", TOKENS, CONTEXT])],
        {"embedding": weights.embedding.astype(dtype)},
    )


def _unet(weights: ToyWeights, dtype: str) -> onnx.GraphProto:
    """conv + sin(t / 1000 * w) + mean(context) @ W -> tanh -> conv, plus half the input: non-linear in everything."""
    size = [HIDDEN, 1, 1]
    nodes = [
        helper.make_node("Conv", ["sample", "conv_in"], ["hidden"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["timestep", "thousandth"], ["t"]),
        helper.make_node("Unsqueeze", ["t", "last"], ["t_column"]),
        helper.make_node("Mul", ["t_column", "time"], ["phase"]),
        helper.make_node("Sin", ["phase"], ["time_embedding"]),
        helper.make_node("ReduceMean", ["encoder_hidden_states", "middle"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "context"], ["context_embedding"]),
        helper.make_node("Add", ["time_embedding", "context_embedding"], ["embedding"]),
        helper.make_node("Reshape", ["embedding", "per_channel"], ["bias"]),
        helper.make_node("Add", ["hidden", "bias"], ["biased"]),
        helper.make_node("Tanh", ["biased"], ["active"]),
        helper.make_node("Conv", ["active", "conv_out"], ["change"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["sample", "half"], ["halved"]),
        helper.make_node("Add", ["change", "halved"], ["out_sample"]),
    ]
    latents = ["batch", LATENTS, "height", "width"]
    return _graph(
        nodes,
        _unet_inputs(dtype),
        [_tensor("out_sample", dtype, latents)],
        {
            "conv_in": weights.conv_in.astype(dtype),
            "conv_out": weights.conv_out.astype(dtype),
            "time": weights.time.astype(dtype),
            "context": weights.context.astype(dtype),
            "thousandth": np.array(0.001, dtype),
            "half": np.array(0.5, dtype),
            "last": np.array([1]),
            "middle": np.array([1]),
            "per_channel": np.array([-1, *size]),
        },
    )


def _unet_inputs(dtype: str) -> list[onnx.ValueInfoProto]:
    return [
        _tensor("sample", dtype, ["batch", LATENTS, "height", "width"]),
        _tensor("timestep", dtype, ["batch"]),
        _tensor("encoder_hidden_states", dtype, ["batch", TOKENS, CONTEXT]),
    ]


def _unet_with_features(weights: ToyWeights, dtype: str) -> onnx.GraphProto:
    graph = _unet(weights, dtype)
    graph.node.append(helper.make_node("Identity", ["active"], ["deep_features"]))
    graph.output.append(_tensor("deep_features", dtype, ["batch", HIDDEN, "height", "width"]))
    return graph


def _unet_shallow(weights: ToyWeights, dtype: str) -> onnx.GraphProto:
    nodes = [
        helper.make_node("Conv", ["deep_features", "conv_out"], ["change"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["sample", "half"], ["halved"]),
        helper.make_node("Add", ["change", "halved"], ["out_sample"]),
    ]
    latents = ["batch", LATENTS, "height", "width"]
    return _graph(
        nodes,
        [
            *_unet_inputs(dtype),
            _tensor("deep_features", dtype, ["batch", HIDDEN, "height", "width"]),
        ],
        [_tensor("out_sample", dtype, latents)],
        {"conv_out": weights.conv_out.astype(dtype), "half": np.array(0.5, dtype)},
    )


def _vae_decoder(weights: ToyWeights, dtype: str) -> onnx.GraphProto:
    nodes = [
        helper.make_node("Conv", ["latent_sample", "decoder"], ["small"]),
        helper.make_node("Resize", ["small", "", "scales"], ["sample"], mode="nearest"),
    ]
    return _graph(
        nodes,
        [_tensor("latent_sample", dtype, ["batch", LATENTS, "height", "width"])],
        [_tensor("sample", dtype, ["batch", 3, "image_height", "image_width"])],
        {"decoder": weights.decoder.astype(dtype), "scales": np.array([1, 1, 8, 8], np.float32)},
    )


def _vae_encoder(weights: ToyWeights, dtype: str) -> onnx.GraphProto:
    nodes = [helper.make_node("Conv", ["sample", "encoder"], ["latent_parameters"], strides=[8, 8])]
    return _graph(
        nodes,
        [_tensor("sample", dtype, ["batch", 3, "image_height", "image_width"])],
        [_tensor("latent_parameters", dtype, ["batch", 2 * LATENTS, "height", "width"])],
        {"encoder": weights.encoder.astype(dtype)},
    )


def _graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: dict[str, NDArray[np.generic]],
) -> onnx.GraphProto:
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return helper.make_graph(nodes, "toy", inputs, outputs, initializers)


_ONNX_DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


def _tensor(name: str, dtype: str, axes: Sequence[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _ONNX_DTYPES[dtype], axes)


def _specs(tensors: Sequence[onnx.ValueInfoProto]) -> tuple[bundles.TensorSpec, ...]:
    names = {number: name for name, number in _ONNX_DTYPES.items()}
    return tuple(
        bundles.TensorSpec(
            tensor.name,
            names[tensor.type.tensor_type.elem_type],
            tuple(axis.dim_param or axis.dim_value for axis in tensor.type.tensor_type.shape.dim),
        )
        for tensor in tensors
    )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Backend tensorrt on the stand-in."""
    from bksdm_runtime.backends import device
    from tests.runtime.standin import Driver, Library

    pretended = Driver()
    monkeypatch.setattr(device, "driver", pretended)
    for module in (device, engines):
        monkeypatch.setattr(module, "cuda_devices", lambda: 1)
    device.device.cache_clear()
    library = Library(pretended)
    pretended.library = library  # type: ignore[attr-defined]
    library.__spec__ = importlib.util.spec_from_loader("tensorrt", None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", library)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "bksdm_runtime.backends.trt", raising=False)
    yield pretended
    gc.collect()  # while the driver that gave memory is there to take it back
    device.device.cache_clear()
    sys.modules.pop("bksdm_runtime.backends.trt", None)
