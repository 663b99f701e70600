"""Generation that is killed, sharded and gone on with; with a stand-in for what draws, and with the demo."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bksdm import checkpoint
from bksdm_evaluation.artists import BundleArtist, Noise, Pixels, Settings
from bksdm_evaluation.captions import Caption, Captions
from bksdm_evaluation.checkpoint_artist import CheckpointArtist
from bksdm_evaluation.generation import GENERATION, LISTING, GenerationError, Job, generate, pending
from bksdm_evaluation.protocol import CLEAN, PUBLISHED
from bksdm_evaluation.shards import Shard
from bksdm_runtime import bundle as bundles
from bksdm_runtime.engine import EngineSettings
from bksdm_runtime.pipeline import Pipeline

CAPTIONS = Captions(tuple(Caption(f"{i:03d}", f"caption {i}") for i in range(7)), "captions.txt", "ab" * 32)
JOB = Job(CAPTIONS, Settings(steps=2, guidance_scale=2.0, batch_size=2), CLEAN, seed=0, size=32)


class Painter:
    """Paints its noise; `stops` after so many pictures, as a killed process does."""

    latent_shape = (4, 8, 8)
    guidance_scale = 2.0

    def __init__(self, stops: int = 1000, name: str = "painter") -> None:
        self.drawn: list[str] = []
        self._stops, self._name = stops, name

    def draw(
        self, captions: Sequence[str], noise: Sequence[Noise], settings: Settings, on_step: Callable[[float], object]
    ) -> Iterator[Pixels]:
        assert len(captions) <= settings.batch_size
        for caption, own in zip(captions, noise, strict=True):
            if len(self.drawn) == self._stops:
                raise KeyboardInterrupt
            self.drawn.append(caption)
            on_step(1)
            pixels = np.repeat(np.repeat(own[:3].transpose(1, 2, 0) * 40 + 128, 8, 0), 8, 1)
            yield pixels.clip(0, 255).astype(np.uint8)

    def identity(self) -> dict[str, object]:
        return {"kind": "painter", "name": self._name}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_folder_is_an_image_folder_that_says_how_it_was_drawn(tmp_path: Path) -> None:
    told: list[float] = []
    made = generate(Painter(), JOB, tmp_path / "a", on_step=told.append, full=tmp_path / "full")
    assert (made.made, made.found, made.missing) == (7, 0, 0)
    assert sum(told) == 7
    rows = [json.loads(line) for line in (tmp_path / "a" / LISTING).read_text().splitlines()]
    assert rows[3] == {"file_name": "003.png", "text": "caption 3"}
    said = json.loads((tmp_path / "a" / GENERATION).read_text())
    assert said["captions"]["count"] == 7
    assert (said["protocol"], said["size"], said["steps"]) == ("clean", 32, 2)
    with Image.open(tmp_path / "a" / "003.png") as small, Image.open(tmp_path / "full" / "003.png") as full:
        assert (small.size, full.size) == ((32, 32), (64, 64))


@pytest.mark.parametrize("protocol", [CLEAN, PUBLISHED])
def test_killed_anywhere_it_goes_on_and_ends_the_same(tmp_path: Path, protocol) -> None:
    job = replace(JOB, protocol=protocol)
    generate(Painter(), job, tmp_path / "whole")
    expected = files(tmp_path / "whole")
    for stops in range(7):
        folder = tmp_path / str(stops)
        with pytest.raises(KeyboardInterrupt):
            generate(Painter(stops), job, folder)
        assert len(pending(job, Shard(), folder)) == 7 - stops
        painter = Painter()
        made = generate(painter, job, folder)
        assert (made.made, made.found) == (7 - stops, stops)
        assert len(painter.drawn) == 7 - stops  # nothing finished is redone
        assert files(folder) == expected


def test_what_a_killed_process_left_of_its_own_pictures_goes(tmp_path: Path) -> None:
    own, others = tmp_path / ".002.png.host-7.part", tmp_path / ".003.png.host-7.part"
    for part in (own, others):
        part.write_bytes(b"half")
    generate(Painter(), JOB, tmp_path, Shard(0, 2))
    assert not own.exists()
    assert others.exists()  # another shard's, which may be at it


@pytest.mark.parametrize("protocol", [CLEAN, PUBLISHED])
def test_shards_of_any_number_draw_the_same_pictures(tmp_path: Path, protocol) -> None:
    job = replace(JOB, protocol=protocol)
    generate(Painter(), job, tmp_path / "whole")
    for number in (3, 1, 0, 2):
        made = generate(Painter(), job, tmp_path / "one", Shard(number, 4))
        generate(Painter(), job, tmp_path / f"own-{number}", Shard(number, 4))
    assert made.missing == 0
    assert files(tmp_path / "one") == files(tmp_path / "whole")
    together = {name: data for i in range(4) for name, data in files(tmp_path / f"own-{i}").items()}
    assert together == files(tmp_path / "whole")
    assert generate(Painter(), job, tmp_path / "part", Shard(1, 4)).missing == 5


def test_a_picture_does_not_depend_on_its_batch_or_its_place(tmp_path: Path) -> None:
    generate(Painter(), JOB, tmp_path / "two")
    larger = replace(JOB, settings=replace(JOB.settings, batch_size=5))
    generate(Painter(), larger, tmp_path / "five")
    turned = replace(JOB, captions=replace(CAPTIONS, rows=CAPTIONS.rows[::-1]))
    generate(Painter(), turned, tmp_path / "turned")
    pictures = [{n: d for n, d in files(tmp_path / f).items() if n.endswith(".png")} for f in ("two", "five", "turned")]
    assert pictures[0] == pictures[1] == pictures[2]


def test_another_model_or_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    generate(Painter(), JOB, tmp_path, Shard(0, 2))
    before = files(tmp_path)
    with pytest.raises(
        GenerationError, match=r"drawn otherwise .model.name is painter there, another here.: take another"
    ):
        generate(Painter(name="another"), JOB, tmp_path)
    with pytest.raises(GenerationError, match="steps is 2 there, 3 here"):
        generate(Painter(), replace(JOB, settings=replace(JOB.settings, steps=3)), tmp_path)
    (tmp_path / GENERATION).write_text("{")
    with pytest.raises(GenerationError, match="cannot be read"):
        generate(Painter(), JOB, tmp_path)
    assert {name: data for name, data in files(tmp_path).items() if name != GENERATION} == {
        name: data for name, data in before.items() if name != GENERATION
    }


def test_a_bundle_and_its_checkpoint_draw_the_same_from_the_same_noise(tmp_path: Path) -> None:
    captions = Captions((Caption("a", "a hot dog, 3d icon"), Caption("b", "a crab, 3d icon")), "c.txt", "ab" * 32)
    job = Job(captions, Settings(steps=4, guidance_scale=2.0, batch_size=2), CLEAN, seed=5, size=64)
    pipeline = Pipeline.open(bundles.demo(), EngineSettings(backend="onnxruntime", threads=1))
    generate(BundleArtist(pipeline), job, tmp_path / "bundle")
    generate(CheckpointArtist(checkpoint.load("demo")), job, tmp_path / "checkpoint")
    for name in ("a.png", "b.png"):
        ours, theirs = (
            np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("bundle", "checkpoint")
        )
        assert np.abs(ours - theirs).max() <= 1  # measured 1, before the resize
    said = [json.loads((tmp_path / folder / GENERATION).read_text())["model"] for folder in ("bundle", "checkpoint")]
    assert said[0]["sha256"] == bundles.load(bundles.demo()).sha256
    assert set(said[1]["sha256"]) == {"text_encoder", "unet", "vae"}
