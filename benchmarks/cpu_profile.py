"""Where the time of a graph goes on OpenVINO: milliseconds by kind of operation and its arithmetic.

    python benchmarks/cpu_profile.py --bundle out/bk-sdm-tiny --size 512
    python benchmarks/cpu_profile.py --bundle out/bk-sdm-tiny-int8 --size 512 --component vae_decoder

One call to warm up, then the medians over --calls of OpenVINO's own counters. What a count says is its sum over all
operations of a kind; OpenVINO fuses, so that a convolution's time may hold the sum and the norm after it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "runtime")]

import numpy as np  # noqa: E402
import openvino  # noqa: E402

from bksdm_runtime import bundle as bundles  # noqa: E402
from bksdm_runtime.backends.ov import OvEngine  # noqa: E402
from bksdm_runtime.bundle import Bundle  # noqa: E402
from bksdm_runtime.engine import EngineSettings, open_engine  # noqa: E402

_ARITHMETIC = ("I8", "U8", "BF16", "F16", "FP16", "F32", "FP32", "I32", "I64")  # ends of OpenVINO's names of kernels


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=bundles.demo(), help="default: the demo")
    parser.add_argument("--component", default="unet")
    parser.add_argument("--arithmetic", default="auto", choices=["auto", "f32", "bf16"])
    parser.add_argument("--size", type=int, help="pixels, square; default: the bundle's own")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--least", type=float, default=0.005, help="share below which kinds are summed up as others")
    chosen = parser.parse_args(arguments)
    bundle = bundles.load(chosen.bundle, verify=False)
    settings = EngineSettings("openvino", arithmetic=chosen.arithmetic, threads=chosen.threads)
    rows, whole = profile(bundle, chosen.component, settings, chosen.size, chosen.calls)
    print(f"{chosen.component}: {whole:.0f} ms a call\n")
    print("| operation | arithmetic | count | ms | share |\n|---|---|---|---|---|")
    total = sum(ms for _, ms in rows.values())
    rest = 0.0
    for (kind, arithmetic), (count, ms) in sorted(rows.items(), key=lambda row: -row[1][1]):
        if ms < chosen.least * total:
            rest += ms
        else:
            print(f"| {kind} | {arithmetic} | {count} | {ms:.1f} | {ms / total:.1%} |")
    print(f"| others | | | {rest:.1f} | {rest / total:.1%} |")
    return 0


def profile(
    bundle: Bundle, component: str, settings: EngineSettings, size: int | None, calls: int
) -> tuple[dict[tuple[str, str], tuple[int, float]], float]:
    """Number and milliseconds of the operations of each (kind, arithmetic), and the milliseconds of a whole call."""
    engine = open_engine(bundle, component, settings)
    assert isinstance(engine, OvEngine)
    inputs = _inputs(bundle, component, size)
    model: Any = engine.read()
    model.reshape({name: array.shape for name, array in inputs.items()})
    config = {**engine.config, "PERF_COUNT": True}
    request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
    request.infer(inputs)
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    counts: Counter[tuple[str, str]] = Counter()
    wholes: list[float] = []
    for _ in range(calls):
        request.infer(inputs)
        wholes.append(request.latency)
        spent: Counter[tuple[str, str]] = Counter()
        counts.clear()
        for node in request.profiling_info:
            if node.real_time:
                kind = node.node_type, _arithmetic(node.exec_type)
                spent[kind] += node.real_time.total_seconds() * 1000
                counts[kind] += 1
        for kind, ms in spent.items():
            times[kind].append(ms)
    return {kind: (counts[kind], median(ms)) for kind, ms in times.items()}, median(wholes)


def _arithmetic(kernel: str) -> str:
    end = kernel.upper().rpartition("_")[2]
    return end.lower() if end in _ARITHMETIC else ""


def _inputs(bundle: Bundle, component: str, size: int | None) -> Mapping[str, np.ndarray]:
    """Of one guided picture: two rows for what guidance asks twice, one for the decoder and the encoder."""
    facts = bundle.manifest.model
    height, width = (size, size) if size is not None else (facts.height, facts.width)
    factor = facts.vae_scale_factor
    rows = 1 if component.startswith("vae") else 2
    axes = {
        "batch": rows,
        "timesteps": rows,
        "height": height // factor,
        "width": width // factor,
        "image_height": height,
        "image_width": width,
    }
    generator = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {}
    for spec in bundle.manifest.components[component].inputs:
        shape = [axes[axis] if isinstance(axis, str) else axis for axis in spec.axes]
        if spec.dtype.startswith("int"):
            inputs[spec.name] = np.ones(shape, spec.dtype)
        elif spec.name == "timestep":
            inputs[spec.name] = np.full(shape, 500, spec.dtype)
        else:
            inputs[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
    return inputs


if __name__ == "__main__":
    sys.exit(main())
