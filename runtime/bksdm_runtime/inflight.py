"""In-flight batching: pictures share U-Net evaluations, each joining when it comes and leaving when it is done.

They may differ in prompt, seed, steps, guidance and sampler; what shares an evaluation agrees in size, and in whether
all of the U-Net is evaluated or its outermost layer alone. A guided picture is two rows of it, an unguided one is one.
Each picture's arithmetic is that of `pipeline.sample`, so it is what `Pipeline.draw` gives for it alone, to the last
pixel, whatever it shares evaluations with: see rows.py for the measurement that this rests on, and for its bounds.
(TensorRT's own loop on the device sums in another order than this one; there a picture equals itself in any company,
and a picture of bksdm-run to a rounding.)
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime import demands
from bksdm_runtime.batches import MEMORY_BUDGET, Batch, batch_limit
from bksdm_runtime.checks import check
from bksdm_runtime.contract import DEEP
from bksdm_runtime.engine import EngineError
from bksdm_runtime.evaluations import Evaluation
from bksdm_runtime.pipeline import Pipeline
from bksdm_runtime.request import Request
from bksdm_runtime.rows import equal_counts
from bksdm_runtime.stepping import Array, History, first_latents, guided, next_latents

_KEPT_CONTEXTS = 256  # 60 MB at [77, 768]

Observe = Callable[[str, float, int], None]


@dataclass(frozen=True)
class Stepped:
    """A picture's evaluation is done: which, from 0, of how many. latents: [C, h, w] after it; not to be written to."""

    ticket: int
    index: int
    total: int
    latents: Array


@dataclass(frozen=True)
class Drawn:
    """A picture is finished. request: with size and guidance filled in; pixels: [H, W, 3] uint8."""

    ticket: int
    request: Request
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Failed:
    """A picture is lost, and why."""

    ticket: int
    error: EngineError


Event = Stepped | Drawn | Failed


@dataclass
class _Slot:
    """One picture under way. batch: its request alone, with its schedule and what each evaluation computes.

    context: [2, 77, D], the negative prompt's first, or [1, 77, D] unguided; guidance: [1].
    x: [1, C, h, w]; deep: of its last full evaluation, [2, F, h, w] or [1, F, h, w]; index: of its next evaluation.
    waiting_since: the turn that served it last.
    """

    ticket: int
    batch: Batch
    context: Array
    guidance: Array
    x: Array
    waiting_since: int
    deep: Array
    history: History = ()
    index: int = 0

    @property
    def request(self) -> Request:
        return self.batch.requests[0]

    @property
    def is_finished(self) -> bool:
        return self.index == len(self.batch.evaluations)

    @property
    def now(self) -> Evaluation:
        return self.batch.evaluations[self.index]

    @property
    def rows(self) -> int:
        return 2 if self.now.guided else 1

    @property
    def shares_with(self) -> tuple[int, int, bool]:
        return self.batch.height, self.batch.width, self.now.full


class InFlight:
    """Pictures under way on one pipeline, at most `slots` of them. Not thread-safe, as the pipeline is not.

    observe: told of each piece of work, its seconds and how many pictures it served: "text", "step" or "decode".
    memory_budget: bytes of activations that an evaluation may need (see batches.unet_bytes).
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        slots: int,
        observe: Observe = lambda stage, seconds, pictures: None,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, found {slots}")
        self.pipeline = pipeline
        self.slots = slots
        self._observe = observe
        self._memory_budget = memory_budget
        self._under_way: dict[int, _Slot] = {}
        self._contexts: OrderedDict[str, Array] = OrderedDict()
        self._counts: dict[tuple[int, int, bool], tuple[int, ...]] = {}
        self._tickets = 0
        self._turn = 0

    def __len__(self) -> int:
        """How many pictures are under way."""
        return len(self._under_way)

    def counts(self, height: int, width: int, *, full: bool = True) -> tuple[int, ...]:
        """The rows that a shared evaluation of this size may have, rising; () for none, see rows.py.

        Measured when first asked for. Raises EngineError.
        """
        key = height, width, full
        if key not in self._counts:
            bundle = self.pipeline.bundle
            component = "unet" if full else "unet_shallow"
            fits = batch_limit(height, width, bundle.manifest.model.vae_scale_factor, True, self._memory_budget)
            shapes = demands.of_evaluation(bundle, height, width, full=full)
            self._counts[key] = equal_counts(self.pipeline.engine(component), shapes, 2 * min(self.slots, fits))
        return self._counts[key]

    def admit(self, request: Request) -> int:
        """Take a picture on: its ticket. Its texts are encoded and its noise is drawn here.

        Raises RequestError, ScheduleError, ImageError; EngineError, also where there is no slot free.
        """
        if len(self) >= self.slots:
            raise EngineError(f"all {self.slots} slots are taken")
        [batch], pictures = check(self.pipeline.bundle, [request])
        demands.refuse(batch, self.pipeline.bundle, self.pipeline.engine)
        request = batch.requests[0]
        texts = [request.negative_prompt, request.prompt] if batch.guided else [request.prompt]
        context = np.stack([self._context(text) for text in texts])
        clean, noise = self.pipeline.start(batch, pictures)
        x = first_latents(batch.schedule, noise, clean)
        self._tickets += 1
        guidance = np.array([request.guidance], np.float32)
        self._under_way[self._tickets] = _Slot(
            self._tickets, batch, context, guidance, x, self._turn, np.empty(0, np.float32)
        )
        return self._tickets

    def cancel(self, ticket: int) -> None:
        """Drop a picture; nothing where it is not under way any more."""
        self._under_way.pop(ticket, None)

    def advance(self) -> list[Event]:
        """One piece of work for the picture that has waited longest, and what came of it; [] when none is under way.

        That is decoding it, or an evaluation that it shares with those that have waited longest after it: none starves.
        """
        if not self._under_way:
            return []
        self._turn += 1
        waiting = sorted(self._under_way.values(), key=lambda slot: (slot.waiting_since, slot.ticket))
        first = waiting[0]
        if first.is_finished:
            return [self._decode(first)]
        group = [slot for slot in waiting if not slot.is_finished and slot.shares_with == first.shares_with]
        try:
            counts = self.counts(*first.shares_with[:2], full=first.now.full)
            sharing = _as_many_as_fit(group, counts[-1]) if counts else group[:1]
            outputs = self._evaluate(sharing, counts)
        except EngineError as error:
            return [self._fail(slot, error) for slot in group]
        return [self._step(slot, rows) for slot, rows in zip(sharing, outputs, strict=True)]

    def _evaluate(self, sharing: list[_Slot], counts: tuple[int, ...]) -> list[dict[str, Array]]:
        """The U-Net's outputs for each, its own rows of them."""
        started = time.perf_counter()
        f = np.float32
        full = sharing[0].now.full
        samples: list[Array] = []
        timesteps: list[Array] = []
        contexts: list[Array] = []
        deeps: list[Array] = []
        for slot in sharing:
            schedule, rows = slot.batch.schedule, slot.rows
            samples += [slot.x * f(schedule.input_scale[slot.index])] * rows  # [1, C, h, w] each
            timesteps.append(np.full(rows, schedule.timesteps[slot.index], f))
            contexts.append(slot.context[-rows:])  # unguided: the prompt's, which stands last
            deeps.append(slot.deep[-rows:])
        used = sum(slot.rows for slot in sharing)
        count = next((count for count in counts if count >= used), used)
        inputs = {
            "sample": _filled(samples, count),  # [count, C, h, w]
            "timestep": _filled(timesteps, count),
            "encoder_hidden_states": _filled(contexts, count),
        }
        if not full:
            inputs[DEEP] = _filled(deeps, count)
        outputs = self.pipeline.engine("unet" if full else "unet_shallow")(inputs)
        ends = np.cumsum([slot.rows for slot in sharing]).tolist()
        parts = [
            # A copy: a view would keep the whole evaluation's outputs for as long as a picture remembers its own.
            {name: cast(Array, np.array(array[end - slot.rows : end])) for name, array in outputs.items()}
            for slot, end in zip(sharing, ends, strict=True)
        ]
        self._observe("step", time.perf_counter() - started, len(sharing))
        return parts

    def _step(self, slot: _Slot, outputs: dict[str, Array]) -> Event:
        slot.deep = outputs.get(DEEP, slot.deep)
        output = outputs["out_sample"]
        if slot.now.guided:
            output = guided(output, slot.guidance)  # [1, C, h, w]
        slot.x, slot.history = next_latents(slot.batch.schedule, slot.index, slot.x, output, slot.history)
        slot.index += 1
        slot.waiting_since = self._turn
        return Stepped(slot.ticket, slot.index - 1, len(slot.batch.evaluations), slot.x[0])

    def _decode(self, slot: _Slot) -> Event:
        started = time.perf_counter()
        try:
            if not np.isfinite(slot.x).all():
                raise EngineError("unet gave NaN or infinity: the picture is lost (an fp16 graph may have overflowed)")
            pixels = self.pipeline.decode(slot.x, slot.request.vae_tile)[0]
        except EngineError as error:
            return self._fail(slot, error)
        self._observe("decode", time.perf_counter() - started, 1)
        del self._under_way[slot.ticket]
        return Drawn(slot.ticket, slot.request, pixels)

    def _fail(self, slot: _Slot, error: EngineError) -> Failed:
        del self._under_way[slot.ticket]
        return Failed(slot.ticket, error)

    def _context(self, text: str) -> Array:
        if text not in self._contexts:
            started = time.perf_counter()
            while len(self._contexts) >= _KEPT_CONTEXTS:
                self._contexts.popitem(last=False)
            self._contexts[text] = self.pipeline.encode_text(text)
            self._observe("text", time.perf_counter() - started, 1)
        self._contexts.move_to_end(text)
        return self._contexts[text]


def _as_many_as_fit(group: list[_Slot], most: int) -> list[_Slot]:
    """The first of a group, and after it all that still fit so many rows."""
    taken: list[_Slot] = []
    free = most
    for slot in group:
        if slot.rows <= free:
            taken.append(slot)
            free -= slot.rows
    return taken


def _filled(parts: list[Array], count: int) -> Array:
    """The parts as `count` rows, the last one again where they are fewer."""
    rows = np.concatenate(parts)
    return np.concatenate([rows, np.repeat(rows[-1:], count - len(rows), axis=0)])
