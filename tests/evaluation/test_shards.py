from __future__ import annotations

import pytest

from bksdm_evaluation.shards import Shard, ShardError, read_shard


def test_shards_split_everything_without_overlap() -> None:
    parts = [list(Shard(i, 3).of(10)) for i in range(3)]
    assert sorted(i for part in parts for i in part) == list(range(10))
    assert parts[1] == [1, 4, 7]
    assert list(Shard(4, 5).of(3)) == []


def test_auto_is_what_torchrun_or_slurm_says() -> None:
    assert read_shard("auto", {}) == Shard(0, 1)
    assert read_shard("auto", {"RANK": "2", "WORLD_SIZE": "4"}) == Shard(2, 4)
    slurm = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert read_shard("auto", slurm) == Shard(1, 2)
    assert read_shard("1/3", {"RANK": "0", "WORLD_SIZE": "2"}) == Shard(1, 3)


@pytest.mark.parametrize("text", ["3/3", "-1/2", "1", "a/b", "0/0", "1/2/3"])
def test_what_is_no_shard_is_one_sentence(text: str) -> None:
    with pytest.raises(ShardError, match="is none"):
        read_shard(text, {})
