"""The bundle: the folder that export writes and everything downstream reads. This file owns its checks on disk."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bksdm_runtime.contract import Component, ModelFacts, TensorSpec
from bksdm_runtime.manifest import (
    MANIFEST_NAME,
    SCHEDULER_CONFIG,
    SCHEMA_VERSION,
    BundleError,
    FileRecord,
    Licence,
    Manifest,
)
from bksdm_runtime.strict_json import JsonError, parse_object

__all__ = [  # the schema's names belong to the bundle: writers import them from here
    "MANIFEST_NAME",
    "SCHEDULER_CONFIG",
    "SCHEMA_VERSION",
    "Bundle",
    "BundleError",
    "Component",
    "FileRecord",
    "Licence",
    "Manifest",
    "ModelFacts",
    "TensorSpec",
    "demo",
    "file_records",
    "file_sha256",
    "load",
    "verify_weights",
    "verifying_weights",
]

ENGINES_FOLDER = "engines"  # built on the user's own machine, each with the key that made it; never part of the hashes
TOKENIZER_FOLDER = "tokenizer"
FUSED = "_cuda.onnx"  # end of the name of a graph in ONNX Runtime's own operators, beside the plain one's

# A real manifest has under 100 kB; past this the file is not one, and is refused unread.
MAX_MANIFEST_BYTES = 8 * 1024 * 1024
# A file that is larger and no graph is not parsed but read as numbers: weights, in a file of their own beside a graph.
_SMALL = 32 * 1024 * 1024
# Left in any folder by a desktop that looked into it.
_DESKTOP_FILES = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Bundle:
    """A bundle that passed its checks. sha256: of bundle.json, which pins every other file: the bundle's hash."""

    root: Path
    manifest: Manifest
    scheduler_config: Mapping[str, object]
    sha256: str

    def component_path(self, name: str) -> Path:
        """Path of a component's graph. Raises BundleError when the bundle has no such component."""
        if name not in self.manifest.components:
            has = ", ".join(self.manifest.components)
            raise BundleError(f"bundle {self.root} has no {name} (it has {has})")
        return self.root / self.manifest.components[name].path

    def fused_path(self, name: str) -> Path:
        """Path of a component's graph in ONNX Runtime's own operators, for its CUDA provider; of the plain one if none.

        Raises BundleError when the bundle has no such component.
        """
        plain = self.component_path(name)
        fused = plain.with_name(plain.stem + FUSED)
        return fused if fused.relative_to(self.root).as_posix() in self.manifest.files else plain


def load(folder: Path | str, *, verify: bool = True, weights: bool = True) -> Bundle:
    """Open a bundle and check all of it: schema, paths, sizes, shapes, and with `verify` the SHA-256 of every file.

    weights: of the large files of weights, too; without, `verify_weights` is left to the caller.
    A file that bundle.json does not list is refused anywhere below a top folder that holds listed files (a graph could
    read it as its weights); beside those folders, at the top or in engines/, it is ignored. Raises BundleError.
    """
    root = Path(folder)
    with _errors_of(root):
        opened = _load(root.resolve())
        if verify:
            names = opened.manifest.files.keys()
            _verify(opened, names if weights else names - _weights(opened.manifest))
        return opened


def verify_weights(bundle: Bundle) -> None:
    """Check the SHA-256 of what `load` leaves out without `weights`. Raises BundleError."""
    with _errors_of(bundle.root):
        _verify(bundle, _weights(bundle.manifest))


@contextmanager
def verifying_weights(bundle: Bundle) -> Generator[None]:
    """`verify_weights` beside the block. Damage is said as such, not as what a library in the block made of it."""
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(verify_weights, bundle)
        try:
            yield
        except Exception:
            verified.result()
            raise
        verified.result()


def _weights(manifest: Manifest) -> set[str]:
    return {name for name, record in manifest.files.items() if record.bytes > _SMALL and not name.endswith(".onnx")}


@contextmanager
def _errors_of(root: Path) -> Generator[None]:
    try:
        yield
    except JsonError as error:
        raise BundleError(f"bundle {root}: {error}") from None
    except BundleError as error:
        raise BundleError(f"bundle {root}: {error}") from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise BundleError(f"bundle {root} cannot be read: {error.strerror or error}{where}") from None


def demo() -> Path:
    """Folder of the bundle that ships in the wheel. Raises BundleError when this build has none."""
    folder = Path(__file__).parent / "demo"
    if not (folder / MANIFEST_NAME).is_file():
        raise BundleError(f"this build of bksdm ships no demo bundle ({folder} has no {MANIFEST_NAME})")
    return folder


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Size and SHA-256 of every regular file, except bundle.json, engines/ and what a desktop left behind.

    Keys are posix paths relative to the folder, sorted.
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in _DESKTOP_FILES
    )
    names = [name for name in names if name != MANIFEST_NAME and not name.startswith(ENGINES_FOLDER + "/")]
    hashes = _sha256_of(folder, names)
    return {name: FileRecord((folder / name).stat().st_size, hashes[name]) for name in names}


def _sha256_of(root: Path, names: Iterable[str]) -> dict[str, str]:
    paths = {name: root / name for name in names}
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(zip(paths, pool.map(file_sha256, paths.values()), strict=True))


def file_sha256(path: Path) -> str:
    """Lower-case hexadecimal SHA-256, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _verify(bundle: Bundle, names: Iterable[str]) -> None:
    for name, found in _sha256_of(bundle.root, sorted(names)).items():
        _compare(name, found, bundle.manifest)


def _compare(name: str, found: str, manifest: Manifest) -> None:
    expected = manifest.files[name].sha256
    if found != expected:
        raise BundleError(
            f"{name} was changed or damaged (sha256 {found[:12]}, {MANIFEST_NAME} says {expected[:12]}): "
            "copy or export the bundle again"
        )


def _load(root: Path) -> Bundle:
    if not root.is_dir():
        raise BundleError("there is no such folder")
    if not (root / MANIFEST_NAME).is_file():
        hint = " (a diffusers checkpoint: export it first)" if (root / "model_index.json").is_file() else ""
        raise BundleError(f"it has no {MANIFEST_NAME}{hint}: bksdm-export writes bundles")
    content, sha256 = _read(root, MANIFEST_NAME)
    manifest = Manifest.from_json(_text(content, MANIFEST_NAME))
    for name, record in manifest.files.items():
        _check_file(root, name, record)
    _refuse_unlisted(root, manifest)
    content, found = _read(root, SCHEDULER_CONFIG)
    _compare(SCHEDULER_CONFIG, found, manifest)  # whatever else is verified: it is parsed here
    try:
        # diffusers saves DPM-Solver's `lambda_min_clipped` so; the schedule refuses it in any other setting
        scheduler_config = parse_object(_text(content, SCHEDULER_CONFIG), minus_infinity=True)
    except JsonError as error:
        raise BundleError(f"{SCHEDULER_CONFIG}: {error}") from None
    return Bundle(root, manifest, scheduler_config, sha256)


def _read(root: Path, name: str) -> tuple[bytes, str]:
    """A small file's content and its SHA-256."""
    path = root / name
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{name} is too large to be one ({path.stat().st_size:,} bytes)")
    content = path.read_bytes()
    return content, hashlib.sha256(content).hexdigest()


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise BundleError(f"{name} is not UTF-8 text") from None


def _check_file(root: Path, name: str, record: FileRecord) -> None:
    path = root / name
    if not path.is_file():
        raise BundleError(f"{name} is missing: copy or export the bundle again")
    if not path.resolve().is_relative_to(root):
        raise BundleError(f"{name} is a link that leaves the folder: copy the files themselves (cp -rL)")
    found = path.stat().st_size
    if found != record.bytes:
        raise BundleError(
            f"{name} has {found:,} bytes, {MANIFEST_NAME} says {record.bytes:,}: copy or export the bundle again"
        )


def _refuse_unlisted(root: Path, manifest: Manifest) -> None:
    graphs = [root / component.path for component in manifest.components.values()]
    folders = {name.split("/")[0] for name in manifest.files if "/" in name}
    waiting = [root / folder for folder in sorted(folders, reverse=True)]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            name = path.relative_to(root).as_posix()
            if path.is_dir():
                if path.is_symlink():  # what it leads to is listed under another name, or not at all
                    raise BundleError(f"{name} is a linked folder: copy the files themselves (cp -rL)")
                waiting.append(path)
            elif name not in manifest.files and not (path.name in _DESKTOP_FILES and not _named_in(graphs, path.name)):
                raise BundleError(f"{name} is not listed in {MANIFEST_NAME}: remove it, or export the bundle again")


def _named_in(graphs: Iterable[Path], name: str) -> bool:
    """Whether a graph's bytes hold the name, as they do where its weights lie in a file of that name."""
    for graph in graphs:
        with graph.open("rb") as file:
            if graph.stat().st_size and mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).find(name.encode()) >= 0:
                return True
    return False
