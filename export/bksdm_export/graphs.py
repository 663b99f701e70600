"""The I/O contract: names, dtypes and axes of the four graphs, in one place that every writer reads.

Names are those that Optimum's ORTStableDiffusionPipeline feeds and fetches, so that a bundle opens there too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bksdm_runtime.bundle import Component, ModelFacts, TensorSpec
from bksdm_runtime.contract import DEEP

if TYPE_CHECKING:
    from bksdm.checkpoint import Checkpoint

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
PRECISIONS = ("fp32", "fp16", "int8")
STORAGES = ("fp32", "fp16", "int8")  # of fp32 arithmetic; the others bring their own
# What int8 changes: the text encoder runs once for a picture, the VAE encoder for some pictures alone.
IN_INT8 = ("unet", "unet_shallow", "vae_decoder")
# What it may change in a U-Net's output: root mean square of the error over that of the output. Later steps correct
# much of that and nothing corrects the decoder's, which may change by this share of it (docs/cpu.md).
INT8_ERROR, INT8_DECODER_SHARE = 0.07, 1 / 14
LARGEST_DOWNSAMPLING = 8  # of the demo's 256 tokens it leaves 4
DEPTHS = ("quick", "full")  # of the verification; see reference.plan
DTYPES: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "int8": "float32"}

# 18: the lowest that torch's dynamo exporter writes, and what TensorRT 8.6 to 11, OpenVINO and ONNX Runtime all read.
OPSET = 18

# Its own axis, not "batch": it takes one value per sample, or a single one for all of them (Optimum feeds that), and
# ONNX Runtime plans memory on the promise that equal axis names mean equal sizes.
TIMESTEPS = "timesteps"


def model_facts(checkpoint: Checkpoint) -> ModelFacts:
    """What a pipeline must know about the model, from the configs of its parts.

    size_multiple is the VAE's factor: the U-Net's graph forwards the sizes of its skip connections (see wrappers), so
    every latent size is right in it, odd ones too; export verifies sizes off the grid each time (see reference).
    """
    vae = checkpoint.vae.config
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return ModelFacts(
        tokens=int(checkpoint.tokenizer.model_max_length),
        context_dim=int(checkpoint.unet.config["cross_attention_dim"]),
        latent_channels=int(vae["latent_channels"]),
        vae_scale_factor=factor,
        scaling_factor=float(vae["scaling_factor"]),
        size_multiple=factor,
        height=checkpoint.image_size,
        width=checkpoint.image_size,
        guidance_scale=checkpoint.guidance_scale,
    )


def deep_channels(checkpoint: Checkpoint) -> int:
    """Channels of what the last layer of the U-Net's outermost up stage takes from the layer before."""
    return int(checkpoint.unet.config["block_out_channels"][0])


def components(facts: ModelFacts, precision: str, *, deep: int | None = None) -> dict[str, Component]:
    """Every component's path and tensors. precision: one of PRECISIONS; int8 graphs take and give float32.

    deep: channels of the deep features for a bundle with a step cache, whose U-Net is two graphs; None for none.
    """
    real = DTYPES[precision]
    latents = ("batch", facts.latent_channels, "height", "width")
    image = ("batch", 3, "image_height", "image_width")
    context = ("batch", facts.tokens, facts.context_dim)
    unet_inputs = (
        TensorSpec("sample", real, latents),
        # Always float32: above 512 fp16 is spaced 0.5 apart, and samplers ask for timesteps between integers.
        TensorSpec("timestep", "float32", (TIMESTEPS,)),
        TensorSpec("encoder_hidden_states", real, context),
    )
    features = () if deep is None else (TensorSpec(DEEP, real, ("batch", deep, "height", "width")),)
    parts = {
        "text_encoder": Component(
            path="text_encoder/model.onnx",
            inputs=(TensorSpec("input_ids", "int32", ("batch", facts.tokens)),),
            outputs=(TensorSpec("last_hidden_state", real, context),),
        ),
        "unet": Component(
            path="unet/model.onnx",
            inputs=unet_inputs,
            outputs=(TensorSpec("out_sample", real, latents), *features),
        ),
        "vae_decoder": Component(
            path="vae_decoder/model.onnx",
            inputs=(TensorSpec("latent_sample", real, latents),),  # already divided by scaling_factor
            outputs=(TensorSpec("sample", real, image),),  # about [-1, 1]
        ),
        "vae_encoder": Component(
            path="vae_encoder/model.onnx",
            inputs=(TensorSpec("sample", real, image),),  # [-1, 1]
            # Mean, then logarithm of the variance, of the latents before scaling_factor.
            outputs=(TensorSpec("latent_parameters", real, ("batch", 2 * facts.latent_channels, "height", "width")),),
        ),
    }
    if features:
        parts["unet_shallow"] = Component(
            path="unet/shallow.onnx",
            inputs=(*unet_inputs, *features),
            outputs=(TensorSpec("out_sample", real, latents),),
        )
    return parts
