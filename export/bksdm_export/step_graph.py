"""What the runtime's sampling loop computes between two U-Net evaluations, as a graph for a device.

    python -m bksdm_export.step_graph      writes runtime/bksdm_runtime/backends/step_*.onnx again

Guidance, and one row of the sampler's table (runtime/bksdm_runtime/schedule.py) for each picture. The runtime carries
no ONNX editor, so the two graphs, for U-Nets that give float32 and float16, are made here and shipped in its package.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser

# What latents, history and table are to a step: runtime/bksdm_runtime/backends/cuda.py feeds them.
PAST = 5  # as many earlier outputs as PNDM, the longest of the samplers, takes
COLUMNS = 5 + PAST
TEXT = """
<ir_version: 8, opset_import: ["" : 18], producer_name: "bksdm">
step (
    {dtype}[rows, channels, height, width] out_sample,
    float[batch, channels, height, width] latents,
    float[batch, {past}, channels, height, width] history,
    float[steps, batch, {columns}, 1, 1, 1] table,
    int64[1] index,
    float[batch, 1, 1, 1] guidance,
    int64[1] negative_end,
    int64[1] positive_start,
    int64[4] repeats
) => (
    float[batch, channels, height, width] next_latents,
    float[batch, {past}, channels, height, width] next_history,
    int64[1] next_index,
    {dtype}[next_rows, channels, height, width] sample,
    float[next_rows] timestep
)
<int64[1] first = {{0}}, int64[1] second = {{1}}, int64[1] start = {{0}}, int64[1] end = {{-1}},
 int64[1] far = {{9223372036854775807}}, int64[3] sides = {{1, 2, 3}}, int64[6] columns = {{1, 1, 1, 1, 1, {past}}}>
{{
    output = Cast <to = 1> (out_sample)
    negative = Slice (output, start, negative_end, first)
    positive = Slice (output, positive_start, far, first)
    difference = Sub (positive, negative)
    push = Mul (guidance, difference)
    guided = Add (negative, push)

    rows = Gather <axis = 0> (table, index)
    row = Squeeze (rows, first)
    keep_latents5, keep_output5, shrink5, scale5, time5, weights = Split <axis = 1> (row, columns)
    keep_latents = Squeeze (keep_latents5, second)
    keep_output = Squeeze (keep_output5, second)
    shrink = Squeeze (shrink5, second)
    scale = Squeeze (scale5, second)
    time = Squeeze (time5, second)

    kept_latents = Mul (latents, keep_latents)
    kept_output = Mul (guided, keep_output)
    remembered4 = Add (kept_latents, kept_output)
    remembered = Unsqueeze (remembered4, second)
    older = Slice (history, start, end, second)
    next_history = Concat <axis = 1> (remembered, older)
    weighted = Mul (next_history, weights)
    pushed = ReduceSum <keepdims = 0> (weighted, second)
    shrunk = Mul (latents, shrink)
    next_latents = Add (shrunk, pushed)
    next_index = Add (index, second)

    scaled = Mul (next_latents, scale)
    half = Cast <to = {number}> (scaled)
    sample = Tile (half, repeats)
    times = Tile (time, repeats)
    timestep = Squeeze (times, sides)
}}
"""
_NAMES = {"float32": ("float", onnx.TensorProto.FLOAT), "float16": ("float16", onnx.TensorProto.FLOAT16)}
FOLDER = Path(__file__).resolve().parents[2] / "runtime" / "bksdm_runtime" / "backends"


def build(dtype: str) -> onnx.ModelProto:
    """The graph for a U-Net that takes and gives `dtype`, float32 or float16. Checked, shapes inferred."""
    name, number = _NAMES[dtype]
    text = TEXT.format(dtype=name, number=int(number), past=PAST, columns=COLUMNS)
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    return model


if __name__ == "__main__":
    for one in _NAMES:
        onnx.save(build(one), FOLDER / f"step_{one}.onnx")
