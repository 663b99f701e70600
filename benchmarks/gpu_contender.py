"""One contender of the GPU benchmark in a process of its own. Reads a task as JSON, writes its figures as JSON.

python benchmarks/gpu_contender.py TASK FILE

kind: "ours" (options: backend, fused, graphs), "diffusers" (options: compiled) or "peak" (what the matrix units
reach)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

EVALUATIONS = 30  # of the U-Net alone, after the warm-up


class Ours:
    def __init__(self, task: dict[str, Any]) -> None:
        from bksdm_runtime import bundle as bundles
        from bksdm_runtime.bundle import FUSED
        from bksdm_runtime.engine import EngineSettings
        from bksdm_runtime.pipeline import Pipeline

        self.task = task
        self._larger: dict[int, Any] = {}
        bundle = bundles.load(task["model"])
        if not task["options"].get("fused", True):
            plain = {name: file for name, file in bundle.manifest.files.items() if not name.endswith(FUSED)}
            bundle = replace(bundle, manifest=replace(bundle.manifest, files=plain))
        self.backend = task["options"].get("backend", "cuda")
        if self.backend == "cuda":
            from bksdm_runtime.backends import cuda

            if not task["options"].get("graphs", True):
                cuda.open_component = partial(cuda.open_component, place=replace(cuda.CUDA, captures=False))
        self.pipe = Pipeline.open(bundle, EngineSettings(backend=self.backend))

    def draw(self, batch: int) -> list[np.ndarray]:
        from bksdm_runtime.request import Request

        task, size = self.task, self.task["size"]
        requests = [
            Request(task["prompt"], "", task["seed"] + i, task["steps"], task["guidance"], size, size)
            for i in range(batch)
        ]
        return self._pipe(batch).draw(requests, batch_size=batch)

    def _pipe(self, batch: int) -> Any:
        """Engines of one fixed shape lie in a bundle of their own for every larger batch."""
        from bksdm_runtime.engine import EngineSettings
        from bksdm_runtime.pipeline import Pipeline

        folder = Path(f"{self.task['model']}-batch{batch}")
        if self.backend == "cuda" or not folder.is_dir():
            return self.pipe
        if batch not in self._larger:
            self._larger[batch] = Pipeline.open(folder, EngineSettings(backend=self.backend))
        return self._larger[batch]

    def stages(self, batch: int) -> dict[str, Callable[[], object]]:
        pipe = self._pipe(batch)
        unet: Any = pipe._engines["unet"]
        side = self.task["size"] // self.pipe.bundle.manifest.model.vae_scale_factor
        facts = self.pipe.bundle.manifest.model
        bound = unet.bind(
            {
                "sample": (2 * batch, facts.latent_channels, side, side),
                "timestep": (2 * batch,),
                "encoder_hidden_states": (2 * batch, facts.tokens, facts.context_dim),
            }
        )
        decoder: Any = pipe._engines["vae_decoder"]
        decoding = decoder.bind({"latent_sample": (1, facts.latent_channels, side, side)})
        latents = np.random.default_rng(0).standard_normal((1, facts.latent_channels, side, side)).astype(np.float32)
        dtype = next(spec.dtype for spec in decoder.component.inputs if spec.name == "latent_sample")
        decoding.fill({"latent_sample": latents.astype(dtype)})
        return {
            "text": lambda: [pipe.encode_text(text) for text in ("", self.task["prompt"])],
            "unet": self._to_its_end(unet, bound),
            "decode": self._to_its_end(decoder, decoding),
            "decode to pixels": lambda: pipe.decode(latents * facts.scaling_factor),
        }

    def _to_its_end(self, engine: Any, bound: Any) -> Callable[[], object]:
        """One evaluation, as a CUDA graph where the backend has them, until the device is done."""
        if self.backend == "cuda":
            return bound.run
        bound.run()
        engine.stream.wait()
        graph = engine.stream.capture(bound.run) if bound.can_be_captured else None

        def evaluate() -> None:
            if graph is None:
                bound.run()
            else:
                engine.stream.replay(graph)
            engine.stream.wait()

        return evaluate

    def versions(self) -> dict[str, str]:
        if self.backend == "cuda":
            import onnxruntime

            return {"onnxruntime": onnxruntime.__version__}
        engine: Any = self.pipe._engines["unet"]
        return {self.backend: engine.loaded.plan.key.machine.version}


class Diffusers:
    """StableDiffusionPipeline in fp16, channels last, as its documentation advises for speed; compiled: U-Net and
    decoder by torch.compile with CUDA graphs ("reduce-overhead")."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch
        from diffusers import StableDiffusionPipeline

        self.task, self.torch = task, torch
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(task["model"], torch_dtype=torch.float16).to("cuda")
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.unet.to(memory_format=torch.channels_last)
        self.pipe.vae.to(memory_format=torch.channels_last)
        if task["options"].get("compiled"):
            self.pipe.unet = torch.compile(self.pipe.unet, mode="reduce-overhead", fullgraph=True)
            self.pipe.vae.decode = torch.compile(self.pipe.vae.decode, mode="reduce-overhead", fullgraph=True)

    def draw(self, batch: int) -> list[np.ndarray]:
        task = self.task
        pictures = self.pipe(
            prompt=task["prompt"],
            negative_prompt="",
            height=task["size"],
            width=task["size"],
            num_inference_steps=task["steps"],
            guidance_scale=task["guidance"],
            num_images_per_prompt=batch,
            generator=[self.torch.Generator().manual_seed(task["seed"] + i) for i in range(batch)],
        ).images
        return [np.asarray(picture) for picture in pictures]

    def stages(self, batch: int) -> dict[str, Callable[[], object]]:
        torch, pipe, side = self.torch, self.pipe, self.task["size"] // 8
        half = {"device": "cuda", "dtype": torch.float16}
        sample = torch.randn(2 * batch, 4, side, side, **half).to(memory_format=torch.channels_last)
        context = torch.randn(2 * batch, 77, pipe.unet.config["cross_attention_dim"], **half)
        timestep = torch.tensor(500, device="cuda")

        def waited(call: Callable[[], object]) -> Callable[[], object]:
            def run() -> None:
                with torch.inference_mode():
                    call()
                torch.cuda.synchronize()

            return run

        found = {
            "text": waited(lambda: pipe.encode_prompt(self.task["prompt"], "cuda", 1, True, "")),
            "unet": waited(lambda: pipe.unet(sample, timestep, context, return_dict=False)),
        }
        if batch == 1:  # larger ones would be compiled anew
            latents = sample[:1]
            found["decode"] = waited(lambda: pipe.vae.decode(latents, return_dict=False))
            found["decode to pixels"] = waited(
                lambda: pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0])
            )
        return found

    def versions(self) -> dict[str, str]:
        import diffusers

        return {"torch": self.torch.__version__, "diffusers": diffusers.__version__}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    contender = {"ours": Ours, "diffusers": Diffusers}[task["kind"]](task)
    opened = time.perf_counter() - started
    batches: dict[str, Any] = {}
    first = None
    for batch in task["batches"]:
        for _ in range(2 if batch == 1 else 1):
            pictures = contender.draw(batch)
            first = time.perf_counter() - started if first is None else first
        count = task["pictures"] if batch == 1 else 3
        seconds = [_timed(lambda b=batch: contender.draw(b)) for _ in range(count)]
        stages = {}
        for name, call in contender.stages(batch).items():
            for _ in range(4):
                call()
            stages[name] = [_timed(call) for _ in range(EVALUATIONS)]
        batches[str(batch)] = {"seconds": seconds, "stages": stages}
        if batch == 1:
            np.save(task["picture"], pictures[0])
    return {
        "opened": opened,
        "first_picture": first,
        "batches": batches,
        "memory": _memory(),
        "versions": contender.versions(),
    }


def peak() -> dict[str, Any]:
    """FLOP/s of the fastest fp16 matrix product."""
    import torch

    side = 8192
    matrix = torch.randn(side, side, device="cuda", dtype=torch.float16)

    def product() -> None:
        matrix @ matrix  # pyright: ignore[reportUnusedExpression]
        torch.cuda.synchronize()

    for _ in range(5):
        product()
    return {"flops": 2 * side**3 / min(_timed(product) for _ in range(20)), "device": torch.cuda.get_device_name()}


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _memory() -> int | None:
    """Bytes of the card in use, by its driver: of this process, where no other uses the card."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.check_output(asked, text=True).splitlines()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    answer = peak() if given["kind"] == "peak" else measure(given)
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
