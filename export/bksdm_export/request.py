"""What to export, and the checkpoint that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bksdm import checkpoint as checkpoints
from bksdm import lora
from bksdm.checkpoint import Checkpoint
from bksdm_export.errors import ExportError
from bksdm_export.graphs import DEPTHS, INT8_ERROR, LARGEST_DOWNSAMPLING, PRECISIONS
from bksdm_export.storage import round_weights
from bksdm_export.token_downsampling import downsample_tokens
from bksdm_export.verify import TOLERANCES


@dataclass(frozen=True)
class ExportRequest:
    """What to export and how; weights, unet, revision, allow_pickle and seed as bksdm.checkpoint.load takes them.

    loras: files with the scale of each, merged in this order; lora_partial: as bksdm.lora.merge takes it.
    precision: of the graphs' arithmetic; storage: of the weights on disk, None for that of the arithmetic.
    step_cache: the U-Net gives its deep features, and a shallow one that takes them lies beside it.
    token_downsampling: keys and values of the outermost self-attentions come from every so many-th token; 1 is exact.
    int8_error: what int8 may change in the U-Net's output, see quantise; layers stay fp32 to keep to it. The decoder
    keeps to INT8_DECODER_SHARE of it. int8_like: an int8 bundle, or its parity.json, whose choice of layers is taken
    instead of measuring; what it does not have is measured.
    depth: of the verification, one of DEPTHS. gate: of so many pictures, see bksdm_export.gate; 0 for none.
    force: replace an older bundle at `output`; of a link, the one that it names. Raises ExportError for a choice that
    there is not.
    """

    output: Path
    variant: str | None = None
    weights: str | None = None
    unet: str | None = None
    revision: str | None = None
    allow_pickle: bool = False
    seed: int = 0
    loras: tuple[tuple[str, float], ...] = ()
    lora_partial: bool = False
    precision: str = "fp32"
    storage: str | None = None
    step_cache: bool = False
    token_downsampling: int = 1
    int8_error: float = INT8_ERROR
    int8_like: Path | None = None
    depth: str = "quick"
    gate: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        for name, found, choices in (
            ("precision", self.precision, PRECISIONS),
            ("storage", self.kind[1], PRECISIONS),
            ("verification depth", self.depth, DEPTHS),
        ):
            if found not in choices:
                raise ExportError(f"there is no {name} {found!r}: choose from {', '.join(choices)}")
        if not self.int8_error > 0:
            raise ExportError(f"an int8 error of {self.int8_error:g} cannot be kept to: take one above 0")
        if not 1 <= self.token_downsampling <= LARGEST_DOWNSAMPLING:
            raise ExportError(
                f"token downsampling is by 1 (none) to {LARGEST_DOWNSAMPLING}, not by {self.token_downsampling}"
            )
        precision, storage = self.kind
        if self.kind not in TOLERANCES:
            choices = ", ".join(f"{p} stored as {s}" for p, s in TOLERANCES)
            raise ExportError(f"precision {precision} stored as {storage} is not written: choose from {choices}")

    @property
    def kind(self) -> tuple[str, str]:
        """Precision and storage."""
        return self.precision, self.precision if self.storage is None else self.storage


def load(request: ExportRequest) -> Checkpoint:
    """The checkpoint that a request names, its LoRAs merged. Raises CheckpointError."""
    whole = checkpoints.load(
        request.weights,
        variant=request.variant,
        revision=request.revision,
        unet=request.unet,
        allow_pickle=request.allow_pickle,
        seed=request.seed,
    )
    for file, scale in request.loras:
        whole = lora.merge(whole, Path(file), scale, partial=request.lora_partial)
    return whole


def round_to(checkpoint: Checkpoint, storage: str) -> None:
    """Round a checkpoint's weights in place to what `storage` holds."""
    for model in (checkpoint.text_encoder, checkpoint.unet, checkpoint.vae):
        round_weights(model, storage)


def downsample(checkpoint: Checkpoint, factor: int) -> None:
    """Downsample the tokens of its U-Net in place, by 1 not at all. Raises ExportError: it has no such attention."""
    if factor > 1 and not downsample_tokens(checkpoint.unet, factor):
        raise ExportError("the model's outermost stages have no self-attention: leave out --token-downsampling")
