"""What the two protocols make of the same pictures: scores of one set, saved, resized and measured both ways.

    bksdm-train data -o data/emoji --sources fluent --groups animals-nature,food-drink
    python benchmarks/protocols.py --data data/emoji/train --size 64

Draws a picture of every caption once (the demo's, 128 px) and saves it under both protocols at --size, which halves it
as 512 px are halved to 256; real pictures come to that size as each protocol has it. KID with its standard error, and
FID, which so few pictures bias upwards alike in both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "runtime", "evaluation")]
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from bksdm_evaluation import inception, picture_sets  # noqa: E402
from bksdm_evaluation.artists import BundleArtist, Settings  # noqa: E402
from bksdm_evaluation.captions import read_captions  # noqa: E402
from bksdm_evaluation.feature_set import FeatureSet  # noqa: E402
from bksdm_evaluation.generation import Job, generate  # noqa: E402
from bksdm_evaluation.picture_sets import PictureSet  # noqa: E402
from bksdm_evaluation.protocol import CLEAN, PROTOCOLS  # noqa: E402
from bksdm_evaluation.scoring import FeatureMeter, run  # noqa: E402
from bksdm_evaluation.statistics import frechet_distance, kernel_distance  # noqa: E402
from bksdm_runtime import bundle as bundles  # noqa: E402
from bksdm_runtime.engine import EngineSettings  # noqa: E402
from bksdm_runtime.pipeline import Pipeline  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="an image folder with captions")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    network = inception.load_network()
    with TemporaryDirectory() as name:
        folder = Path(name)
        full = _draw(chosen.data, folder, chosen.steps)
        sets: dict[str, tuple[FeatureSet, FeatureSet]] = {}
        for protocol in PROTOCOLS.values():
            place = folder / protocol.name
            place.mkdir()
            for path in sorted(full.glob("*.png")):
                with Image.open(path) as picture:
                    content = protocol.file_of(np.asarray(picture.convert("RGB")), chosen.size)
                (place / f"{path.stem}{protocol.suffix}").write_bytes(content)
            drawn = picture_sets.generated([place], protocol.name, chosen.size)
            real = picture_sets.real([chosen.data], protocol, chosen.size)
            sets[protocol.name] = _features(network, drawn), _features(network, real)
    found: dict[str, Any] = {"size": chosen.size, "steps": chosen.steps, "pictures": sets["clean"][0].count}
    found |= {name: _scores(drawn, real) for name, (drawn, real) in sets.items()}
    print(table(found))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def table(found: dict[str, Any]) -> str:
    rows = [f"{found['pictures']} pictures of {found['size']} px, {found['steps']} steps", ""]
    rows += ["| protocol | KID | FID (biased) |", "|---|---|---|"]
    for name in PROTOCOLS:
        kid, fid = found[name]["kid"], found[name]["fid"]
        rows.append(f"| `{name}` | {kid['value']:.5f} +- {kid['standard_error']:.5f} | {fid:.2f} |")
    return "\n".join(rows)


def _draw(data: Path, folder: Path, steps: int) -> Path:
    """Every caption's picture at the model's own size, as PNG."""
    pipeline = Pipeline.open(bundles.demo(), EngineSettings(threads=len(os.sched_getaffinity(0))))
    artist = BundleArtist(pipeline)
    job = Job(read_captions(data / "metadata.jsonl"), Settings(steps, artist.guidance_scale), CLEAN, CLEAN.seed, 128)
    generate(artist, job, folder / "drawn", full=folder / "full")
    return folder / "full"


def _features(network: Any, pictures: PictureSet) -> FeatureSet:
    meter = FeatureMeter(network, pictures.protocol)
    run(pictures.source, [meter])
    return meter.result(pictures.size)


def _scores(drawn: FeatureSet, real: FeatureSet) -> dict[str, Any]:
    kid = kernel_distance(drawn.sample.astype(np.float64), real.sample.astype(np.float64))
    return {"kid": asdict(kid), "fid": frechet_distance(drawn, real)}


if __name__ == "__main__":
    sys.exit(main())
