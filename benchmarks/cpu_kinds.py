"""How each kind of contender of the CPU benchmark is opened and draws, at its documented best.

A library is imported where it is opened: a contender's environment has its own only, and what is imported counts to its
first picture and to its memory."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpu_task import Contender, Task, Watch


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
        from bksdm_runtime.engine import EngineSettings
        from bksdm_runtime.pipeline import Pipeline

        self.task, self.watch = task, watch
        options = dict(task.options)
        self.saved = options.pop("saved", {})
        self.pipe = Pipeline.open(task.model, EngineSettings(threads=task.threads, **options))

    def draw(self, batch: int, steps: int) -> Sequence[Any]:
        from PIL import Image

        from bksdm_runtime.pipeline import Images
        from bksdm_runtime.request import Request

        task = self.task
        requests = [
            Request(task.prompt, "", task.seed + i, steps, task.guidance, task.size, task.size, "euler", **self.saved)
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
        import openvino_genai  # pyright: ignore[reportMissingImports]

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
    import openvino_genai  # pyright: ignore[reportMissingImports]

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
        import stable_diffusion_cpp  # pyright: ignore[reportMissingImports]

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


KINDS: Mapping[str, Callable[[Task, Watch], Contender]] = {
    "ours": Ours,
    "diffusers": Diffusers,
    "optimum": Diffusers,
    "genai": GenAI,
    "sdcpp": StableDiffusionCpp,
}
