"""Built engines of a bundle (engines/): what each was built for, and which of them fits the machine at hand.

A plan holds code for one GPU and one TensorRT, so it lies outside the bundle's hashes, in
engines/<sm>-<library><version>/, beside the key that says what it was built for. A plan whose key does not fit is never
run. Unlike a graph, a plan is a program: take engines from where you would take one.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bksdm_runtime.bundle import ENGINES_FOLDER, Bundle, BundleError, file_sha256
from bksdm_runtime.manifest import check_path
from bksdm_runtime.strict_json import Fields, JsonError, parse_object

SCHEMA_VERSION = 1
# Name of the backend, as a library calls itself, and in the names of folders.
LIBRARIES: Mapping[str, tuple[str, str]] = {"tensorrt": ("TensorRT", "trt"), "tensorrt-rtx": ("TensorRT-RTX", "rtx")}
VERSION_COMPATIBLE, HARDWARE = "version_compatible", "hardware_compatibility"  # flags that widen what a plan fits
AMPERE_AND_LATER = "ampere+"
STRIPPED, WEIGHT_STREAMING = "stripped", "weight_streaming"  # flags that say what a plan needs before it runs
RECIPE = 1  # of how bksdm-build builds; another number and what is there is built again
_COMMON_PLATFORM = "linux-x86_64"  # which names of folders leave out
_MOST_PROFILES = 64
_LARGEST_KEY = 1 << 20

Shape = tuple[int, ...]


def platform_here() -> str:
    """Operating system and processor: what a plan's host code is for."""
    return f"{sys.platform}-{platform.machine().lower()}"


@dataclass(frozen=True)
class Range:
    """The shapes of one input: the smallest and the largest that a plan takes, and the one that it is fastest at."""

    smallest: Shape
    fastest: Shape
    largest: Shape

    def holds(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.smallest) and all(
            low <= size <= high for low, size, high in zip(self.smallest, shape, self.largest, strict=True)
        )

    @property
    def others(self) -> int:
        """How many sizes it takes besides one of each axis."""
        return sum(high - low for low, high in zip(self.smallest, self.largest, strict=True))

    def __str__(self) -> str:
        def written(shape: Shape) -> str:
            return "x".join(str(size) for size in shape)

        if self.smallest == self.largest:
            return written(self.smallest)
        return f"{written(self.smallest)} to {written(self.largest)}"


Profile = Mapping[str, Range]


@dataclass(frozen=True)
class Machine:
    """What runs a plan.

    library: a key of LIBRARIES; version: its own, in full; sm: compute capability, as 8.9. gpu: the model's name, ""
    for all of that compute capability. platform: operating system and processor, as linux-x86_64.
    """

    library: str
    version: str
    sm: str
    gpu: str = ""
    platform: str = field(default_factory=platform_here)

    @property
    def folder(self) -> str:
        gpu = "".join(f"-{word}" for word in re.findall(r"[a-z0-9]+", self.gpu.lower()))
        other = "" if self.platform == _COMMON_PLATFORM else f"-{self.platform}"
        return f"sm{self.sm.replace('.', '')}-{LIBRARIES[self.library][1]}{self.version}{gpu}{other}"

    def __str__(self) -> str:
        return f"{LIBRARIES[self.library][0]} {self.version} on SM {self.sm}{f' ({self.gpu})' * bool(self.gpu)}"


@dataclass(frozen=True)
class EngineKey:
    """What a plan was built for, and from what.

    onnx: of the graph and its weights, see graph_sha256. profiles: the shapes of every input, by name. flags: what else
    was asked of the builder, by name. recipe: of bksdm-build, see RECIPE.
    """

    component: str
    onnx: str
    machine: Machine
    profiles: tuple[Profile, ...]
    flags: Mapping[str, str | int | bool]
    recipe: int = RECIPE

    def misfit(self, onnx: str, here: Machine) -> str | None:
        """Why a plan of this key cannot run here, as a part of a sentence; None when it can."""
        built = self.machine
        if built.library != here.library:
            return f"is for {LIBRARIES[built.library][0]}"
        if self.onnx != onnx:
            return "was built from another graph or other weights"
        newer = bool(self.flags.get(VERSION_COMPATIBLE)) and _numbers(here.version) >= _numbers(built.version)
        if built.version != here.version and not newer:
            return f"was built with {LIBRARIES[built.library][0]} {built.version}"
        portable = self.flags.get(HARDWARE) == AMPERE_AND_LATER and _numbers(here.sm) >= (8, 0)
        if built.platform != here.platform:
            return f"was built on {built.platform}"
        if built.sm != here.sm and not portable:
            return f"was built for SM {built.sm}"
        # NVIDIA warns of errors where a plan runs on another model of the same compute capability.
        if built.gpu not in ("", here.gpu):
            return f"was built for an {built.gpu}"
        return None

    def profile_for(self, shapes: Mapping[str, Sequence[int]]) -> int | None:
        """Which profile holds these shapes, and as few others as possible; None when none does."""
        holding = [
            (sum(span.others for span in profile.values()), number)
            for number, profile in enumerate(self.profiles)
            if all(span.holds(shapes[name]) for name, span in profile.items())
        ]
        return min(holding)[1] if holding else None


@dataclass(frozen=True)
class Plan:
    """A plan and its key. bytes, sha256: of the file at `path`. seconds, peak_bytes: what building it took."""

    key: EngineKey
    path: Path
    bytes: int
    sha256: str
    seconds: float
    peak_bytes: int

    def to_json(self) -> str:
        return (
            json.dumps(
                {
                    "schema_version": SCHEMA_VERSION,
                    "key": asdict(self.key),
                    "plan": self.path.name,
                    "bytes": self.bytes,
                    "sha256": self.sha256,
                    "seconds": self.seconds,
                    "peak_bytes": self.peak_bytes,
                },
                indent=2,
                sort_keys=True,
            )
            + "\n"
        )


def graph_sha256(bundle: Bundle, component: str) -> str:
    """Of a component's graph and all that it may read: what bundle.json says of them. Raises BundleError.

    Other graphs of the folder and the configs beside them are no part of it.
    """
    bundle.component_path(component)
    path = bundle.manifest.components[component].path
    folder = path.rpartition("/")[0] + "/"
    weights = [
        name
        for name in bundle.manifest.files
        if name.startswith(folder) and not name.endswith((".onnx", ".json")) and name != path
    ]
    digest = hashlib.sha256()
    for name in (path, *sorted(weights)):
        digest.update(f"{name}\0{bundle.manifest.files[name].sha256}\n".encode())
    return digest.hexdigest()


def key_path(bundle: Bundle, machine: Machine, component: str) -> Path:
    """Where the key of a component's plan lies; its plan lies beside it, under the name that the key says."""
    return bundle.root / ENGINES_FOLDER / machine.folder / f"{component}.json"


def built(bundle: Bundle, library: str | None = None) -> list[Path]:
    """The keys of all plans, of one library or of any; none where there is no folder of them."""
    names = "|".join(one for _, one in LIBRARIES.values()) if library is None else LIBRARIES[library][1]
    folders = [
        folder
        for folder in sorted((bundle.root / ENGINES_FOLDER).glob("sm*"))
        if re.match(rf"sm\d+-({names})\d", folder.name)  # "-rtx" may stand in a GPU's name, too
    ]
    return [path for folder in folders for path in sorted(folder.glob("*.json"))]


def find(bundle: Bundle, component: str, here: Machine) -> Plan:
    """The plan of a component that fits this machine: that of its own GPU before that of its compute capability, and
    either before one of others that fits. Raises BundleError, which says what differs and what to do."""
    onnx = graph_sha256(bundle, component)
    exact = key_path(bundle, here, component)
    first = (exact, key_path(bundle, replace(here, gpu=""), component))
    others = [path for path in built(bundle) if path.name == exact.name and path not in first]
    refused: list[str] = []
    for path in dict.fromkeys((*first, *others)):
        if not path.is_file():
            continue
        folder = path.parent.relative_to(bundle.root).as_posix()
        try:
            plan = read(path)
        except BundleError as error:
            if path == exact:
                raise
            refused.append(f"{folder} is damaged ({error})")
            continue
        why = plan.key.misfit(onnx, here)
        if why is None:
            return plan
        refused.append(f"{folder} {why}")
    found = f"; {', '.join(refused)}" if refused else ""
    raise BundleError(
        f"bundle {bundle.root} has no engine of {component} for {here}{found}: "
        f"run bksdm-build {bundle.root} --library {here.library}"
    )


def read(path: Path) -> Plan:
    """A key and where its plan is, whose size is checked. Raises BundleError."""
    try:
        if path.stat().st_size > _LARGEST_KEY:
            raise JsonError("is too large to be a key")
        plan = _plan(Fields(parse_object(path.read_text(encoding="utf-8")), ""), path)
        found = plan.path.stat().st_size
    except (JsonError, UnicodeDecodeError) as error:
        raise BundleError(f"engine key {path}: {error}: run bksdm-build again") from None
    except OSError as error:
        raise BundleError(
            f"engine {error.filename or path} cannot be read: {error.strerror}: run bksdm-build again"
        ) from None
    if found != plan.bytes:
        raise BundleError(f"engine {plan.path} has {found:,} bytes, its key says {plan.bytes:,}: run bksdm-build again")
    return plan


def verify(plan: Plan) -> None:
    """Hash the plan's file. Raises BundleError."""
    try:
        found = file_sha256(plan.path)
    except OSError as error:
        raise BundleError(f"engine {plan.path} cannot be read: {error.strerror}") from None
    if found != plan.sha256:
        raise BundleError(
            f"engine {plan.path} was changed or damaged (sha256 {found[:12]}, its key says {plan.sha256[:12]}): "
            "run bksdm-build again"
        )


def _plan(fields: Fields, path: Path) -> Plan:
    version = fields.integer("schema_version", 0, 1 << 31)
    if version != SCHEMA_VERSION:
        raise JsonError(f"schema version {version} is unknown (this bksdm reads {SCHEMA_VERSION})")
    key = fields.fields("key")
    machine = key.fields("machine")
    sm = machine.text("sm")
    if not re.fullmatch(r"\d{1,2}\.\d", sm):
        raise JsonError("key.machine.sm must be a compute capability like 8.9")
    profiles: list[Profile] = []
    for value, where in key.array("profiles", _MOST_PROFILES):
        profiles.append({name: _range(span) for name, span in Fields(value, where).items()})
    flags: dict[str, str | int | bool] = {}
    for name, value in key.mapping("flags").items():
        if not isinstance(value, (str, int)):
            raise JsonError(f"key.flags.{name} must be text, a whole number, true or false")
        flags[name] = value
    name = check_path(fields.text("plan"))
    if "/" in name:
        raise JsonError("plan must be the name of a file beside the key")
    return Plan(
        key=EngineKey(
            component=key.text("component"),
            onnx=key.text("onnx"),
            machine=Machine(
                machine.choice("library", tuple(LIBRARIES)),
                machine.text("version"),
                sm,
                machine.text("gpu"),
                machine.text("platform"),
            ),
            profiles=tuple(profiles),
            flags=flags,
            recipe=key.integer("recipe", 0, 1 << 31),
        ),
        path=path.with_name(name),
        bytes=fields.integer("bytes", 1, 1 << 50),
        sha256=fields.text("sha256"),
        seconds=fields.number("seconds"),
        peak_bytes=fields.integer("peak_bytes", 0, 1 << 60),
    )


def _range(span: Fields) -> Range:
    def shape(name: str) -> Shape:
        sizes: list[int] = []
        for value, where in span.array(name, 8):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
                raise JsonError(f"{where} must be a positive whole number")
            sizes.append(value)
        return tuple(sizes)

    found = Range(shape("smallest"), shape("fastest"), shape("largest"))
    if not (len(found.smallest) == len(found.fastest) == len(found.largest) and found.holds(found.fastest)):
        raise JsonError(f"{span.where}: the fastest shape must lie between the smallest and the largest")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
