"""Tar shards in WebDataset's layout, LAION's and img2dataset's: KEY.jpg with KEY.txt or KEY.json, read by offset.

The webdataset library itself reads a tar from its start on and cannot seek, so a run could not go on at its place."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from bksdm_training.data import DataError
from bksdm_training.sources import picture
from bksdm_training.sources.skips import BrokenExample, Skip, Skips
from bksdm_training.sources.source import Example, captions_of, check_index, leaves_folder, licence_of, name_of

log = logging.getLogger(__name__)

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")  # gz, bz2, xz, zst, lz4
IMAGES = ("jpg", "jpeg", "png", "webp")
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # as webdataset: the key ends at the file's first dot
WINDOW = 8  # shards of LAION's 10,000: 80,000 examples shuffled together, from files that the disk can keep up with

# Where an example's image and caption lie in its tar; a caption at -1 is missing.
PLACES = np.dtype([("image", "<i8"), ("image_size", "<i8"), ("caption", "<i8"), ("caption_size", "<i8"), ("json", "?")])


class Index(NamedTuple):
    """places: PLACES of every example, tar after tar. counts: examples of each tar. keys: all of them, each with a NUL
    behind it. ends: where those NULs are."""

    places: NDArray[np.void]
    counts: NDArray[np.int64]
    keys: NDArray[np.uint8]
    ends: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TarSource:
    """A Source. Of an example, 41 bytes and its key are held; every read opens its tar anew, so that there is no handle
    to share between processes: 8 us measured on a local disk, against 3.5 ms of decoding a 512 px JPEG."""

    folder: Path
    tars: tuple[str, ...]
    sizes: tuple[int, ...]
    name: str
    index: Index
    lost: Skips
    licence: str | None
    window: int = WINDOW
    _starts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", np.cumsum(self.index.counts) - self.index.counts)

    @property
    def shards(self) -> tuple[int, ...]:
        """One a tar."""
        return tuple(self.index.counts.tolist())

    def __len__(self) -> int:
        return len(self.index.places)

    @property
    def identity(self) -> str:
        """SHA-256 of the tars' names and sizes, and of every example's key, offsets and sizes."""
        total = hashlib.sha256(json.dumps([self.tars, self.sizes]).encode())
        for part in self.index:
            total.update(np.ascontiguousarray(part).tobytes())
        return total.hexdigest()

    def read(self, index: int) -> Example:
        """Raises BrokenExample, IndexError."""
        check_index(index, len(self))
        tar = self.tars[int(np.searchsorted(self._starts, index, side="right")) - 1]
        begin = int(self.index.ends[index - 1]) + 1 if index else 0
        key = f"{tar}/{self.index.keys[begin : self.index.ends[index]].tobytes().decode(errors='backslashreplace')}"
        image, image_size, caption, caption_size, is_json = self.index.places[index].item()
        if caption < 0:
            raise BrokenExample(key, "missing caption")
        try:
            with (self.folder / tar).open("rb", buffering=0) as file:
                text = _exactly(file, caption, caption_size)
                content = _exactly(file, image, image_size)
        except FileNotFoundError:
            raise BrokenExample(key, "missing file") from None
        except (OSError, EOFError) as error:
            raise BrokenExample(key, "unreadable file", error) from None
        captions = captions_of(key, _caption(key, text, is_json))
        return Example(key, picture.decode(key, content), captions)


def open_tars(path: Path, tars: list[Path], index: Path | None = None) -> TarSource:
    """Open tars as one source, reading all their headers or the index kept in the file `index`.

    path: what was asked for, a folder or the tar itself. A cut or damaged tar gives its whole examples; what is lost is
    counted in `lost`, as far as it can be known. Raises DataError, and OSError when the index cannot be written."""
    try:
        states = [tar.stat() for tar in tars]
        packed = [tar.name for tar in tars if _is_compressed(tar)]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): mend or remove it") from error
    if packed:
        more = f" (and {len(packed) - 1} more)" if len(packed) > 1 else ""
        raise DataError(
            f"{path}: {packed[0]}{more} is compressed, and examples are read by their offset: make it a plain .tar"
        )
    signature = json.dumps(
        [[tar.name, state.st_size, state.st_mtime_ns] for tar, state in zip(tars, states, strict=True)]
    )
    found = _load(index, signature) if index else None
    if found is None:
        found = _build(tars)
        if index:
            _save(index, signature, *found)
    if not len(found[0].places):
        raise DataError(
            f"{path} holds no example in {len(tars)} tar{'s' * (len(tars) > 1)} (lost: {dict(found[1].reasons)}): "
            f"each needs KEY.{'|'.join(IMAGES)} and KEY.txt or KEY.json"
        )
    folder = tars[0].parent
    names, sizes = tuple(tar.name for tar in tars), tuple(state.st_size for state in states)
    return TarSource(folder, names, sizes, name_of(path), *found, licence_of(folder))


def _build(tars: list[Path]) -> tuple[Index, Skips]:
    lost = Skips()
    places, counts, keys = [], [], []
    for number, tar in enumerate(tars, 1):
        examples = _examples(tar, lost)
        places.append(np.array([place for _, place in examples], dtype=PLACES))
        counts.append(len(examples))
        keys.append(b"".join(key.encode(errors="surrogateescape") + b"\0" for key, _ in examples))
        log.info("%s: %d examples (tar %d of %d)", tar.name, len(examples), number, len(tars))
    joined = np.frombuffer(b"".join(keys), dtype=np.uint8)
    return Index(np.concatenate(places), np.array(counts, dtype=np.int64), joined, np.flatnonzero(joined == 0)), lost


class _Part(NamedTuple):
    offset: int
    size: int
    is_json: bool = False


def _examples(path: Path, lost: Skips) -> list[tuple[str, tuple[int, int, int, int, bool]]]:
    """(key, place) of every example of a tar, in order of first appearance; all else is counted in `lost`."""
    images: dict[str, _Part | None] = {}
    captions: dict[str, _Part] = {}
    last, damage = "", ""
    with path.open("rb", buffering=512) as file:  # one header: what lies between is skipped, not read
        for member in _members(file):
            if isinstance(member, str):
                damage = member
                break
            name = NAME.fullmatch(member.name)
            if name is None or not member.isreg() or member.issparse():
                continue
            last, kind = name[1], name[2].lower()
            if leaves_folder(last) or "\0" in last:
                lost.add([Skip(f"{path.name}/{member.name}", "member name leaves the archive")], used=0)
            elif kind in IMAGES:
                images[last] = _Part(member.offset_data, member.size)  # of two by one name the last counts, as in tar
            elif kind == "txt" or (kind == "json" and (last not in captions or captions[last].is_json)):
                captions[last] = _Part(member.offset_data, member.size, kind == "json")
                images.setdefault(last, None)
    if damage:
        lost.add([Skip(path.name, *damage.split(": ", 1))], used=0)
        log.warning("%s: %s; its whole examples before that are used", path, damage)
    found = []
    for key, image in images.items():
        caption = captions.get(key, _Part(-1, 0))
        if image is not None and not (damage and key == last and caption.offset < 0):
            found.append((key, (image.offset, image.size, *caption)))
        else:
            reason = "cut off with its tar" if damage and key == last else "caption without an image"
            lost.add([Skip(f"{path.name}/{key}", reason)], used=0)
    return found


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo | str]:
    """The members whose content is there whole, then what is wrong with the tar, if anything."""
    end = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else it holds on to every header, 1 kB each
                if archive.offset <= member.offset:  # a negative size: Python before 3.13.6 would go round in circles
                    yield f"damaged tar: the member at byte {member.offset} ends before it begins"
                    return
                if member.offset_data + member.size > end:
                    yield "truncated tar"
                    return
                yield member
            # next() ends without a word at the closing blocks of zeros, at a cut, and at what is no header
            file.seek(archive.offset)
            block = file.read(tarfile.BLOCKSIZE)
    except Exception as error:  # tarfile's own, and whatever parsing a damaged header raises
        short = any(words in str(error) for words in ("end of data", "empty", "truncated"))
        yield "truncated tar" if short else f"damaged tar: {error}"
        return
    if len(block) < tarfile.BLOCKSIZE:
        yield "truncated tar"
    elif any(block):
        yield f"damaged tar: no header at byte {archive.offset}"


def _caption(key: str, content: bytes, is_json: bool) -> dict[str, object]:
    try:
        if not is_json:
            return {"text": content.decode()}
        fields = json.loads(content)
        return {"caption": fields.get("caption")}
    except (ValueError, AttributeError, RecursionError) as error:
        raise BrokenExample(key, "undecodable caption", error) from None


def _exactly(file: BinaryIO, offset: int, size: int) -> bytes:
    content = os.pread(file.fileno(), size, offset)
    if len(content) < size:
        raise EOFError(f"{len(content)} of {size} bytes at {offset}: the tar changed since it was opened")
    return content


def _is_compressed(path: Path) -> bool:
    if path.name.endswith(COMPRESSED):
        return True
    with path.open("rb") as file:
        return file.read(6).startswith(MAGIC)


def _save(path: Path, signature: str, index: Index, lost: Skips) -> None:
    state = {"seen": lost.seen, "reasons": lost.reasons, "first": [[s.key, s.reason, s.detail] for s in lost.first]}
    arrays: dict[str, Any] = {**index._asdict(), "signature": _bytes(signature), "lost": _bytes(json.dumps(state))}
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    with staging.open("wb") as file:
        np.savez(file, **arrays)
    staging.replace(path)


def _load(path: Path, signature: str) -> tuple[Index, Skips] | None:
    """The kept index, None unless it is whole and of these very tars."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            if kept["signature"].tobytes().decode() != signature:
                return None
            state = json.loads(kept["lost"].tobytes())
            index = Index(*(kept[name] for name in Index._fields))
            if (
                index.places.dtype != PLACES
                or len(index.places) != index.counts.sum()
                or len(index.ends) != len(index.places)
            ):
                return None
        return index, Skips(state["seen"], Counter(state["reasons"]), [Skip(*skip) for skip in state["first"]])
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
        return None


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)
