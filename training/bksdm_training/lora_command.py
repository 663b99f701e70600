"""bksdm-train lora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bksdm.variants import VARIANTS
from bksdm_training.options import (
    LOOP,
    RUN,
    SOURCES,
    errors_said,
    micro_batch,
    named,
    of_the_run,
    of_the_schedule,
    open_accelerator,
    with_options,
)


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    help="Pictures with captions, as distill takes them; with --instance-prompt, a plain folder of pictures.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option(
    "--weights",
    metavar="CHECKPOINT",
    help="What is adapted: a diffusers folder, a .safetensors file, demo or random.  "
    "[default: the variant's own, from the Hub]",
)
@click.option("--variant", type=click.Choice(tuple(VARIANTS)), help="Which model.  [default: small, or what it is]")
@with_options(*SOURCES)
@click.option("--instance-prompt", metavar="TEXT", help='The subject\'s own: "a photo of sks dog" (DreamBooth).')
@click.option("--class-prompt", metavar="TEXT", help='Its class: "a photo of a dog". Half of each batch keeps it.')
@click.option(
    "--class-data", type=click.Path(path_type=Path), help="Pictures of the class.  [default: the model draws]"
)
@click.option("--class-count", type=click.IntRange(1), help="How many the model draws.  [default: 100]")
@click.option("--prior-weight", type=click.FloatRange(0), default=1.0, help="Of the loss on class pictures.")
@click.option("--rank", type=click.IntRange(1), default=8, help="Of the adapters.")
@click.option("--alpha", type=click.FloatRange(0, min_open=True), help="Adapters count alpha / rank.  [default: rank]")
@click.option("--text-encoder", is_flag=True, help="Adapt the text encoder too.")
@click.option("--steps", type=click.IntRange(1), default=1000)
@click.option("--batch-size", type=click.IntRange(1), default=4, help="Pictures a step, all processes.")
@micro_batch
@click.option("--size", type=click.IntRange(64), help="Pixels, square.  [default: the model's]")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-4)
@of_the_schedule
@click.option("--ema-decay", type=click.FloatRange(0, 1, max_open=True), default=0.999)
@click.option("--flip/--no-flip", default=False, help="Mirror half of the pictures.")
@click.option("--checkpoint-every", type=click.IntRange(1), default=250, help="Steps.")
@of_the_run
@click.option("--validation-prompt", "prompts", metavar="TEXT", multiple=True, help="Draw this instead of captions.")
def lora(
    folder: Path,
    output: Path,
    weights: str | None,
    variant: str | None,
    size: int | None,
    alpha: float | None,
    prompts: tuple[str, ...],
    **options: Any,
) -> None:
    """Fine-tune a model by low-rank adapters (LoRA); run again after a kill to go on.

    OUTPUT/pytorch_lora_weights.safetensors is for bksdm-export --lora OUTPUT, and for diffusers' load_lora_weights.
    On several GPUs: accelerate launch -m bksdm_training lora ...

    \b
    bksdm-train lora --variant small --data pictures/ -o runs/style
    bksdm-train lora --variant small --data dog/ --instance-prompt "a photo of sks dog" \\
        --class-prompt "a photo of a dog" -o runs/dog
    """
    _check_prompts(options)
    import torch

    from bksdm import checkpoint
    from bksdm_training.config import AdaptConfig, LoopConfig
    from bksdm_training.lora import adapt
    from bksdm_training.material import open_material, open_subject
    from bksdm_training.prior import draw_class

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    if variant is None and weights in (None, "random"):
        variant = "small"
    of_class = options["class_prompt"]
    with errors_said():
        accelerator = open_accelerator(options["cpu"], options["mixed_precision"], output)
        base = checkpoint.load(weights, variant=variant, **named(options, "revision allow_pickle"))
        try:
            config = AdaptConfig(
                size=size or base.image_size,
                loop=LoopConfig(fused=True, **named(options, f"batch_size {LOOP}")),
                alpha=options["rank"] if alpha is None else alpha,
                prior_weight=options["prior_weight"] if of_class else None,
                **named(options, f"rank text_encoder {RUN}"),
            )
            config.parts(accelerator.num_processes)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        if prompt := options["instance_prompt"]:
            classes = options["class_data"]
            if of_class and classes is None:
                count = options["class_count"] or 100  # diffusers' scripts' own
                classes = draw_class(base, of_class, count, config.size, output / "class", accelerator)
            material = open_subject(folder, prompt, base, config, prior=(classes, of_class) if of_class else None)
        else:
            material = open_material(folder, base, config, index=output / "index.json")
        made = adapt(config, base, material, output, accelerator, prompts=prompts)
    if accelerator.is_main_process:
        click.echo(made)


def _check_prompts(options: dict[str, Any]) -> None:
    """DreamBooth's options are of no use one without the other. Raises UsageError."""
    for name, needed in (
        ("class_prompt", "instance_prompt"),
        ("class_data", "class_prompt"),
        ("class_count", "class_prompt"),
    ):
        if options[name] is not None and options[needed] is None:
            given, wanted = (f"--{option.replace('_', '-')}" for option in (name, needed))
            raise click.UsageError(f"{given} needs {wanted} beside it")
    if options["class_data"] is not None and options["class_count"] is not None:
        raise click.UsageError("--class-count is of pictures that the model draws, and --class-data has some: name one")
