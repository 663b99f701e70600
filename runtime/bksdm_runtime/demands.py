"""What a batch asks of the engines, and whether they were built for it (those of TensorRT, see engine.Bounded)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from bksdm_runtime.batches import Batch
from bksdm_runtime.bundle import Bundle, ModelFacts
from bksdm_runtime.contract import DEEP
from bksdm_runtime.engine import Bounded, Engine, EngineError

Shapes = dict[str, tuple[int, ...]]
EngineOf = Callable[[str], Engine]  # of a component, opened if need be


def latent_shape(batch: Batch, model: ModelFacts) -> tuple[int, int, int]:
    """[C, h, w] of one picture."""
    return model.latent_channels, batch.height // model.vae_scale_factor, batch.width // model.vae_scale_factor


def of_unet(batch: Batch, model: ModelFacts, *, guided: bool) -> Shapes:
    """Inputs of an evaluation, which has two rows a picture where it is guided."""
    rows = 2 * len(batch.requests) if guided else len(batch.requests)
    return {
        "sample": (rows, *latent_shape(batch, model)),
        "timestep": (rows,),
        "encoder_hidden_states": (rows, model.tokens, model.context_dim),
    }


def of_decoder(batch: Batch, model: ModelFacts) -> Shapes:
    """Inputs for one picture, or for one of its tiles."""
    channels, h, w = latent_shape(batch, model)
    tile = batch.requests[0].vae_tile
    side = max(h, w) if tile is None else tile // model.vae_scale_factor
    return {"latent_sample": (1, channels, min(side, h), min(side, w))}


def demands(batch: Batch, bundle: Bundle) -> dict[str, list[Shapes]]:
    """Every shape that the batch will have, by component."""
    model = bundle.manifest.model
    _, h, w = latent_shape(batch, model)
    found: dict[str, list[Shapes]] = {"unet": [], "vae_decoder": [of_decoder(batch, model)]}
    for now in dict.fromkeys(batch.evaluations):
        shapes = of_unet(batch, model, guided=now.guided)
        if now.full:
            found["unet"].append(shapes)
        else:
            shape = deep_shape(bundle, h, w)
            found.setdefault("unet_shallow", []).append({**shapes, DEEP: (shapes["timestep"][0], *shape)})
    if any(request.init_image is not None for request in batch.requests):
        found["vae_encoder"] = [{"sample": (1, 3, batch.height, batch.width)}]
    return found


def deep_shape(bundle: Bundle, h: int, w: int) -> tuple[int, int, int]:
    """[F, h, w]: the deep features of one row, which the shallow U-Net takes."""
    [deep] = [spec for spec in bundle.manifest.components["unet"].outputs if spec.name == DEEP]
    return cast(int, deep.axes[1]), h, w


def of_evaluation(bundle: Bundle, height: int, width: int, *, full: bool) -> Shapes:
    """Inputs of the U-Net, or of the shallow one, without their rows."""
    model = bundle.manifest.model
    h, w = height // model.vae_scale_factor, width // model.vae_scale_factor
    shapes: Shapes = {
        "sample": (model.latent_channels, h, w),
        "timestep": (),
        "encoder_hidden_states": (model.tokens, model.context_dim),
    }
    return shapes if full else {**shapes, DEEP: deep_shape(bundle, h, w)}


def lacking(batch: Batch, component: str, bundle: Bundle, engine_of: EngineOf) -> Shapes | None:
    """What of the batch a component's engine was not built for; None where it takes all of it."""
    engine = engine_of(component)
    if not isinstance(engine, Bounded):
        return None
    return next((shapes for shapes in demands(batch, bundle)[component] if not engine.holds(shapes)), None)


def split(batch: Batch, bundle: Bundle, engine_of: EngineOf) -> list[Batch]:
    """The batch in as few parts as there are that the U-Nets were built for; singly where there are none."""
    count = len(batch.requests)
    unets = [name for name in demands(batch, bundle) if name.startswith("unet")]
    held = [
        size
        for size in range(1, count + 1)
        if all(lacking(_part(batch, 0, size), name, bundle, engine_of) is None for name in unets)
    ]
    fewest: list[tuple[int, ...] | None] = [()]  # for each number of requests, the sizes of its parts
    for rest in range(1, count + 1):
        ways = [(size, *way) for size in held if size <= rest and (way := fewest[rest - size]) is not None]
        fewest.append(min(ways, key=lambda way: (len(way), tuple(-size for size in way)), default=None))
    sizes = fewest[count] or (1,) * count
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_part(batch, start, start + size) for start, size in zip(starts, sizes, strict=True)]


def refuse(batch: Batch, bundle: Bundle, engine_of: EngineOf) -> None:
    """Refuse what an engine was not built for before anything is computed. Raises EngineError: what to build."""
    for component in demands(batch, bundle):
        shapes = lacking(batch, component, bundle, engine_of)
        if shapes is not None:
            count, height, width = len(batch.requests), batch.height, batch.width
            what = f"{count} picture{'s' * (count > 1)} at once of {width}x{height} px"
            flags = f"--height {height} --width {width}"
            if component == "vae_decoder" and batch.requests[0].vae_tile is not None:
                factor = bundle.manifest.model.vae_scale_factor
                height, width = (factor * side for side in shapes["latent_sample"][2:])
                what = f"tiles of {width}x{height} px"
                flags = f"--component vae_decoder --height {height} --width {width}"
            elif component.startswith("unet"):
                unguided = shapes["timestep"][0] == count
                what += " without guidance" * unguided
                flags += f" --batch {count}" * (count > 1) + " --unguided" * unguided
            raise EngineError(
                f"the engine of {component} was not built for {what}: bksdm-build {bundle.root} "
                f"--library {engine_of(component).backend} --add {flags}, or take another --backend"
            )


def _part(batch: Batch, start: int, end: int) -> Batch:
    """Some of a batch's requests."""
    return replace(batch, positions=batch.positions[start:end], requests=batch.requests[start:end])
