"""What the frozen encoders give, computed once: latent moments of every picture, text embeddings of every caption.

Moments, not latents: those are drawn from them anew each time, as without a cache. A folder of safetensors shards, each
with its SHA-256 beside it, and `cache.json` once it is whole."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from bksdm.checkpoint import Checkpoint
from bksdm.digests import digest
from bksdm.packages import sha256
from bksdm.sampling import embed
from bksdm_training import records, runs
from bksdm_training.data import DataError
from bksdm_training.examples import Batch, Drawing, without_traceback
from bksdm_training.sources import Example, ShardOrder, Skips, Source, prepare, read_or_next
from bksdm_training.vae import encode_pixels, move

INDEX = "cache.json"
FORMAT = 1
EMPTY = "empty.safetensors"  # the embedding of the empty caption, for caption dropout
_KEYS = {"size", "flip", "encoders", "shards", "source", "window", "shard_size", "captions", "licence"}
HASHED_WHEN_OPENED = 4 * 2**30  # bytes: two seconds where the processor has SHA-256, 2 GB/s measured
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def build(
    teacher: Checkpoint,
    source: Source,
    folder: Path,
    accelerator: Accelerator,
    *,
    size: int,
    flip: bool = True,
    dtype: str = "fp16",
    batch_size: int = 16,
    shard_size: int = 1024,
    workers: int = 0,
    skip_limit: float = 0.01,
) -> Path:
    """Encode every example of `source` at `size` px with the teacher's autoencoder and text encoder.

    flip: mirrored pictures too. dtype: of what is stored, fp16 or fp32; it is computed in float32. Shards that an
    earlier call finished are checked and kept; under `accelerate launch` the processes share them out.
    Raises ResumeError (begun with something else), DataError (too much of the data is unusable)."""
    begun = {
        "format": FORMAT,
        "size": size,
        "flip": flip,
        "dtype": dtype,
        "shard_size": shard_size,
        "source": {"name": source.name, "identity": source.identity, "shards": list(source.shards)},
        "encoders": encoders(teacher),
    }
    runs.begin(folder, begun, {key: {"source": "data"}.get(key, key) for key in begun}, accelerator)
    device = accelerator.device
    vae, text_encoder = move(teacher.vae, device), nn.Module.to(teacher.text_encoder, device)
    numbers = range(-(-len(source) // shard_size))
    own = [number for number in numbers if number % accelerator.num_processes == accelerator.process_index]
    own_rows = {number: range(number * shard_size, min((number + 1) * shard_size, len(source))) for number in own}
    skips, failed = copy.deepcopy(source.lost) if accelerator.is_main_process else Skips(), ""
    with tqdm(
        total=sum(map(len, own_rows.values())),
        unit="image",
        dynamic_ncols=True,
        disable=None if accelerator.is_main_process else True,
    ) as bar:
        try:
            for number, rows in own_rows.items():
                if (record := _finished(folder, number)) is None:
                    shard = _Shard(teacher, DTYPES[dtype], skips)
                    for examples in _read(source, rows, size, flip=flip, batch_size=batch_size, workers=workers):
                        shard.add(examples, vae, text_encoder)
                        bar.update(len(examples.counts))
                        skips.check(skip_limit)
                    shard.write(folder, number)
                else:
                    skips.merge(Skips(record["seen"], Counter(record["skipped"])))
                    bar.update(len(rows))
        except (DataError, OSError) as error:  # every process ends, or the others would wait for this one
            failed = str(error)
    if reasons := [reason for reason in gather_object([failed]) if reason]:
        raise DataError(reasons[0])
    runs.together(accelerator, lambda: _finish(folder, begun, numbers, teacher, source))
    return folder


def encoders(teacher: Checkpoint) -> dict[str, str]:
    """SHA-256 of the weights that a cache depends on."""
    return {"vae": digest(teacher.vae.state_dict()), "text_encoder": digest(teacher.text_encoder.state_dict())}


class CachedExamples(Dataset[Batch]):
    """Examples of a whole cache, in the order in which its source would give them."""

    def __init__(self, folder: Path, teacher: Checkpoint, drawing: Drawing, *, size: int, seed: int) -> None:
        """Raises DataError when the cache is not whole, damaged, or made for another size or with other encoders."""
        self.folder, self.drawing = folder, drawing
        self.facts = read_index(folder)
        if self.facts["size"] != size:
            raise DataError(f"{folder} is a cache for {self.facts['size']} px, not {size}: pass --size or make another")
        if self.facts["encoders"] != encoders(teacher):
            raise DataError(f"{folder} was made with another model's encoders: make it with bksdm-train cache again")
        if drawing.flip and not self.facts["flip"]:
            raise DataError(f"{folder} was made without mirrored pictures: pass --no-flip, or make it with them")
        # Every hash of a small cache, sizes of a large one: half a terabyte takes its time to read. What
        # bksdm-train cache says of a cache that exists is always of its hashes.
        in_full = sum(shard["bytes"] for shard in self.facts["shards"]) <= HASHED_WHEN_OPENED
        for number, shard in enumerate(self.facts["shards"]):
            if not _is_whole(folder / _name(number), shard, in_full=in_full):
                raise DataError(f"{folder / _name(number)} is damaged: run the bksdm-train cache command again")
        self.order = ShardOrder(self.facts["source"]["shards"], seed, self.facts["window"])
        self.identity = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # files do not travel to workers

    def __len__(self) -> int:
        return sum(self.facts["source"]["shards"])

    def __getitem__(self, position: int) -> Batch:
        index = self.order.index(position)
        shard, row = self._shard(index // self.facts["shard_size"]), index % self.facts["shard_size"]
        draw = self.drawing.at(position)
        start, count = (int(shard.get_slice(name)[row : row + 1]) for name in ("starts", "counts"))
        if draw.dropped:
            context = self._empty()
        else:
            pick = start + int(draw.caption * count)
            context = shard.get_slice("context")[pick : pick + 1]
        return Batch(
            moments=shard.get_slice("moments")[row : row + 1, int(draw.flip)],
            context=context,
            timesteps=draw.timestep[None],
            latent_noise=draw.latent_noise[None],
            noise=draw.noise[None],
        )

    def _shard(self, number: int) -> Any:
        if number not in self._open:  # mapped into memory, not read; opened anew in each worker
            self._open[number] = safe_open(self.folder / _name(number), "pt")  # type: ignore[no-untyped-call]
        return self._open[number]

    def _empty(self) -> Tensor:
        if -1 not in self._open:
            with safe_open(self.folder / EMPTY, "pt") as file:  # type: ignore[no-untyped-call]
                self._open[-1] = file.get_tensor("context")
        return self._open[-1]


def is_cache(path: Path) -> bool:
    """Whether `path` is a cache, whole or only begun."""
    return (path / INDEX).is_file() or any(path.glob("shard-*.safetensors"))


def read_index(folder: Path) -> dict[str, Any]:
    """The facts of a whole cache. Raises DataError."""
    try:
        facts = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise DataError(f"{folder} is a cache of format {facts['format']}, this reads {FORMAT}: make it again")
        if missing := _KEYS - facts.keys():
            raise ValueError(f"it has no {min(missing)}")
    except FileNotFoundError:
        raise DataError(f"{folder} is a cache that is not whole: run the bksdm-train cache command again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / INDEX} is damaged ({error}): run the bksdm-train cache command again") from error
    return facts


class _Encoded:
    """A batch of examples on the way in: pixels [B, F, 3, S, S], the captions of all, how many each has."""

    def __init__(self, examples: list[tuple[Example, list[Any], Tensor]]) -> None:
        self.pixels = torch.stack([pixels for _, _, pixels in examples])
        self.captions = [text for example, _, _ in examples for text in example.captions]
        self.counts = [len(example.captions) for example, _, _ in examples]
        self.skipped = [skip for _, skips, _ in examples for skip in skips]


class _Shard:
    def __init__(self, teacher: Checkpoint, dtype: torch.dtype, skips: Skips) -> None:
        """skips: of all that this process reads; what this shard adds to them goes into its record."""
        self.teacher, self.dtype, self.skips = teacher, dtype, skips
        self.before = copy.deepcopy(skips)
        self.moments: list[Tensor] = []
        self.context: list[Tensor] = []
        self.counts: list[int] = []

    @torch.no_grad()
    def add(self, batch: _Encoded, vae: Any, text_encoder: Any) -> None:
        both = batch.pixels.flatten(0, 1).to(vae.device)  # [B F, 3, S, S]
        moments = encode_pixels(vae, both).unflatten(0, batch.pixels.shape[:2])
        self.moments.append(moments.to("cpu", self.dtype))
        for start in range(0, len(batch.captions), 64):
            texts = batch.captions[start : start + 64]
            self.context.append(embed(text_encoder, self.teacher.tokenizer, texts).to("cpu", self.dtype))
        self.counts += batch.counts
        self.skips.add(batch.skipped, used=len(batch.counts))

    def write(self, folder: Path, number: int) -> None:
        counts = torch.tensor(self.counts)
        tensors = {
            "moments": torch.cat(self.moments),
            "context": torch.cat(self.context),
            "counts": counts,
            "starts": counts.cumsum(0) - counts,
        }
        path = folder / _name(number)
        staging = path.with_name(f".{path.name}")
        records.save_tensors(tensors, staging)
        staging.replace(path)
        record = {
            "sha256": sha256(path),
            "bytes": path.stat().st_size,
            "examples": len(counts),
            "seen": self.skips.seen - self.before.seen,
            "skipped": dict(self.skips.reasons - self.before.reasons),
        }
        records.write_json(path.with_suffix(".json"), record)


class _Rows(Dataset[Any]):
    """Some rows of a source, ready to be encoded: the example, why it is not the row's own, its pixels."""

    def __init__(self, source: Source, rows: range, size: int, *, flip: bool) -> None:
        self.source, self.rows, self.size, self.flip = source, rows, size, flip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Example, list[Any], Tensor]:
        example, skips = read_or_next(self.source, self.rows[number])
        sides = (False, True) if self.flip else (False,)
        pixels = torch.stack([prepare(example.image, self.size, side) for side in sides])
        return example, skips[:1], pixels  # the skips after the first are those of the next rows


def _read(source: Source, rows: range, size: int, *, flip: bool, batch_size: int, workers: int) -> Iterator[_Encoded]:
    ready = _Rows(source, rows, size, flip=flip)
    try:
        yield from DataLoader(ready, batch_size=batch_size, num_workers=workers, collate_fn=_Encoded)
    except DataError as error:
        raise without_traceback(error) from None


def _finish(folder: Path, begun: Mapping[str, Any], numbers: range, teacher: Checkpoint, source: Source) -> None:
    shards, seen, reasons = [], source.lost.seen, Counter(source.lost.reasons)
    for number in numbers:
        record = _record(folder / _name(number))
        if record is None or not _is_whole(folder / _name(number), record, in_full=False):
            raise DataError(f"{folder / _name(number)} is not whole: run the command again")
        shards.append({"file": _name(number), **{key: record[key] for key in ("sha256", "bytes", "examples")}})
        seen += record["seen"]
        reasons.update(record["skipped"])
    empty = embed(teacher.text_encoder, teacher.tokenizer, [""]).detach().to("cpu", DTYPES[begun["dtype"]])
    staging = folder / f".{EMPTY}"
    records.save_tensors({"context": empty}, staging)
    staging.replace(folder / EMPTY)
    shown = [read_or_next(source, index)[0].captions[0] for index in spread(len(source), 8)]
    facts = {
        **begun,
        "window": source.window,
        "shards": shards,
        "captions": shown,
        "licence": source.licence,
        "skipped": {"seen": seen, "reasons": dict(reasons)},
    }
    records.write_json(folder / INDEX, facts)


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` numbers below `count`, evenly spread."""
    return list(range(0, count, max(1, count // wanted)))[:wanted]


def _finished(folder: Path, number: int) -> dict[str, Any] | None:
    """The record of a shard that is whole, None of any other."""
    path = folder / _name(number)
    record = _record(path)
    return record if record is not None and _is_whole(path, record, in_full=True) else None


def _record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        return record if {"sha256", "bytes", "examples", "seen", "skipped"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _is_whole(path: Path, record: Mapping[str, Any], *, in_full: bool) -> bool:
    try:
        return path.stat().st_size == record["bytes"] and (not in_full or sha256(path) == record["sha256"])
    except (OSError, KeyError, TypeError):
        return False


def _name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
