"""One contender of the CPU benchmark in a process of its own: the first picture, then measured ones, then batches.

python benchmarks/cpu_contender.py JSON RESULT     (a Task, made by cpu.py; the answer goes into the file RESULT)

Runs under the Python of the contender's environment: nothing but the standard library is imported at the top, so that
the time to the first picture and the memory are the contender's own."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from cpu_kinds import KINDS
from cpu_task import Contender, Drawn, Result, Task, Watch

PACKAGES = (
    *("torch", "diffusers", "transformers", "optimum", "optimum-onnx", "optimum-intel"),
    *("onnxruntime", "openvino", "openvino-genai", "stable-diffusion-cpp-python", "numpy"),
)


def measure(task: Task) -> Result:
    watch = Watch()
    contender = KINDS[task.kind](task, watch)
    images = contender.draw(1, task.steps)
    first_picture = time.time()
    assert watch.first_step is not None
    drawn = [_drawn(contender, watch, 1, task.steps) for _ in range(task.pictures)]
    peak = peak_memory()
    images[0].save(task.picture)
    for batch in task.batches:
        if batch > 1:  # what is compiled for a shape is compiled here
            contender.draw(batch, 2)
        drawn.append(_drawn(contender, watch, batch, task.steps))
    first_step = watch.first_step - task.started
    return Result(first_step, first_picture - task.started, drawn, peak, _versions())


def _drawn(contender: Contender, watch: Watch, batch: int, steps: int) -> Drawn:
    watch.steps.clear()
    watch.stages.clear()
    began, began_cpu = time.perf_counter(), time.process_time()
    contender.draw(batch, steps)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    contender.after()
    between = [later - earlier for earlier, later in zip(watch.steps, watch.steps[1:], strict=False)]
    return Drawn(batch, seconds, cpu_seconds, between, watch.stages.get("text"), watch.stages.get("decode"))


def peak_memory() -> int:
    """Bytes. Not getrusage's figure: that one starts from the memory of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def _versions() -> dict[str, str]:
    """Of the packages that this process has loaded, so that what merely is installed is not named."""
    loaded = {name.split(".")[0] for name in sys.modules}
    known = metadata.packages_distributions()
    names = {found.replace("_", "-") for module in loaded for found in known.get(module, ())}
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in PACKAGES if name in names}}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    answer = json.dumps(asdict(measure(Task(**{**given, "batches": tuple(given["batches"])}))))
    Path(sys.argv[2]).write_text(answer, encoding="utf-8")
