"""The I/O contract between a bundle's graphs and the pipeline: what each component takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bksdm_runtime.strict_json import JsonError

FLOATS = ("float32", "float16")
INTEGERS = ("int32", "int64")
DEEP = "deep_features"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph. dtype: float32, float16, int32 or int64; a dynamic axis is its name."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


@dataclass(frozen=True)
class Component:
    """One graph. path: posix, relative to the bundle."""

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class ModelFacts:
    """What the pipeline must know about the model.

    height, width: default size in pixels, multiples of size_multiple; guidance_scale: the default, at least 1.
    scaling_factor: latents are the VAE's times this.
    """

    tokens: int
    context_dim: int
    latent_channels: int
    vae_scale_factor: int
    scaling_factor: float
    size_multiple: int
    height: int
    width: int
    guidance_scale: float


# Axes: a name in `sizes` below must have that size; any other is dynamic.
# The graphs may have more outputs (a pooler), never more inputs: nothing would feed them.
_CONTRACT: Mapping[str, tuple[Mapping[str, tuple[tuple[str, ...], str]], Mapping[str, tuple[tuple[str, ...], str]]]] = {
    "text_encoder": (
        {"input_ids": (INTEGERS, "batch tokens")},
        {"last_hidden_state": (FLOATS, "batch tokens context")},
    ),
    "unet": (
        {
            "sample": (FLOATS, "batch latents height width"),
            "timestep": (FLOATS + INTEGERS, "batch"),
            "encoder_hidden_states": (FLOATS, "batch tokens context"),
        },
        {"out_sample": (FLOATS, "batch latents height width")},
    ),
    # The outermost layer of the U-Net alone; what it takes of the rest, the U-Net of such a bundle gives besides.
    "unet_shallow": (
        {
            "sample": (FLOATS, "batch latents height width"),
            "timestep": (FLOATS + INTEGERS, "batch"),
            "encoder_hidden_states": (FLOATS, "batch tokens context"),
            DEEP: (FLOATS, "batch deep height width"),
        },
        {"out_sample": (FLOATS, "batch latents height width")},
    ),
    "vae_decoder": (
        {"latent_sample": (FLOATS, "batch latents height width")},
        {"sample": (FLOATS, "batch rgb height width")},
    ),
    "vae_encoder": (
        {"sample": (FLOATS, "batch rgb height width")},
        {"latent_parameters": (FLOATS, "batch moments height width")},
    ),
}
_OPTIONAL_COMPONENTS = ("vae_encoder", "unet_shallow")
# Beside the U-Net: they share a file of weights, and a graph finds such a file in its own folder alone.
_FOLDERS = {"unet_shallow": "unet"}


def check_components(components: Mapping[str, Component], facts: ModelFacts, precision: str) -> None:
    """The graphs and the facts against the contract and one another. Raises JsonError.

    precision: of the graphs' arithmetic, "fp32", "fp16" or "int8".
    """
    if not facts.scaling_factor > 0:
        raise JsonError(f"model.scaling_factor must be positive, found {facts.scaling_factor}")
    if not facts.guidance_scale >= 1:
        raise JsonError(f"model.guidance_scale must be at least 1 (no guidance), found {facts.guidance_scale}")
    if facts.size_multiple % facts.vae_scale_factor:
        raise JsonError(
            f"model.size_multiple ({facts.size_multiple}) must be a multiple of "
            f"model.vae_scale_factor ({facts.vae_scale_factor})"
        )
    for side, pixels in (("height", facts.height), ("width", facts.width)):
        if pixels % facts.size_multiple:
            raise JsonError(
                f"model.{side} ({pixels}) must be a multiple of model.size_multiple ({facts.size_multiple})"
            )
    for name in components:
        if name not in _CONTRACT:
            raise JsonError(f"components.{name} is unknown (known: {', '.join(_CONTRACT)})")
    for name, component in components.items():
        # Its external weights are found from its folder: whatever lies there must be listed.
        folder = _FOLDERS.get(name, name)
        if not component.path.startswith(f"{folder}/"):
            raise JsonError(
                f"components.{name}.path must lie in the folder {folder}/, found {ascii(component.path)[:80]}"
            )
    for name in _CONTRACT:
        if name not in components and name not in _OPTIONAL_COMPONENTS:
            raise JsonError(f"components.{name} is missing")
    sizes = {
        "tokens": facts.tokens,
        "context": facts.context_dim,
        "latents": facts.latent_channels,
        "rgb": 3,
        "moments": 2 * facts.latent_channels,  # mean, then logarithm of the variance
    }
    if "unet_shallow" in components:
        sizes["deep"] = _deep_channels(components["unet"])
    for name, component in components.items():
        _check_graph(name, component, sizes, precision)


def _deep_channels(unet: Component) -> int:
    """Of the features that the shallow U-Net is to take. Raises JsonError where the U-Net does not give them."""
    for spec in unet.outputs:
        if spec.name == DEEP and len(spec.axes) == 4 and isinstance(spec.axes[1], int) and spec.dtype in FLOATS:
            return spec.axes[1]
    raise JsonError(f"components.unet.outputs must give {DEEP}, [batch, channels, height, width], for unet_shallow")


def _check_graph(name: str, component: Component, sizes: Mapping[str, int], precision: str) -> None:
    for side, specs, expected in zip(
        ("inputs", "outputs"), (component.inputs, component.outputs), _CONTRACT[name], strict=True
    ):
        found = {spec.name: spec for spec in specs}
        where = f"components.{name}.{side}"
        missing = [tensor for tensor in expected if tensor not in found]
        extra = [tensor for tensor in found if tensor not in expected] if side == "inputs" else []
        if missing or extra:
            raise JsonError(f"{where} must be {', '.join(expected)}, found {', '.join(found) or 'none'}")
        for tensor, (dtypes, axes) in expected.items():
            spec = found[tensor]
            if spec.dtype not in dtypes:
                raise JsonError(f"{where}: {tensor} must be {' or '.join(dtypes)}, found {spec.dtype}")
            if spec.dtype == "float16" and precision != "fp16":
                raise JsonError(f"{where}: {tensor} is float16 in a bundle of precision {precision}")
            wanted = [sizes.get(axis, axis) for axis in axes.split()]
            fits = len(wanted) == len(spec.axes) and all(
                isinstance(has, str) if isinstance(want, str) else has == want
                for want, has in zip(wanted, spec.axes, strict=True)
            )
            if not fits:
                raise JsonError(f"{where}: {tensor} must be {_shape(wanted)}, found {_shape(spec.axes)}")


def _shape(axes: Iterable[str | int]) -> str:
    return "[" + ", ".join(str(axis) for axis in axes) + "]"
