"""The OpenVINO backend gives what ONNX Runtime gives, in the arithmetic that it names, for the shapes of every call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import onnx
import pytest

from bksdm_runtime import bundle as bundles
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.engine import EngineError, EngineSettings, MissingBackend, Preparing, open_engine
from bksdm_runtime.pipeline import Pipeline, Request

pytest.importorskip("openvino", reason="needs openvino: pip install 'bksdm[openvino]'")
from bksdm_runtime.backends import ov

Rewrite = Callable[[Path, Callable[[dict[str, Any]], object]], None]
Inputs = dict[str, np.ndarray]

ORT = EngineSettings(backend="onnxruntime", threads=1)
F32 = EngineSettings(backend="openvino", threads=1, arithmetic="f32")
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path) -> Bundle:
    return bundles.load(toy_bundle)


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return bundles.load(bundles.demo())


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[list[int]], dict[str, object]]]:
    """What OpenVINO is asked to compile: shapes of the inputs, and the configuration."""
    seen: list[tuple[list[list[int]], dict[str, object]]] = []
    real = ov._core()

    class Spy:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def compile_model(self, model: Any, device: str, config: dict[str, object]) -> object:
            seen.append(([list(port.shape) for port in model.inputs], config))
            return real.compile_model(model, device, config)

    monkeypatch.setattr(ov, "_core", Spy)
    return seen


def draw(bundle: Bundle, component: str, batch: int, height: int, width: int) -> Inputs:
    """Random inputs; height and width in latents."""
    random = np.random.default_rng(0)
    latents = random.standard_normal((batch, 4, height, width)).astype(np.float32)
    if component == "text_encoder":
        return {"input_ids": random.integers(0, 49_407, (batch, 77))}
    if component == "unet":
        context = random.standard_normal((batch, 77, bundle.manifest.model.context_dim)).astype(np.float32)
        return {
            "sample": latents,
            "timestep": np.linspace(1, 961, batch).astype(np.float32),
            "encoder_hidden_states": context,
        }
    if component == "vae_decoder":
        return {"latent_sample": latents}
    return {"sample": random.uniform(-1, 1, (batch, 3, 8 * height, 8 * width)).astype(np.float32)}


def error(found: Inputs, expected: Inputs) -> float:
    """Largest difference as a part of the largest value, after shapes and dtypes."""
    assert found.keys() == expected.keys()
    [name] = expected
    assert (found[name].shape, found[name].dtype) == (expected[name].shape, expected[name].dtype)
    return float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max())


@pytest.mark.parametrize("component", COMPONENTS)
def test_f32_is_onnxruntimes_result_at_every_shape(demo: Bundle, component: str) -> None:
    ours, reference = open_engine(demo, component, F32), open_engine(demo, component, ORT)
    for batch, height, width in ((1, 16, 16), (2, 16, 16), (3, 5, 9)):  # the model's own, guided, odd
        inputs = draw(demo, component, batch, height, width)
        # measured: 2.2e-7, 1.6e-6, 3.3e-6, 1.3e-6 in the order of the components; bf16 would be 1e-3 and more
        assert error(ours(inputs), reference(inputs)) < 1e-5


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_half_precision_graph_is_computed_in_f32(
    make_toy_bundle: Callable[..., Path], tmp_path: Path, bundle: Bundle, component: str
) -> None:
    half = bundles.load(make_toy_bundle(tmp_path / "half", dtype="float16"))
    engine = open_engine(half, component, F32)
    assert engine.arithmetic == "f32"
    inputs = draw(bundle, component, 2, 8, 8)
    # measured: 4.8e-4 at most, from the weights, inputs and outputs that are rounded to half precision
    assert error(engine(inputs), open_engine(bundle, component, ORT)(inputs)) < 2e-3


def test_a_picture_is_onnxruntimes(demo: Bundle) -> None:
    request = Request("a red apple", steps=4)
    [ours], [reference] = (Pipeline.open(demo, settings).draw([request]) for settings in (F32, ORT))
    # measured: at most 1 level, and 0.0001 on average
    assert np.abs(ours.astype(int) - reference.astype(int)).mean() < 0.005


@pytest.mark.parametrize(
    ("vendor", "flags", "slow"),
    [
        ("GenuineIntel", "avx512_bf16 avx512_fp16", True),
        ("GenuineIntel", "avx512_bf16 avx512_fp16 amx_bf16 amx_tile", False),
        ("GenuineIntel", "avx512_bf16", False),  # Cooper Lake, which never had AMX: not measured
        ("AuthenticAMD", "avx512_bf16 avx512_fp16", False),
        ("GenuineIntel", "avx2", False),
    ],
)
def test_bf16_is_slow_where_amx_is_hidden(vendor: str, flags: str, slow: bool, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    block = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\nvmx flags\t: vnmi\n"
    path.write_text(f"{block}\n{block}\n")
    assert ov._is_bf16_slow(path) is slow
    assert not ov._is_bf16_slow(tmp_path / "none")


def test_auto_is_bf16_only_where_the_processor_has_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = replace(F32, arithmetic="auto")
    monkeypatch.setattr(ov, "_capabilities", lambda: ["FP32", "INT8"])
    assert open_engine(bundle, "unet", auto).arithmetic == "f32"
    with pytest.raises(EngineError, match=r"this processor has no bf16 arithmetic .*: use f32, or auto"):
        open_engine(bundle, "unet", replace(F32, arithmetic="bf16"))
    monkeypatch.setattr(ov, "_capabilities", lambda: ["FP32", "INT8", "BF16"])
    for slow, expected in ((False, "bf16"), (True, "f32")):
        monkeypatch.setattr(ov, "_is_bf16_slow", lambda slow=slow: slow)
        assert open_engine(bundle, "unet", auto).arithmetic == expected
    assert open_engine(bundle, "unet", F32).arithmetic == "f32"


def test_bf16_where_the_processor_has_it_is_close(demo: Bundle) -> None:
    if "BF16" not in ov._capabilities():
        pytest.skip("needs a processor with bf16 arithmetic")
    engine = open_engine(demo, "unet", replace(F32, arithmetic="bf16"))
    inputs = draw(demo, "unet", 2, 16, 16)
    reference = open_engine(demo, "unet", ORT)(inputs)
    # measured: 0.0097, emulated by a processor with AVX-512 only; full-size tiny 0.029
    assert 1e-4 < error(engine(inputs), reference) < 0.1


def test_another_arithmetic_is_refused(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="'openvino' computes in f32 or bf16, not in f16"):
        open_engine(bundle, "unet", replace(F32, arithmetic="f16"))


def test_a_library_that_computes_otherwise_than_asked_is_an_error(bundle: Bundle) -> None:
    engine = open_engine(bundle, "unet", F32)
    engine.arithmetic = "bf16"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(EngineError, match="unet: OpenVINO computes in f32 where bf16 was asked for"):
        engine(draw(bundle, "unet", 1, 8, 8))


def test_settings_reach_the_library(bundle: Bundle, compiled: list[Any]) -> None:
    for settings in (F32, replace(F32, pinning=True)):
        open_engine(bundle, "unet", settings)(draw(bundle, "unet", 2, 8, 6))
    shapes = [[2, 4, 8, 6], [2], [2, 77, 16]]  # fixed before it is compiled
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    assert compiled == [(shapes, {**config, "ENABLE_CPU_PINNING": pinning}) for pinning in (False, True)]


def test_threads_are_what_the_process_may_use(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ov, "_usable", lambda: 4)
    monkeypatch.setattr(ov, "physical_cores", lambda: 2)
    threads = {None: 2, 1: 1, 3: 3, 9: 4}  # the library uses no more than it has
    for asked, used in threads.items():
        assert open_engine(bundle, "unet", replace(F32, threads=asked)).threads == used


def test_each_shape_is_compiled_once_and_two_are_kept(bundle: Bundle, compiled: list[Any]) -> None:
    engine = open_engine(bundle, "vae_decoder", F32)
    results = [engine(draw(bundle, "vae_decoder", batch, 8, 8))["sample"] for batch in (1, 2, 1, 2, 3, 2, 1, 2)]
    assert [shapes[0][0] for shapes, _ in compiled] == [1, 2, 3, 1]  # the oldest makes room
    assert [len(result) for result in results] == [1, 2, 1, 2, 3, 2, 1, 2]
    np.testing.assert_array_equal(results[0], results[6])
    np.testing.assert_array_equal(results[1], results[7])


def test_a_shape_that_was_prepared_is_not_compiled_again(bundle: Bundle, compiled: list[Any]) -> None:
    engine: Any = open_engine(bundle, "unet", F32)
    assert isinstance(engine, Preparing)
    inputs = draw(bundle, "unet", 2, 8, 8)
    shapes = {name: array.shape for name, array in inputs.items()}
    threads = [Thread(target=engine.prepare, args=(shapes,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    engine(inputs)  # waits for whoever compiles it
    for thread in threads:
        thread.join()
    assert [shapes for shapes, _ in compiled] == [[[2, 4, 8, 8], [2], [2, 77, 16]]]


def test_what_cannot_be_prepared_is_left_to_the_call(bundle: Bundle) -> None:
    engine: Any = open_engine(bundle, "unet", F32)
    engine.prepare({"sample": (2, 3, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 77, 16)})
    engine.prepare({})
    assert engine(draw(bundle, "unet", 2, 8, 8))["out_sample"].shape == (2, 4, 8, 8)


def test_weights_stored_as_fp16_are_unfolded_as_they_are_packed(demo: Bundle) -> None:
    """As OpenVINO's own files say it; a version that reads the mark otherwise only takes more time and memory."""
    engine: Any = open_engine(demo, "unet", F32)
    halves = [node for node in engine.read().get_ops() if node.get_type_name() == "Convert" and _is_half(node)]
    assert len(halves) > 100
    assert all(ov._DECOMPRESSION in node.get_rt_info() for node in halves)


def _is_half(node: Any) -> bool:
    return node.get_input_element_type(0).get_type_name() == "f16"


def test_outputs_belong_to_the_caller(bundle: Bundle) -> None:
    engine = open_engine(bundle, "unet", F32)
    inputs = draw(bundle, "unet", 1, 8, 8)
    first = engine(inputs)["out_sample"]
    kept = first.copy()
    engine({**inputs, "sample": inputs["sample"] + 1})
    np.testing.assert_array_equal(first, kept)
    first += 1


def test_inputs_are_cast_and_may_lie_as_they_like(bundle: Bundle) -> None:
    engine = open_engine(bundle, "unet", F32)
    plain = draw(bundle, "unet", 2, 8, 8)
    expected = engine(plain)["out_sample"]
    for other in (np.asfortranarray, lambda array: array.astype(np.float64), lambda array: array[::-1][::-1]):
        np.testing.assert_array_equal(engine({name: other(a) for name, a in plain.items()})["out_sample"], expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda inputs: inputs.pop("timestep"), "unet takes sample, timestep, encoder_hidden_states, was given sample"),
        (lambda inputs: inputs.update(sample=np.zeros((2, 3, 8, 8))), r"sample must be \[batch, 4, height, width\]"),
        (lambda inputs: inputs.update(sample=np.zeros((4, 8, 8))), r"sample must be .*, was given \[4, 8, 8\]"),
        (lambda inputs: inputs.update(sample=np.zeros((3, 4, 8, 8))), r"unet failed at sample \[3, 4, 8, 8\], timest"),
    ],
)
def test_wrong_inputs_are_one_sentence_and_change_nothing(
    bundle: Bundle, change: Callable[[Inputs], object], match: str, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs = draw(bundle, "unet", 2, 8, 8)
    engine = open_engine(bundle, "unet", F32)
    wrong = dict(inputs)
    change(wrong)
    with pytest.raises(EngineError, match=match) as caught:
        engine(wrong)
    assert "\n" not in str(caught.value)
    assert engine(inputs)["out_sample"].shape == (2, 4, 8, 8)
    assert capfd.readouterr() == ("", "")  # the library keeps quiet too


def relist(folder: Path, rewrite_manifest: Rewrite) -> Bundle:
    records = {name: vars(record) for name, record in bundles.file_records(folder).items()}
    rewrite_manifest(folder, lambda content: content.update(files=records))
    return bundles.load(folder)


def test_a_damaged_graph_is_one_sentence(
    toy_copy: Path, rewrite_manifest: Rewrite, capfd: pytest.CaptureFixture[str]
) -> None:
    path = toy_copy / "unet" / "model.onnx"
    cannot = r"unet: OpenVINO cannot open .*unet/model\.onnx: Model can't be parsed"
    nothing = "unet: the graph's inputs are nothing, bundle.json says sample"
    for content, match in ((b"", nothing), (b"not a graph", cannot), (path.read_bytes()[:500], cannot)):
        path.write_bytes(content)
        with pytest.raises(EngineError, match=match) as caught:
            open_engine(relist(toy_copy, rewrite_manifest), "unet", F32)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_operator_that_the_library_lacks_is_one_sentence(toy_copy: Path, rewrite_manifest: Rewrite) -> None:
    path = toy_copy / "unet" / "model.onnx"
    model = onnx.load(path)
    model.graph.node[-1].op_type = "Improve"
    onnx.save(model, path)
    with pytest.raises(EngineError, match=r"unet: OpenVINO cannot open .*Improve") as caught:
        open_engine(relist(toy_copy, rewrite_manifest), "unet", F32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("rename", "the graph's inputs are noisy, timestep, encoder_hidden_states, bundle.json says sample"),
        ("retype", "output out_sample is float16, bundle.json says float32"),
        ("static", r"input sample is \['\?', 4, 8, '\?'\], bundle.json says"),
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
        model.graph.node[-1].output[0] = "single"
        half = onnx.TensorProto.FLOAT16
        model.graph.node.append(onnx.helper.make_node("Cast", ["single"], ["out_sample"], to=half))
        model.graph.output[0].type.tensor_type.elem_type = half
    else:
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 8
    onnx.save(model, path)
    with pytest.raises(EngineError, match=match):
        open_engine(relist(toy_copy, rewrite_manifest), "unet", F32)


def test_a_missing_library_names_its_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bksdm_runtime.backends.ov")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingBackend, match=r"^backend 'openvino' needs openvino: pip install 'bksdm\[openvino\]'$"):
        open_engine(bundle, "unet", F32)
