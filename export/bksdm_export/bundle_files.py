"""The files of a bundle beside its graphs, as diffusers and Optimum write them, and bundle.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from bksdm import vocabulary
from bksdm.checkpoint import Checkpoint, Licence
from bksdm_runtime import bundle as bundles
from bksdm_runtime.bundle import Component, Manifest, ModelFacts
from bksdm_runtime.version import version

LICENCE_FILE = "LICENSE"
# Whose versions decide what the graphs look like; and ONNX Runtime, whose module alone knows under which name (-gpu,
# -directml) it was installed.
_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")


def write_all_but_graphs(checkpoint: Checkpoint, folder: Path) -> None:
    """Configs, tokenizer, scheduler settings and licence: what diffusers' readers and our own find beside graphs."""
    diffusers = metadata.version("diffusers")
    scheduler = {**checkpoint.scheduler_config, "_diffusers_version": diffusers}
    _write_json(folder / "model_index.json", _model_index(str(scheduler["_class_name"]), diffusers))
    _write_json(folder / bundles.SCHEDULER_CONFIG, scheduler)
    vocabulary.save(checkpoint.tokenizer, folder / bundles.TOKENIZER_FOLDER)
    (folder / LICENCE_FILE).write_text(checkpoint.licence.notice, encoding="utf-8")
    # Optimum reads a config.json beside each graph.
    vae = _config(checkpoint.vae.to_json_string())
    text_encoder = _config(checkpoint.text_encoder.config.to_json_string(use_diff=True))
    _write_json(folder / "text_encoder" / "config.json", {**text_encoder, "architectures": ["CLIPTextModel"]})
    _write_json(folder / "unet" / "config.json", _config(checkpoint.unet.to_json_string()))
    _write_json(folder / "vae_decoder" / "config.json", vae)
    _write_json(folder / "vae_encoder" / "config.json", vae)


def tools() -> dict[str, str]:
    """Versions of everything that makes a bundle."""
    import onnxruntime

    versions = {name: metadata.version(name) for name in _TOOLS}
    return {"bksdm": version(), **versions, "onnxruntime": onnxruntime.__version__}


def expected_bytes(checkpoint: Checkpoint, storage: str) -> int:
    """About what a bundle will take on disk, rather more than less. storage: of the weights, as in the manifest."""
    parts = (checkpoint.text_encoder, checkpoint.unet, checkpoint.vae)
    parameters = sum(parameter.numel() for part in parts for parameter in part.parameters())
    # int8 counts as two bytes: of int8 arithmetic text encoder and VAE encoder stay fp32, and so do layers that int8
    # harms (demo: 2.1)
    # A tenth for what stays fp32 among fp16 weights; and what is no weight: 4.1 MB in the demo's bundle, mostly the
    # tokenizer; more of pictures where they are large.
    return int(parameters * {"fp32": 4, "fp16": 2, "int8": 2}[storage] * 1.1) + 16_000_000


def manifest(
    variant: str,
    source: str,
    licence: Licence,
    facts: ModelFacts,
    components: Mapping[str, Component],
    tools: Mapping[str, str],
    *,
    precision: str,
    storage: str,
    token_downsampling: int = 1,
) -> Manifest:
    """A manifest that lists no file yet and proves nothing yet."""
    return Manifest(
        variant=variant,
        source=source,
        precision=precision,
        storage=storage,
        model=facts,
        components=components,
        files={},
        parity={},
        licence=bundles.Licence(licence.name, LICENCE_FILE),
        tools=tools,
        token_downsampling=token_downsampling,
    )


def write_manifest(folder: Path, unproven: Manifest, parity: Mapping[str, object]) -> None:
    """Hash every file that lies in the folder, and write bundle.json last."""
    complete = replace(unproven, files=bundles.file_records(folder), parity=parity)
    (folder / bundles.MANIFEST_NAME).write_text(complete.to_json(), encoding="utf-8")


def _model_index(scheduler: str, diffusers: str) -> dict[str, object]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _config(text: str) -> dict[str, object]:
    config = json.loads(text)
    for key in ("_name_or_path", "dtype", "torch_dtype"):  # of the machine and the torch modules, not of the graphs
        config.pop(key, None)
    return config


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
