"""Random weights at true architecture for the GPU benchmark: a diffusers folder, and the fp16 bundle of it.

python benchmarks/gpu_make.py VARIANT FOLDER    writes FOLDER/checkpoint and FOLDER/bundle

What `bksdm-export --precision fp16` does without its proof, which takes a CPU minutes and which the benchmark gives by
comparing pictures with PyTorch's (gpu.py). Random weights stay far within fp16's range: no part of a graph is fp32."""

from __future__ import annotations

import sys
from pathlib import Path

from bksdm import checkpoint
from bksdm_export import bundle_files, fuse, graphs, precision, to_onnx
from bksdm_export.wrappers import wrap


def main(variant: str, folder: str) -> None:
    made = checkpoint.load("demo" if variant == "demo" else "random", variant=None if variant == "demo" else variant)
    checkpoint.save(made, Path(folder) / "checkpoint")
    write_bundle(made, Path(folder) / "bundle")


def write_bundle(made: checkpoint.Checkpoint, output: Path) -> None:
    """The bundle of a checkpoint, in half precision throughout. The checkpoint's modules are used up."""
    facts = graphs.model_facts(made)
    components = graphs.components(facts, "fp16")
    bundle_files.write_all_but_graphs(made, output)
    variant, source, licence = made.variant, made.source, made.licence
    for name, component in components.items():
        module = wrap(made, name)
        precision.to_half(module, ())
        model = to_onnx.to_onnx(to_onnx.to_exported_program(module, component), component)
        path = output / component.path
        to_onnx.save(model, path, path)
        fuse.fuse(model)
        to_onnx.save(model, fuse.fused_path(path), path)
    unproven = bundle_files.manifest(
        variant, source, licence, facts, components, bundle_files.tools(), precision="fp16", storage="fp16"
    )
    bundle_files.write_manifest(output, unproven, {})


if __name__ == "__main__":
    main(*sys.argv[1:])
