"""The whole pipeline against diffusers' schedulers, torch's noise and transformers' tokenizer, on the toy model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from bksdm_runtime import bundle as bundles
from bksdm_runtime import pipeline as pipelines
from bksdm_runtime.batches import batch_limit, unet_bytes
from bksdm_runtime.bundle import BundleError
from bksdm_runtime.engine import EngineError, EngineSettings
from bksdm_runtime.image import ImageError
from bksdm_runtime.noise import randn
from bksdm_runtime.pipeline import Images, Pipeline, Request, Step, sample
from bksdm_runtime.request import RequestError
from bksdm_runtime.schedule import ScheduleError, make_schedule

# diffusers 0.39 builds numpy arrays from tensors the way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CLIP_TOKENIZER = Path(__file__).parents[2] / "bksdm" / "clip_tokenizer"
SCHEDULERS = {
    "pndm": diffusers.PNDMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
}
SCALING = 0.18215
ONE = EngineSettings(backend="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def pipeline(toy_bundle: Path) -> Pipeline:
    return Pipeline.open(toy_bundle, ONE)


class Reference:
    """StableDiffusionPipeline's and StableDiffusionImg2ImgPipeline's loops, written out over torch and diffusers."""

    def __init__(self, weights: Any, config: dict[str, Any]) -> None:
        self.weights = {name: torch.from_numpy(array) for name, array in vars(weights).items()}
        self.config = config
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(CLIP_TOKENIZER)
        self.deep = torch.empty(0)  # features of the last whole evaluation

    def context(self, prompt: str) -> torch.Tensor:
        ids = self.tokenizer(
            prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        return self.weights["embedding"][ids]  # [1, 77, D]

    def unet(
        self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, *, cached: bool = False
    ) -> torch.Tensor:
        conv, w = torch.nn.functional.conv2d, self.weights
        bias = torch.sin(timestep.float() / 1000 * w["time"]) + context.mean(1) @ w["context"]
        if not cached:
            self.deep = torch.tanh(conv(sample, w["conv_in"], padding=1) + bias[:, :, None, None])
        return conv(self.deep[-len(sample) :], w["conv_out"], padding=1) + sample / 2

    def __call__(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        """Final latents [4, h, w] and picture [H, W, 3] uint8 of one request, alone."""
        scheduler = SCHEDULERS[request.sampler].from_config(self.config)
        scheduler.set_timesteps(request.steps)
        generator = torch.Generator().manual_seed(request.seed)
        height, width = request.height or 64, request.width or 64
        shape = (1, 4, height // 8, width // 8)
        timesteps = scheduler.timesteps
        if request.init_image is not None:
            run = min(int(request.steps * request.strength), request.steps)
            timesteps = timesteps[request.steps - run :]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(request.steps - run)
            assert isinstance(request.init_image, Image.Image)
            image = VaeImageProcessor().preprocess(request.init_image, height=height, width=width)
            parameters = torch.nn.functional.conv2d(image, self.weights["encoder"], stride=8)
            posterior = DiagonalGaussianDistribution(parameters)
            clean = SCALING * posterior.sample(generator)
            noise = torch.randn(shape, generator=generator)
            latents = scheduler.add_noise(clean, noise, timesteps[:1])
        else:
            latents = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
        context = self.context(request.prompt)
        scale = 7.5 if request.guidance_scale is None else request.guidance_scale  # the toy bundle's own
        guided = scale > 1
        if guided:
            context = torch.cat([self.context(request.negative_prompt), context])
        first, end = (int(share * len(timesteps)) for share in request.guidance_interval)
        negative_known = False
        for i, timestep in enumerate(timesteps):
            now = guided and first <= i < end
            model_input = scheduler.scale_model_input(torch.cat([latents] * 2) if now else latents, timestep)
            cached = i % request.cache_interval > 0 and (negative_known or not now)
            output = self.unet(model_input, timestep, context[-len(model_input) :], cached=cached)
            negative_known = now
            if now:
                negative, positive = output.chunk(2)
                output = negative + scale * (positive - negative)
            latents = scheduler.step(output, timestep, latents).prev_sample
        decoded = torch.nn.functional.conv2d(latents / SCALING, self.weights["decoder"])
        decoded = torch.nn.functional.interpolate(decoded, scale_factor=8, mode="nearest")
        [picture] = VaeImageProcessor().postprocess(decoded, output_type="pil")
        return latents[0].numpy(), np.asarray(picture)


@pytest.fixture(scope="module")
def reference(toy_bundle: Path, toy_weights: Any) -> Reference:
    return Reference(toy_weights, dict(bundles.load(toy_bundle).scheduler_config))


def run(pipeline: Pipeline, requests: Sequence[Request], **options: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Final latents and pictures, in the order of the requests."""
    latents: dict[int, np.ndarray] = {}
    pictures: dict[int, np.ndarray] = {}
    for item in pipeline.generate(requests, **options):
        if isinstance(item, Step):
            latents.update(zip(item.positions, item.latents, strict=True))
        else:
            pictures.update(zip(item.positions, item.pixels, strict=True))
    places = range(len(requests))
    return [latents[i] for i in places], [pictures[i] for i in places]


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Latents of up to 23 after float32 through up to 26 evaluations. Measured: 5e-5 at most."""
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)


def assert_same_picture(ours: np.ndarray, theirs: np.ndarray) -> None:
    """A value that lies on the edge between two levels may fall on either side; no more than one level."""
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    assert np.mean(ours != theirs) < 0.01  # measured: none differ


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize(("steps", "guidance"), [(25, 7.5), (7, 1.0), (1, 3.0)])
def test_text_to_image_is_diffusers(
    pipeline: Pipeline, reference: Reference, sampler: str, steps: int, guidance: float
) -> None:
    request = Request("a red apple", "blurry, dark", 5, steps=steps, guidance_scale=guidance, sampler=sampler)
    [latents], [picture] = run(pipeline, [request])
    expected_latents, expected = reference(request)
    assert_close(latents, expected_latents)
    assert_same_picture(picture, expected)
    assert picture.std() > 10  # a picture that is all black or all white would prove nothing


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
def test_image_to_image_is_diffusers(pipeline: Pipeline, reference: Reference, sampler: str, strength: float) -> None:
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (90, 70, 3), np.uint8))
    request = Request("a red apple", seed=11, steps=20, sampler=sampler, init_image=picture, strength=strength)
    [latents], [ours] = run(pipeline, [request])
    expected_latents, expected = reference(request)
    assert_close(latents, expected_latents)
    assert_same_picture(ours, expected)


@pytest.mark.parametrize(("height", "width"), [(64, 128), (192, 64)])
def test_other_sizes_are_diffusers(pipeline: Pipeline, reference: Reference, height: int, width: int) -> None:
    request = Request("a pear", seed=2, steps=10, height=height, width=width)
    [latents], [picture] = run(pipeline, [request])
    assert picture.shape == (height, width, 3)
    assert_close(latents, reference(request)[0])
    assert_same_picture(picture, reference(request)[1])


@pytest.mark.parametrize(
    "prompt", ["", pytest.param("苹果 🍎", marks=pytest.mark.needs_reference), "x " * 500], ids=["empty", "cjk", "long"]
)
def test_any_prompt_is_diffusers(pipeline: Pipeline, reference: Reference, prompt: str) -> None:
    request = Request(prompt, prompt[::-1], seed=0, steps=3)
    assert_close(run(pipeline, [request])[0][0], reference(request)[0])


def test_a_fp16_bundle_stays_close(make_toy_bundle: Callable[..., Path], tmp_path: Path, reference: Reference) -> None:
    request = Request("a red apple", seed=5, steps=10)
    [latents], _ = run(Pipeline.open(make_toy_bundle(tmp_path / "half", dtype="float16"), ONE), [request])
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, reference(request)[0], atol=0.1)  # measured: 0.03 on values up to 16


MIXED = [
    Request("a red apple", seed=1, steps=8),
    Request("a pear", "ugly", seed=2, steps=8, guidance_scale=3.0),
    Request("a plum", seed=3, steps=8, guidance_scale=1.0),
    Request("a wide plum", seed=3, steps=8, width=128),
    Request("a red apple", seed=4, steps=8, sampler="euler"),
    Request("a red apple", seed=1, steps=8, noise="cuda"),
    Request("", seed=5, steps=9),
    Request("a plum", seed=2**63 - 1, steps=8, guidance_scale=1.0),
]


@pytest.fixture(scope="module")
def cached(make_toy_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = make_toy_bundle(tmp_path_factory.mktemp("cached") / "bundle", step_cache=True)
    return Pipeline.open(folder, ONE)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.8), (0.25, 0.7)])
@pytest.mark.parametrize("cache", [1, 2, 3, 5])
def test_saved_evaluations_are_those_written_out(
    cached: Pipeline, reference: Reference, sampler: str, guidance: float, interval: tuple[float, float], cache: int
) -> None:
    request = Request(
        "a red apple",
        "blurry",
        seed=3,
        steps=12,
        sampler=sampler,
        guidance_scale=guidance,
        guidance_interval=interval,
        cache_interval=cache,
    )
    [latents], [picture] = run(cached, [request])
    expected_latents, expected = reference(request)
    assert_close(latents, expected_latents)
    assert_same_picture(picture, expected)


def test_a_cached_image_is_the_same_alone_and_in_company(cached: Pipeline) -> None:
    requests = [
        Request(f"picture {i}", seed=i, steps=6, cache_interval=3 - i % 2, guidance_interval=(0.2, 0.9))
        for i in range(4)
    ]
    latents, _ = run(cached, requests, batch_size=2)
    for i, request in enumerate(requests):
        [alone], _ = run(cached, [request])
        assert_close(latents[i], alone)


def test_the_whole_unet_runs_every_so_many_evaluations_alone(cached: Pipeline) -> None:
    calls: list[str] = []

    class Noting:
        def __init__(self, name: str, engine: Any) -> None:
            self.name, self.engine = name, engine

        def __call__(self, inputs: Any) -> Any:
            calls.append(f"{self.name} {len(inputs['sample'])}")
            return self.engine(inputs)

    cached.draw([Request("a", steps=1, cache_interval=2)])  # opens the shallow one
    before = dict(cached._engines)
    try:
        cached._engines.update({name: Noting(name, before[name]) for name in ("unet", "unet_shallow")})
        cached.draw([Request("a", steps=5, sampler="euler", cache_interval=2, guidance_interval=(0.0, 0.8))])
        assert calls == ["unet 2", "unet_shallow 2", "unet 2", "unet_shallow 2", "unet 1"]
        calls.clear()
        cached.draw([Request("a", steps=5, sampler="euler", cache_interval=4, guidance_interval=(0.5, 1.0))])
        assert calls == ["unet 1", "unet_shallow 1", "unet 2", "unet_shallow 2", "unet 2"]
    finally:
        cached._engines.update(before)


def test_engines_are_told_the_shapes_that_come(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    class AtOnce(NamedTuple):
        target: Callable[[], None]

        def start(self) -> None:
            self.target()

    monkeypatch.setattr(pipelines, "Thread", AtOnce)

    class Told:
        def __init__(self, name: str, engine: Any) -> None:
            self.name, self.engine = name, engine

        def prepare(self, shapes: Any) -> None:
            told[self.name] = dict(shapes)

        def __call__(self, inputs: Any) -> Any:
            given = {name: array.shape for name, array in inputs.items()}
            assert self.name == "text_encoder" or told[self.name] == given
            return self.engine(inputs)

    before = dict(pipeline._engines)
    try:
        pipeline._engines.update({name: Told(name, engine) for name, engine in before.items()})
        pipeline.draw([Request("a", steps=2, height=64, width=128), Request("b", steps=2, height=64, width=128)])
        pipeline.draw([Request("a", steps=2, guidance_scale=1.0)])
        assert told["unet"]["sample"] == (1, 4, 8, 8)
        assert list(told) == ["unet", "vae_decoder"]  # the first step waits for the first of them
    finally:
        pipeline._engines.clear()
        pipeline._engines.update(before)


def test_tiles_of_a_pointwise_decoder_are_the_whole_picture(counted: tuple[Pipeline, dict[str, Counting]]) -> None:
    """The toy decoder sees one latent at a time; a real one does not, see docs/shortcuts.md."""
    pipeline, engines = counted
    request = Request("a red apple", steps=2, height=256, width=320)
    [whole] = pipeline.draw([request])
    engines["vae_decoder"].calls.clear()
    [tiled] = pipeline.draw([replace(request, vae_tile=192)])
    assert len(engines["vae_decoder"].calls) == 2 * 2
    assert np.abs(whole.astype(int) - tiled).max() <= 1  # a level where rounding falls the other way
    with pytest.raises(RequestError, match="vae_tile 100 does not fit"):
        pipeline.generate([replace(request, vae_tile=100)])


def test_steps_cannot_be_cached_without_a_shallow_unet(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match="export it again with --step-cache"):
        pipeline.generate([Request("a", cache_interval=2)])


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3])
def test_an_image_is_the_same_alone_and_in_any_batch(pipeline: Pipeline, batch_size: int | None) -> None:
    alone = [run(pipeline, [request]) for request in MIXED]
    latents, pictures = run(pipeline, MIXED, batch_size=batch_size)
    for i, (own_latents, own_picture) in enumerate(alone):
        # Measured: 7e-6 on values up to 10: sums that ONNX Runtime takes in another order in another batch. On the
        # true U-Net of `tiny` (128 to 512 px, batches 1 to 8) it is equal bit for bit on the CPU.
        np.testing.assert_allclose(latents[i], own_latents[0], rtol=0, atol=3e-5)
        assert_same_picture(pictures[i], own_picture[0])


def test_the_same_batch_gives_the_same_bits(pipeline: Pipeline) -> None:
    """What --from-png rests on: the company in a batch does not matter, only its size and the place in it."""
    latents, pictures = run(pipeline, MIXED, batch_size=3)
    items = pipeline.generate(MIXED, batch_size=3)
    for item in [item for item in items if isinstance(item, Images)]:
        [position], [request], [place] = item.positions, item.requests, item.batch_indices
        again, picture_again = run(pipeline, [request] * item.batch_size, batch_size=item.batch_size)
        np.testing.assert_array_equal(again[place], latents[position])
        np.testing.assert_array_equal(picture_again[place], pictures[position])


def test_requests_that_agree_share_a_batch(pipeline: Pipeline) -> None:
    seen = [item.positions for item in pipeline.generate(MIXED) if isinstance(item, Step) and item.index == 0]
    assert seen == [(0, 1, 5), (2, 7), (3,), (4,), (6,)]
    seen = [
        item.positions for item in pipeline.generate(MIXED, batch_size=2) if isinstance(item, Step) and not item.index
    ]
    assert seen == [(0, 1), (5,), (2, 7), (3,), (4,), (6,)]


class Counting:
    """An engine that notes the batch of every call."""

    def __init__(self, engine: Any, tensor: str) -> None:
        self.engine, self.tensor, self.calls = engine, tensor, []
        self.backend, self.component, self.threads = engine.backend, engine.component, engine.threads
        self.arithmetic = engine.arithmetic

    def __call__(self, inputs: Any) -> Any:
        self.calls.append(len(inputs[self.tensor]))
        return self.engine(inputs)


@pytest.fixture
def counted(toy_bundle: Path) -> tuple[Pipeline, dict[str, Counting]]:
    opened = Pipeline.open(toy_bundle, ONE)
    tensors = {"text_encoder": "input_ids", "unet": "sample", "vae_decoder": "latent_sample"}
    engines = {name: Counting(opened._engines[name], tensor) for name, tensor in tensors.items()}
    opened._engines.update(engines)
    return opened, engines


def test_guidance_is_one_batched_evaluation_and_none_at_1(counted: tuple[Pipeline, dict[str, Counting]]) -> None:
    pipeline, engines = counted
    run(pipeline, [Request("a", steps=25), Request("b", steps=25)])
    assert engines["unet"].calls == [4] * 26  # 25 PNDM steps are 26 evaluations
    engines["unet"].calls.clear()
    run(pipeline, [Request("a", steps=25, guidance_scale=1), Request("b", steps=25, guidance_scale=1)])
    assert engines["unet"].calls == [2] * 26
    assert set(engines["vae_decoder"].calls) == {1}


def test_a_bundle_brings_its_own_guidance(
    make_toy_bundle: Callable[..., Path], rewrite_manifest: Callable[..., None], tmp_path: Path
) -> None:
    folder = make_toy_bundle(tmp_path / "toy")
    rewrite_manifest(folder, lambda content: content["model"].update(guidance_scale=2.5))
    pipeline = Pipeline.open(folder, ONE)
    [own], [said] = (run(pipeline, [Request("a", steps=3, guidance_scale=scale)])[0] for scale in (None, 2.5))
    np.testing.assert_array_equal(own, said)
    [images] = [item for item in pipeline.generate([Request("a", steps=1)]) if isinstance(item, Images)]
    assert images.requests[0].guidance_scale == 2.5


def test_a_bundle_of_guidance_1_is_sampled_without(
    make_toy_bundle: Callable[..., Path], rewrite_manifest: Callable[..., None], tmp_path: Path
) -> None:
    folder = make_toy_bundle(tmp_path / "toy")
    rewrite_manifest(folder, lambda content: content["model"].update(guidance_scale=1))
    pipeline = Pipeline.open(folder, ONE)
    unet = pipeline._engines["unet"] = Counting(pipeline._engines["unet"], "sample")
    run(pipeline, [Request("a", steps=1)])
    assert unet.calls == [1]


def test_draw_gives_the_pictures_in_the_order_of_the_requests(pipeline: Pipeline) -> None:
    _, pictures = run(pipeline, MIXED)
    drawn = pipeline.draw(MIXED)
    assert len(drawn) == len(MIXED)
    for ours, theirs in zip(drawn, pictures, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert pipeline.draw([]) == []


def test_each_distinct_prompt_is_encoded_once(counted: tuple[Pipeline, dict[str, Counting]]) -> None:
    pipeline, engines = counted
    run(pipeline, [Request(prompt, steps=1, seed=i) for i, prompt in enumerate("aabba")], batch_size=2)
    assert engines["text_encoder"].calls == [1] * 3  # a, b and the empty negative prompt


def test_without_guidance_the_negative_prompt_is_not_encoded(counted: tuple[Pipeline, dict[str, Counting]]) -> None:
    pipeline, engines = counted
    run(pipeline, [Request("a", "b", steps=1, guidance_scale=1)])
    assert engines["text_encoder"].calls == [1]


def test_the_memory_budget_sets_the_batch(pipeline: Pipeline) -> None:
    requests = [Request("a", seed=i, steps=1) for i in range(5)]
    budget = 2 * 2 * unet_bytes(64)  # two guided images of 8 x 8 latents
    seen = [len(i.positions) for i in pipeline.generate(requests, memory_budget=budget) if isinstance(i, Step)]
    assert seen == [2, 2, 1]
    seen = [len(i.positions) for i in pipeline.generate(requests, memory_budget=1) if isinstance(i, Step)]
    assert seen == [1] * 5


@pytest.mark.parametrize(
    ("side", "guided", "expected"), [(64, True, 16), (128, True, 16), (256, True, 7), (256, False, 14), (512, True, 1)]
)
def test_what_fits_two_gibibytes(side: int, guided: bool, expected: int) -> None:
    assert batch_limit(side, side, 8, guided, 2 << 30) == expected


def test_steps_tell_where_the_loop_is(pipeline: Pipeline) -> None:
    *steps, last = pipeline.generate([Request("a", steps=25)])
    assert isinstance(last, Images)
    assert all(isinstance(step, Step) for step in steps)
    assert [step.index for step in steps] == list(range(26))
    assert {step.total for step in steps} == {26}
    assert [step.timestep for step in steps[:4]] == [961, 921, 921, 881]
    assert {step.latents.shape for step in steps} == {(1, 4, 8, 8)}
    assert last.requests == (Request("a", steps=25, guidance_scale=7.5, height=64, width=64),)


def test_kept_steps_are_not_written_over(pipeline: Pipeline) -> None:
    items = pipeline.generate([Request("a", steps=5)])
    kept = [(item.latents, item.latents.copy()) for item in items if isinstance(item, Step)]
    for latents, copy in kept:
        np.testing.assert_array_equal(latents, copy)


def test_a_preview_is_made_on_demand_only(counted: tuple[Pipeline, dict[str, Counting]]) -> None:
    pipeline, engines = counted
    steps = [item for item in pipeline.generate([Request("a", steps=4)] * 2) if isinstance(item, Step)]
    assert engines["vae_decoder"].calls == [1, 1]
    assert steps[-1].preview().shape == (2, 64, 64, 3)
    assert engines["vae_decoder"].calls == [1] * 4
    [_, final] = run(pipeline, [Request("a", steps=4)])
    np.testing.assert_array_equal(steps[-1].preview()[0], final[0])
    assert (steps[0].preview() != steps[-1].preview()).any()


def test_closing_the_generator_cancels_between_steps(counted: tuple[Pipeline, dict[str, Counting]]) -> None:
    pipeline, engines = counted
    items = pipeline.generate([Request("a", steps=25)])
    for _ in itertools.islice(items, 3):
        pass
    items.close()
    assert next(items, None) is None
    assert len(engines["unet"].calls) == 3
    assert engines["vae_decoder"].calls == []
    assert run(pipeline, [Request("a", steps=1)])  # and the pipeline is as good as new


def test_everything_is_checked_before_anything_is_computed(
    counted: tuple[Pipeline, dict[str, Counting]], tmp_path: Path
) -> None:
    pipeline, engines = counted
    good = Request("a")
    wrong: list[tuple[list[Request], type[Exception], str]] = [
        ([good, Request("a", height=100)], RequestError, "height 100 does not fit .* 64: the nearest .* 64 and 128"),
        ([good, Request("a", width=63)], RequestError, "width 63 does not fit .* the nearest that works is 64"),
        ([good, Request("a", init_image=tmp_path / "no.png")], ImageError, "there is no picture"),
        ([good, Request("a", init_image=Image.new("RGB", (9, 9)), strength=0.01)], ScheduleError, "strength 0.01"),
    ]
    for requests, error, match in wrong:
        with pytest.raises(error, match=match):
            pipeline.generate(requests)
    with pytest.raises(RequestError, match="batch_size must be at least 1"):
        pipeline.generate([good], batch_size=0)
    assert not any(engine.calls for engine in engines.values())
    assert list(pipeline.generate([])) == []


def test_an_init_image_needs_the_vae_encoder(make_toy_bundle: Callable[..., Path], tmp_path: Path) -> None:
    pipeline = Pipeline.open(make_toy_bundle(tmp_path / "small", vae_encoder=False), ONE)
    with pytest.raises(RequestError, match="this bundle has no VAE encoder, so it cannot start from a picture"):
        pipeline.generate([Request("a", init_image=Image.new("RGB", (64, 64)))])
    assert run(pipeline, [Request("a", steps=1)])


def test_an_init_image_may_be_a_file(pipeline: Pipeline, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (64, 64, 3), np.uint8))
    picture.save(tmp_path / "start.png")
    opened, _ = run(pipeline, [Request("a", steps=4, init_image=picture)])
    read, _ = run(pipeline, [Request("a", steps=4, init_image=tmp_path / "start.png")])
    np.testing.assert_array_equal(opened, read)


def test_a_cut_prompt_is_said_in_the_log(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    run(pipeline, [Request("apple " * 75 + "zebra", steps=1)])
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("zebra")
    caplog.clear()
    run(pipeline, [Request("apple " * 75, steps=1)])
    assert caplog.records == []


def test_nan_from_the_unet_is_an_error_and_no_picture(
    pipeline: Pipeline, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overflowing(Counting):
        def __call__(self, inputs: Any) -> Any:
            return {"out_sample": np.full(inputs["sample"].shape, np.nan, np.float32)}

    opened = Pipeline.open(toy_bundle, ONE)
    opened._engines["unet"] = Overflowing(opened._engines["unet"], "sample")
    with pytest.raises(EngineError, match="unet gave NaN or infinity"):
        list(opened.generate([Request("a", steps=2)]))


def test_nan_from_the_decoder_is_an_error_and_no_picture(toy_bundle: Path) -> None:
    class Overflowing(Counting):
        def __call__(self, inputs: Any) -> Any:
            return {"sample": np.full((1, 3, 64, 64), np.inf, np.float32)}

    opened = Pipeline.open(toy_bundle, ONE)
    opened._engines["vae_decoder"] = Overflowing(opened._engines["vae_decoder"], "latent_sample")
    with pytest.raises(EngineError, match="vae_decoder gave NaN or infinity"):
        list(opened.generate([Request("a", steps=2)]))


def test_sample_walks_from_given_noise_and_contexts(pipeline: Pipeline, toy_bundle: Path) -> None:
    """As export uses it for parity: no pipeline, only the engine, a schedule and arrays."""
    schedule = make_schedule(bundles.load(toy_bundle).scheduler_config, steps=6)
    context = np.stack([pipeline.encode_text(""), pipeline.encode_text("a red apple")])
    noise = randn(3, (1, 4, 8, 8))
    walked = list(sample(pipeline._engines["unet"], schedule, noise, context, np.array([7.5], np.float32)))
    assert [timestep for timestep, _ in walked] == list(schedule.timesteps)
    expected, _ = run(pipeline, [Request("a red apple", seed=3, steps=6)])
    np.testing.assert_array_equal(walked[-1][1], expected)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer/vocab.json"])  # what is read only here, and what is parsed
def test_large_weights_are_verified_beside_the_opening(
    toy_copy: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "_SMALL", 0)  # whatever is no graph counts as such
    flip(toy_copy / name, 0)
    opened = bundles.load(toy_copy, weights=False)
    with pytest.raises(BundleError, match=f"{name} was changed or damaged"):
        bundles.verify_weights(opened)
    for bundle, verify in ((toy_copy, False), (opened, True)):
        with pytest.raises(BundleError, match=f"{name} was changed or damaged"):
            Pipeline.open(bundle, ONE, verify_weights=verify)
    if name == "LICENSE":
        Pipeline.open(opened, ONE)  # verified by who loaded it, or not at all


def test_whatever_is_parsed_is_verified_before(toy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "_open", lambda *_: pytest.fail("it opened a graph"))
    flip(toy_copy / "unet" / "model.onnx", 100)
    with pytest.raises(BundleError, match=r"unet/model.onnx was changed or damaged"):
        Pipeline.open(toy_copy, ONE)


def test_a_bundle_may_be_given_opened(toy_bundle: Path) -> None:
    opened = bundles.load(toy_bundle)
    assert Pipeline.open(opened, ONE).bundle is opened
    named = Pipeline.open(str(toy_bundle), ONE)
    assert (named.backend, named.arithmetic, named.threads) == ("onnxruntime", "f32", 1)
    assert pipelines.Request is Request
