"""Which engine is run for what, and what is refused, on a stand-in for TensorRT (standin.py).

What this does not show: TensorRT, the CUDA driver and a GPU, that plans are right, and how fast any of it is (`make
gpu-check`). That the stand-in has the names and parameters of the real libraries: test_standin.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from bksdm_runtime import bundle as bundles
from bksdm_runtime import demands, plans
from bksdm_runtime.backends import device
from bksdm_runtime.bundle import BundleError
from bksdm_runtime.checks import check
from bksdm_runtime.engine import EngineError, MissingBackend
from bksdm_runtime.pipeline import Pipeline, Step
from bksdm_runtime.plans import EngineKey, Machine, Range
from tests.runtime.standin import (
    HERE,
    ON_HOST,
    ON_PLANS,
    Driver,
    build,
)
from tests.runtime.trajectories import PLAIN, differ


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    return build(Path(shutil.copytree(toy_bundle, tmp_path / "bundle")))


@pytest.mark.usefixtures("driver")
def test_a_picture_that_the_engine_was_not_built_for_is_refused_before_anything_runs(bundle: Path) -> None:
    pipeline = Pipeline.open(bundle, ON_PLANS)
    expected = (
        rf"the engine of unet was not built for 1 picture at once of 128x1088 px: "
        rf"bksdm-build {bundle} --library tensorrt --add --height 1088 --width 128, or take another --backend"
    )
    with pytest.raises(EngineError, match=expected):
        pipeline.generate([replace(PLAIN, height=1088)])
    with pytest.raises(EngineError, match=r"for 5 pictures at once of 128x64 px.*--batch 5"):
        pipeline.generate([PLAIN] * 5, batch_size=5)
    batches = {item.positions for item in pipeline.generate([PLAIN] * 9) if isinstance(item, Step)}
    assert batches == {(0, 1, 2, 3), (4, 5, 6, 7), (8,)}  # eight rows at most
    tall = replace(PLAIN, height=1088, vae_tile=512)
    with pytest.raises(EngineError, match="the engine of unet was not built for 1 picture at once of 128x1088"):
        pipeline.generate([tall])


@pytest.mark.usefixtures("driver")
def test_whatever_a_picture_will_need_is_asked_before_it_is_begun(
    make_toy_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = build(make_toy_bundle(tmp_path / "cached", step_cache=True))
    opened = bundles.load(folder)
    pipeline = Pipeline.open(folder, ON_PLANS)
    picture = Image.new("RGB", (128, 64))
    wide = replace(PLAIN, width=320, vae_tile=192)
    pipeline.draw([replace(wide, cache_interval=2, init_image=picture)])
    for component, changes in (
        ("unet_shallow", {"cache_interval": 2}),
        ("vae_encoder", {"init_image": picture}),
    ):
        plans.key_path(opened, HERE, component).unlink()
        pipeline = Pipeline.open(folder, ON_PLANS)
        pipeline.draw([PLAIN])
        with pytest.raises(EngineError, match=f"has no engine of {component}"):
            pipeline.generate([replace(PLAIN, **changes)])
    one = build(make_toy_bundle(tmp_path / "one"), fixed=(wide,))
    with pytest.raises(
        EngineError, match=r"vae_decoder was not built for tiles of 192x64 px: .* --component vae_decoder --height"
    ):
        Pipeline.open(one, ON_PLANS).generate([wide])


@pytest.mark.usefixtures("driver")
def test_an_engine_for_guided_pictures_alone_says_how_to_get_the_others(toy_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))
    build(folder)
    opened = bundles.load(folder)
    path = plans.key_path(opened, HERE, "unet")
    plan = plans.read(path)
    two = {name: Range(*((2, *shape[1:]) for shape in (span.smallest, span.fastest, span.largest)))
           for name, span in plan.key.profiles[0].items()}  # fmt: skip
    path.write_text(replace(plan, key=replace(plan.key, profiles=(two,))).to_json())
    pipeline = Pipeline.open(folder, ON_PLANS)
    assert len(pipeline.draw([PLAIN, PLAIN])) == 2  # one after the other
    with pytest.raises(EngineError, match=r"for 1 picture at once of 128x64 px without guidance.*--unguided"):
        pipeline.generate([replace(PLAIN, guidance_scale=1.0)])


NEARLY: dict[str, tuple[Machine, dict[str, Any], str]] = {
    "another version": (
        replace(HERE, version="10.3.0"),
        {},
        r"engines/sm89-trt10\.3\.0-nvidia-l4 was built with TensorRT 10\.3\.0: run bksdm-build",
    ),
    "another compute capability": (replace(HERE, sm="8.6"), {}, "was built for SM 8.6"),
    "another GPU of the same": (replace(HERE, gpu="GeForce RTX 4090"), {}, r"was built for an GeForce RTX 4090"),
    "another platform": (replace(HERE, platform="linux-aarch64"), {}, "was built on linux-aarch64"),
    "another library": (
        replace(HERE, library="tensorrt-rtx"),
        {},
        "engines/sm89-rtx11.4.0.106-nvidia-l4 is for TensorRT-RTX",
    ),
    "other weights": (HERE, {"onnx": "0" * 64}, "was built from another graph or other weights"),
}


@pytest.mark.parametrize(("machine", "changes", "why"), NEARLY.values(), ids=NEARLY)
@pytest.mark.usefixtures("driver")
def test_an_engine_that_does_not_fit_is_not_run(
    toy_bundle: Path, tmp_path: Path, machine: Machine, changes: dict[str, Any], why: str
) -> None:
    folder = build(Path(shutil.copytree(toy_bundle, tmp_path / "bundle")), machine, **changes)
    with pytest.raises(EngineError, match=why) as caught:
        Pipeline.open(folder, ON_PLANS)
    assert "has no engine of" in str(caught.value)
    assert "for TensorRT 11.4.0.106 on SM 8.9 (NVIDIA L4)" in str(caught.value)


def test_the_profile_that_holds_the_least_besides_is_taken() -> None:
    wide, narrow = {"x": Range((1, 4), (2, 4), (8, 4))}, {"x": Range((2, 4), (2, 4), (2, 4))}
    key = EngineKey("unet", "a", HERE, (wide, narrow), {})
    assert [key.profile_for({"x": (rows, 4)}) for rows in (1, 2, 3, 9)] == [0, 1, 0, None]


def test_what_flags_let_an_engine_fit() -> None:
    key = EngineKey("unet", "a", Machine("tensorrt", "10.3.0", "8.6"), ({},), {})
    ampere = replace(key, flags={plans.HARDWARE: plans.AMPERE_AND_LATER})
    assert key.misfit("a", replace(key.machine, sm="8.9")) == "was built for SM 8.6"
    assert ampere.misfit("a", replace(key.machine, sm="8.9")) is None
    assert ampere.misfit("a", replace(key.machine, sm="12.0")) is None
    assert ampere.misfit("a", replace(key.machine, sm="7.5")) == "was built for SM 8.6"
    compatible = replace(key, flags={plans.VERSION_COMPATIBLE: True})
    assert compatible.misfit("a", replace(key.machine, version="10.13.0")) is None
    assert compatible.misfit("a", replace(key.machine, version="9.9.9")) == "was built with TensorRT 10.3.0"


def test_a_gpu_with_rtx_in_its_name_has_no_engines_of_tensorrt_rtx(bundle: Path) -> None:
    build(bundle, replace(HERE, gpu="NVIDIA GeForce RTX 4090"))
    opened = bundles.load(bundle)
    assert (len(plans.built(opened, "tensorrt")), plans.built(opened, "tensorrt-rtx")) == (8, [])


def test_the_own_gpus_engine_goes_before_that_of_its_compute_capability_and_that_before_others(bundle: Path) -> None:
    wide = replace(HERE, gpu="", sm="8.0")
    build(bundle, wide, flags={plans.HARDWARE: plans.AMPERE_AND_LATER})
    build(bundle, replace(HERE, gpu=""))
    opened = bundles.load(bundle)
    for machine in (HERE, replace(HERE, gpu=""), wide):
        assert plans.find(opened, "unet", HERE).key.machine == machine
        plans.key_path(opened, machine, "unet").unlink()
    with pytest.raises(BundleError, match="has no engine of unet"):
        plans.find(opened, "unet", HERE)


@pytest.mark.usefixtures("driver")
def test_batches_are_as_few_as_the_engine_was_built_for(toy_bundle: Path, tmp_path: Path) -> None:
    folder = build(Path(shutil.copytree(toy_bundle, tmp_path / "bundle")))
    opened = bundles.load(folder)
    path = plans.key_path(opened, HERE, "unet")
    plan = plans.read(path)

    def of(smallest: int, largest: int) -> dict[str, Range]:
        return {
            name: Range((smallest, *span.smallest[1:]), (largest, *span.fastest[1:]), (largest, *span.largest[1:]))
            for name, span in plan.key.profiles[0].items()
        }

    def split(count: int, *profiles: dict[str, Range]) -> list[int]:
        path.write_text(replace(plan, key=replace(plan.key, profiles=profiles)).to_json())
        pipeline = Pipeline.open(folder, ON_PLANS)
        asked = [replace(PLAIN, seed=seed) for seed in range(count)]
        [whole] = check(pipeline.bundle, asked, batch_size=16)[0]
        parts = demands.split(whole, pipeline.bundle, pipeline.engine)
        assert [position for part in parts for position in part.positions] == list(range(count))
        return [len(part.requests) for part in parts]

    assert split(9, of(4, 16)) == [7, 2]  # and not 8 and 1, which is refused
    assert split(4, of(4, 4), of(6, 6)) == [2, 2]
    assert split(3, of(2, 2), of(8, 8)) == [1, 1, 1]
    assert split(3, of(16, 16)) == [1, 1, 1]  # each of which is refused, and so is the first
    with pytest.raises(EngineError, match="not built for 1 picture at once of 128x64 px: "):
        Pipeline.open(folder, ON_PLANS).generate([PLAIN] * 3)


@pytest.mark.usefixtures("driver")
def test_several_gpus_engines_lie_side_by_side(bundle: Path) -> None:
    build(bundle, replace(HERE, sm="8.6"))
    build(bundle, replace(HERE, version="10.3.0"))
    build(bundle, replace(HERE, gpu="another model"))
    build(bundle, replace(HERE, platform="linux-aarch64"))
    opened = bundles.load(bundle)
    assert len(plans.built(opened, "tensorrt")) == 20
    plans.key_path(opened, replace(HERE, sm="8.6"), "unet").write_text("{")  # another's damage hides nothing
    assert differ(Pipeline.open(bundle, ON_PLANS), Pipeline.open(bundle, ON_HOST), PLAIN) < 2e-6


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no plan": (lambda path: path.with_suffix(".plan").unlink(), r"unet\.plan cannot be read: No such file"),
    "half a plan": (
        lambda path: path.with_suffix(".plan").write_bytes(b"half"),
        r"has 4 bytes, its key says \d+: run bksdm-build again",
    ),
    "a changed plan": (
        lambda path: path.with_suffix(".plan").write_bytes(path.with_suffix(".plan").read_bytes()[::-1]),
        r"was changed or damaged \(sha256",
    ),
    "no JSON": (lambda path: path.write_text("{"), r"unet\.json: is not JSON"),
    "another schema": (
        lambda path: path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2')),
        r"schema version 2 is unknown",
    ),
    "a plan elsewhere": (
        lambda path: path.write_text(path.read_text().replace('"unet.plan"', '"../../unet.plan"')),
        "is not a path inside the bundle",
    ),
    "another input": (
        lambda path: path.write_text(path.read_text().replace('"timestep": {', '"time": {')),
        "has other inputs than unet: run bksdm-build again",
    ),
    "a nonsensical profile": (
        lambda path: path.write_text(json.dumps(_swapped(json.loads(path.read_text())))),
        "the fastest shape must lie between",
    ),
}


def _swapped(key: dict[str, Any]) -> dict[str, Any]:
    span = key["key"]["profiles"][0]["sample"]
    span["smallest"], span["largest"] = span["largest"], span["smallest"]
    return key


@pytest.mark.parametrize(("damage", "why"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.usefixtures("driver")
def test_a_damaged_engine_is_one_sentence(bundle: Path, damage: Callable[[Path], object], why: str) -> None:
    damage(plans.key_path(bundles.load(bundle), HERE, "unet"))
    with pytest.raises(EngineError, match=why):
        Pipeline.open(bundle, ON_PLANS)


def test_what_the_library_refuses_is_one_sentence(driver: Driver, bundle: Path) -> None:
    library = driver.library  # type: ignore[attr-defined]
    pipeline = Pipeline.open(bundle, ON_PLANS)
    for refuses, why in (("context", "no execution context"), ("run", "did not run: TensorRT says no more")):
        library.refuses = refuses
        with pytest.raises(EngineError, match=f"text_encoder:? {why}"):
            pipeline.draw([PLAIN])
    library.refuses, driver.fails = "", "cuMemAlloc"
    with pytest.raises(EngineError, match=r"text_encoder ran out of memory at input_ids \[1, 77\]"):
        Pipeline.open(bundle, ON_PLANS).draw([PLAIN])
    driver.fails = None
    path = plans.key_path(bundles.load(bundle), HERE, "unet")
    plan = plans.read(path)
    plan.path.write_bytes(b"no plan")
    path.write_text(replace(plan, bytes=7, sha256=bundles.file_sha256(plan.path)).to_json())
    with pytest.raises(EngineError, match=r"unet\.plan cannot be read: IRuntime::deserializeCudaEngine: magic tag"):
        Pipeline.open(bundle, ON_PLANS)
    build(bundle)
    for fails, why in (("cuStreamCreate", "cuStreamCreate: CUDA_ERROR_OUT_OF_MEMORY"), ("cuCtxSetCurrent", "cuCtx")):
        driver.fails = fails
        with pytest.raises(EngineError, match=f"backend 'tensorrt' does not start: {why}"):
            Pipeline.open(bundle, ON_PLANS)
    driver.fails = None
    library.Runtime = lambda logger: (_ for _ in ()).throw(TypeError("pybind11::init(): factory returned nullptr"))
    with pytest.raises(EngineError, match="does not start: pybind11::init"):
        Pipeline.open(bundle, ON_PLANS)


def test_a_stripped_plan_gets_its_weights_and_a_streamed_one_its_budget(driver: Driver, bundle: Path) -> None:
    library = driver.library  # type: ignore[attr-defined]
    fits = [True]
    read: list[str] = []
    library.Refitter = lambda engine, logger: SimpleNamespace(refit_cuda_engine=lambda: True)
    library.OnnxParserRefitter = lambda refitter, logger: SimpleNamespace(
        refit_from_file=lambda path: read.append(path) or fits[0]
    )
    build(bundle, flags={plans.STRIPPED: True, plans.WEIGHT_STREAMING: True})
    opened = bundles.load(bundle)
    pipeline = Pipeline.open(bundle, ON_PLANS)
    assert {str(opened.component_path(name)) for name in ("unet", "text_encoder", "vae_decoder")} == set(read)
    unet: Any = pipeline._engines["unet"]
    assert unet.loaded.engine.weight_streaming_budget_v2 == 1 << 20
    fits[0] = False
    with pytest.raises(
        EngineError, match=r"unet\.plan does not take the weights of .*model\.onnx: TensorRT says no more"
    ):
        Pipeline.open(bundle, ON_PLANS)


@pytest.mark.usefixtures("driver")
def test_int8_and_another_arithmetic_are_refused(bundle: Path) -> None:
    with pytest.raises(EngineError, match="computes this bundle in f32, not in bf16"):
        Pipeline.open(bundle, replace(ON_PLANS, arithmetic="bf16"))
    opened = bundles.load(bundle)
    int8 = replace(opened, manifest=replace(opened.manifest, precision="int8"))
    with pytest.raises(EngineError, match="runs bundles of precision fp16 or fp32, and this is int8"):
        Pipeline.open(int8, ON_PLANS)


@pytest.mark.usefixtures("driver")
def test_auto_takes_tensorrt_where_the_bundle_has_engines(
    bundle: Path, toy_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="bksdm_runtime"):
        assert Pipeline.open(bundle).backend == "tensorrt"
        assert Pipeline.open(toy_bundle).backend in ("openvino", "onnxruntime")
    assert "tensorrt, because the bundle has engines for TensorRT and there is a CUDA device" in caplog.text
    assert "not tensorrt, because the bundle has no engines for it (see bksdm-build)" in caplog.text
    plans.key_path(bundles.load(bundle), HERE, "unet").write_text("{")
    assert Pipeline.open(bundle).backend in ("openvino", "onnxruntime")
    assert "a GPU is there, but backend tensorrt does not start: engine key" in caplog.text


def test_without_a_device_or_the_library_it_is_one_sentence(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingBackend, match=r"backend 'tensorrt' needs tensorrt: pip install 'bksdm\[tensorrt\]'"):
        Pipeline.open(bundle, ON_PLANS)
    device.device.cache_clear()
    monkeypatch.setattr(device, "cuda_devices", lambda: 0)
    with pytest.raises(EngineError, match="needs a CUDA device and NVIDIA's driver, and found none here"):
        Pipeline.open(bundle, replace(ON_PLANS, backend="tensorrt-rtx"))
