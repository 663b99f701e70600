"""The demo data: emoji pictures with captions, as an image folder in BK-SDM's own layout.

Pictures: Fluent Emoji 3D (Microsoft, MIT) and Noto Emoji (Google, Apache-2.0), composited on white.
Captions: the names and keywords of emojibase (MIT). The split is by concept, never by image: a concept that is
held out is unseen in every style.

    OUT/train/metadata.jsonl  {"file_name", "text", "captions", "concept", "style"} a line, and the PNGs
    OUT/unseen/...            the same for the held-out concepts
    OUT/LICENSE              the notices of every source
    OUT/dataset.json          counts, sources, licences, packages with their hashes
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from PIL import Image

from bksdm.leftovers import scratch
from bksdm.packages import PACKAGES, fetch

# emojibase groups with depictable things: smileys, people, animals, food, travel, activities, objects.
# Left out: 2 components, 8 symbols (signs and letters), 9 flags (mixed provenance).
GROUPS = {
    "smileys-emotion": 0,
    "people-body": 1,
    "animals-nature": 3,
    "food-drink": 4,
    "travel-places": 5,
    "activities": 6,
    "objects": 7,
}
STYLES = {"fluent": "3d", "noto": "flat"}
UNSEEN_SHARE = 0.05  # of concepts


@dataclass(frozen=True)
class Emoji:
    """One concept: its lower-case name, its keywords, its code points as the file names spell them."""

    name: str
    tags: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class Example:
    """One line of metadata.jsonl. `text` is the canonical caption, `captions` all that training draws from."""

    file_name: str
    text: str
    captions: tuple[str, ...]
    concept: str
    style: str


def is_unseen(concept: str, share: float = UNSEEN_SHARE) -> bool:
    """Whether a concept is held out: decided by its name's hash, so it stays out in every style and version."""
    return int.from_bytes(hashlib.sha256(concept.encode()).digest()[:4], "big") < share * 2**32


def captions(emoji: Emoji, style: str) -> tuple[str, ...]:
    """The captions of one picture, canonical first: with the style word, without, with an article, with keywords."""
    name = emoji.name
    article = with_article(name)
    texts = [f"{article}, {style} icon", name, article, f"{name}, {style} icon", f"{style} icon of {article}"]
    extra = [tag for tag in emoji.tags if tag not in name][:4]
    texts += [f"{name}, {tag}" for tag in extra[:2]]
    if len(extra) > 2:
        texts.append(f"{name}, {', '.join(extra)}, {style} icon")
    return tuple(dict.fromkeys(texts))


def with_article(name: str) -> str:
    """ "red apple" -> "a red apple"; a plural name stays as it is ("grapes", "women wrestling")."""
    head = re.split(r" with | in | on | of | and |: ", name)[0].split()
    plural = head[0] in ("men", "women", "people") or (head[-1].endswith("s") and not head[-1].endswith(("ss", "us")))
    # by sound, not by letter: a unicorn, a euro, an hourglass, an x-ray
    vowel = re.match(r"hour|x-ray|(?!uni|eu|ewe|one\b|used|ukulele)[aeiou]", name)
    return name if plural else ("an " if vowel else "a ") + name


def build(
    output: Path,
    *,
    sources: tuple[str, ...] = tuple(STYLES),
    groups: tuple[str, ...] = tuple(GROUPS),
    size: int = 256,
) -> dict[str, object]:
    """Write the image folder at `size` px (square) and return the contents of dataset.json.

    sources: keys of STYLES; groups: keys of GROUPS.

    The folder appears whole or not at all. Raises PackageError, and FileExistsError when `output` exists."""
    if output.exists():
        raise FileExistsError(f"{output} exists: remove it or choose another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    concepts = list(read_concepts(groups))
    summary: dict[str, object] = {"size": size, "unseen_share": UNSEEN_SHARE, "groups": list(groups)}
    with scratch(output.parent, f".{output.name}.building-") as staging:
        rows: dict[str, list[Example]] = {"train": [], "unseen": []}
        for split in rows:
            (staging / split).mkdir()
        for source in sources:
            pictures = {"fluent": fluent_pictures, "noto": noto_pictures}[source](size)
            by_key = {emoji.key: emoji for emoji in concepts}
            for key, picture in pictures:
                emoji = by_key.pop(key, None)  # one picture a concept: some files differ by U+FE0F alone
                if emoji is None:
                    continue
                split = "unseen" if is_unseen(emoji.name) else "train"
                texts = captions(emoji, STYLES[source])
                example = Example(f"{source}-{key}.png", texts[0], texts, emoji.name, STYLES[source])
                on_white(picture, size).save(staging / split / example.file_name)
                rows[split].append(example)
        for split, examples in rows.items():
            lines = [json.dumps(asdict(e), ensure_ascii=False) for e in sorted(examples, key=lambda e: e.file_name)]
            (staging / split / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        summary["counts"] = {split: len(examples) for split, examples in rows.items()}
        summary["concepts"] = {split: len({e.concept for e in examples}) for split, examples in rows.items()}
        (staging / "LICENSE").write_text(licence_notice(sources), encoding="utf-8")
        names = {"fluent": "@lobehub/fluent-emoji-3d", "noto": "@iconify-json/noto"}
        summary["sources"] = [asdict(PACKAGES[names[s]]) for s in sources] + [asdict(PACKAGES["emojibase-data"])]
        (staging / "dataset.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        staging.replace(output)
    return summary


def licence_notice(sources: tuple[str, ...]) -> str:
    """The notices that travel with the pictures and with weights trained on them."""
    folder = resources.files("bksdm_training") / "licences"
    parts = [(folder / f"{name}.txt").read_text(encoding="utf-8") for name in (*sources, "emojibase")]
    return f"\n{'-' * 80}\n\n".join(parts)


def read_concepts(groups: tuple[str, ...] = tuple(GROUPS)) -> Iterator[Emoji]:
    """The base emoji (no skin tones) of the chosen groups, from emojibase."""
    wanted = {GROUPS[group] for group in groups}
    with tarfile.open(fetch("emojibase-data")) as archive:
        rows = json.load(_member(archive, "package/en/data.json"))
    for row in rows:
        if row.get("group") in wanted:
            # straight apostrophes, as people type them
            yield Emoji(row["label"].lower().replace("\u2019", "'"), tuple(row.get("tags", ())), _key(row["hexcode"]))


def fluent_pictures(size: int) -> Iterator[tuple[str, Image.Image]]:
    """(key, RGBA picture) of every Fluent 3D emoji, 256 px as published."""
    del size  # raster source
    with tarfile.open(fetch("@lobehub/fluent-emoji-3d")) as archive:
        for member in archive:
            if member.name.endswith(".webp"):
                data = archive.extractfile(member)
                if data is not None:
                    yield _key(Path(member.name).stem), Image.open(io.BytesIO(data.read())).convert("RGBA")


def noto_pictures(size: int) -> Iterator[tuple[str, Image.Image]]:
    """(key, RGBA picture) of every Noto emoji, drawn at `size` px."""
    import resvg_py  # only this source needs a rasteriser

    with tarfile.open(fetch("@iconify-json/noto")) as archive:
        icons = json.load(_member(archive, "package/icons.json"))
        chars = json.load(_member(archive, "package/chars.json"))
    for code, name in chars.items():
        icon = icons["icons"].get(name)
        if icon is None:
            continue
        w, h = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}">{icon["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
        yield _key(code), Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def on_white(picture: Image.Image, size: int) -> Image.Image:
    """An RGBA picture on a white ground, RGB, `size` px square."""
    ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(ground, picture).convert("RGB")
    return flat if flat.size == (size, size) else flat.resize((size, size), Image.Resampling.LANCZOS)


def _key(code: str) -> str:
    # The sources disagree on whether the emoji presentation selector U+FE0F is written.
    return "-".join(part.lower().lstrip("0") for part in code.split("-") if part.lower() != "fe0f")


def _member(archive: tarfile.TarFile, name: str) -> io.BufferedIOBase:
    data = archive.extractfile(name)
    if data is None:
        raise FileNotFoundError(f"{archive.name} has no file {name}")
    return data  # type: ignore[return-value]
