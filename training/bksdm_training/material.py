"""What a run learns from: a data source read as it goes, or a cache of what the encoders make of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bksdm import licence
from bksdm.checkpoint import Checkpoint
from bksdm.components import vae_scale
from bksdm.licence import Licence
from bksdm_training.cache import CachedExamples, is_cache, spread
from bksdm_training.config import RunConfig
from bksdm_training.examples import Drawing, Examples, PairedExamples, PictureExamples
from bksdm_training.sources import Skips, Source, open_plain, open_source, read_or_next

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


def open_material(path: Path, teacher: Checkpoint, config: RunConfig, *, index: Path | None = None) -> Material:
    """Open a data set or a cache. index: where the index of tar shards is kept. Raises DataError."""
    if is_cache(path):
        drawing = _drawing(teacher, config)
        cached = CachedExamples(path, teacher, drawing, size=config.size, seed=config.loop.seed)
        about = {"name": path.resolve().name, "kind": "cache", "source": cached.facts["source"]["name"]}
        return Material(cached, about, tuple(cached.facts["captions"]), _terms(cached.facts["licence"]))
    source = open_source(path, index=index)
    captions = tuple(read_or_next(source, i)[0].captions[0] for i in spread(len(source), SHOWN))
    about = {"name": source.name, "kind": "pictures", "count": len(source)}
    return Material(_pictures(source, teacher, config), about, captions, _terms(source.licence), source.lost)


def open_subject(
    path: Path, prompt: str, base: Checkpoint, config: RunConfig, *, prior: tuple[Path, str] | None = None
) -> Material:
    """Open a plain folder of pictures of one subject, DreamBooth's; prior: a folder of its class and their prompt, the
    examples at odd positions. Raises DataError."""
    source = open_plain(path, prompt)
    examples = _pictures(source, base, config)
    about = {"name": source.name, "kind": "subject", "count": len(source), "prompt": source.caption}
    terms = _terms(source.licence)
    if prior is not None:
        classes = open_plain(*prior)
        # Another seed: at the same index of both there would be the same noise.
        paired = PairedExamples(examples, _pictures(classes, base, config, seed=config.loop.seed + 1))
        about["class"] = {"name": classes.name, "count": len(classes), "prompt": classes.caption}
        theirs = _terms(classes.licence)
        terms = licence.joined(terms, theirs) if terms and theirs else terms or theirs
        return Material(paired, about, (source.caption,), terms)
    return Material(examples, about, (source.caption,), terms)


def _pictures(source: Source, teacher: Checkpoint, config: RunConfig, *, seed: int | None = None) -> PictureExamples:
    drawing = _drawing(teacher, config, seed)
    return PictureExamples(
        source, teacher.tokenizer, drawing, size=config.size, seed=drawing.seed, window=source.window
    )


def _drawing(teacher: Checkpoint, config: RunConfig, seed: int | None = None) -> Drawing:
    side = config.size // vae_scale(teacher.vae)
    latent = (int(teacher.vae.config["latent_channels"]), side, side)
    seed = config.loop.seed if seed is None else seed
    return Drawing(seed, latent, flip=config.flip, caption_dropout=config.caption_dropout)


def _terms(notice: str | None) -> Licence | None:
    return None if notice is None else Licence(licence.UNNAMED, notice)
