"""What the CPU benchmark compares, as tables: environments, models and contenders. To add one, add a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Environment:
    """A virtual environment. packages: what pip installs, one call each; removed: what it then uninstalls; variables:
    while it is made."""

    packages: tuple[tuple[str, ...], ...]
    removed: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


CURRENT = "current"  # the environment that runs the benchmark: no environment is made
_TORCH = ("torch==2.13.0",)  # first and by its version, so that no other package picks a build
ENVIRONMENTS: Mapping[str, Environment] = {
    "diffusers": Environment(
        (_TORCH, (*_TORCH, "diffusers==0.42.1", "transformers==5.23.0", "accelerate==1.15.0", "safetensors==0.8.0"))
    ),
    # optimum-onnx 0.1.0 excludes newer transformers and diffusers.
    "optimum": Environment(
        (
            _TORCH,
            (
                *(*_TORCH, "diffusers==0.39.0", "transformers==4.57.6", "huggingface_hub==0.36.2"),
                *("optimum==2.1.0", "optimum-onnx==0.1.0", "onnx==1.23.2", "onnxruntime==1.32.0"),
            ),
        )
    ),
    "genai": Environment(
        (
            _TORCH,
            (
                *(*_TORCH, "optimum-intel[openvino,diffusers]==2.2.0", "openvino==2026.4.1"),
                *("openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"),
            ),
        ),
        # The index has no CPU build of it, and the other one's import fails beside CPU torch, with transformers'.
        removed=("torchvision",),
    ),
    # Built from source for this CPU; needs cmake and a C++ compiler.
    "sdcpp": Environment((("stable-diffusion-cpp-python==0.4.7",),), variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"}),
}


@dataclass(frozen=True)
class Model:
    """What a contender opens. command: makes it; {python} and {bin} are of the environment, {checkpoint} and what else
    of models it needs are their folders, {output} what is to be written, {script} the folder of this file."""

    environment: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


# Step by step: q8_0 straight from fp32 leaves the convolutions, which it does not quantise, in fp32 (1.47 GB for tiny).
_GGUF = """
import pathlib, sys, stable_diffusion_cpp
source, output, *kinds = sys.argv[1:]
made = [output + "." + kind + ".gguf" for kind in kinds]
for before, after, kind in zip([source, *made], made, kinds):
    if not stable_diffusion_cpp.StableDiffusion().convert(before, output_path=after, output_type=kind):
        sys.exit("no " + after + " was written")
pathlib.Path(made[-1]).rename(output)
for one in made[:-1]:
    pathlib.Path(one).unlink()
"""
# GenAI's own folder with the U-Net and decoder of our int8 bundle in it: the same numbers on both sides.
_OURS_FOR_GENAI = """
import pathlib, shutil, sys, openvino
source, bundle, output = map(pathlib.Path, sys.argv[1:])
shutil.copytree(source, output)
for part, wanted in (("unet", "out_sample"), ("vae_decoder", "sample")):
    model = openvino.Core().read_model(bundle / part / "model.onnx")
    for result in model.get_results():
        if wanted not in result.input_value(0).names:
            model.remove_result(result)
    if part == "unet":  # GenAI hands timesteps on as it finds them in Optimum's exports
        steps = openvino.preprocess.PrePostProcessor(model)
        steps.input("timestep").tensor().set_element_type(openvino.Type.i64)
        model = steps.build()
    # Uncompressed, as our bundle stores it: halves would be other numbers in the layers that are not int8.
    openvino.save_model(model, output / part / "openvino_model.xml", compress_to_fp16=False)
"""
_EXPORT = "from bksdm_export.cli import main; main()"
_TO_OPENVINO = (
    *("{bin}/optimum-cli", "export", "openvino", "--model", "{checkpoint}", "--task", "text-to-image"),
    *("--library", "diffusers"),
)
CHECKPOINT = "checkpoint"  # all other models are made from it, so that all draw the same picture
MODELS: Mapping[str, Model] = {
    CHECKPOINT: Model(CURRENT, ("{python}", "{script}/cpu_checkpoint.py", "{variant}", "{output}")),
    "bundle": Model(
        CURRENT,
        ("{python}", "-c", _EXPORT, "--weights", "{checkpoint}", "--storage", "fp16", "--step-cache", "-o", "{output}"),
    ),
    "bundle-int8": Model(
        CURRENT,
        (
            *("{python}", "-c", _EXPORT, "--weights", "{checkpoint}", "--precision", "int8"),
            "--step-cache",
            "-o",
            "{output}",
        ),
    ),
    "bundle-by-2": Model(
        CURRENT,
        (
            *("{python}", "-c", _EXPORT, "--weights", "{checkpoint}", "--storage", "fp16"),
            *("--step-cache", "--token-downsampling", "2", "-o", "{output}"),
        ),
    ),
    "bundle-int8-by-2": Model(
        CURRENT,
        (
            *("{python}", "-c", _EXPORT, "--weights", "{checkpoint}", "--precision", "int8"),
            *("--step-cache", "--token-downsampling", "2", "--int8-like", "{bundle-int8}", "-o", "{output}"),
        ),
        needs=("bundle-int8",),
    ),
    "openvino-ours-int8": Model(
        "genai",
        ("{python}", "-c", _OURS_FOR_GENAI, "{openvino-fp16}", "{bundle-int8}", "{output}"),
        needs=("openvino-fp16", "bundle-int8"),
    ),
    "onnx": Model(
        "optimum",
        ("{bin}/optimum-cli", "export", "onnx", "--model", "{checkpoint}", "--task", "text-to-image", "{output}"),
    ),
    "openvino-fp16": Model("genai", (*_TO_OPENVINO, "--weight-format", "fp16", "{output}")),
    "openvino-int8": Model("genai", (*_TO_OPENVINO, "--weight-format", "int8", "{output}")),
    "f16.gguf": Model("sdcpp", ("{python}", "-c", _GGUF, "{checkpoint}", "{output}", "f16")),
    "q8_0.gguf": Model("sdcpp", ("{python}", "-c", _GGUF, "{checkpoint}", "{output}", "f16", "q8_0")),
}


@dataclass(frozen=True)
class Row:
    """A contender. kind: a key of cpu_contender.KINDS. arithmetic: fp32, bf16 or int8, whose measured peak its U-Net is
    held against. exact: what it draws is the checkpoint's picture up to rounding. variables: of its process.
    aim: of an approximate row of ours, how many times as fast as the best exact peer it is to be. twin: of a peer, the
    row of ours that runs the very same graphs."""

    name: str
    kind: str
    environment: str
    model: str
    options: Mapping[str, Any]
    arithmetic: str = "fp32"
    exact: bool = True
    aim: float | None = None
    twin: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def backend(self) -> str | None:
        return self.options["backend"] if self.kind == "ours" else None


# Folds the weights into compiled code: https://docs.pytorch.org/docs/stable/torch.compiler_inductor_profiling.html
_FREEZING = {"TORCHINDUCTOR_FREEZING": "1"}
_FLASH = {"diffusion_flash_attn": True}
ROWS: tuple[Row, ...] = (
    Row("ours, ONNX Runtime fp32", "ours", CURRENT, "bundle", {"backend": "onnxruntime"}),
    Row("ours, OpenVINO f32", "ours", CURRENT, "bundle", {"backend": "openvino", "arithmetic": "f32"}),
    Row("ours, OpenVINO bf16", "ours", CURRENT, "bundle", {"backend": "openvino", "arithmetic": "bf16"}, "bf16"),
    Row(
        "ours, OpenVINO f32, every 3rd step whole",
        "ours",
        CURRENT,
        "bundle",
        {"backend": "openvino", "arithmetic": "f32", "saved": {"cache_interval": 3}},
        exact=False,
        aim=2.0,
    ),
    Row(
        "ours, OpenVINO bf16, every 3rd step whole",
        "ours",
        CURRENT,
        "bundle",
        {"backend": "openvino", "arithmetic": "bf16", "saved": {"cache_interval": 3}},
        "bf16",
        exact=False,
        aim=2.0,
    ),
    Row(
        "ours, OpenVINO bf16, tokens by 2",
        "ours",
        CURRENT,
        "bundle-by-2",
        {"backend": "openvino", "arithmetic": "bf16"},
        "bf16",
        exact=False,
    ),
    Row(
        "ours, OpenVINO bf16, tokens by 2, every 3rd step whole",
        "ours",
        CURRENT,
        "bundle-by-2",
        {"backend": "openvino", "arithmetic": "bf16", "saved": {"cache_interval": 3}},
        "bf16",
        exact=False,
    ),
    Row("diffusers fp32", "diffusers", "diffusers", CHECKPOINT, {"dtype": "float32"}),
    Row(
        "diffusers bf16, channels last",
        "diffusers",
        "diffusers",
        CHECKPOINT,
        {"dtype": "bfloat16", "channels_last": True},
        "bf16",
    ),
    Row(
        "diffusers fp32, compiled",
        "diffusers",
        "diffusers",
        CHECKPOINT,
        {"dtype": "float32", "compiled": True},
        variables=_FREEZING,
    ),
    Row(
        "diffusers bf16, compiled",
        "diffusers",
        "diffusers",
        CHECKPOINT,
        {"dtype": "bfloat16", "channels_last": True, "compiled": True},
        "bf16",
        variables=_FREEZING,
    ),
    Row("Optimum, ONNX Runtime fp32", "optimum", "optimum", "onnx", {}),
    Row(
        "ours, OpenVINO int8, rest bf16",
        "ours",
        CURRENT,
        "bundle-int8",
        {"backend": "openvino", "arithmetic": "bf16"},
        "bf16",
        exact=False,
        aim=1.5,
    ),
    Row(
        "ours, OpenVINO int8, rest bf16, every 3rd step whole",
        "ours",
        CURRENT,
        "bundle-int8",
        {"backend": "openvino", "arithmetic": "bf16", "saved": {"cache_interval": 3}},
        "bf16",
        exact=False,
        aim=3.0,
    ),
    Row(
        "ours, OpenVINO int8, rest bf16, tokens by 2, every 3rd step whole",
        "ours",
        CURRENT,
        "bundle-int8-by-2",
        {"backend": "openvino", "arithmetic": "bf16", "saved": {"cache_interval": 3}},
        "bf16",
        exact=False,
    ),
    Row(
        "ours, OpenVINO int8, rest f32",
        "ours",
        CURRENT,
        "bundle-int8",
        {"backend": "openvino", "arithmetic": "f32"},
        exact=False,
        aim=1.5,
    ),
    Row(
        "ours, OpenVINO int8, rest f32, every 3rd step whole",
        "ours",
        CURRENT,
        "bundle-int8",
        {"backend": "openvino", "arithmetic": "f32", "saved": {"cache_interval": 3}},
        exact=False,
        aim=3.0,
    ),
    Row("OpenVINO GenAI f32", "genai", "genai", "openvino-fp16", {"precision": "f32"}),
    Row("OpenVINO GenAI bf16", "genai", "genai", "openvino-fp16", {"precision": "bf16"}, "bf16"),
    Row("OpenVINO GenAI int8 weights, bf16", "genai", "genai", "openvino-int8", {"precision": "bf16"}, "bf16", False),
    Row("OpenVINO GenAI int8 weights, f32", "genai", "genai", "openvino-int8", {"precision": "f32"}, exact=False),
    Row(
        "OpenVINO GenAI, our int8, rest bf16",
        "genai",
        "genai",
        "openvino-ours-int8",
        {"precision": "bf16"},
        "bf16",
        exact=False,
        twin="ours, OpenVINO int8, rest bf16",
    ),
    Row(
        "OpenVINO GenAI, our int8, rest f32",
        "genai",
        "genai",
        "openvino-ours-int8",
        {"precision": "f32"},
        exact=False,
        twin="ours, OpenVINO int8, rest f32",
    ),
    Row("stable-diffusion.cpp f16", "sdcpp", "sdcpp", "f16.gguf", _FLASH),
    Row("stable-diffusion.cpp q8_0", "sdcpp", "sdcpp", "q8_0.gguf", _FLASH, exact=False),
)
# The short form: what the current environment may have, on the models in the repository.
QUICK = ("ours, ONNX Runtime fp32", "ours, OpenVINO f32", "diffusers fp32", "Optimum, ONNX Runtime fp32")
