"""The sampling loop on device buffers, run on the CPU provider: its bindings, graphs and arithmetic are those of a GPU.

What this does not show: the CUDA provider itself, graph capture, and how fast any of it is (`make gpu-check`).
"""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from bksdm_export import step_graph
from bksdm_export.step_graph import FOLDER, build
from bksdm_runtime import bundle as bundles
from bksdm_runtime import devices, step_table
from bksdm_runtime import engine as engines
from bksdm_runtime.backends import buffers as device_buffers
from bksdm_runtime.backends import cuda
from bksdm_runtime.backends.buffers import Bound, Numbers, Place
from bksdm_runtime.backends.ort import CPU
from bksdm_runtime.engine import EngineError, EngineSettings, Sampler
from bksdm_runtime.pipeline import Images, Pipeline, Step, sample
from bksdm_runtime.request import Request
from bksdm_runtime.schedule import make_schedule
from tests.runtime.trajectories import CACHED, CHANGES, PLAIN, differ, steps

HERE = Place(CPU, "cpu", captures=False)
open_component = cuda.open_component
ONE = EngineSettings(backend="onnxruntime", threads=1)
ON_BUFFERS = EngineSettings(backend="cuda", threads=1)


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend cuda on the CPU."""
    monkeypatch.setattr(cuda, "open_component", partial(cuda.open_component, place=HERE))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_shipped_graphs_are_those_that_are_built(dtype: str) -> None:
    assert onnx.load(FOLDER / f"step_{dtype}.onnx") == build(dtype)
    assert (step_table.PAST, step_table.COLUMNS) == (step_graph.PAST, step_graph.COLUMNS)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.usefixtures("buffers")
def test_latents_are_those_of_the_loop_on_the_host(toy_bundle: Path, changes: dict[str, Any]) -> None:
    request = replace(PLAIN, **changes)
    error = differ(Pipeline.open(toy_bundle, ON_BUFFERS), Pipeline.open(toy_bundle, ONE), request)
    assert error < 2e-6  # measured: 3.4e-7 at most


@pytest.mark.usefixtures("buffers")
def test_a_batch_an_init_image_and_one_picture_after_another(toy_bundle: Path) -> None:
    picture = Image.new("RGB", (128, 64), (200, 30, 30))
    device, host = Pipeline.open(toy_bundle, ON_BUFFERS), Pipeline.open(toy_bundle, ONE)
    assert isinstance(device._engines["unet"], Sampler)
    assert not isinstance(host._engines["unet"], Sampler)
    batch = [replace(PLAIN, seed=seed, guidance_scale=scale) for seed, scale in ((1, 3.0), (2, 7.5), (3, 12.0))]
    drawn = replace(PLAIN, init_image=picture, strength=0.5, sampler="dpmsolver++")
    for requests in (batch, [drawn], [PLAIN], [replace(PLAIN, steps=3)], batch):
        assert differ(device, host, *requests) < 1e-5  # measured: 3.3e-7 at most, without AVX-512 2.2e-6


@pytest.mark.parametrize("changes", CACHED.values(), ids=CACHED)
@pytest.mark.usefixtures("buffers")
def test_deep_features_stay_where_they_are(
    make_toy_bundle: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle", step_cache=True)
    request = replace(PLAIN, steps=10, **changes)
    assert differ(Pipeline.open(bundle, ON_BUFFERS), Pipeline.open(bundle, ONE), request) < 2e-6  # measured: 3.4e-7


@pytest.mark.usefixtures("buffers")
@pytest.mark.parametrize("timesteps", ["float32", "float16"])
def test_fp16_latents_go_from_step_to_step_in_fp32(
    make_toy_bundle: Callable[..., Path], rewrite_manifest: Callable[..., None], tmp_path: Path, timesteps: str
) -> None:
    bundle = make_toy_bundle(tmp_path / "half", dtype="float16")
    if timesteps == "float32":  # as every export writes them
        with_wide_timesteps(bundle, rewrite_manifest)
    device, host = Pipeline.open(bundle, ON_BUFFERS), Pipeline.open(bundle, ONE)
    assert isinstance(device._engines["unet"], Sampler) == (timesteps == "float32")
    # measured: 3.4e-4; what the U-Net is fed differs in its last bit now and then
    assert differ(device, host, PLAIN) < 2e-3
    [(_, latents), *_] = steps(device, PLAIN)
    assert latents.dtype == np.float32


def with_wide_timesteps(folder: Path, rewrite_manifest: Callable[..., None]) -> None:
    path = folder / "unet" / "model.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        node.input[:] = ["narrow" if name == "timestep" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["timestep"], ["narrow"], to=onnx.TensorProto.FLOAT16))
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(model, path)
    records = {name: vars(record) for name, record in bundles.file_records(folder).items()}

    def change(content: dict[str, Any]) -> None:
        content["files"] = records
        content["components"]["unet"]["inputs"][1]["dtype"] = "float32"

    rewrite_manifest(folder, change)


@pytest.mark.usefixtures("buffers")
def test_other_components_give_what_they_give_on_the_host(toy_bundle: Path) -> None:
    device, host = Pipeline.open(toy_bundle, ON_BUFFERS), Pipeline.open(toy_bundle, ONE)
    for _ in range(3):  # the buffers of the first call serve the others
        [ours], [wanted] = ([i for i in p.generate([PLAIN]) if isinstance(i, Images)] for p in (device, host))
        assert int(np.abs(ours.pixels.astype(int) - wanted.pixels.astype(int)).max()) <= 1


@pytest.mark.usefixtures("buffers")
def test_a_loop_that_is_closed_leaves_the_next_picture_alone(toy_bundle: Path) -> None:
    device, host = Pipeline.open(toy_bundle, ON_BUFFERS), Pipeline.open(toy_bundle, ONE)
    started = device.generate([PLAIN])
    next(started)
    started.close()
    assert differ(device, host, replace(PLAIN, seed=9)) < 2e-6


@pytest.mark.usefixtures("buffers")
def test_pictures_that_are_drawn_by_turns_keep_apart(toy_bundle: Path) -> None:
    """One pipeline, two generators; and a whole picture between the steps of another."""
    device, host = Pipeline.open(toy_bundle, ON_BUFFERS), Pipeline.open(toy_bundle, ONE)
    others = replace(PLAIN, prompt="a boat", seed=8)

    def by_turns(pipeline: Pipeline) -> list[np.ndarray]:
        pairs = zip(pipeline.generate([PLAIN]), pipeline.generate([others]), strict=True)
        return [item.latents for pair in pairs for item in pair if isinstance(item, Step)]

    def nested(pipeline: Pipeline) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for item in pipeline.generate([PLAIN]):
            if isinstance(item, Step):
                found.append(item.latents)
                pipeline.draw([others])
        return found

    for draw in (by_turns, nested):
        for found, wanted in zip(draw(device), draw(host), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())  # measured: 3e-7
    unet: Any = device._engines["unet"]
    assert unet._lanes == set()


@pytest.mark.usefixtures("buffers")
def test_buffers_of_few_shapes_are_kept(make_toy_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Guided and unguided evaluations of each: more shapes than are kept, again and again."""
    bundle = make_toy_bundle(tmp_path / "bundle", step_cache=True)
    device, host = Pipeline.open(bundle, ON_BUFFERS), Pipeline.open(bundle, ONE)
    interval = {"guidance_interval": (0.3, 0.8), "cache_interval": 2}
    for width in (64, 128, 192, 256, 320, 64, 128):
        assert differ(device, host, replace(PLAIN, width=width, steps=5, **interval)) < 2e-6  # measured: 4e-7
    unet: Any = device._engines["unet"]
    assert len(unet._passing) == cuda._KEPT
    gc.collect()
    alive = sum(type(one) is Bound for one in gc.get_objects())
    pairs = sum(len(targets) for one in unet._walks.values() for targets in one._pairs.values())
    # What was let go of is gone: U-Net and shallow one keep 4 shapes each, a pair between two of them has 2.
    assert pairs <= cuda._KEPT * 4
    assert alive <= 4 * cuda._KEPT + 2 * pairs


@pytest.mark.usefixtures("buffers")
def test_the_first_shapes_are_captured_and_stay(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are given out here too; the CPU's provider does not read them."""
    monkeypatch.setattr(cuda, "open_component", partial(open_component, place=replace(HERE, captures=True)))
    monkeypatch.setattr(cuda, "_CAPTURED", 2)
    device, host = Pipeline.open(toy_bundle, ON_BUFFERS), Pipeline.open(toy_bundle, ONE)
    unet: Any = device._engines["unet"]
    kept: list[Any] = []
    for width in (64, 128, 192, 256, 320, 384, 64, 128, 192):
        assert differ(device, host, replace(PLAIN, width=width, steps=2)) < 2e-6
        kept = kept or list(unet._captured.values())
    assert len(unet._captured) == 2
    assert list(unet._captured.values())[: len(kept)] == kept
    assert len(unet._passing) == cuda._KEPT


def test_graphs_are_numbered_until_no_more_are_captured() -> None:
    numbers = Numbers(cuda.CUDA, 3)
    assert [numbers.next() for _ in range(5)] == [1, 2, 3, None, None]
    assert Numbers(HERE, 3).next() is None


FAILURES = {
    "CUDA failure 700: an illegal access\nmore about it": r"failed at .*\]: CUDA failure 700: an illegal access$",
    "[ONNXRuntimeError] : 6 : Failed to allocate memory": r"ran out of memory at .*\]: use a smaller size",
}


@pytest.mark.parametrize(("said", "expected"), FAILURES.items())
@pytest.mark.usefixtures("buffers")
def test_a_failure_on_the_way_is_one_sentence(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, said: str, expected: str
) -> None:
    device = Pipeline.open(toy_bundle, ON_BUFFERS)

    def fail(_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(device_buffers.Bound, "run", fail)
    schedule = make_schedule(device.bundle.scheduler_config, steps=2)
    unet: Any = device._engines["unet"]
    begun = unet.sample(schedule, np.zeros((1, 4, 8, 8), np.float32), np.zeros((1, 77, 16), np.float32), None)
    with pytest.raises(EngineError, match=f"^unet {expected}"):
        next(begun)
    assert unet._lanes == set()


@pytest.mark.usefixtures("buffers")
def test_what_the_loop_cannot_do_is_one_sentence(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, host = Pipeline.open(toy_bundle, ON_BUFFERS), Pipeline.open(toy_bundle, ONE)
    monkeypatch.setattr(step_table, "MOST_EVALUATIONS", 5)
    with pytest.raises(EngineError, match=r"at most 5 U-Net evaluations a picture, found 7: use fewer steps"):
        device.draw([PLAIN])
    schedule = make_schedule(device.bundle.scheduler_config, steps=2)
    arrays = np.zeros((1, 4, 8, 8), np.float32), np.zeros((1, 77, 16), np.float32), None
    unet: Any = device._engines["unet"]
    with pytest.raises(EngineError, match=r"differ in backend \(cuda, onnxruntime\)"):
        next(unet.sample(schedule, *arrays, shallow=host._engines["unet"]))


def test_the_loop_on_the_host_is_a_samplers_in_all_but_the_unet() -> None:
    """Both are called alike, so their arguments must not drift apart."""
    host = list(inspect.signature(sample).parameters.values())[1:]
    device = list(inspect.signature(cuda.CudaUNet.sample).parameters.values())[1:]
    named = list(inspect.signature(engines.Sampler.sample).parameters.values())[1:]
    assert [p.name for p in host] == [p.name for p in device] == [p.name for p in named]


# On a GPU. Each is also in the provider's own arithmetic and kernels, captured as CUDA graphs.
on_a_gpu = pytest.mark.skipif(not engines.has_cuda(), reason="needs onnxruntime-gpu and a CUDA device")
REAL = EngineSettings(backend="cuda")
HOST = EngineSettings(backend="onnxruntime")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("changes", [*CHANGES.values(), *CACHED.values()], ids=[*CHANGES, *CACHED])
def test_a_gpu_has_the_latents_of_the_host(
    make_toy_bundle: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle", step_cache=True)
    device, host = Pipeline.open(bundle, REAL), Pipeline.open(bundle, HOST)
    for seed in (3, 4):  # the second from graphs that the first captured
        assert differ(device, host, replace(PLAIN, seed=seed, **changes)) < 1e-4


@pytest.mark.gpu
@on_a_gpu
def test_a_gpu_draws_the_demo_as_the_host_does_at_every_size() -> None:
    device, host = Pipeline.open(bundles.demo(), REAL), Pipeline.open(bundles.demo(), HOST)
    request = Request("a red apple", seed=1, steps=8)
    [ours], [wanted] = device.draw([request]), host.draw([request])
    assert np.abs(ours.astype(int) - wanted.astype(int)).mean() < 0.1
    for height, width in ((256, 256), (512, 384), (768, 768), (1024, 1024), (64, 72)):
        [picture] = device.draw([replace(request, height=height, width=width, steps=2)])  # NaN is an error
        assert picture.shape == (height, width, 3)


@pytest.mark.gpu
@on_a_gpu
def test_graphs_change_nothing_and_a_hundred_pictures_take_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = Pipeline.open(bundles.demo(), REAL)
    request = Request("a red apple", seed=1, steps=4)
    [first] = captured.draw([request])
    captured.draw([replace(request, seed=2)])
    before = used_memory()
    for seed in range(100):
        captured.draw([replace(request, seed=seed)])
    assert used_memory() - before < 16 << 20
    [last] = captured.draw([request])
    assert (first == last).all()
    place = replace(cuda.CUDA, captures=False)
    monkeypatch.setattr(cuda, "open_component", partial(cuda.open_component, place=place))
    [plain] = Pipeline.open(bundles.demo(), REAL).draw([request])
    assert (plain == first).all()


def used_memory() -> int:
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.check_output(asked, text=True).splitlines()[0]) << 20


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu alone and a device, by their own account."""
    monkeypatch.setattr(engines, "cuda_devices", lambda: 1)
    monkeypatch.setattr(engines, "_is_installed", lambda name: name == "onnxruntime-gpu")


@pytest.mark.usefixtures("a_gpu")
def test_auto_takes_cuda_where_there_is_a_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert engines.resolve_backend("auto") == "cuda"
    assert "because onnxruntime-gpu is installed and there is a CUDA device" in caplog.text
    assert engines.resolve_backend("auto", without=["cuda"]) != "cuda"
    monkeypatch.setattr(engines, "_is_installed", lambda _: True)  # the other one's files may lie on top
    assert engines.resolve_backend("auto") != "cuda"
    assert "share their files and both are installed" in caplog.text
    monkeypatch.setattr(engines, "_is_installed", lambda name: name == "onnxruntime-gpu")
    monkeypatch.setattr(engines, "cuda_devices", lambda: 0)
    assert engines.resolve_backend("auto") in ("openvino", "onnxruntime")


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.skipif(
    "CUDAExecutionProvider" in cuda.ort.library.get_available_providers(), reason="this onnxruntime has the provider"
)
def test_auto_goes_on_without_a_gpu_that_does_not_start(toy_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = Pipeline.open(toy_bundle, EngineSettings(threads=1))
    assert pipeline.backend in ("openvino", "onnxruntime")
    assert "a GPU is there, but backend cuda does not start: backend 'cuda': this onnxruntime has no" in caplog.text
    with pytest.raises(EngineError, match="has no CUDAExecutionProvider"):
        Pipeline.open(toy_bundle, EngineSettings(backend="cuda"))


def test_libraries_are_loaded_once_and_leave_stdout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def preload() -> None:
        calls.append("called")
        time.sleep(0.05)

    monkeypatch.setattr(cuda.ort, "library", SimpleNamespace(preload_dlls=preload))
    before = sys.stdout
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: cuda._preload_cuda(), range(6)))
    assert sys.stdout is before
    assert calls == ["called"]


def test_without_a_driver_there_are_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(devices.ctypes, "CDLL", absent)
    assert devices.cuda_devices() == 0


@pytest.mark.parametrize(("started", "counted", "expected"), [(0, 0, 2), (100, 0, 0), (0, 100, 0)])
def test_devices_are_the_drivers(monkeypatch: pytest.MonkeyPatch, started: int, counted: int, expected: int) -> None:
    class Driver:
        def cuInit(self, _: int) -> int:  # noqa: N802
            return started

        def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
            count._obj.value = 2
            return counted

    monkeypatch.setattr(devices.ctypes, "CDLL", lambda _: Driver())
    assert devices.cuda_devices() == expected
