"""Published weights from the Hugging Face Hub, through its standard cache."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from bksdm import weights_file
from bksdm.errors import CheckpointError

logger = logging.getLogger(__name__)

OTHER_WAYS = (
    "give other weights: a diffusers FOLDER, a FILE.safetensors, demo (ships with the repository), "
    "or random (true architecture, no download)"
)
# Long enough for a slow link, short enough that a blocked one does not look like a hang.
TIMEOUT_S = 10.0
_COMPONENTS = ("text_encoder", "unet", "vae")
_SMALL_FILES = ("model_index.json", "tokenizer/*", "scheduler/*")


def snapshot(
    repo: str, revision: str | None = None, *, allow_pickle: bool = False, with_unet: bool = True
) -> tuple[Path, str]:
    """The folder in the cache that holds `repo` at `revision`, downloaded if need be, and the commit it is.

    Fetches configurations and one set of weights: full-precision safetensors where they exist. HF_HUB_OFFLINE, HF_HOME,
    HF_HUB_CACHE and HF_ENDPOINT act as everywhere. A copy in the cache is used where the Hub has or shows none any
    more. with_unet: False leaves the U-Net out, for another one to be laid over. Raises CheckpointError.
    """
    named = f"{repo}@{revision}" if revision else repo
    try:
        # Asked once, with a time limit of its own, before the many-file download that would retry for minutes.
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S)
    except GatedRepoError:
        why = f"the Hub asks for its terms to be accepted (visit https://huggingface.co/{repo})"
        return _cached(repo, revision, why, with_unet=with_unet)
    except RevisionNotFoundError as reason:
        raise CheckpointError(f"{repo} has no revision {revision!r} on the Hub") from reason
    except RepositoryNotFoundError:
        return _cached(repo, revision, f"the Hub has no public {repo}", with_unet=with_unet)
    except OfflineModeIsEnabled:
        return _cached(repo, revision, "HF_HUB_OFFLINE is set", with_unet=with_unet)
    except Exception as reason:  # the client lets through requests' errors or httpx's, depending on its version
        return _cached(repo, revision, f"the Hub cannot be reached ({_kind(reason)})", with_unet=with_unet)
    names = [file.rfilename for file in info.siblings or ()]
    wanted = wanted_files(names, named, allow_pickle=allow_pickle, with_unet=with_unet)
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=wanted, etag_timeout=TIMEOUT_S)
    except Exception as reason:  # as above; a full disk and a broken connection also end here
        raise CheckpointError(
            f"downloading {named} failed ({_kind(reason)}): run it again, it goes on where it stopped"
        ) from reason
    return Path(folder), Path(folder).name


def wanted_files(names: Iterable[str], repo: str, *, allow_pickle: bool = False, with_unet: bool = True) -> list[str]:
    """Patterns of the files of a repository to download. Raises CheckpointError when it holds pickles only."""
    names = list(names)
    patterns: list[str] = [*_SMALL_FILES]
    for component in _components(with_unet=with_unet):
        inside = [name.split("/")[1] for name in names if name.startswith(f"{component}/") and name.count("/") == 1]
        choice = weights_file.choose(inside, where=f"{repo}/{component}", allow_pickle=allow_pickle)
        patterns += [f"{component}/config.json", *(f"{component}/{file}" for file in choice.files)]
    return patterns


def _cached(repo: str, revision: str | None, why: str, *, with_unet: bool) -> tuple[Path, str]:
    named = f"{repo}@{revision}" if revision else repo
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as reason:
        raise CheckpointError(f"{named} is not in the cache and {why}: {OTHER_WAYS}", change="weights") from reason
    if lacking := _lacking(folder, _components(with_unet=with_unet)):
        raise CheckpointError(
            f"the download of {named} was not finished, it lacks {lacking}, and {why}: {OTHER_WAYS}", change="weights"
        )
    logger.info("%s: using the cached copy, %s", repo, why)
    return folder, folder.name


def _components(*, with_unet: bool) -> tuple[str, ...]:
    return tuple(component for component in _COMPONENTS if with_unet or component != "unet")


def _lacking(folder: Path, components: Iterable[str]) -> str | None:
    """What a download that was cut short has not brought, if anything: a file only gets its name when it is whole."""
    for name in ("model_index.json", "tokenizer", "scheduler", *(f"{part}/config.json" for part in components)):
        if not (folder / name).exists():
            return name
    weights = (".safetensors", ".bin")
    return next(
        (
            f"the weights of {part}/"
            for part in components
            if not any(p.suffix in weights for p in (folder / part).iterdir())
        ),
        None,
    )


def _kind(reason: BaseException) -> str:
    return type(reason).__name__
