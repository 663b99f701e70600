"""How fast pictures are scored: against features alone, and against pytorch-fid and torch-fidelity.

    python benchmarks/scoring.py --pictures 96 --rounds 3
    pip install --no-deps --target peers pytorch-fid==0.3.0 torch-fidelity==0.3.0
    python benchmarks/scoring.py --pictures 96 --rounds 3 --peers peers

All contenders run the same network, the packaged Inception, on the same files, in turn, with as many threads and
reading processes as there are cores. Peers import torchvision, of which there is no build beside CPU torch: a stand-in
gives them its ToTensor, all that they take of it here, and their own weights, which they would download, stay out.

"features alone" has every picture in memory, prepared: what no reading can be faster than. Writes JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "runtime", "evaluation")]
from bksdm_evaluation import inception  # noqa: E402
from bksdm_evaluation.picture_files import collect  # noqa: E402
from bksdm_evaluation.protocol import CLEAN, PROTOCOLS, PUBLISHED  # noqa: E402
from bksdm_evaluation.scoring import FeatureMeter, Source, run  # noqa: E402

BATCH = 16


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where pytorch-fid and torch-fidelity lie")
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = inception.load_network()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        contenders = _contenders(network, Path(folder), chosen)
        for name, contender in contenders.items():
            contender()  # warm
            seconds[name] = []
        for _ in range(chosen.rounds):
            for name, contender in contenders.items():
                started = time.perf_counter()
                contender()
                seconds[name].append((time.perf_counter() - started) / chosen.pictures)
    figures = {
        "pictures": chosen.pictures,
        "size": chosen.size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds_a_picture": seconds,
    }
    print(table(figures))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def table(figures: Mapping[str, Any]) -> str:
    seconds = figures["seconds_a_picture"]
    rows = ["| contender | ms a picture | times features alone (least to most) |", "| --- | --- | --- |"]
    for name, own in seconds.items():
        alone = seconds["features alone, clean" if "clean" in name else "features alone, published"]
        ratios = [one / other for one, other in zip(own, alone, strict=True)]
        spread = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        rows.append(f"| {name} | {1000 * median(own):.1f} | {spread} |")
    return "\n".join(rows)


def _contenders(network: nn.Module, folder: Path, chosen: argparse.Namespace) -> dict[str, Callable[[], object]]:
    random = np.random.default_rng(0)
    found: dict[str, Callable[[], object]] = {}
    for protocol in PROTOCOLS.values():
        place = folder / protocol.name
        place.mkdir()
        for number in range(chosen.pictures):  # of detail, so that a file is as large as a photograph's
            coarse = random.integers(0, 256, (chosen.size // 4, chosen.size // 4, 3)).astype(np.uint8)
            picture = Image.fromarray(coarse).resize((chosen.size, chosen.size), Image.Resampling.BICUBIC)
            content = protocol.file_of(np.asarray(picture), chosen.size)
            (place / f"{number:05d}{protocol.suffix}").write_bytes(content)
        files = collect([place])
        found[f"features alone, {protocol.name}"] = _alone(network, files, protocol)
        found[f"bksdm-eval, {protocol.name}"] = _ours(network, files, protocol, chosen.size)
    if chosen.peers is not None:
        files = collect([folder / PUBLISHED.name])
        sys.path.insert(0, str(chosen.peers))
        _stand_in_for_torchvision()
        found["pytorch-fid 0.3.0"] = _pytorch_fid(network, files)
        found["torch-fidelity 0.3.0"] = _torch_fidelity(network, files)
    return found


def _ours(network: nn.Module, files: Mapping[str, Path], protocol: Any, size: int) -> Callable[[], object]:
    def ours() -> None:
        run(Source(files, protocol, size), [FeatureMeter(network, protocol)], batch_size=BATCH)

    return ours


@torch.no_grad()
def _alone(network: nn.Module, files: Mapping[str, Path], protocol: Any) -> Callable[[], object]:
    pictures = [Image.open(path).convert("RGB") for path in files.values()]
    if protocol == CLEAN:
        prepared = torch.from_numpy(np.stack([inception.prepare_clean(one) for one in pictures]))
    else:
        prepared = inception.prepare(
            torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2)
        )

    def alone() -> None:
        with torch.no_grad():
            for batch in prepared.split(BATCH):
                network(batch)

    return alone


def _pytorch_fid(network: nn.Module, files: Mapping[str, Path]) -> Callable[[], object]:
    from pytorch_fid import fid_score

    class Theirs(nn.Module):
        """What its InceptionV3 does around its network: [B, 3, H, W] in [0, 1] -> [[B, 2048, 1, 1]]."""

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            x = nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
            return [network(2 * x - 1)[:, :, None, None]]

    model, cores = Theirs(), len(os.sched_getaffinity(0))
    fid_score.tqdm = lambda loader: loader
    paths = list(files.values())
    return lambda: fid_score.get_activations(paths, model, BATCH, num_workers=cores)


def _torch_fidelity(network: nn.Module, files: Mapping[str, Path]) -> Callable[[], object]:
    from torch_fidelity.datasets import ImagesPathDataset
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.utils import get_featuresdict_from_dataset

    class Theirs(FeatureExtractorBase):
        """[B, 3, H, W] uint8 -> features; its own network resizes as TensorFlow does, at about this cost."""

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("2048",)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (network(inception.prepare(x)),)

    extractor, dataset = Theirs("packaged", ["2048"]), ImagesPathDataset(list(files.values()))
    return lambda: get_featuresdict_from_dataset(dataset, extractor, BATCH, False, False, False)


def _stand_in_for_torchvision() -> None:
    """Modules by the names that peers import; of them only ToTensor is ever called here."""

    class ToTensor:
        def __call__(self, picture: Image.Image) -> torch.Tensor:
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().div(255)

    def module(name: str, **attributes: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        vars(made).update(attributes)
        sys.modules[name] = made
        return made

    transforms = module("torchvision.transforms", ToTensor=ToTensor, Compose=object)
    datasets = module("torchvision.datasets", CIFAR10=object, STL10=object)
    blocks = {f"Inception{letter}": nn.Module for letter in "ABCDE"}
    models = module("torchvision.models", inception=types.SimpleNamespace(**blocks))
    module("torchvision.models.utils", load_state_dict_from_url=None)
    module("torchvision", transforms=transforms, datasets=datasets, models=models, __version__="0.28.0")


if __name__ == "__main__":
    sys.exit(main())
