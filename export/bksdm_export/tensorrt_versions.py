"""What differs between TensorRT 8.6, 10, 11 and TensorRT-RTX when an engine is built: all of it, and only here.

|                  | 8.6                      | 10, 11                           | RTX                              |
|------------------|--------------------------|----------------------------------|----------------------------------|
| what makes fp16  | the flag FP16, and fp32  | the graph's own types, in a      | the graph's own types            |
|                  | held where the graph has | network that is strongly typed   |                                  |
|                  | it                       |                                  |                                  |
| where it builds  | on the GPU that runs it  | on the GPU that runs it          | anywhere, for SMs that are named |
| timings          | kept                     | kept                             | none: a GPU compiles to the end  |
| progress         | not said                 | said                             | said                             |

Polygraphy's loaders hide the rest: EXPLICIT_BATCH, which 10 no longer has, and a parser that must outlive its network.
https://docs.nvidia.com/deeplearning/tensorrt/latest/api/migration-guide.html
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bksdm_export.errors import ExportError
from bksdm_runtime.devices import compute_capability, device_name
from bksdm_runtime.plans import AMPERE_AND_LATER, HARDWARE, LIBRARIES, STRIPPED, VERSION_COMPATIBLE, WEIGHT_STREAMING

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
SAME_SM = "same-sm"
HARDWARE_CHOICES = (AMPERE_AND_LATER, SAME_SM)


class MissingLibrary(ExportError):  # noqa: N818 - reads as what it says
    """A library is not installed; the message names the extra that brings it."""


# Names of options that keys call otherwise: those that the runtime reads.
_IN_KEYS = {
    "hardware": HARDWARE,
    "version_compatible": VERSION_COMPATIBLE,
    "weight_streaming": WEIGHT_STREAMING,
    "stripped": STRIPPED,
}


@dataclass(frozen=True)
class Options:
    """What a builder may be asked for besides shapes; None and False leave it its own way.

    optimization_level: 0 to 5, how long it looks for faster kernels; workspace: bytes of scratch memory at most;
    hardware: other GPUs that the engine shall run on, one of HARDWARE_CHOICES. Each costs speed, but for the first.
    """

    optimization_level: int | None = None
    workspace: int | None = None
    hardware: str | None = None
    version_compatible: bool = False
    weight_streaming: bool = False
    stripped: bool = False

    def flags(self) -> dict[str, str | int | bool]:
        """As an engine's key has them: what is asked for, and nothing else."""
        asked = {name: value for name, value in asdict(self).items() if value is not None and value is not False}
        return {_IN_KEYS.get(name, name): value for name, value in asked.items()}

    @classmethod
    def of(cls, flags: Mapping[str, str | int | bool]) -> Options:
        """What a key's flags ask for. Raises ExportError at one that no option is."""
        names = {in_keys: name for name, in_keys in _IN_KEYS.items()}
        asked: dict[str, Any] = {names.get(name, name): value for name, value in flags.items()}
        if unknown := asked.keys() - cls.__dataclass_fields__.keys():
            raise ExportError(
                f"an engine's key has the flag {min(unknown)}, which this bksdm does not know: use --force"
            )
        return cls(**asked)


@dataclass(frozen=True)
class Installed:
    """A TensorRT that is installed here. name: "tensorrt" or "tensorrt-rtx"."""

    name: str
    library: Any

    @property
    def version(self) -> str:
        return str(self.library.__version__)

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt-rtx"

    @property
    def strongly_typed(self) -> bool:
        return self.is_rtx or int(self.version.split(".")[0]) >= 10

    def __str__(self) -> str:
        return f"{LIBRARIES[self.name][0]} {self.version}"


def installed(name: str) -> Installed:
    """Import a TensorRT, and have Polygraphy use that one. Raises MissingLibrary, ExportError."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if name == "tensorrt-rtx" else "0"  # read when it is imported
    try:
        library = __import__(MODULES[name])
        __import__("polygraphy")
    except ModuleNotFoundError as error:
        raise MissingLibrary(f"needs {error.name}: pip install 'bksdm[{name},build]'") from None
    except (ImportError, OSError) as error:  # its own libraries do not load
        raise ExportError(f"{LIBRARIES[name][0]} is installed but does not load: {error}") from error
    return Installed(name, library)


def target(here: Installed, sm: str | None) -> str:
    """Compute capability to build for, as 8.9; sm: the one asked for, None for that of the GPU. Raises ExportError."""
    own = compute_capability()
    if here.is_rtx:
        known = [name for name in here.library.ComputeCapability.__members__ if name.startswith("SM")]
        wanted = own if sm is None else sm
        if wanted is None:
            raise ExportError(f"there is no GPU here to build for, and no --sm names one ({here} knows {_sms(known)})")
        if not re.fullmatch(r"\d{1,2}\.\d", wanted) or f"SM{wanted.replace('.', '')}" not in known:
            raise ExportError(f"{here} does not build for SM {wanted}: choose from {_sms(known)}")
        return wanted
    if own is None:
        raise ExportError(f"{here} builds on the GPU that is to run the engine, and there is none here")
    if sm not in (None, own):
        raise ExportError(f"{here} builds for the GPU here, which is SM {own}, not for SM {sm}: leave out --sm")
    return own


def model(here: Installed, options: Options) -> str:
    """Name of the GPU that an engine is tied to; "" where it runs on all of its compute capability."""
    return "" if here.is_rtx or options.hardware is not None else device_name()


def check(here: Installed, options: Options) -> None:
    """Refuse what this TensorRT does not have. Raises ExportError."""
    if here.is_rtx:
        if options.version_compatible:
            raise ExportError(f"{here} builds no version-compatible engines: leave out --version-compatible")
        if options.hardware is not None:
            raise ExportError(f"{here} builds for the compute capabilities that --sm names: leave out --hardware")
    wanted = {
        "--version-compatible": ("BuilderFlag", "VERSION_COMPATIBLE", options.version_compatible),
        "--weight-streaming": ("BuilderFlag", "WEIGHT_STREAMING", options.weight_streaming),
        "--strip": ("BuilderFlag", "STRIP_PLAN", options.stripped),
        f"--hardware {AMPERE_AND_LATER}": (
            "HardwareCompatibilityLevel",
            "AMPERE_PLUS",
            options.hardware == AMPERE_AND_LATER,
        ),
        f"--hardware {SAME_SM}": (
            "HardwareCompatibilityLevel",
            "SAME_COMPUTE_CAPABILITY",
            options.hardware == SAME_SM,
        ),
    }
    for flag, (enumeration, member, asked) in wanted.items():
        if asked and not hasattr(getattr(here.library, enumeration, None), member):
            raise ExportError(f"{here} has no {flag}: leave it out, or build with a newer one")


def network(here: Installed, graph: Path, prepare: Callable[[Any], None]) -> Any:
    """A Polygraphy loader of the graph's network. prepare: changes the network before it is built."""
    from polygraphy.backend.trt import NetworkFromOnnxPath, PostprocessNetwork

    typed = {"strongly_typed": True} if here.strongly_typed else {}
    parsed = NetworkFromOnnxPath(str(graph), **typed)

    def prepared(network: Any) -> None:
        prepare(network)
        if not here.strongly_typed:
            _hold_fp32(here.library, network)

    return PostprocessNetwork(parsed, prepared)


def config(here: Installed, options: Options, sm: str, timing: Path | None, progress: Any, **common: Any) -> Any:
    """A Polygraphy loader of the builder's settings. timing: a timing cache to begin with; common: as it takes them."""
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig

    library = here.library
    settings: dict[str, Any] = dict(common)
    if options.optimization_level is not None:
        settings["builder_optimization_level"] = options.optimization_level
    if options.workspace is not None:
        settings["memory_pool_limits"] = {library.MemoryPoolType.WORKSPACE: options.workspace}
    if options.hardware is not None:
        level = "AMPERE_PLUS" if options.hardware == AMPERE_AND_LATER else "SAME_COMPUTE_CAPABILITY"
        settings["hardware_compatibility_level"] = getattr(library.HardwareCompatibilityLevel, level)
    for flag, wanted in (
        ("version_compatible", options.version_compatible),
        ("weight_streaming", options.weight_streaming),
        ("strip_plan", options.stripped),
    ):
        if wanted:
            settings[flag] = True
    if progress is not None:
        settings["progress_monitor"] = progress
    if here.is_rtx:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        major, minor = sm.split(".")
        made = CreateConfigRTX(compute_capabilities=[(int(major), int(minor))], **settings)
    else:
        if timing is not None and timing.is_file():
            settings["load_timing_cache"] = str(timing)
        if not here.strongly_typed:  # 8.6
            settings |= {"fp16": True, "precision_constraints": "obey"}
        made = CreateConfig(**settings)

    def finish(_builder: Any, _network: Any, made: Any) -> None:
        made.clear_flag(library.BuilderFlag.TF32)  # on by default, and 10 bits of mantissa: islands are fp32 for more
        if not here.strongly_typed:  # 8.6
            # Two contexts of one profile: whole and shallow evaluations, or two pictures at once. Later it is so. Not
            # through Polygraphy's preview_features, which turns off all that it is not told, and some are on.
            made.set_preview_feature(library.PreviewFeature.PROFILE_SHARING_0806, True)
        settled = hasattr(library.BuilderFlag, "REQUIRE_USER_ALLOCATION") and not options.weight_streaming
        if here.is_rtx and settled:
            # Without it a context may allocate as it runs, which no CUDA graph can hold. Streaming weights needs that.
            made.set_flag(library.BuilderFlag.REQUIRE_USER_ALLOCATION)

    return PostprocessConfig(made, finish)


def keeps_timings(here: Installed) -> bool:
    return not here.is_rtx


def reports_progress(here: Installed) -> bool:
    return hasattr(here.library, "IProgressMonitor")


def _hold_fp32(library: Any, network: Any) -> None:
    """Have a weakly typed builder compute in fp32 what is fp32 in the graph, where it would take fp16 for speed."""
    data = (library.LayerType.CONSTANT, library.LayerType.SHAPE)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        outputs = [layer.get_output(j) for j in range(layer.num_outputs)]
        if layer.type not in data and outputs and all(one.dtype == library.float32 for one in outputs):
            layer.precision = library.float32
            for j in range(layer.num_outputs):
                layer.set_output_type(j, library.float32)


def _sms(members: Sequence[str]) -> str:
    return ", ".join(f"{name[2:-1]}.{name[-1]}" for name in members)
