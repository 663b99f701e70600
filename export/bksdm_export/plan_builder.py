"""Builds one engine, in a process of its own: TensorRT may crash or be killed, and takes its memory with it.

    python -m bksdm_export.plan_builder JOB

JOB is a `Job` in JSON. On stdout come lines of JSON: {"phase", "step", "steps"} as it goes on, {"peak_bytes"} in the
end; what libraries print there goes to stderr. It ends when its stdin does, so that no builder outlives whoever asked
for it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from bksdm_export import tensorrt_versions
from bksdm_export.tensorrt_versions import Options
from bksdm_runtime.plans import Profile, Range

GAVE_UP = 3  # exit code of an error whose sentence is the last line of stderr


@dataclass(frozen=True)
class Job:
    """library: "tensorrt" or "tensorrt-rtx"; graph: the ONNX file; timing: a timing cache, read and written."""

    library: str
    graph: str
    plan: str
    sm: str
    profiles: tuple[Profile, ...]
    options: Options
    timing: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        profiles = tuple(
            {
                name: Range(*(tuple(span[side]) for side in ("smallest", "fastest", "largest")))
                for name, span in one.items()
            }
            for one in values.pop("profiles")
        )
        return cls(**{**values, "profiles": profiles, "options": Options(**values["options"])})


def build(job: Job) -> None:
    """Write the plan. Raises what Polygraphy and the library raise."""
    here = tensorrt_versions.installed(job.library)
    from polygraphy.backend.trt import EngineBytesFromNetwork
    from polygraphy.backend.trt import Profile as PolygraphyProfile
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.WARNING
    timing = None if job.timing is None else Path(job.timing)
    progress = _monitor(here.library) if tensorrt_versions.reports_progress(here) else None
    shapes = []
    for profile in job.profiles:
        one = PolygraphyProfile()
        for name, span in profile.items():
            one.add(name, span.smallest, span.fastest, span.largest)
        shapes.append(one)

    def fix(network: Any) -> None:
        _fix_sizes(network, job.profiles)

    network = tensorrt_versions.network(here, Path(job.graph), fix)
    config = tensorrt_versions.config(here, job.options, job.sm, timing, progress, profiles=shapes)
    plan = EngineBytesFromNetwork(network, config=config, save_timing_cache=job.timing)()
    Path(job.plan).write_bytes(memoryview(plan))


def _fix_sizes(network: Any, profiles: Sequence[Profile]) -> None:
    """Make every size that is the same in all profiles a fixed one: what never changes is computed when it is built."""
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        spans = [profile[tensor.name] for profile in profiles]
        sizes = [
            first if all(span.smallest[axis] == span.largest[axis] == first for span in spans) else -1
            for axis, first in enumerate(spans[0].smallest)
        ]
        tensor.shape = tuple(sizes)


def _monitor(library: Any) -> Any:
    class Monitor(library.IProgressMonitor):
        """Says on stdout which phase is under way; the library calls it from its own threads."""

        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            _say({"phase": phase_name, "step": 0, "steps": num_steps})

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps = self._steps.get(phase_name, 0)
            if steps < 100 or step % (steps // 100) == 0:
                _say({"phase": phase_name, "step": step + 1, "steps": steps})
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


_told: list[TextIO] = []  # where the process that asked listens
_SAYING = threading.Lock()  # TensorRT reports from several threads


def _say(what: Mapping[str, object]) -> None:
    with _SAYING:
        for listener in _told:
            listener.write(json.dumps(what) + "\n")
            listener.flush()


def _peak_bytes() -> int:
    """The most memory that this process had. Not what the system says of a child, which counts what its parent had."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used * (1 if sys.platform == "darwin" else 1024)
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def _end_with_stdin() -> None:
    while os.read(0, 1):
        pass
    os._exit(GAVE_UP)  # a builder cannot be interrupted


def main() -> int:
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    _told.append(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # Polygraphy prints TensorRT's errors on stdout
    try:
        build(Job.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except Exception as error:  # Polygraphy's, the library's, and ours: whoever asked wants a sentence
        print(f"[!] {error or type(error).__name__}", file=sys.stderr, flush=True)  # noqa: T201
        return GAVE_UP
    _say({"peak_bytes": _peak_bytes()})
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a library's clean-up must not crash a process whose plan is written
