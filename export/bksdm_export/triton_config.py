"""The configurations of a repository's two models, as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bksdm_runtime.served_request import DTYPES, FIELDS, REQUIRED, Limits

FRONT, CORE = "txt2img", "txt2img_core"
_TYPES = {name: f"TYPE_{name}" for name in ("UINT64", "INT32", "FP32", "BOOL", "UINT8")} | {"BYTES": "TYPE_STRING"}


@dataclass(frozen=True)
class Tensor:
    """An output of a model. dims: without the batch, -1 where a size is open."""

    name: str
    datatype: str
    dims: tuple[int, ...] = (1,)


PICTURE = (
    Tensor("png", "BYTES"),
    Tensor("png_b64", "BYTES"),
    Tensor("image", "UINT8", (-1, -1, 3)),
    Tensor("seed_used", "UINT64"),
)
STEPS = (Tensor("step", "INT32"), Tensor("of_steps", "INT32"), Tensor("preview_image", "UINT8", (-1, -1, 3)))
# Nobody sees a step of one answer.
FRONT_FIELDS = tuple(field for field in FIELDS.values() if field.name != "preview")


@dataclass(frozen=True)
class Serving:
    """How a model is served. limits: what clients may ask for; slots: pictures that are drawn at once.

    fronts: requests that may wait for their picture over HTTP or unary gRPC, each a small process.
    max_queue, queue_seconds: how many requests may wait for a slot, and for how long; more are refused, UNAVAILABLE.
    A batch that the core has taken from the queue, of at most as many requests as there are slots, has that time again.
    backend, threads: of the engines, as bksdm-run's; threads 0 for one per core.
    """

    limits: Limits
    slots: int = 8
    fronts: int = 12
    max_queue: int = 64
    queue_seconds: float = 60.0
    backend: str = "auto"
    threads: int = 0


def front(serving: Serving) -> str:
    """config.pbtxt of the front: no batching of its own, which would hold requests back from the core's."""
    return "\n".join(
        [
            f'name: "{FRONT}"',
            'backend: "python"',
            "max_batch_size: 0",
            *front_inputs(),
            *map(as_output, PICTURE),
            f"instance_group [ {{ kind: KIND_CPU count: {serving.fronts} }} ]",
            *as_parameters(serving.limits.to_parameters()),
            "",
        ]
    )


def front_inputs() -> list[str]:
    """Of a model that fills in what a request leaves out."""
    return [_input(field.name, field.datatype, optional=field.name not in REQUIRED) for field in FRONT_FIELDS]


def core(serving: Serving, *, on_gpu: bool) -> str:
    """config.pbtxt of the core: streams, batches, and has no optional inputs, for what has others is not batched."""
    parameters = {
        **serving.limits.to_parameters(),
        "slots": str(serving.slots),
        "queue_seconds": repr(serving.queue_seconds),
        "backend": serving.backend,
        "threads": str(serving.threads),
        "FORCE_CPU_ONLY_INPUT_TENSORS": "yes",  # a prompt on a GPU is of no use
    }
    where = "kind: KIND_GPU count: 1 gpus: [ 0 ]" if on_gpu else "kind: KIND_CPU count: 1"
    return "\n".join(
        [
            f'name: "{CORE}"',
            'backend: "python"',
            f"max_batch_size: {serving.slots}",
            "model_transaction_policy { decoupled: true }",
            "dynamic_batching {",
            "  default_queue_policy {",
            "    timeout_action: REJECT",
            f"    default_timeout_microseconds: {round(serving.queue_seconds * 1e6)}",
            "    allow_timeout_override: true",
            f"    max_queue_size: {serving.max_queue}",
            "  }",
            "}",
            *(_input(field.name, field.datatype) for field in FIELDS.values()),
            *map(as_output, (*STEPS, *PICTURE)),
            f"instance_group [ {{ {where} }} ]",
            *as_parameters(parameters),
            *(_warm_up(size) for size in serving.limits.sizes),
            "",
        ]
    )


def warm_up_files(limits: Limits) -> dict[str, bytes]:
    """The files that the core's warm-up reads, by name: a picture of one step at every served size."""
    height_and_width = {side for size in limits.sizes for side in size}
    return {
        "prompt": _content("BYTES", b"warm-up"),
        "negative_prompt": _content("BYTES", b""),
        "seed": _content("UINT64", 0),
        "steps": _content("INT32", 1),
        "guidance_scale": _content("FP32", limits.guidance_scale),
        "sampler": _content("BYTES", b"ddim"),
        "format": _content("BYTES", b"png"),
        "preview": _content("BOOL", True),
        **{f"pixels_{side}": _content("INT32", side) for side in height_and_width},
    }


def _warm_up(size: tuple[int, int]) -> str:
    height, width = size
    files = {name: name for name in FIELDS} | {"height": f"pixels_{height}", "width": f"pixels_{width}"}
    inputs = [
        f'  inputs {{ key: "{field.name}" value: {{ data_type: {_TYPES[field.datatype]} dims: [ 1 ] '
        f'input_data_file: "{files[field.name]}" }} }}'
        for field in FIELDS.values()
    ]
    return "\n".join(["model_warmup {", f'  name: "{width}x{height}"', "  batch_size: 1", *inputs, "}"])


def _content(datatype: str, value: object) -> bytes:
    """A tensor of one value as Triton reads it from a file: BYTES begin with their length."""
    if isinstance(value, bytes):
        return len(value).to_bytes(4, "little") + value
    return np.array([value], DTYPES[datatype]).tobytes()


def _input(name: str, datatype: str, *, optional: bool = False) -> str:
    more = " optional: true" if optional else ""
    return f'input [ {{ name: "{name}" data_type: {_TYPES[datatype]} dims: [ 1 ]{more} }} ]'


def as_output(tensor: Tensor) -> str:
    dims = ", ".join(map(str, tensor.dims))
    return f'output [ {{ name: "{tensor.name}" data_type: {_TYPES[tensor.datatype]} dims: [ {dims} ] }} ]'


def as_parameters(parameters: Mapping[str, str]) -> Sequence[str]:
    return [
        f'parameters {{ key: "{name}" value: {{ string_value: {json.dumps(value)} }} }}'
        for name, value in parameters.items()
    ]
