"""What a run learns from: a data source read as it goes, or a cache of what the encoders make of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bksdm.checkpoint import Checkpoint
from bksdm.components import vae_scale
from bksdm.licence import Licence
from bksdm_training.cache import CachedExamples, is_cache, spread
from bksdm_training.config import DistillConfig
from bksdm_training.examples import Drawing, Examples, PictureExamples
from bksdm_training.sources import Skips, open_source, read_or_next

SHOWN = 8  # captions kept for grids


@dataclass(frozen=True)
class Material:
    """examples: by position. about: for records. captions: of the grids. terms: the pictures' licence, None where the
    data has none. lost: what was unusable at opening."""

    examples: Examples
    about: Mapping[str, object]
    captions: tuple[str, ...] = ()
    terms: Licence | None = None
    lost: Skips = field(default_factory=Skips)


def open_material(path: Path, teacher: Checkpoint, config: DistillConfig, *, index: Path | None = None) -> Material:
    """Open a data set or a cache. index: where the index of tar shards is kept. Raises DataError."""
    side = config.size // vae_scale(teacher.vae)
    channels = int(teacher.vae.config["latent_channels"])
    drawing = Drawing(
        config.loop.seed, (channels, side, side), flip=config.flip, caption_dropout=config.caption_dropout
    )
    if is_cache(path):
        cached = CachedExamples(path, teacher, drawing, size=config.size, seed=config.loop.seed)
        about = {"name": path.resolve().name, "kind": "cache", "source": cached.facts["source"]["name"]}
        return Material(cached, about, tuple(cached.facts["captions"]), _terms(cached.facts["licence"]))
    source = open_source(path, index=index)
    examples = PictureExamples(
        source, teacher.tokenizer, drawing, size=config.size, seed=config.loop.seed, window=source.window
    )
    captions = tuple(read_or_next(source, i)[0].captions[0] for i in spread(len(source), SHOWN))
    about = {"name": source.name, "kind": "pictures", "count": len(source)}
    return Material(examples, about, captions, _terms(source.licence), source.lost)


def _terms(notice: str | None) -> Licence | None:
    return None if notice is None else Licence("see the notice", notice)
