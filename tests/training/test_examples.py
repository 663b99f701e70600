"""Examples by position: the same whoever reads them, and whatever was read before."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image

from bksdm import checkpoint
from bksdm_training.examples import Drawing, Feed, PictureExamples
from bksdm_training.sources import open_source

DRAWING = Drawing(seed=3, latent=(4, 8, 8), flip=True, caption_dropout=0.25)


@pytest.fixture(scope="module")
def examples(mini_data):
    source = open_source(mini_data / "train")
    return PictureExamples(source, checkpoint.tokenizer(), DRAWING, size=64, seed=3, window=1)


def _equal(a, b):
    for name in ("pixels", "ids", "timesteps", "latent_noise", "noise"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_a_position_is_the_same_in_any_order_of_asking(examples):
    forwards = [examples[position] for position in range(30)]
    for position in (29, 3, 17):
        _equal(examples[position], forwards[position])


def test_what_is_drawn_has_the_shares_it_should():
    draws = [DRAWING.at(position) for position in range(4000)]
    assert 0.47 < sum(draw.flip for draw in draws) / 4000 < 0.53
    assert 0.22 < sum(draw.dropped for draw in draws) / 4000 < 0.28
    picks = Counter(draw.pick(["a", "b", "c", "d"]) for draw in draws)
    assert set(picks) == {0, 1, 2, 3}
    assert max(picks.values()) < 1150
    timesteps = torch.stack([draw.timestep for draw in draws])
    assert timesteps.min() >= 0
    assert timesteps.max() < 1000
    assert abs(timesteps.float().mean() - 499.5) < 15  # 3 standard errors: 13.7
    noise = torch.stack([draw.noise for draw in draws])
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert not torch.equal(draws[0].noise, draws[0].latent_noise)


@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_every_position_of_a_step_is_seen_once_however_it_is_dealt_out(examples, processes, parts):
    for step in (1, 2, 7):
        seen = []
        for process in range(processes):
            feed = Feed(examples, batch_size=8, parts=parts, process=process, processes=processes, workers=0)
            seen += [position for part in range(parts) for position in feed.positions(step, part)]
        assert sorted(seen) == list(range(8 * (step - 1), 8 * step))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_the_examples_of_their_positions_with_any_number_of_workers(examples, workers):
    feed = Feed(examples, batch_size=6, parts=2, process=0, processes=1, workers=workers)
    for step in (4, 5):
        for part in (0, 1):
            batch = feed.batch(step, part)
            for row, position in enumerate(feed.positions(step, part)):
                one = examples[position]
                assert torch.equal(batch.pixels[row], one.pixels[0])
                assert torch.equal(batch.ids[row], one.ids[0])
                assert torch.equal(batch.noise[row], one.noise[0])


def test_batches_do_not_touch_torchs_own_random_state(examples):
    before = torch.get_rng_state()
    Feed(examples, batch_size=2, parts=1, process=0, processes=1, workers=0).batch(1, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_broken_picture_is_replaced_by_the_next_and_told(tmp_path):
    lines = []
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"disc {i}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "2.png").write_bytes(b"cut")
    examples = PictureExamples(open_source(tmp_path), checkpoint.tokenizer(), DRAWING, size=64, seed=0, window=1)
    batches = [examples[position] for position in range(4)]
    told = [skip.key for batch in batches for skip in batch.skipped]
    assert told == ["2.png"]
    reds = sorted(int(batch.pixels[0, 0, 0, 0]) for batch in batches)
    assert reds == [0, 60, 180, 180]
