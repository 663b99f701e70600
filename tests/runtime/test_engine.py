"""Engines run the bundle's graphs in the graphs' own dtypes, and every failure is one sentence."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from bksdm_runtime import bundle as bundles
from bksdm_runtime.backends import ort
from bksdm_runtime.bundle import Bundle, BundleError
from bksdm_runtime.cores import physical_cores
from bksdm_runtime.engine import BACKENDS, EngineError, EngineSettings, MissingBackend, open_engine, resolve_backend

ONE = EngineSettings(backend="onnxruntime", threads=1)
Rewrite = Callable[[Path, Callable[[dict[str, Any]], object]], None]


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path) -> Bundle:
    return bundles.load(toy_bundle)


def unet_inputs(batch: int = 2, height: int = 8, width: int = 8) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    return {
        "sample": random.standard_normal((batch, 4, height, width)).astype(np.float32),
        "timestep": np.linspace(1, 961, batch).astype(np.float32),
        "encoder_hidden_states": random.standard_normal((batch, 77, 16)).astype(np.float32),
    }


def torch_unet(weights: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The toy U-Net written again, in torch float64."""
    sample, timestep, context = (torch.from_numpy(array).double() for array in inputs.values())
    conv = torch.nn.functional.conv2d
    bias = torch.sin(timestep[:, None] / 1000 * torch.from_numpy(weights.time).double())
    bias = bias + context.mean(1) @ torch.from_numpy(weights.context).double()
    hidden = conv(sample, torch.from_numpy(weights.conv_in).double(), padding=1)
    active = torch.tanh(hidden + bias[:, :, None, None])
    return (conv(active, torch.from_numpy(weights.conv_out).double(), padding=1) + sample / 2).numpy()


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 8, 8), (3, 5, 24)])
def test_the_graph_computes_what_torch_computes(
    bundle: Bundle, toy_weights: Any, batch: int, height: int, width: int
) -> None:
    inputs = unet_inputs(batch, height, width)
    output = open_engine(bundle, "unet", ONE)(inputs)["out_sample"]
    assert output.shape == (batch, 4, height, width)
    assert output.dtype == np.float32
    # measured: 5e-7 against float64
    np.testing.assert_allclose(output, torch_unet(toy_weights, inputs), rtol=0, atol=3e-6)


def test_inputs_are_cast_to_the_graph_and_outputs_to_float32(bundle: Bundle) -> None:
    engine = open_engine(bundle, "unet", ONE)
    plain = engine(unet_inputs())["out_sample"]
    wide = engine({name: array.astype(np.float64) for name, array in unet_inputs().items()})["out_sample"]
    np.testing.assert_array_equal(plain, wide)
    strided = {name: np.asfortranarray(array) for name, array in unet_inputs().items()}
    np.testing.assert_array_equal(plain, engine(strided)["out_sample"])
    ids = np.full((1, 77), 49407, np.int64)  # the graph takes int32
    assert open_engine(bundle, "text_encoder", ONE)({"input_ids": ids})["last_hidden_state"].shape == (1, 77, 16)


def test_fp16_graphs_run_on_the_cpu(make_toy_bundle: Callable[..., Path], tmp_path: Path, bundle: Bundle) -> None:
    half = bundles.load(make_toy_bundle(tmp_path / "half", dtype="float16"))
    assert half.manifest.precision == "fp16"
    for component in half.manifest.components:
        open_engine(half, component, ONE)
    output = open_engine(half, "unet", ONE)(unet_inputs())["out_sample"]
    assert output.dtype == np.float32
    # measured: 1.7e-3 on values up to 3.9
    np.testing.assert_allclose(output, open_engine(bundle, "unet", ONE)(unet_inputs())["out_sample"], atol=8e-3)


@pytest.mark.parametrize(("installed", "expected", "why"), [(True, "openvino", ""), (False, "onnxruntime", "not ")])
def test_auto_is_openvino_where_it_is_installed_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, installed: bool, expected: str, why: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    with caplog.at_level("INFO", logger="bksdm_runtime"):
        assert resolve_backend("auto") == expected
    assert caplog.messages == [f"backend auto: {expected}, because openvino is {why}installed"]
    assert set(BACKENDS) == {"openvino", "onnxruntime", "cuda", "tensorrt", "tensorrt-rtx"}


def test_auto_without_openvino_opens_onnxruntime(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert open_engine(bundle, "unet", EngineSettings(threads=1)).backend == "onnxruntime"


def test_onnxruntime_has_the_graphs_own_arithmetic_and_refuses_another(
    bundle: Bundle, make_toy_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    half = bundles.load(make_toy_bundle(tmp_path / "half", dtype="float16"))
    for opened, own, other in ((bundle, "f32", "bf16"), (half, "f16", "f32")):
        assert open_engine(opened, "unet", ONE).arithmetic == own
        assert open_engine(opened, "unet", replace(ONE, arithmetic=own)).arithmetic == own
        with pytest.raises(EngineError, match=rf"'onnxruntime' computes this bundle in {own}, not in {other}: leave"):
            open_engine(opened, "unet", replace(ONE, arithmetic=other))


def test_an_unknown_backend_names_the_valid_ones(bundle: Bundle) -> None:
    with pytest.raises(
        EngineError, match="backend 'tpu' is unknown: choose auto, tensorrt, tensorrt-rtx, cuda, openvino"
    ):
        open_engine(bundle, "unet", EngineSettings(backend="tpu"))


def test_an_unknown_component_names_the_bundles_own(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="has no upscaler"):
        open_engine(bundle, "upscaler")


def test_no_threads_is_refused(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="threads must be at least 1, found 0"):
        open_engine(bundle, "unet", EngineSettings(threads=0))


@pytest.mark.parametrize(("backend", "extra"), [("onnxruntime", "cpu"), ("cuda", "cuda")])
def test_a_missing_library_names_its_extra(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, backend: str, extra: str
) -> None:
    for name in ("ort", "cuda"):
        monkeypatch.delitem(sys.modules, f"bksdm_runtime.backends.{name}", raising=False)
        monkeypatch.delattr(f"bksdm_runtime.backends.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingBackend) as caught:
        open_engine(bundle, "unet", EngineSettings(backend=backend))
    assert str(caught.value) == f"backend '{backend}' needs onnxruntime: pip install 'bksdm[{extra}]'"


def test_a_library_that_does_not_load_is_told_apart_from_a_missing_one(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libstdc++.so.6: version not found')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "bksdm_runtime.backends.ort")
    for name in [name for name in sys.modules if name.split(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(EngineError, match="is installed but does not load: libstdc") as caught:
        open_engine(bundle, "unet", ONE)
    assert not isinstance(caught.value, MissingBackend)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda inputs: inputs.pop("timestep"), "unet takes sample, timestep, encoder_hidden_states, was given sample"),
        (lambda inputs: inputs.update(extra=np.zeros(1)), "was given sample, timestep, encoder_hidden_states, extra"),
        (
            lambda inputs: inputs.update(sample=np.zeros((2, 3, 8, 8))),
            r"sample must be \[batch, 4, height, width\], was",
        ),
        (lambda inputs: inputs.update(sample=np.zeros((4, 8, 8))), r"sample must be .*, was given \[4, 8, 8\]"),
        (
            lambda inputs: inputs.update(sample=np.zeros((3, 4, 8, 8))),
            r"unet failed at sample \[3, 4, 8, 8\], timestep",
        ),
    ],
)
def test_wrong_inputs_are_one_sentence(
    bundle: Bundle, change: Callable[[dict[str, np.ndarray]], object], match: str, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs = unet_inputs()
    change(inputs)
    engine = open_engine(bundle, "unet", ONE)
    with pytest.raises(EngineError, match=match) as caught:
        engine(inputs)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # the library keeps quiet too


def relist(folder: Path, rewrite_manifest: Rewrite) -> Bundle:
    """Make the manifest's records true again, as whoever damages a bundle on purpose would."""
    records = {name: vars(record) for name, record in bundles.file_records(folder).items()}
    rewrite_manifest(folder, lambda content: content.update(files=records))
    return bundles.load(folder)


def test_a_damaged_graph_is_one_sentence(
    toy_copy: Path, rewrite_manifest: Rewrite, capfd: pytest.CaptureFixture[str]
) -> None:
    path = toy_copy / "unet" / "model.onnx"
    for content in (b"", b"not a graph", path.read_bytes()[:500]):
        path.write_bytes(content)
        with pytest.raises(EngineError, match=r"unet: ONNX Runtime cannot open .*unet/model\.onnx: ") as caught:
            open_engine(relist(toy_copy, rewrite_manifest), "unet", ONE)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("rename", "the graph's inputs are noisy, timestep, encoder_hidden_states, bundle.json says sample"),
        ("retype", "input timestep is int64, bundle.json says float32"),
        ("fix", r"input encoder_hidden_states is \['batch', 77, 12\], bundle.json says \['batch', 77, 16\]"),
        ("static", r"input sample is \['batch', 4, 8, 'width'\], bundle.json says"),
    ],
)
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(
    toy_copy: Path, rewrite_manifest: Rewrite, change: str, match: str
) -> None:
    path = toy_copy / "unet" / "model.onnx"
    model = onnx.load(path)
    if change == "rename":
        model.graph.input[0].name = "noisy"
        for node in model.graph.node:
            node.input[:] = ["noisy" if name == "sample" else name for name in node.input]
    elif change == "retype":
        model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
        model.graph.node.insert(0, onnx.helper.make_node("Cast", ["timestep"], ["float"], to=onnx.TensorProto.FLOAT))
        model.graph.node[2].input[0] = "float"
    elif change == "fix":
        model.graph.input[2].type.tensor_type.shape.dim[2].dim_value = 12
        del model.graph.node[6:7]  # its weights no longer fit; any graph with these inputs will do
        model.graph.node.insert(6, onnx.helper.make_node("Gemm", ["pooled", "context12"], ["context_embedding"]))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((12, 8), np.float32), "context12"))
    else:
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 8
    onnx.save(model, path)
    with pytest.raises(EngineError, match=match):
        open_engine(relist(toy_copy, rewrite_manifest), "unet", ONE)


def test_cuda_without_the_provider_says_what_to_install(bundle: Bundle) -> None:
    if "CUDAExecutionProvider" in ort.onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    with pytest.raises(EngineError, match=r"has no CUDAExecutionProvider.*leave only one.*'bksdm\[cuda\]'"):
        open_engine(bundle, "unet", EngineSettings(backend="cuda"))


def test_cuda_that_falls_back_to_the_cpu_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(path: str, sess_options: Any, providers: Any) -> Any:
        return ort.onnxruntime.InferenceSession(path, sess_options=sess_options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "library", cuda_stub(InferenceSession=start))
    with pytest.raises(EngineError, match=r"CUDAExecutionProvider did not start \(running: CPUExecutionProvider\)"):
        open_engine(bundle, "unet", EngineSettings(backend="cuda", threads=1))


def cuda_stub(**changes: Any) -> ModuleType:
    """An onnxruntime that has CUDA by its own account, over the real one."""
    real = ort.onnxruntime
    stub = ModuleType("onnxruntime")
    stub.__dict__.update(
        SessionOptions=real.SessionOptions,
        set_default_logger_severity=lambda _: None,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        **changes,
    )
    return stub


def test_cuda_is_asked_for_true_fp32_and_a_choice_of_algorithms_that_no_clock_decides(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """TF32 is on by default, and the default search times the algorithms."""
    seen: list[Any] = []

    def start(path: str, sess_options: Any, providers: Any) -> Any:
        seen.append(providers)
        session = ort.onnxruntime.InferenceSession(path, sess_options=sess_options, providers=["CPUExecutionProvider"])
        monkeypatch.setattr(session, "get_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        return session

    def preload() -> None:
        seen.append("preloaded")
        print("Failed to load libcudnn.so.9")

    monkeypatch.setattr(ort, "library", cuda_stub(InferenceSession=start, preload_dlls=preload))
    assert open_engine(bundle, "unet", EngineSettings(backend="cuda", threads=1)).backend == "cuda"
    options = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": "1"}
    assert seen == ["preloaded", [("CUDAExecutionProvider", options)]]
    assert capfd.readouterr().out == ""  # stdout carries the paths of pictures


def test_the_cpu_provider_preloads_no_cuda_and_takes_no_option_of_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort.onnxruntime, "preload_dlls", None)
    open_engine(bundle, "unet", ONE)


def test_threads_reach_the_session(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = ort.onnxruntime.InferenceSession

    def spy(path: str, sess_options: Any, providers: list[str]) -> Any:
        seen.append(sess_options.intra_op_num_threads)
        return real(path, sess_options=sess_options, providers=providers)

    monkeypatch.setattr(ort.onnxruntime, "InferenceSession", spy)
    assert open_engine(bundle, "unet", EngineSettings(backend="onnxruntime", threads=3)).threads == 3
    assert open_engine(bundle, "unet", EngineSettings(backend="onnxruntime")).threads == physical_cores()
    assert seen == [3, physical_cores()]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process, which Linux does")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_running_out_of_memory_is_one_sentence(toy_copy: Path, rewrite_manifest: Rewrite, backend: str) -> None:
    pytest.importorskip(backend, reason="needs the extra of the backend")
    model = onnx.load(toy_copy / "vae_decoder" / "model.onnx")
    [scales] = [tensor for tensor in model.graph.initializer if tensor.name == "scales"]
    scales.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 1, 65536, 65536], np.float32), "scales"))
    onnx.save(model, toy_copy / "vae_decoder" / "model.onnx")
    relist(toy_copy, rewrite_manifest)
    script = f"""
        import resource
        import numpy as np
        from bksdm_runtime import bundle
        from bksdm_runtime.engine import EngineError, EngineSettings, open_engine
        engine = open_engine(bundle.load({str(toy_copy)!r}), "vae_decoder", EngineSettings({backend!r}, 1))
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # the picture would need 48 GiB
        try:
            engine({{"latent_sample": np.zeros((1, 4, 1, 1), np.float32)}})
        except EngineError as error:
            print(error)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, check=True
    )
    expected = "vae_decoder ran out of memory at latent_sample [1, 4, 1, 1]: use a smaller size or --batch-size 1\n"
    assert (done.stdout, done.stderr) == (expected, "")


def test_opening_the_engine_module_imports_no_backend() -> None:
    script = "import sys, bksdm_runtime.engine; print({'onnxruntime', 'openvino'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "set()\n"
    importlib.import_module("bksdm_runtime.backends.ort")
