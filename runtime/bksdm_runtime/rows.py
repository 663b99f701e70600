"""How many rows a U-Net evaluation may have, so that no picture shows what it shared the evaluation with.

A backend picks its kernels by the shape of a call, and two kernels may add up in different orders: then the last bit of
a sample depends on how many stand beside it. So pictures are evaluated only in counts of rows whose samples were seen
equal, bit for bit, to those of two rows, which are one guided picture alone. Measured on the demo's U-Net with the
probes below and with random ones (96 samples, 1 to 16 rows): ONNX Runtime 1.32 and OpenVINO 2026.4 in f32, every count
is equal; OpenVINO in bf16, every count but 1, which alone differs in 4 samples of 96.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bksdm_runtime.engine import Bounded, Engine, Preparing

# A single row is never evaluated: a matrix of one row has kernels of its own in every library, whose sums differ so
# rarely (see above) that no test at load would find it.
LEAST = 2
_PROBES = 32

log = logging.getLogger(__name__)


def equal_counts(engine: Engine, one: Mapping[str, tuple[int, ...]], most: int) -> tuple[int, ...]:
    """The counts of rows, rising, from LEAST to `most` at most, that give a sample the same bits; LEAST is always one.

    one: the inputs' shapes without their rows. Every count is tried on the same random samples, in other places and
    other company. An engine that has work to do for each shape is tried at powers of two alone. Trying them warms the
    engine up for these shapes, too. Raises EngineError.
    """
    inputs = {name: _probe(shape, seed) for seed, (name, shape) in enumerate(one.items())}
    if isinstance(engine, Preparing):
        candidates = [LEAST << i for i in range(most.bit_length()) if LEAST << i <= most]
    else:
        candidates = list(range(LEAST, most + 1, 2))  # guided pictures, which are two rows each
    if isinstance(engine, Bounded):
        candidates = [count for count in candidates if engine.holds(_shapes(inputs, count))] or [LEAST]
    expected = _evaluate(engine, inputs, LEAST, np.arange(_PROBES))
    equal = [LEAST]
    for count in candidates:
        if count == LEAST:
            continue
        order = np.random.default_rng(count).permutation(_PROBES)
        found = _evaluate(engine, inputs, count, order)
        if all(np.array_equal(found[name], array[order]) for name, array in expected.items()):
            equal.append(count)
        else:
            log.warning(
                "%s: %d rows of %s are not equal bit for bit to %d: pictures do not share such evaluations",
                engine.component.path,
                count,
                dict(one),
                LEAST,
            )
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


def _shapes(inputs: Mapping[str, NDArray[np.generic]], count: int) -> dict[str, Sequence[int]]:
    return {name: (count, *array.shape[1:]) for name, array in inputs.items()}


def _probe(shape: tuple[int, ...], seed: int) -> NDArray[np.generic]:
    """[PROBES, *shape]: timesteps where that is nothing, normals elsewhere."""
    random = np.random.default_rng(seed)
    drawn = random.standard_normal((_PROBES, *shape)) if shape else random.integers(0, 1000, _PROBES)
    return drawn.astype(np.float32)
