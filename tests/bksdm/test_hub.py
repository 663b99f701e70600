"""Published weights, from a cache laid out as the Hub's client lays it out, and what happens when there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

from bksdm import checkpoint, hub, variants
from bksdm.checkpoint import Checkpoint, CheckpointError

FIRST, SECOND = "1" * 40, "2" * 40
SameTensors = Callable[[Checkpoint, Checkpoint], None]


def cached(cache: Path, folder: Path, commit: str, *refs: str) -> Path:
    """Put `folder` into a Hub cache as nota-ai/bk-sdm-small at `commit`."""
    repo = cache / "models--nota-ai--bk-sdm-small"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir(exist_ok=True)
    for ref in refs:
        (repo / "refs" / ref).write_text(commit)
    return repo / "snapshots" / commit


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.usefixtures("mini_is_small")
def test_offline_reads_the_cache_and_honours_the_revision(
    mini_folder: Path, mini_checkpoint: Checkpoint, cache: Path, assert_same_tensors: SameTensors
) -> None:
    cached(cache, mini_folder, FIRST, "main")
    second = cached(cache, mini_folder, SECOND, "v2")
    file = second / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: t + 1 for k, t in load_file(file).items()}, file, metadata={"format": "pt"})
    loaded = checkpoint.load(None, variant="small")
    assert_same_tensors(loaded, mini_checkpoint)
    assert (loaded.variant, loaded.source) == ("small", f"nota-ai/bk-sdm-small@{FIRST}")
    assert loaded.licence.name == "CreativeML OpenRAIL-M"
    assert "Attachment A" in loaded.licence.notice
    for revision in ("v2", SECOND):
        other = checkpoint.load(None, variant="small", revision=revision)
        assert other.source == f"nota-ai/bk-sdm-small@{SECOND}"
        assert other.unet.conv_in.bias.equal(mini_checkpoint.unet.conv_in.bias + 1)
    with pytest.raises(CheckpointError, match=r"bk-sdm-small@v3 is not in the cache and HF_HUB_OFFLINE is set"):
        checkpoint.load(None, variant="small", revision="v3")


def test_a_cached_model_that_is_not_the_variant_is_refused(mini_folder: Path, cache: Path) -> None:
    cached(cache, mini_folder, FIRST, "main")
    with pytest.raises(CheckpointError, match=r"bk-sdm-small@1+ is not 'small': its U-Net has"):
        checkpoint.load(None, variant="small")


def test_nothing_cached_and_no_network_names_the_other_ways(cache: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"^nota-ai/bk-sdm-tiny-2m is not in the cache and HF_HUB_OFFLINE is set: give other weights: "
        r"a diffusers FOLDER, a FILE\.safetensors, demo \(.*\), or random \(.*\)$",
    ):
        checkpoint.load(None, variant="tiny-2m")


def test_the_environment_is_honoured_in_a_fresh_process(mini_folder: Path, tmp_path: Path) -> None:
    cached(tmp_path / "hub", mini_folder, FIRST, "main")
    code = "from bksdm import hub; print(hub.snapshot('nota-ai/bk-sdm-small')[1])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == FIRST


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online", "mini_is_small")
def test_an_unreachable_hub_falls_back_to_the_cache(
    mini_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **options: object) -> None:
        assert options["timeout"] == hub.TIMEOUT_S
        raise ConnectionError("no route")

    monkeypatch.setattr("bksdm.hub.HfApi.model_info", unreachable)
    with pytest.raises(
        CheckpointError, match=r"not in the cache and the Hub cannot be reached \(ConnectionError\): give"
    ):
        checkpoint.load(None, variant="small")
    cached(cache, mini_folder, FIRST, "main")
    assert checkpoint.load(None, variant="small").source.endswith(FIRST)


def test_failing_without_a_network_takes_seconds(tmp_path: Path) -> None:
    # A port of this machine on which nobody listens: refused at once, as a name that does not resolve is.
    code = (
        "import time; from bksdm import hub; from bksdm.errors import CheckpointError\n"
        "start = time.monotonic()\n"
        "try: hub.snapshot('nota-ai/bk-sdm-small')\n"
        "except CheckpointError as reason: print(reason)\n"
        "print(time.monotonic() - start)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_HUB_OFFLINE")
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    reason, seconds = done.stdout.splitlines()
    assert "is not in the cache and the Hub cannot be reached" in reason
    assert float(seconds) < 15, time.monotonic() - start  # measured: 0.1


FILES = [
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "safety_checker/model.safetensors",
    "v1-5-pruned.ckpt",
]


def test_only_configs_and_one_set_of_safetensors_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, online: None, tmp_path: Path
) -> None:
    asked: dict[str, object] = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path / SECOND)

    siblings = [SimpleNamespace(rfilename=name) for name in FILES]
    monkeypatch.setattr("bksdm.hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.snapshot("nota-ai/bk-sdm-small", "v2") == (tmp_path / SECOND, SECOND)
    assert asked["revision"] == "v2"
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    weights = [pattern for pattern in patterns if pattern.endswith((".safetensors", ".bin", ".ckpt"))]
    assert weights == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]


def test_a_repository_of_pickles_is_refused_before_anything_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, online: None
) -> None:
    siblings = [SimpleNamespace(rfilename=name) for name in FILES if not name.endswith(".safetensors")]
    monkeypatch.setattr("bksdm.hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(CheckpointError, match=r"text_encoder/pytorch_model\.bin is a pickle"):
        hub.snapshot("nota-ai/bk-sdm-small")
    names = [name for name in FILES if not name.startswith("vae")]
    wanted = hub.wanted_files([*names, "vae/diffusion_pytorch_model.bin"], "x", allow_pickle=True)
    assert [name for name in wanted if name.endswith(".bin")] == ["vae/diffusion_pytorch_model.bin"]


def refusing(kind: type[Exception]) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise kind.__new__(kind)  # their constructors want a response of the HTTP library of the day

    return refuse


@pytest.mark.usefixtures("online", "mini_is_small")
@pytest.mark.parametrize("kind", [RepositoryNotFoundError, GatedRepoError])
def test_a_copy_in_the_cache_outlives_its_repository(
    kind: type[Exception], mini_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(cache, mini_folder, FIRST, "main")
    monkeypatch.setattr("bksdm.hub.HfApi.model_info", refusing(kind))
    assert checkpoint.load(None, variant="small").source.endswith(FIRST)


@pytest.mark.parametrize("lacking", ["vae", "vae/diffusion_pytorch_model.safetensors", "tokenizer"])
def test_a_download_that_was_killed_is_called_unfinished(mini_folder: Path, cache: Path, lacking: str) -> None:
    path = cached(cache, mini_folder, FIRST, "main") / lacking
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(
        CheckpointError,
        match=r"the download of nota-ai/bk-sdm-small was not finished, it lacks .*(vae/|tokenizer).*, and HF_HUB_OFF.* "
        r"give other weights",
    ):
        checkpoint.load(None, variant="small")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RepositoryNotFoundError, r"@v9 is not in the cache and the Hub has no public nota-ai/bk-sdm-small: give"),
        (GatedRepoError, r"asks for its terms to be accepted \(visit https://huggingface\.co/nota-ai/bk-sdm-small\)"),
        (RevisionNotFoundError, r"nota-ai/bk-sdm-small has no revision 'v9' on the Hub"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(
    kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch, online: None, cache: Path
) -> None:
    monkeypatch.setattr("bksdm.hub.HfApi.model_info", refusing(kind))
    with pytest.raises(CheckpointError, match=message) as error:
        hub.snapshot("nota-ai/bk-sdm-small", "v9")
    assert "\n" not in str(error.value)


def test_a_broken_download_says_that_it_can_go_on(monkeypatch: pytest.MonkeyPatch, online: None) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionError("reset")

    siblings = [SimpleNamespace(rfilename=name) for name in FILES]
    monkeypatch.setattr("bksdm.hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(hub, "snapshot_download", broken)
    with pytest.raises(
        CheckpointError, match=r"downloading nota-ai/bk-sdm-small failed \(ConnectionError\): run it again"
    ):
        hub.snapshot("nota-ai/bk-sdm-small")


def test_a_trained_unet_is_laid_over_the_published_model(
    mini_folder: Path, build_mini: Callable[..., Checkpoint], cache: Path, tmp_path: Path, mini_is_small: None
) -> None:
    checkpoint.save(build_mini(seed=9), tmp_path / "trained")
    shutil.rmtree(cached(cache, mini_folder, FIRST, "main") / "unet")  # not needed, so neither fetched nor read
    loaded = checkpoint.load(None, variant="small", unet=str(tmp_path / "trained"))
    assert loaded.unet.conv_in.weight.equal(build_mini(seed=9).unet.conv_in.weight)
    wanted = hub.wanted_files(FILES, "x", with_unet=False)
    assert "vae/config.json" in wanted
    assert not any(name.startswith("unet/") for name in wanted)
    with pytest.raises(CheckpointError, match=r"not finished, it lacks unet/config\.json, and HF_HUB_OFFLINE is set"):
        checkpoint.load(None, variant="small")


def test_every_variant_has_a_repository() -> None:
    assert all(row.hub.count("/") == 1 for row in variants.VARIANTS.values())
