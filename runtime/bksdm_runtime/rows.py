"""How many rows a U-Net evaluation may have, so that no picture shows what it shared the evaluation with.

A backend picks its kernels by the shape of a call, and two kernels may add up in different orders: then the last bit of
a sample depends on how many stand beside it. So pictures are evaluated only in counts of rows whose samples were seen
equal, bit for bit, to those of two rows, which are one guided picture alone. Measured on the demo's U-Net with the
probes below and with random ones (96 samples, 1 to 16 rows): ONNX Runtime 1.32 and OpenVINO 2026.4 in f32, every count
is equal; OpenVINO in bf16, every count but 1, which alone differs in 4 samples of 96: there an unguided picture may
differ from bksdm-run's, which evaluates it alone, and is the same in all that share evaluations.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.engine import Bounded, Engine, Preparing

# A single row is never evaluated: a matrix of one row has kernels of its own in every library, whose sums differ so
# rarely (see above) that no test at load would find it.
LEAST = 2
# Trying is part of opening a server: of a model of full size on a CPU, a row takes seconds.
_PROBES, _PROBES_OF_LARGE, _LARGE = 32, 16, 16 * 16  # the last in latent pixels

log = logging.getLogger(__name__)


def equal_counts(engine: Engine, one: Mapping[str, tuple[int, ...]], most: int) -> tuple[int, ...]:
    """The counts of rows, rising, from LEAST to `most` at most, that give a sample the same bits in every place.

    () where not even LEAST does: then no two pictures may share an evaluation.

    one: the inputs' shapes without their rows. Counts are tried at powers of two and half-way between them, each on
    the same random samples in other places and other company; at powers of two alone where an engine has work to do
    for each shape. Trying them warms the engine up for these shapes, too. Raises EngineError.
    """
    candidates = [LEAST << i for i in range(most.bit_length())]
    if not isinstance(engine, Preparing):
        candidates = sorted({*candidates, *(count // 2 * 3 for count in candidates if count > LEAST)})
    candidates = [count for count in candidates if LEAST < count <= most]
    if isinstance(engine, Bounded):
        if not engine.holds(_shapes(one, LEAST)):
            return ()
        candidates = [count for count in candidates if engine.holds(_shapes(one, count))]
    probes = _PROBES_OF_LARGE if math.prod(one["sample"][1:]) > _LARGE else _PROBES
    order = np.arange(probes if candidates else LEAST)
    inputs = {name: _probe(shape, probes, seed) for seed, (name, shape) in enumerate(one.items())}
    expected = _evaluate(engine, inputs, LEAST, order)
    equal: list[int] = []
    for count in (LEAST, *candidates):
        order = order[::-1] if count == LEAST else np.random.default_rng(count).permutation(probes)
        found = _evaluate(engine, inputs, count, order)
        if all(np.array_equal(found[name], array[order]) for name, array in expected.items()):
            equal.append(count)
            continue
        log.warning(
            "%s: %d rows of %s are not equal bit for bit to the same by twos: pictures do not share such evaluations",
            engine.component.path,
            count,
            dict(one),
        )
        if count == LEAST:
            break
    return tuple(equal)


def _evaluate(
    engine: Engine, inputs: Mapping[str, NDArray[np.generic]], count: int, order: NDArray[np.intp]
) -> dict[str, NDArray[np.generic]]:
    """The probes' outputs in an order, `count` of them at once."""
    parts: list[dict[str, NDArray[np.generic]]] = []
    for start in range(0, len(order), count):
        chosen = np.take(order, range(start, start + count), mode="wrap")
        outputs = engine({name: array[chosen] for name, array in inputs.items()})
        parts.append({name: array[: len(order) - start] for name, array in outputs.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _shapes(one: Mapping[str, tuple[int, ...]], count: int) -> dict[str, Sequence[int]]:
    return {name: (count, *shape) for name, shape in one.items()}


def _probe(shape: tuple[int, ...], count: int, seed: int) -> NDArray[np.generic]:
    """[count, *shape]: timesteps where that is nothing, normals elsewhere."""
    random = np.random.default_rng(seed)
    drawn = random.standard_normal((count, *shape)) if shape else random.integers(0, 1000, count)
    return drawn.astype(np.float32)
