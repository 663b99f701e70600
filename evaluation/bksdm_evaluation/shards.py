"""A share of a job that processes, GPUs or machines split among themselves: number i of n, without a coordinator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

# Who starts many processes tells each its number and their count so.
_ENVIRONMENTS = (
    ("RANK", "WORLD_SIZE"),  # torchrun
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)


class ShardError(ValueError):
    """A share that there is not; the message is one sentence."""


@dataclass(frozen=True)
class Shard:
    """Every `count`-th item from the `index`-th on. Raises ShardError on construction."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ShardError(f"shard {self.index}/{self.count} is none: the first of n is 0/n, the last n-1/n")

    def of(self, total: int) -> range:
        """The numbers of its items among `total`, rising."""
        return range(self.index, total, self.count)


def read_shard(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """ "i/n", or "auto": what torchrun or Slurm says of this process, all of the job where neither does.

    A Slurm array whose numbers do not begin at 0 must be given as "i/n". Raises ShardError.
    """
    if text == "auto":
        for index, count in _ENVIRONMENTS:
            if index in environment and count in environment:
                return _shard(environment[index], environment[count])
        return Shard()
    index, slash, count = text.partition("/")
    if not slash:
        raise ShardError(f"shard {text[:40]!r} is none: give i/n, as in 0/8, or auto")
    return _shard(index, count)


def _shard(index: str, count: str) -> Shard:
    try:
        return Shard(int(index), int(count))
    except ShardError:
        raise
    except ValueError:
        raise ShardError(f"shard {index[:20]!r}/{count[:20]!r} is none: both are whole numbers, as in 0/8") from None
