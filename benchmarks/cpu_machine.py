"""What the machine can do, and how much there is to do. Prints one JSON object.

python benchmarks/cpu_machine.py peak THREADS              GFLOP/s by arithmetic, the best of matmul and convolution
python benchmarks/cpu_machine.py work CHECKPOINT SIZE      FLOPs of one guided step and of one VAE decode, MACs"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from bksdm.unet import build_unet, count_macs

_SIDE = 1024  # of the square matrices: enough to reach the peak, and short where others want the core
_CHANNELS, _LATENT = 320, 64  # the U-Net's widest convolution at 512 px
_SECONDS = 2.0  # of each, after the warm-up


def peak(threads: int) -> dict[str, float]:
    """GFLOP/s by arithmetic: fp32, bf16 and int8 (multiply-adds counted as two, too). PyTorch's oneDNN is what MKL and
    OpenVINO's kernels are related to; what none of them reaches is no limit to hold an engine against."""
    torch.set_num_threads(threads)
    found: dict[str, float] = {}
    with torch.inference_mode():
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            matrix = torch.rand(_SIDE, _SIDE).to(dtype)
            image = torch.rand(2, _CHANNELS, _LATENT, _LATENT).to(dtype).to(memory_format=torch.channels_last)
            kernel = torch.rand(_CHANNELS, _CHANNELS, 3, 3).to(dtype).to(memory_format=torch.channels_last)
            product = _rate(lambda m=matrix: m @ m, 2 * _SIDE**3)
            work = 2 * 2 * _LATENT**2 * _CHANNELS**2 * 9
            found[name] = max(product, _rate(lambda i=image, k=kernel: torch.conv2d(i, k, padding=1), work))
        bytes_ = torch.randint(-128, 127, (_SIDE, _SIDE), dtype=torch.int8)
        found["int8"] = _rate(lambda: torch._int_mm(bytes_, bytes_), 2 * _SIDE**3)
    return found


def _rate(call: Callable[[], object], work: int) -> float:
    """GFLOP/s of the fastest call: others on the machine only ever take away."""
    call()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return work / best / 1e9


def work(checkpoint: Path, size: int) -> dict[str, float]:
    """work_of a diffusers folder."""
    unet, vae = (json.loads((checkpoint / part / "config.json").read_text()) for part in ("unet", "vae"))
    return work_of(unet, vae, size)


def work_of(unet_config: Mapping[str, Any], vae_config: Mapping[str, Any], size: int) -> dict[str, float]:
    """guided_step, decode: FLOPs of batch 2 and of one picture, attention's own products included. macs: of the U-Net
    at batch 1, convolutions and linear layers, as BK-SDM's authors count them."""
    latent = size // 2 ** (len(vae_config["block_out_channels"]) - 1)
    with torch.device("meta"), torch.no_grad():
        unet = build_unet(unet_config)
        vae: Any = AutoencoderKL.from_config(dict(vae_config))
        sample = torch.empty(2, unet_config["in_channels"], latent, latent)
        context = torch.empty(2, 77, unet_config["cross_attention_dim"])
        step = _flops(lambda: unet(sample, torch.empty(2), context))
        decode = _flops(lambda: vae.decode(sample[:1]))
    return {"guided_step": step, "decode": decode, "macs": count_macs(unet_config, latent=latent)}


def _flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    print(json.dumps(peak(int(rest[0])) if what == "peak" else work(Path(rest[0]), int(rest[1]))))
