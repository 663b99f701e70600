"""`bksdm-export`: a checkpoint becomes a verified bundle. Table and path on stdout, progress on stderr."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from bksdm.variants import VARIANTS
from bksdm_export.build_cli import shown
from bksdm_export.build_cli import table as engines_table
from bksdm_export.graphs import DEPTHS, INT8_ERROR, LARGEST_DOWNSAMPLING, PRECISIONS, STORAGES
from bksdm_runtime.command import run as run_command
from bksdm_runtime.command import version_option

_PROGRAM = "bksdm-export"
_DEFAULT_VARIANT = "small"
TARGETS = ("onnx", "tensorrt", "triton")
_WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".pkl")
_LORA_FILE = "pytorch_lora_weights.safetensors"  # bksdm.lora.FILE, which needs torch
# What the export extra brings.
_EXTRA = ("torch", "diffusers", "transformers", "safetensors", "onnx", "onnxscript", "onnx_ir", "onnxruntime")
_EXTRA_INT8 = "nncf"


@click.command(context_settings={"max_content_width": 110})
@click.option(
    "--variant",
    type=click.Choice(tuple(VARIANTS)),
    help=f"Which model.  [default: {_DEFAULT_VARIANT}, or what --weights is]",
)
@click.option(
    "--weights",
    metavar="WEIGHTS",
    help="A diffusers folder, a .safetensors file, 'demo' or 'random'.  [default: the variant's own, from the Hub]",
)
@click.option("--unet", metavar="DIR", help="A trained U-Net to lay over the weights.")
@click.option(
    "--lora", "loras", metavar="FILE", multiple=True, help="A LoRA to merge, or its folder; again for more, in order."
)
@click.option(
    "--lora-scale", "scales", metavar="SCALE", type=float, multiple=True, help="Of each --lora, in order.  [default: 1]"
)
@click.option("--lora-partial", is_flag=True, help="Merge what fits of a LoRA for the full model.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit on the Hub.")
@click.option("--allow-pickle", is_flag=True, help="Read .bin and .ckpt files too (weights only).")
@click.option("--seed", type=click.IntRange(min=0), help="Of --weights random.  [default: 0]")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Of the arithmetic: fp32 or int8 for a CPU, fp16 for a GPU.  [default: fp32; for --target tensorrt fp16]",
)
@click.option(
    "--storage",
    type=click.Choice(STORAGES),
    help="Of the weights on disk; fp16 halves an fp32 bundle, int8 quarters it.  [default: as --precision]",
)
@click.option(
    "--int8-error",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SHARE",
    help=f"What int8 may change in the U-Net's output; less leaves more layers in fp32.  [default: {INT8_ERROR:g}]",
)
@click.option(
    "--int8-like",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="An int8 bundle of the model or its base, or its parity.json: leave the same layers in fp32, unmeasured.",
)
@click.option("--step-cache", is_flag=True, help="Write what bksdm-run --cache-interval needs, too.")
@click.option(
    "--token-downsampling",
    type=click.IntRange(1, LARGEST_DOWNSAMPLING),
    default=1,
    metavar="N",
    help="Let the outermost self-attentions see every N-th token only: faster, not exact.  [default: 1, all of them]",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="onnx",
    show_default=True,
    help="tensorrt: an fp16 bundle, and engines of it for the GPU here, as bksdm-build makes them. "
    "triton: a bundle, and beside it a model repository that serves it, as bksdm-triton writes one.",
)
@click.option(
    "--verify",
    "depth",
    type=click.Choice(DEPTHS),
    default="quick",
    show_default=True,
    help="How many pictures and steps are compared with PyTorch.",
)
@click.option(
    "--gate",
    type=click.IntRange(2, 4096),
    metavar="N",
    help="Draw N pictures by PyTorch and by the bundle, and fail where bksdm-eval compare would.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The bundle's folder; of a link, what it names.  [default: out/ and the model's name, as out/bk-sdm-small]",
)
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
@version_option(_PROGRAM)
def command(
    variant: str | None,
    weights: str | None,
    unet: str | None,
    loras: tuple[str, ...],
    scales: tuple[float, ...],
    lora_partial: bool,
    revision: str | None,
    allow_pickle: bool,
    seed: int | None,
    precision: str | None,
    storage: str | None,
    int8_error: float | None,
    int8_like: Path | None,
    step_cache: bool,
    token_downsampling: int,
    target: str,
    depth: str,
    gate: int | None,
    output: Path | None,
    force: bool,
    verbose: bool,
) -> int:
    """Export a Stable Diffusion checkpoint as a bundle of ONNX graphs, each compared with PyTorch.

    \b
    bksdm-export --variant small
    bksdm-export --variant tiny --precision fp16 -o out/tiny-fp16
    bksdm-export --weights my-checkpoint/ --unet runs/student/unet
    bksdm-export --variant small --lora runs/dog --lora-scale 0.8
    """
    if precision is None:
        precision = "fp16" if target == "tensorrt" else "fp32"
    if target == "tensorrt" and precision != "fp16":
        raise click.UsageError(f"--target tensorrt is for --precision fp16, and this is {precision}: leave it out")
    if seed is not None and weights != "random":
        raise click.UsageError("--seed draws the weights of --weights random, and these are not drawn: leave it out")
    if revision is not None and weights is not None:
        raise click.UsageError(f"--revision names a commit on the Hub, and {weights} is not from there: leave it out")
    if int8_error is not None and precision != "int8":
        raise click.UsageError(f"--int8-error is of --precision int8, and this is {precision}: leave it out")
    if int8_like is not None and precision != "int8":
        raise click.UsageError(f"--int8-like is of --precision int8, and this is {precision}: leave it out")
    if int8_like is not None and int8_error is not None:
        raise click.UsageError("--int8-like takes another's choice and --int8-error makes one: leave one of them out")
    if scales and len(scales) != len(loras):
        raise click.UsageError(
            f"{len(loras)} --lora and {len(scales)} --lora-scale: give every file its scale, in the same order, or none"
        )
    merged = tuple(zip(loras, scales or [1.0] * len(loras), strict=True))
    _log_to_stderr(verbose)
    # At its import diffusers reports which of several optimum distributions it picked: nothing for our users.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    started = time.perf_counter()

    def progress(stage: str) -> None:
        click.echo(f"[{time.perf_counter() - started:6.1f} s] {stage}", err=True)

    progress("importing PyTorch")  # here and not above: --help must work whatever is installed
    try:
        import onnxruntime  # noqa: F401 - opened late, but a missing one should be told early

        from bksdm.errors import CheckpointError
        from bksdm_export.errors import ExportError
        from bksdm_export.recipe import export_variant
        from bksdm_export.report import table
        from bksdm_export.request import ExportRequest
        from bksdm_export.tensorrt_versions import MissingLibrary
        from bksdm_export.to_tensorrt import BuildRequest, build_engines, can_build
        from bksdm_export.triton_repository import RepositoryRequest, check_repository, write_repository
        from bksdm_runtime.bundle import BundleError
        from bksdm_runtime.engine import EngineError

        if precision == "int8":
            import nncf  # noqa: F401 - as above
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name == _EXTRA_INT8:
            click.echo(f"{_PROGRAM}: --precision int8 needs {name}: pip install 'bksdm[int8]'", err=True)
            return 2
        if name not in _EXTRA:
            raise
        click.echo(f"{_PROGRAM}: needs {name}: pip install 'bksdm[export]'", err=True)
        return 2

    if variant is None and weights is None:
        variant = _DEFAULT_VARIANT
    if output is None:
        output = default_output(
            variant,
            weights,
            unet=unet,
            loras=merged,
            revision=revision,
            seed=seed,
            precision=precision,
            storage=storage,
            int8_error=int8_error,
            int8_like=int8_like,
            step_cache=step_cache,
            token_downsampling=token_downsampling,
        )
    try:
        if target == "tensorrt":
            can_build()  # told before minutes have passed
        if target == "triton":
            check_repository(_repository(output), force=force)
        request = ExportRequest(
            output=output,
            variant=variant,
            weights=weights,
            unet=unet,
            loras=merged,
            lora_partial=lora_partial,
            revision=revision,
            allow_pickle=allow_pickle,
            seed=0 if seed is None else seed,
            precision=precision,
            storage=storage,
            int8_error=INT8_ERROR if int8_error is None else int8_error,
            int8_like=int8_like,
            step_cache=step_cache,
            token_downsampling=token_downsampling,
            depth=depth,
            gate=gate or 0,
            force=force,
        )
        folder = export_variant(request, progress)
    except MissingLibrary as error:
        click.echo(f"{_PROGRAM}: --target tensorrt {error}", err=True)
        return 2
    except (ExportError, CheckpointError) as error:
        click.echo(f"{_PROGRAM}: {error}", err=True)
        return 1
    if target == "tensorrt":
        try:
            with shown() as built_so_far:
                built = build_engines(BuildRequest(folder), built_so_far)
        except (ExportError, BundleError) as error:
            click.echo(f"{_PROGRAM}: {error} (the bundle is whole: go on with bksdm-build {folder})", err=True)
            return 1
        click.echo(engines_table(built), err=True)
    if target == "triton":
        try:
            write_repository(RepositoryRequest(folder, _repository(output), force=force), progress)
        except (ExportError, BundleError, EngineError) as error:
            click.echo(f"{_PROGRAM}: {error} (the bundle is whole: go on with bksdm-triton {folder})", err=True)
            return 1
    click.echo(table(folder))
    click.echo(str(folder))
    if target == "triton":
        click.echo(str(_repository(output)))
    return 0


def default_output(
    variant: str | None,
    weights: str | None,
    *,
    unet: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
    revision: str | None = None,
    seed: int | None = None,
    precision: str = "fp32",
    storage: str | None = None,
    int8_error: float | None = None,
    int8_like: Path | None = None,
    step_cache: bool = False,
    token_downsampling: int = 1,
) -> Path:
    """out/ and the model's own name, with all that was asked of it and makes it another model.

    The name is the last part of the Hub's, of the folder's or of the file's, as out/bk-sdm-small, out/my-student-fp16,
    out/bk-sdm-tiny@v2-unet-my-student-stored-fp16.
    """
    if weights in (None, "random"):
        name = VARIANTS[variant or _DEFAULT_VARIANT].hub.rpartition("/")[2]
    else:
        name = _name(weights)
    if weights == "random":
        name += "-random"
    if seed is not None:
        name += f"-seed{seed}"
    if revision is not None:
        name += f"@{revision.replace('/', '-')}"
    if unet is not None:
        name += f"-unet-{_name(unet)}"
    for file, scale in loras:
        name += f"-lora-{_name(file)}" + ("" if scale == 1 else f"@{scale:g}")
    if precision != "fp32":
        name += f"-{precision}"
    if int8_error is not None:
        name += f"@{int8_error:g}"
    if int8_like is not None:
        name += f"-like-{_name(str(int8_like.parent if int8_like.suffix == '.json' else int8_like))}"
    if storage not in (None, precision):
        name += f"-stored-{storage}"
    if step_cache:
        name += "-step-cache"
    if token_downsampling > 1:
        name += f"-tokens-by-{token_downsampling}"
    return Path("out") / name


def _repository(output: Path) -> Path:
    """The folder of --target triton's repository, beside the bundle's."""
    # abspath: of "." the name is that of the folder you are in.
    return output.parent / f"{output.name}-triton" if output.name else Path(f"{os.path.abspath(output)}-triton")  # noqa: PTH100


def _name(path: str) -> str:
    """The last name in the path of weights that says something, without a file's suffix."""
    # abspath, for "." and ".." have no name; and not resolve: links in the Hub's cache lead to files named by a hash.
    absolute = Path(os.path.abspath(path))  # noqa: PTH100
    if absolute.name == _LORA_FILE:
        absolute = absolute.parent
    if absolute.suffix in _WEIGHT_SUFFIXES:
        return absolute.stem
    if absolute.name == "unet":  # of a whole checkpoint
        absolute = absolute.parent
    return absolute.name or "model"


def _log_to_stderr(verbose: bool) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format=f"{_PROGRAM}: %(message)s")


def run(arguments: Sequence[str] | None = None) -> int:
    """The command as a function, from arguments (None: the process's own) to its exit code."""
    return run_command(command, _PROGRAM, arguments)


def main() -> None:
    sys.exit(run())
