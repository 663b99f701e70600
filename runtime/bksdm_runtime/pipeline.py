"""From requests to pictures: text encoder, sampling loop, VAE. The hot path is `sample`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bksdm_runtime import bundle as bundles
from bksdm_runtime import demands
from bksdm_runtime.batches import LARGEST_AUTOMATIC_BATCH, MEMORY_BUDGET, Batch
from bksdm_runtime.bundle import Bundle
from bksdm_runtime.checks import check
from bksdm_runtime.contract import DEEP
from bksdm_runtime.engine import (
    DEFAULT_SETTINGS,
    ON_A_GPU,
    Bounded,
    Engine,
    EngineError,
    EngineSettings,
    Preparing,
    Sampler,
    open_engine,
    resolve_backend,
)
from bksdm_runtime.evaluations import Evaluation, plan_evaluations
from bksdm_runtime.image import Provenance, from_image, to_uint8
from bksdm_runtime.noise import Generator as NoiseGenerator
from bksdm_runtime.noise import open_generator
from bksdm_runtime.request import Request
from bksdm_runtime.schedule import Schedule
from bksdm_runtime.stepping import History, first_latents, guided, next_latents
from bksdm_runtime.tiles import decode_tiles
from bksdm_runtime.tokenizer import Tokenizer
from bksdm_runtime.version import version

Array = NDArray[np.float32]

_KEPT_CONTEXTS = 256  # 60 MB at [77, 768]: a list of prompts may be endless

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One U-Net evaluation of a batch is done.

    index, total: which evaluation, from 0, of how many; timestep: what the U-Net was told.
    latents: [B, C, h, w] after it, a new array each time; the loop goes on from it, so copy before writing to it.
    positions: which of the requests the batch holds.
    preview: decodes these latents to [B, H, W, 3] uint8 when called, at the cost of a VAE decode each.
    """

    index: int
    total: int
    timestep: float
    latents: Array
    positions: tuple[int, ...]
    preview: Callable[[], NDArray[np.uint8]] = field(repr=False)


@dataclass(frozen=True)
class Images:
    """Finished pictures. positions: which of the requests they answer; pixels: [B, H, W, 3] uint8.

    requests: those requests, with size and guidance filled in. batch_size: how many shared the U-Net evaluations;
    batch_indices: where in that batch these stood.
    """

    positions: tuple[int, ...]
    requests: tuple[Request, ...]
    pixels: NDArray[np.uint8]
    batch_size: int
    batch_indices: tuple[int, ...]


def sample(
    unet: Engine,
    schedule: Schedule,
    noise: Array,
    context: Array,
    guidance: Array | None,
    clean: Array | None = None,
    *,
    evaluations: Sequence[Evaluation] | None = None,
    shallow: Engine | None = None,
) -> Generator[tuple[float, Array], None, None]:
    """Walk from noise to clean latents, yielding (timestep, latents [B, C, h, w]) after each U-Net evaluation.

    noise: [B, C, h, w] standard normal. context: [2B, 77, D], the negative prompts' first, with guidance; [B, 77, D]
    without. guidance: [B], or None to evaluate the U-Net once per image. clean: [B, C, h, w], what image-to-image
    starts from. evaluations: what each computes, None for all of it; those that are not full go to `shallow`, with the
    deep features that the U-Net gave last; without it all are full. Closing the generator cancels. Classifier-free
    guidance, arXiv 2207.12598; the table of coefficients is schedule.py's, computed in float64, applied in float32.
    """
    f = np.float32
    planned = evaluations or plan_evaluations(len(schedule.timesteps), guided=guidance is not None)
    x = first_latents(schedule, noise, clean)  # [B, C, h, w]
    deep = np.empty(0, f)
    history: History = ()
    for i, (timestep, now) in enumerate(zip(schedule.timesteps, planned, strict=True)):
        model_input = x * f(schedule.input_scale[i])
        if now.guided:
            model_input = np.concatenate([model_input, model_input])  # [2B, C, h, w]
        inputs = {
            "sample": model_input,
            "timestep": np.full(len(model_input), timestep, f),
            "encoder_hidden_states": context[-len(model_input) :],  # unguided: the prompts', which stand last
        }
        if now.full or shallow is None:
            outputs = unet(inputs)
        else:
            outputs = shallow({**inputs, DEEP: deep[-len(model_input) :]})
        deep = cast(Array, outputs.get(DEEP, deep))  # [2B, F, h, w], or [B, F, h, w] unguided
        output = cast(Array, outputs["out_sample"])
        if now.guided and guidance is not None:
            output = guided(output, guidance)  # [B, C, h, w]
        x, history = next_latents(schedule, i, x, output, history)
        yield float(timestep), x


class Pipeline:
    """A bundle opened on a backend; `backend`, `arithmetic` and `threads` are what its engines really use.

    Not thread-safe; opens the VAE encoder when the first init image comes, the shallow U-Net when steps are cached.
    """

    def __init__(
        self, bundle: Bundle, settings: EngineSettings, tokenizer: Tokenizer, engines: Mapping[str, Engine]
    ) -> None:
        self.bundle = bundle
        self._settings = settings
        self._tokenizer = tokenizer
        self._engines = dict(engines)
        unet = engines["unet"]
        self.backend, self.arithmetic, self.threads = unet.backend, unet.arithmetic, unet.threads

    @classmethod
    def open(
        cls, bundle: Bundle | Path | str, settings: EngineSettings = DEFAULT_SETTINGS, *, verify_weights: bool = False
    ) -> Pipeline:
        """Open a bundle, or the folder of one, whose every file is then verified.

        verify_weights: of a Bundle that was loaded without, as of a folder: beside the opening.
        Where backend "auto" is one on a GPU and that does not start, it is the next one, and the log says so.
        Raises BundleError, EngineError, MissingBackend.
        """
        if isinstance(bundle, Bundle) and not verify_weights:
            return cls._open_first(bundle, settings)
        opened = bundle if isinstance(bundle, Bundle) else bundles.load(bundle, weights=False)
        with bundles.verifying_weights(opened):
            return cls._open_first(opened, settings)

    @classmethod
    def _open_first(cls, opened: Bundle, settings: EngineSettings) -> Pipeline:
        """On the first backend that starts, of those that `settings` leave open."""
        failed: list[str] = []
        while True:
            chosen = replace(settings, backend=resolve_backend(settings.backend, opened, without=failed))
            try:
                return cls._open(opened, chosen)
            except EngineError as error:
                if settings.backend != "auto" or chosen.backend not in ON_A_GPU:
                    raise
                log.warning("a GPU is there, but backend %s does not start: %s", chosen.backend, error)
                failed.append(chosen.backend)

    @classmethod
    def _open(cls, opened: Bundle, chosen: EngineSettings) -> Pipeline:
        names: tuple[str, ...] = ("unet", "text_encoder", "vae_decoder")  # the slowest first
        with ThreadPoolExecutor(len(names)) as pool:  # the libraries release the GIL while they open a graph
            opening = pool.map(partial(open_engine, opened, settings=chosen), names)
            tokenizer = Tokenizer.open(opened.root / bundles.TOKENIZER_FOLDER)
            engines: dict[str, Engine] = dict(zip(names, opening, strict=True))
        return cls(opened, chosen, tokenizer, engines)

    def generate(
        self, requests: Sequence[Request], *, batch_size: int | None = None, memory_budget: int = MEMORY_BUDGET
    ) -> Generator[Step | Images, None, None]:
        """Serve the requests, yielding each step and then the pictures; closing the generator cancels.

        Requests that agree in size, sampler, steps and in whether they are guided share U-Net evaluations, at most
        `batch_size` at once, or as many as fit `memory_budget` bytes of activations (see batches.unet_bytes).
        Everything is checked before this returns, nothing is computed until the first item is asked for.
        Raises RequestError, ScheduleError, ImageError; while running EngineError.
        """
        if isinstance(self._engines["unet"], Bounded):
            largest = LARGEST_AUTOMATIC_BATCH if batch_size is None else batch_size
            batches, pictures = check(self.bundle, requests, batch_size=largest)
            if batch_size is None:  # what it takes at once was decided when it was built
                batches = [part for batch in batches for part in demands.split(batch, self.bundle, self.engine)]
            for batch in batches:
                demands.refuse(batch, self.bundle, self.engine)
        else:
            batches, pictures = check(self.bundle, requests, batch_size=batch_size, memory_budget=memory_budget)
        return self._generate(batches, pictures)

    def draw(self, requests: Sequence[Request], *, batch_size: int | None = None) -> list[NDArray[np.uint8]]:
        """The pictures of the requests in their order, [H, W, 3] uint8 each: `generate` to its end, without its steps.

        Raises what `generate` raises.
        """
        pictures: dict[int, NDArray[np.uint8]] = {}
        for item in self.generate(requests, batch_size=batch_size):
            if isinstance(item, Images):
                pictures |= zip(item.positions, item.pixels, strict=True)
        return [pictures[position] for position in range(len(requests))]

    def provenance(self) -> Provenance:
        """What makes its pictures, singly; whoever draws in batches or from pictures adds that."""
        manifest = self.bundle.manifest
        return Provenance(
            bundle=self.bundle.sha256,
            variant=manifest.variant,
            backend=self.backend,
            precision=manifest.precision,
            version=version(),
            threads=self.threads,
            arithmetic=self.arithmetic,
            token_downsampling=manifest.token_downsampling,
        )

    def encode_text(self, prompt: str) -> Array:
        """Context of one prompt, [77, D]. What does not fit 77 tokens is dropped, and said so in the log."""
        tokens = self._tokenizer.encode(prompt)
        if tokens.dropped:
            dropped = tokens.dropped if len(tokens.dropped) <= 500 else f"{tokens.dropped[:500]}..."
            log.warning("the prompt is too long for the model, this end of it is dropped: %s", dropped)
        return _run(self._engines["text_encoder"], "last_hidden_state", input_ids=tokens.ids[None])[0]

    def decode(self, latents: Array, tile: int | None = None) -> NDArray[np.uint8]:
        """Latents [B, C, h, w] -> pictures [B, H, W, 3] uint8, one at a time: a batch would only cost memory.

        tile: side in pixels of tiles to decode in, for still less memory; None decodes a picture at once.
        """
        model = self.bundle.manifest.model
        unscaled = latents / np.float32(model.scaling_factor)

        def decode_one(one: Array) -> Array:
            return _run(self._engines["vae_decoder"], "sample", latent_sample=one)

        side = max(latents.shape[2:]) if tile is None else tile // model.vae_scale_factor
        decoded = np.concatenate(
            [decode_tiles(decode_one, one[None], (side, side), model.vae_scale_factor) for one in unscaled]
        )
        if not np.isfinite(decoded).all():
            raise EngineError(
                "vae_decoder gave NaN or infinity: the picture is lost (an fp16 graph may have overflowed)"
            )
        return to_uint8(decoded)

    def encode_image(self, image: Image.Image, height: int, width: int, generator: NoiseGenerator) -> Array:
        """A picture, resized -> latents [C, h, w] drawn from the VAE's posterior, as diffusers' image-to-image does."""
        parameters = _run(self.engine("vae_encoder"), "latent_parameters", sample=from_image(image, height, width))[0]
        mean, log_variance = np.split(parameters, 2)  # [C, h, w] each
        # The bounds are diffusers' DiagonalGaussianDistribution's.
        bounded: Array = np.minimum(np.maximum(log_variance, -30), 20)
        deviation = np.exp(bounded * np.float32(0.5))
        latents = mean + deviation * generator.randn(mean.shape)
        return latents * np.float32(self.bundle.manifest.model.scaling_factor)

    def _generate(
        self, batches: Sequence[Batch], pictures: Mapping[Path, Image.Image]
    ) -> Generator[Step | Images, None, None]:
        contexts: dict[str, Array] = {}
        for batch in batches:
            guided = batch.guided
            negatives = [request.negative_prompt for request in batch.requests] if guided else []
            texts = [*negatives, *(request.prompt for request in batch.requests)]
            self._prepare(batch)
            if len(contexts) > _KEPT_CONTEXTS:
                contexts = {text: contexts[text] for text in set(texts) & contexts.keys()}
            for text in texts:
                if text not in contexts:  # one at a time: a prompt's context must not depend on its company
                    contexts[text] = self.encode_text(text)
            context = np.stack([contexts[text] for text in texts])  # [2B, 77, D], or [B, 77, D] unguided
            guidance = np.array([r.guidance for r in batch.requests], np.float32) if guided else None
            clean, noise = self.start(batch, pictures)
            latents = noise
            unet = self._engines["unet"]
            walk = unet.sample if isinstance(unet, Sampler) else partial(sample, unet)
            steps = walk(
                batch.schedule,
                noise,
                context,
                guidance,
                clean,
                evaluations=batch.evaluations,
                shallow=None if all(now.full for now in batch.evaluations) else self.engine("unet_shallow"),
            )
            for index, (timestep, latents) in enumerate(steps):
                preview = partial(self.decode, latents, batch.requests[0].vae_tile)
                yield Step(index, len(batch.schedule.timesteps), timestep, latents, batch.positions, preview)
            if not np.isfinite(latents).all():
                raise EngineError("unet gave NaN or infinity: the picture is lost (an fp16 graph may have overflowed)")
            for i, (position, request) in enumerate(zip(batch.positions, batch.requests, strict=True)):
                pixels = self.decode(latents[i : i + 1], request.vae_tile)
                yield Images((position,), (request,), pixels, len(latents), (i,))

    def _prepare(self, batch: Batch) -> None:
        """Have U-Net and then decoder do, beside the text encoder and the first steps, what they do once a shape."""
        model = self.bundle.manifest.model
        wanted = {"unet": demands.of_unet(batch, model, guided=batch.evaluations[0].guided)}
        if batch.requests[0].vae_tile is None:  # tiles come in several shapes
            wanted["vae_decoder"] = demands.of_decoder(batch, model)
        engines = [(self._engines[component], shapes) for component, shapes in wanted.items()]
        preparing = [(engine.prepare, shapes) for engine, shapes in engines if isinstance(engine, Preparing)]

        def prepare() -> None:  # one after the other: the first step waits for the U-Net alone
            for work, shapes in preparing:
                work(shapes)

        if preparing:
            Thread(target=prepare).start()  # no daemon: the library must end before us

    def engine(self, component: str) -> Engine:
        """One that only some requests need, opened when the first of them comes."""
        if component not in self._engines:
            self._engines[component] = open_engine(self.bundle, component, self._settings)
        return self._engines[component]

    def start(self, batch: Batch, pictures: Mapping[Path, Image.Image]) -> tuple[Array | None, Array]:
        """Clean latents (None without init images) and noise, [B, C, h, w] each, every image from its own generator."""
        clean: list[Array] = []
        noise: list[Array] = []
        for request in batch.requests:
            generator = open_generator(request.seed, request.noise)
            if request.init_image is not None:  # drawn before the noise, as diffusers does
                image = request.init_image
                picture = pictures[image] if isinstance(image, Path) else image
                clean.append(self.encode_image(picture, batch.height, batch.width, generator))
            given = request.latents
            shape = demands.latent_shape(batch, self.bundle.manifest.model)
            noise.append(generator.randn(shape) if given is None else given)
        return np.stack(clean) if clean else None, np.stack(noise)


def _run(engine: Engine, output: str, **inputs: NDArray[np.generic]) -> Array:
    """Call an engine for one of its outputs, which is float32 as every floating-point output of an engine is."""
    return cast(Array, engine(inputs)[output])
