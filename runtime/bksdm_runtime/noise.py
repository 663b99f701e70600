"""Standard normal noise, number for number that of `torch.randn`, without torch.

A seed then gives the picture that diffusers gives. Two of torch's generators are reproduced in numpy:

- `CpuGenerator`: at::mt19937 and the CPU normal kernel (aten/src/ATen/native/cpu/DistributionTemplates.h,
  aten/src/ATen/core/DistributionsHelper.h). The uniform stream and the angles are equal bit for bit; log, sin and cos
  are computed here in float64, in torch by float32 code that depends on the processor, so the normals differ a little:
  |difference| / max(1, |value|) is 2.4e-7 at most with AVX2 or AVX-512, and 2.3e-6 without either (20 million values
  each, torch 2.13, ATEN_CPU_CAPABILITY=avx2, avx512, default). Torch differs from itself by as much between them.
  Draws of fewer than 16 values take torch's float64 path and are equal bit for bit.
- `CudaGenerator`: Philox4x32-10 and cuRAND's Box-Muller transform in the layout of torch's CUDA kernel
  (aten/src/ATen/native/cuda/DistributionTemplates.h, curand_normal.h). The words are equal bit for bit; the device
  takes sin and cos from fast instructions (absolute error about 2^-21, and the radius is under 6.7), so expect the
  normals to differ by up to some 3e-6. Equal to every printed digit of outputs published from an A100, an H100, an
  RTX A4000 and others (see the test).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_BLOCK = 256  # threads in a block of torch's distribution kernels (block_size_bound)
_A100_THREADS = 108 * 2048  # multiprocessors x threads per multiprocessor
_TWO_PI = float(np.float32(2 * math.pi))  # torch and cuRAND both round it to float32


class NoiseError(ValueError):
    """A seed, shape or generator that torch would refuse too."""


class Generator(Protocol):
    """A source of noise that goes on where the last draw stopped, as a torch.Generator does."""

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Draw the next normals, as `torch.randn(shape, generator=...)`; raises NoiseError on a negative size."""
        ...


def randn(seed: int, shape: Sequence[int], *, generator: str = "cpu") -> NDArray[np.float32]:
    """Draw what `torch.randn(shape, generator=torch.Generator(generator).manual_seed(seed))` draws, as float32."""
    return open_generator(seed, generator).randn(shape)


def open_generator(seed: int, generator: str = "cpu") -> Generator:
    """Make the named generator ("cpu" or "cuda") from a seed; raises NoiseError for any other name."""
    if generator not in GENERATORS:
        raise NoiseError(f"there is no noise generator {generator!r}: choose one of {', '.join(GENERATORS)}")
    return GENERATORS[generator](seed)


class CpuGenerator:
    """`torch.Generator("cpu")`: a Mersenne Twister seeded by the low 32 bits of the seed.

    seed: -2**63 .. 2**64 - 1, as torch takes it (negative means 2**64 + seed); else NoiseError.
    """

    def __init__(self, seed: int) -> None:
        # RandomState's stream is frozen by numpy's compatibility policy; its integer seeding is the one of at::mt19937
        self._words = np.random.RandomState(_seed64(seed) & 0xFFFFFFFF)
        self._spare: float | None = None  # the second normal of a pair; only the scalar path reads or leaves it

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Draw the next normals of this generator; shape as in torch, float32."""
        size = _numel(shape)
        # under 16 values torch takes another path: float64, one value after the other
        drawn = self._vectorised(size) if size >= 16 else self._scalar(size)
        return np.reshape(drawn, tuple(shape))

    def _uint32(self, size: int) -> NDArray[np.uint32]:
        return self._words.randint(0, 1 << 32, size=size, dtype=np.uint32)

    def _vectorised(self, size: int) -> NDArray[np.float32]:
        uniform = _uniform24(self._uint32(size))
        whole = size - size % 16
        normal = np.empty(size, np.float32)
        normal[:whole] = _normal16(uniform[:whole])
        if whole < size:  # torch draws the last 16 values anew, over some that it already had
            normal[-16:] = _normal16(_uniform24(self._uint32(16)))
        return normal

    def _scalar(self, size: int) -> NDArray[np.float32]:
        return np.array([self._next() for _ in range(size)], np.float32)

    def _next(self) -> float:
        if self._spare is not None:
            normal, self._spare = self._spare, None
            return normal
        high1, low1, high2, low2 = (int(word) for word in self._uint32(4))
        angle = 2 * math.pi * _uniform53(high1, low1)
        radius = math.sqrt(-2 * math.log1p(-_uniform53(high2, low2)))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


class CudaGenerator:
    """`torch.Generator("cuda")`: counter-based Philox4x32-10, keyed by all 64 bits of the seed.

    threads: multiprocessors x resident threads per multiprocessor of the GPU to imitate. It matters only to a draw
    of more values than that: torch then wraps its grid, and GPUs differ from each other. 512 px latents (16,384
    values) are the same on every GPU; 1024 px ones (65,536) on those with at least so many threads, which leaves out
    the T4 (40 x 1024). The default is the A100's 221,184.
    """

    def __init__(self, seed: int, *, threads: int = _A100_THREADS) -> None:
        if threads < _BLOCK:
            raise NoiseError(f"a GPU of {threads} threads cannot run a block of {_BLOCK}")
        self._seed = _seed64(seed)
        self._max_blocks = threads // _BLOCK
        self._counter = 0  # Philox counter of the next draw: a quarter of torch's philox offset

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Draw the next normals of this generator; shape as in torch, float32."""
        size = _numel(shape)
        if size == 0:
            return np.empty(tuple(shape), np.float32)
        threads = _BLOCK * min(-(-size // _BLOCK), self._max_blocks)
        rows: list[NDArray[np.float32]] = []
        # Every round gives each thread one counter, so four normals; component k of thread i goes to k * threads + i.
        while len(rows) * threads < size:
            words = philox(self._counter, np.arange(threads, dtype=np.uint64), self._seed)
            self._counter += 1
            needed = min(4, -(-size // threads) - len(rows))
            for pair in range(0, needed, 2):
                rows += _box_muller(words[pair], words[pair + 1])[: needed - pair]
        return np.reshape(np.concatenate(rows)[:size], tuple(shape))


GENERATORS: Mapping[str, Callable[[int], Generator]] = {"cpu": CpuGenerator, "cuda": CudaGenerator}


def philox(counter: int, subsequence: NDArray[np.uint64], key: int) -> tuple[NDArray[np.uint32], ...]:
    """Encrypt the counters (counter, subsequence[i]) with Philox4x32-10: four uint32 arrays, each like subsequence.

    counter: 64-bit, the low half of the 128-bit block; subsequence: the high half; key: 64-bit.
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11); the laying out is curand_init's.
    """
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0 = np.full(subsequence.shape, counter & 0xFFFFFFFF, np.uint64)
    c1 = np.full(subsequence.shape, counter >> 32 & 0xFFFFFFFF, np.uint64)
    c2, c3 = subsequence & low, subsequence >> half
    key0, key1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (product1 >> half) ^ c1 ^ np.uint64(key0), product1 & low
        c2, c3 = (product0 >> half) ^ c3 ^ np.uint64(key1), product0 & low
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(word.astype(np.uint32) for word in (c0, c1, c2, c3))


def _box_muller(x: NDArray[np.uint32], y: NDArray[np.uint32]) -> list[NDArray[np.float32]]:
    """Turn two words into two normals (sine first), as cuRAND's _curand_box_muller does."""
    inverse = 2.0**-32
    inverse_2pi = inverse * _TWO_PI
    # the device converts to float32 and fuses multiply and add: one rounding after both, which float64 imitates
    u = _float32(_float32(x) * inverse + inverse / 2)
    v = _float32(_float32(y) * inverse_2pi + inverse_2pi / 2)
    radius = np.sqrt(-2 * np.log(u))
    return [(radius * np.sin(v)).astype(np.float32), (radius * np.cos(v)).astype(np.float32)]


def _float32(values: NDArray[np.uint32] | NDArray[np.float64]) -> NDArray[np.float64]:
    return values.astype(np.float32).astype(np.float64)


def _normal16(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn [16 * n] uniforms into normals; of each 16, value j and value j + 8 make a pair (normal_fill_16)."""
    pairs = np.reshape(uniform, (-1, 2, 8))
    radius = np.sqrt(-2 * np.log(1 - pairs[:, 0].astype(np.float64)))
    angle = (pairs[:, 1] * _TWO_PI).astype(np.float64)  # rounded to float32 first, as torch's angle is
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32).ravel()


def _uniform24(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    return (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)  # at::uniform_real_distribution


def _uniform53(high: int, low: int) -> float:
    return ((high << 32 | low) & ((1 << 53) - 1)) * 2.0**-53


def _seed64(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NoiseError(f"the seed is {seed!r}, a {type(seed).__name__}: give an integer")
    if not -(2**63) <= seed < 2**64:
        raise NoiseError(f"the seed {seed} is out of range: torch takes -2**63 to 2**64 - 1")
    return seed % 2**64


def _numel(shape: Sequence[int]) -> int:
    if any(length < 0 for length in shape):
        raise NoiseError(f"the shape {tuple(shape)} has a negative size")
    return math.prod(shape)
