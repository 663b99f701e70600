"""One contender of the CPU benchmark in a process of its own: the first picture, then measured ones, then batches.

python benchmarks/cpu_contender.py JSON RESULT     (a Task, made by cpu.py, which puts its answer into the file RESULT)

Runs under the Python of the contender's environment: nothing but the standard library is imported at the top, so that
the time to the first picture and the memory are the contender's own."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

PACKAGES = (
    *("torch", "diffusers", "transformers", "optimum", "optimum-onnx", "optimum-intel"),
    *("onnxruntime", "openvino", "openvino-genai", "stable-diffusion-cpp-python", "numpy"),
)


@dataclass(frozen=True)
class Task:
    """kind: a key of KINDS; model: what it opens; options: of the contender's row. started: time.time() when the process
    was started. noise: a file of raw float32 [1, C, h, w], what torch's CPU generator draws for `seed`. pictures: how
    many of batch 1 after the first; batches: sizes of which one set of pictures each is drawn at the end."""

    kind: str
    model: str
    options: dict[str, Any]
    prompt: str
    seed: int
    steps: int
    size: int
    guidance: float
    threads: int
    started: float
    noise: str
    picture: str
    pictures: int
    batches: tuple[int, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """One picture, or one batch of them. steps: seconds between the ends of two guided steps, so one less than there
    are; text, decode: of all prompts and pictures, None where the contender does not tell; cpu_seconds: of all threads."""

    batch: int
    seconds: float
    cpu_seconds: float
    steps: list[float]
    text: float | None
    decode: float | None


@dataclass(frozen=True)
class Result:
    """first_step, first_picture: seconds since the process was started. peak: bytes, largest resident set up to the end
    of the pictures of batch 1."""

    first_step: float
    first_picture: float
    drawn: list[Drawn]
    peak: int
    versions: dict[str, str]


@dataclass
class Watch:
    """What a contender notes while it draws."""

    steps: list[float] = field(default_factory=list)  # when each ended, by time.perf_counter
    stages: dict[str, float] = field(default_factory=dict)
    first_step: float | None = None  # time.time() of the first of all

    def step(self) -> None:
        self.first_step = time.time() if self.first_step is None else self.first_step
        self.steps.append(time.perf_counter())

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - began

        return run


class Contender(Protocol):
    def draw(self, batch: int, steps: int) -> Sequence[Any]:
        """Pillow images, noting each step and what else it knows in the watch that it was opened with."""
        ...

    def after(self) -> None:
        """Measure what could not be while drawing."""
        ...


class Diffusers:
    """StableDiffusionPipeline, and Optimum's, which is built on it."""

    def __init__(self, task: Task, watch: Watch) -> None:
        import torch
        from diffusers import EulerDiscreteScheduler

        torch.set_num_threads(task.threads)
        self.task, self.watch = task, watch
        self.pipe = self._optimum() if task.kind == "optimum" else self._diffusers(torch)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = EulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.encode_prompt = watch.timed("text", self.pipe.encode_prompt)
        self.pipe.vae.decode = watch.timed("decode", self.pipe.vae.decode)

    def _diffusers(self, torch: Any) -> Any:
        from diffusers import StableDiffusionPipeline

        options = self.task.options
        pipe = StableDiffusionPipeline.from_pretrained(self.task.model, torch_dtype=getattr(torch, options["dtype"]))
        if options.get("channels_last"):
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)
        if options.get("compiled"):
            pipe.unet.compile()
            pipe.vae.decoder.compile()
        return pipe

    def _optimum(self) -> Any:
        import onnxruntime
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.task.threads
        return ORTStableDiffusionPipeline.from_pretrained(self.task.model, session_options=options)

    def draw(self, batch: int, steps: int) -> Sequence[Any]:
        import torch

        def ended(_: Any, __: int, ___: Any, kept: dict[str, Any]) -> dict[str, Any]:
            self.watch.step()
            return kept

        task = self.task
        return self.pipe(
            prompt=task.prompt,
            negative_prompt="",
            height=task.size,
            width=task.size,
            num_inference_steps=steps,
            guidance_scale=task.guidance,
            num_images_per_prompt=batch,
            generator=[torch.Generator().manual_seed(task.seed + i) for i in range(batch)],
            callback_on_step_end=ended,
        ).images

    def after(self) -> None: ...


class Ours:
    def __init__(self, task: Task, watch: Watch) -> None:
        from bksdm_runtime.pipeline import Pipeline

        self.task, self.watch = task, watch
        self.pipe = Pipeline.open(task.model, threads=task.threads, **task.options)

    def draw(self, batch: int, steps: int) -> Sequence[Any]:
        from bksdm_runtime.pipeline import Images
        from bksdm_runtime.request import Request
        from PIL import Image

        task = self.task
        requests = [
            Request(task.prompt, "", task.seed + i, steps, task.guidance, task.size, task.size, "euler")
            for i in range(batch)
        ]
        pictures: list[Any] = []
        for item in self.pipe.generate(requests, batch_size=batch):
            if isinstance(item, Images):
                self.watch.stages["decode"] = time.perf_counter() - self.watch.steps[-1]
                pictures += [Image.fromarray(pixels) for pixels in item.pixels]
            else:
                self.watch.step()
        return pictures

    def after(self) -> None:
        encode = self.watch.timed("text", self.pipe.encode_text)
        for text in ("", self.task.prompt):
            encode(text)


class GenAI:
    """OpenVINO GenAI, its shapes fixed before compiling as its documentation advises."""

    def __init__(self, task: Task, watch: Watch) -> None:
        self.task, self.watch, self.batch = task, watch, 0
        self._open(1)

    def _open(self, batch: int) -> None:
        import openvino_genai

        folder = Path(self.task.model)
        self.pipe = openvino_genai.Text2ImagePipeline(folder)
        self.pipe.set_scheduler(
            openvino_genai.Scheduler.from_config(
                folder / "scheduler" / "scheduler_config.json", openvino_genai.Scheduler.Type.EULER_DISCRETE
            )
        )
        self.pipe.reshape(batch, self.task.size, self.task.size, self.task.guidance)
        self.pipe.compile(
            "CPU",
            PERFORMANCE_HINT="LATENCY",
            INFERENCE_NUM_THREADS=self.task.threads,
            INFERENCE_PRECISION_HINT=self.task.options["precision"],
        )
        self.batch = batch

    def draw(self, batch: int, steps: int) -> Sequence[Any]:
        from PIL import Image

        if batch != self.batch:
            self._open(batch)

        def ended(_: int, __: int, ___: Any) -> bool:
            self.watch.step()
            return False  # go on

        drawn = self.pipe.generate(
            self.task.prompt,
            negative_prompt="",
            width=self.task.size,
            height=self.task.size,
            num_inference_steps=steps,
            guidance_scale=self.task.guidance,
            num_images_per_prompt=batch,
            callback=ended,
            generator=_noise_of(self.task),
        )
        figures = self.pipe.get_performance_metrics()
        self.watch.stages["text"] = sum(figures.get_text_encoder_infer_duration().values()) / 1000  # ms
        self.watch.stages["decode"] = figures.get_vae_decoder_infer_duration() / 1000
        return [Image.fromarray(pixels) for pixels in drawn.data]

    def after(self) -> None: ...


def _noise_of(task: Task) -> Any:
    """A generator for GenAI that gives the noise of the file, again for every picture of a batch."""
    import numpy as np
    import openvino
    import openvino_genai

    noise = np.fromfile(task.noise, np.float32)

    class Noise(openvino_genai.Generator):
        def __init__(self) -> None:
            super().__init__()
            self.drawn = 0

        def next(self) -> float:
            self.drawn += 1
            return float(noise[(self.drawn - 1) % noise.size])

        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(np.resize(noise, tuple(shape)))

    return Noise()


class StableDiffusionCpp:
    def __init__(self, task: Task, watch: Watch) -> None:
        import stable_diffusion_cpp

        self.task, self.watch = task, watch
        pattern = re.compile(rb"(get_learned_condition|decode_first_stage) completed, taking ([0-9.]+)s")
        names = {b"get_learned_condition": "text", b"decode_first_stage": "decode"}

        @stable_diffusion_cpp.sd_log_callback
        def logged(_: int, text: bytes, __: Any) -> None:
            sys.stderr.buffer.write(text)
            if found := pattern.search(text):
                watch.stages[names[found[1]]] = float(found[2])

        self.logged = logged  # a callback of ctypes lives as long as something holds it
        stable_diffusion_cpp.sd_set_log_callback(logged, None)
        self.pipe = stable_diffusion_cpp.StableDiffusion(
            model_path=task.model, n_threads=task.threads, rng_type="cpu", vae_decode_only=True, **task.options
        )

    def draw(self, batch: int, steps: int) -> Sequence[Any]:
        task = self.task

        def progress(step: int, of: int, _: float) -> None:
            if step and of == steps:  # it also tells how loading goes
                self.watch.step()

        return self.pipe.generate_image(
            prompt=task.prompt,
            negative_prompt="",
            width=task.size,
            height=task.size,
            cfg_scale=task.guidance,
            sample_method="euler",
            scheduler="discrete",
            sample_steps=steps,
            seed=task.seed,
            batch_count=batch,
            progress_callback=progress,
        )

    def after(self) -> None: ...


KINDS: dict[str, Callable[[Task, Watch], Contender]] = {
    "ours": Ours,
    "diffusers": Diffusers,
    "optimum": Diffusers,
    "genai": GenAI,
    "sdcpp": StableDiffusionCpp,
}


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
    names = {distribution for module in loaded for distribution in known.get(module, ())}
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in PACKAGES if name in names}}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    answer = json.dumps(asdict(measure(Task(**{**given, "batches": tuple(given["batches"])}))))
    Path(sys.argv[2]).write_text(answer, encoding="utf-8")
