"""The loop of the TensorRT backends on a stand-in (standin.py).

What this does not show: TensorRT, the CUDA driver and a GPU, that plans are right, and how fast any of it is (`make
gpu-check`). That the stand-in has the names and parameters of the real libraries: test_standin.py.
"""

from __future__ import annotations

import gc
import inspect
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bksdm_runtime import bundle as bundles
from bksdm_runtime import plans
from bksdm_runtime.backends import plan_engine, rtx
from bksdm_runtime.engine import EngineError, EngineSettings, Sampler
from bksdm_runtime.inflight import Drawn, Event, InFlight
from bksdm_runtime.pipeline import Pipeline, Step, sample
from tests.runtime.standin import (
    HERE,
    ON_HOST,
    ON_PLANS,
    Driver,
    build,
)
from tests.runtime.trajectories import CACHED, CHANGES, PLAIN, differ, steps


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    return build(Path(shutil.copytree(toy_bundle, tmp_path / "bundle")))


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.usefixtures("driver")
def test_latents_are_those_of_the_loop_on_the_host(bundle: Path, changes: dict[str, Any]) -> None:
    request = replace(PLAIN, **changes)
    error = differ(Pipeline.open(bundle, ON_PLANS), Pipeline.open(bundle, ON_HOST), request)
    assert error < 2e-6  # measured: 0, here and below, the stand-in's sums being in the host's order


@pytest.mark.usefixtures("driver")
def test_a_batch_an_init_image_and_one_picture_after_another(bundle: Path) -> None:
    picture = Image.new("RGB", (128, 64), (200, 30, 30))
    on_device, host = Pipeline.open(bundle, ON_PLANS), Pipeline.open(bundle, ON_HOST)
    assert isinstance(on_device._engines["unet"], Sampler)
    batch = [replace(PLAIN, seed=seed, guidance_scale=scale) for seed, scale in ((1, 3.0), (2, 7.5), (3, 12.0))]
    drawn = replace(PLAIN, init_image=picture, strength=0.5, sampler="dpmsolver++")
    for requests in (batch, [drawn], [PLAIN], [replace(PLAIN, steps=3)], batch):
        assert differ(on_device, host, *requests) < 2e-6
    np.testing.assert_array_equal(on_device.draw([PLAIN])[0], host.draw([PLAIN])[0])


@pytest.mark.usefixtures("driver")
def test_pictures_in_flight_share_what_the_engine_was_built_for(bundle: Path) -> None:
    pipeline = Pipeline.open(bundle, ON_PLANS)
    requests = [replace(PLAIN, seed=seed, steps=2 + seed, guidance_scale=1.5 + seed) for seed in range(6)]
    under_way = InFlight(pipeline, slots=6)
    assert under_way.counts(64, 128) == (2, 4, 6, 8)  # of 12, eight rows being the most
    asked = {under_way.admit(request): request for request in requests}
    events: list[Event] = []
    while len(under_way):
        events += under_way.advance()
    drawn = {event.ticket: event.pixels for event in events if isinstance(event, Drawn)}
    assert drawn.keys() == asked.keys()
    for ticket, pixels in drawn.items():
        np.testing.assert_array_equal(pixels, pipeline.draw([asked[ticket]])[0])
    with pytest.raises(EngineError, match="not built for 1 picture at once of 128x1088 px"):
        under_way.admit(replace(PLAIN, height=1088))


@pytest.mark.parametrize("changes", CACHED.values(), ids=CACHED)
@pytest.mark.usefixtures("driver")
def test_deep_features_stay_where_they_are(
    make_toy_bundle: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = build(make_toy_bundle(tmp_path / "cached", step_cache=True))
    request = replace(PLAIN, steps=10, **changes)
    assert differ(Pipeline.open(folder, ON_PLANS), Pipeline.open(folder, ON_HOST), request) < 2e-6


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("cached", [False, True])
def test_engines_of_fixed_shapes_open_and_draw(
    make_toy_bundle: Callable[..., Path], tmp_path: Path, cached: bool
) -> None:
    """As bksdm-build makes them by default: a plan's own shapes are then numbers, where bundle.json has names."""
    square = replace(PLAIN, width=64)
    folder = build(make_toy_bundle(tmp_path / "fixed", step_cache=cached), fixed=(PLAIN, square))
    on_device, host = Pipeline.open(folder, ON_PLANS), Pipeline.open(folder, ON_HOST)
    for request in (PLAIN, square):
        assert differ(on_device, host, replace(request, cache_interval=2 if cached else 1)) < 2e-6
        np.testing.assert_array_equal(on_device.draw([request])[0], host.draw([request])[0])
    one = build(make_toy_bundle(tmp_path / "one", step_cache=cached), fixed=(PLAIN,))
    assert differ(Pipeline.open(one, ON_PLANS), Pipeline.open(one, ON_HOST), PLAIN) < 2e-6


@pytest.mark.usefixtures("driver")
def test_half_precision_is_stepped_in_single(make_toy_bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = build(make_toy_bundle(tmp_path / "half", dtype="float16"))
    on_device = Pipeline.open(folder, ON_PLANS)
    assert on_device.arithmetic == "f16"
    assert differ(on_device, Pipeline.open(folder, ON_HOST), replace(PLAIN, steps=25)) < 2e-6


def test_the_second_picture_only_replays(driver: Driver, bundle: Path) -> None:
    pipeline = Pipeline.open(bundle, ON_PLANS)
    first = pipeline.draw([PLAIN])[0]
    made, blocks = driver.library.contexts, len(driver.blocks)  # type: ignore[attr-defined]
    assert driver.replayed == 7  # PNDM's six steps
    for _ in range(20):
        np.testing.assert_array_equal(pipeline.draw([PLAIN])[0], first)
    assert (driver.library.contexts, driver.replayed) == (made, 7 * 21)  # type: ignore[attr-defined]
    gc.collect()
    assert len(driver.blocks) == blocks
    for size in range(64, 1024, 64):  # of many sizes a few are kept
        pipeline.draw([replace(PLAIN, height=size, width=size, steps=1)])
    assert driver.modules == 1
    gc.collect()
    gc.disable()
    try:
        del pipeline  # is enough: nothing waits for the collector
        assert not driver.blocks
    finally:
        gc.enable()


def test_without_cuda_graphs_the_picture_is_the_same(driver: Driver, bundle: Path) -> None:
    first = Pipeline.open(bundle, ON_PLANS).draw([PLAIN])[0]
    replayed, driver.fails = driver.replayed, "cuStreamBeginCapture"
    np.testing.assert_array_equal(Pipeline.open(bundle, ON_PLANS).draw([PLAIN])[0], first)
    assert driver.replayed == replayed


@pytest.mark.usefixtures("driver")
def test_two_pictures_drawn_at_once_are_kept_apart_and_one_may_be_left(bundle: Path) -> None:
    pipeline, host = Pipeline.open(bundle, ON_PLANS), Pipeline.open(bundle, ON_HOST)
    other = replace(PLAIN, prompt="a green pear", seed=9)
    alone = [steps(host, PLAIN), steps(host, other)]
    both = [pipeline.generate([one]) for one in (PLAIN, other)]
    left = pipeline.generate([replace(PLAIN, seed=5)])
    next(left)
    for i in range(7):
        for run, wanted in zip(both, alone, strict=True):
            item = next(run)
            assert isinstance(item, Step)
            np.testing.assert_allclose(item.latents, wanted[i][1], rtol=0, atol=2e-6 * np.abs(wanted[i][1]).max())
    left.close()
    for run in both:
        run.close()
    assert differ(pipeline, host, PLAIN) < 2e-6


def test_what_rtx_compiles_is_kept_and_found_again(tmp_path: Path, bundle: Path) -> None:
    class Cache:
        def __init__(self) -> None:
            self.content = b""

        def serialize(self) -> bytes:
            return self.content

        def deserialize(self, blob: bytes) -> bool:
            self.content = blob
            return True

    class Config:
        def create_runtime_cache(self) -> Cache:
            return Cache()

        def set_runtime_cache(self, cache: Cache) -> bool:
            self.cache = cache
            return True

        dynamic_shapes_kernel_specialization_strategy: Any = None

    class Engine:
        def create_runtime_config(self) -> Config:
            return Config()

        def create_execution_context(self, config: Config) -> Config:
            return config

    plan = plans.read(plans.key_path(bundles.load(bundle), HERE, "unet"))
    wanted = EngineSettings(compiled_cache=tmp_path / "cache")
    first = rtx.RTXContexts(plan, wanted)
    made = first.new(Engine())
    assert made.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    made.cache.content = b"compiled"
    first.ran()
    assert rtx.RTXContexts(plan, wanted).new(Engine()).cache.content == b"compiled"
    assert rtx.RTXContexts(replace(plan, sha256="0"), wanted).new(Engine()).cache.content == b""
    rtx.RTXContexts(plan, EngineSettings()).ran()  # nothing is kept where nothing was asked for


@pytest.mark.usefixtures("driver")
def test_the_loop_takes_what_the_hosts_loop_takes() -> None:
    own = list(inspect.signature(plan_engine.PlanUNet.sample).parameters)[1:]
    assert own == list(inspect.signature(sample).parameters)[1:]
