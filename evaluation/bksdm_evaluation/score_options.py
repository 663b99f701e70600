"""What the commands of bksdm-eval share that draw, score and compare: options, errors, a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bksdm_evaluation.progress import bar

if TYPE_CHECKING:
    import torch

    from bksdm_evaluation.feature_set import FeatureSet
    from bksdm_evaluation.picture_sets import PictureSet
    from bksdm_evaluation.protocol import Protocol

PROTOCOL_NAMES = ("clean", "published")  # of bksdm_evaluation.protocol, whose noise --help does not need
FOLDER = click.Path(path_type=Path)
LIBRARIES = ("torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu", "openvino")


def errors() -> tuple[type[Exception], ...]:
    """What a user can cause: one sentence each."""
    from bksdm.errors import CheckpointError, VariantError
    from bksdm.packages import PackageError
    from bksdm_evaluation.captions import CaptionsError
    from bksdm_evaluation.errors import ClipError
    from bksdm_evaluation.feature_set import FeatureSetError
    from bksdm_evaluation.generation import GenerationError
    from bksdm_evaluation.picture_files import PicturesError
    from bksdm_evaluation.retrieval import ScoreError
    from bksdm_evaluation.shards import ShardError
    from bksdm_evaluation.statistics import TooFewPictures
    from bksdm_runtime.pictures import USER_ERRORS

    of_models = (CheckpointError, VariantError, PackageError, ClipError, *USER_ERRORS)
    of_pictures = (
        CaptionsError,
        FeatureSetError,
        GenerationError,
        PicturesError,
        ScoreError,
        ShardError,
        TooFewPictures,
    )
    return (*of_models, *of_pictures, OSError)


def device(kind: str, threads: int | None) -> torch.device:
    """Where to compute, by --device. threads: of torch. Raises BadParameter."""
    import torch

    from bksdm_evaluation import devices

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return devices.pick(kind)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from error


def passing(command: Callable[..., None]) -> Callable[..., None]:
    """Options of every pass over pictures."""
    for option in reversed(
        [
            click.option(
                "--size", type=click.IntRange(32, 2048), default=256, show_default=True, help="Pixels, square."
            ),
            click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True),
            click.option("--device", "kind", default="auto", show_default=True, help="auto: the GPU, if any."),
            click.option("--threads", type=click.IntRange(1), help="That read pictures ahead."),
        ]
    ):
        command = option(command)
    return command


def inception(command: Callable[..., None]) -> Callable[..., None]:
    """The option of commands that have use for Inception's weights."""
    return click.option(
        "--inception", "weights", type=FOLDER, metavar="FILE", help="pytorch-fid's weights.  [default: from a package]"
    )(command)


def reference_of(
    paths: Sequence[Path], protocol: Protocol, size: int, network: Any, batch_size: int, threads: int | None
) -> FeatureSet | None:
    """Statistics of all paths together; None for none."""
    from bksdm_evaluation import feature_set, picture_sets
    from bksdm_evaluation.scoring import said_of_features

    if not paths:
        return None
    said = said_of_features(protocol, size, network)
    sets = [feature_set.load(path, said) for path in paths if path.suffix == ".npz"]
    if folders := [path for path in paths if path.suffix != ".npz"]:
        sets.append(features(picture_sets.real(folders, protocol, size), network, batch_size, threads))
    if not sets:
        return None
    whole = sets[0]
    for other in sets[1:]:
        whole = whole + other
    return whole


def features(pictures: PictureSet, network: Any, batch_size: int, threads: int | None) -> FeatureSet:
    """Statistics of real pictures, under a bar."""
    from bksdm_evaluation.scoring import FeatureMeter, run

    meter = FeatureMeter(network, pictures.protocol)
    with bar("real pictures", len(pictures.files)) as on_progress:
        run(pictures.source, [meter], threads=threads, batch_size=batch_size, on_progress=on_progress)
    return meter.result(pictures.size)
