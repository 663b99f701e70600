"""How a student is distilled or fine-tuned, and what a demo teacher is and how it is trained: frozen settings,
validated once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from bksdm_training.losses import LossWeights


@dataclass(frozen=True)
class LoopConfig:
    """One training loop. batch_size: pictures of one optimizer step, over all processes and accumulated parts.
    Learning rate: linear warm-up, constant, then linear to zero over the last `decay_share`
    (warm-up - stable - decay, arXiv 2405.18392), so that a run can be prolonged by raising `steps` alone until it has
    begun to decay."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    decay_share: float = 0.25
    weight_decay: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0
    ema_decay: float = 0.999
    checkpoint_every: int = 250
    keep: int = 2  # states on disk
    seed: int = 1234
    bf16: bool = False  # this loop alone; otherwise as accelerate is configured
    accumulate: int = 1  # parts of a step
    fused: bool = False  # AdamW as one kernel

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.checkpoint_every < 1:
            raise ValueError("steps, batch_size and checkpoint_every must be at least 1")
        if self.learning_rate < 0 or self.weight_decay < 0 or self.clip <= 0:
            raise ValueError("learning_rate and weight_decay are 0 or more, clip is more than 0")
        if not 0 <= self.decay_share <= 1 or not 0 <= self.ema_decay < 1:
            raise ValueError("decay_share must lie in [0, 1] and ema_decay in [0, 1)")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 1..steps."""
        decay = round(self.steps * self.decay_share)
        rate = min(1.0, step / max(1, self.warmup))
        if decay and step > self.steps - decay:
            rate = min(rate, (self.steps - step + 1) / (decay + 1))
        return self.learning_rate * rate


@dataclass(frozen=True)
class TeacherConfig:
    """A narrow Stable Diffusion v1: the stage pattern of SD v1.4 at a width that trains from scratch on a CPU.

    The two innermost stages are equally wide, as in Stable Diffusion: block removal for tiny joins the outer of them to
    what the inner one joined. Four attention heads, not eight:
    at these widths eight would leave 4 channels a head, which CPU attention kernels run three times slower."""

    size: int = 128  # px, square
    unet_channels: tuple[int, ...] = (32, 96, 160, 160)
    unet_heads: int = 4
    unet_groups: int = 16
    text_width: int = 64
    text_layers: int = 4
    text_heads: int = 4
    vae_channels: tuple[int, ...] = (32, 64, 96, 96)
    vae_layers: int = 1
    vae_groups: int = 8
    crop: int = 64  # px; the autoencoder sees crops, and whole pictures over its last `whole_share` of steps
    whole_share: float = 0.15
    lpips_weight: float = 0.5
    kl_weight: float = 5e-4
    caption_dropout: float = 0.1
    # Learning rate factor of the token table. A row is trained only when its word comes up, once in dozens of steps;
    # without this the contexts of "a red apple" and "a green apple" were 0.97 alike after 60 epochs.
    embedding_rate: float = 10.0
    snr_gamma: float = 5.0  # bound of the loss weight, see denoiser.loss_weights
    # What the finished model is to be sampled with. One of the preset "cpu", top-1 of 200 training captions: 52.5 % at
    # 1, 67.5 % at 1.5, 69.0 % at 2 and 3, 28.5 % at 7.5.
    guidance_scale: float = 2.0
    vae: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=5500, batch_size=8, learning_rate=1e-3, warmup=50, ema_decay=0.995, bf16=True
        )
    )
    unet: LoopConfig = field(default_factory=lambda: LoopConfig(steps=7000, batch_size=16, learning_rate=8e-4))

    def __post_init__(self) -> None:
        if self.size % 64:
            raise ValueError(f"size must be a multiple of 64 px (three halvings of 8 px latents), not {self.size}")


PRESETS = {
    # 17.4 M parameters. One CPU core: 5,500 steps of the autoencoder in 25 minutes, 7,000 of the denoiser in 78,
    # measured. Its innermost stages differ in width: base and small can be cut from it, tiny cannot.
    "cpu": TeacherConfig(unet_channels=(32, 96, 128, 160)),
    # A teacher for the whole family, on one CPU core. The one that ships (checkpoints/demo-teacher) went on from one of
    # the preset above for 4,500 steps instead of beginning anew.
    "family": TeacherConfig(
        unet=LoopConfig(steps=12_000, batch_size=16, learning_rate=8e-4, fused=True),
    ),
    # One GPU. Not run to its end: an H100 took 0.19 s a step of 128, as of 64 or 16 (0.17, 0.19), since starting the
    # kernels takes longer than they run. That is two hours for the denoiser.
    "cuda": TeacherConfig(
        size=256,
        crop=128,
        vae=LoopConfig(steps=20_000, batch_size=64, learning_rate=6e-4, ema_decay=0.999, bf16=True),
        unet=LoopConfig(
            steps=40_000, batch_size=128, learning_rate=6e-4, ema_decay=0.9995, checkpoint_every=1000, bf16=True
        ),
    ),
}


def with_changes(
    config: TeacherConfig, vae_steps: int | None = None, unet_steps: int | None = None, batch_size: int | None = None
) -> TeacherConfig:
    """The same settings with other run lengths, or another batch size of the U-Net."""
    if vae_steps is not None:
        config = replace(config, vae=replace(config.vae, steps=vae_steps))
    if unet_steps is not None:
        config = replace(config, unet=replace(config.unet, steps=unet_steps))
    if batch_size is not None:
        config = replace(config, unet=replace(config.unet, batch_size=batch_size))
    return config


def _largest_part(share: int, most: int = 64) -> int:
    return max((part for part in range(1, min(share, most) + 1) if share % part == 0), default=1)


@dataclass(frozen=True)
class RunConfig:
    """What every run on captioned pictures is told.

    size: px, square. micro_batch: pictures that one process takes at a time; None takes up to 64, the published
    run's.
    skip_limit: share of unusable examples that is borne. shown: pictures in the grid of a checkpoint; 0 draws none."""

    loop: LoopConfig
    size: int = 512
    flip: bool = True
    caption_dropout: float = 0.0
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    workers: int = 0
    skip_limit: float = 0.01
    shown: int = 4

    def __post_init__(self) -> None:
        if self.size < 64 or self.size % 8:
            raise ValueError(f"size must be a multiple of 8 px, 64 or more, not {self.size}")
        if not 0 <= self.caption_dropout <= 1 or not 0 <= self.skip_limit <= 1:
            raise ValueError("caption_dropout and skip_limit are shares, 0 to 1")

    def parts(self, processes: int) -> int:
        """How often each process accumulates before a step. Raises ValueError when the batch cannot be dealt out."""
        batch = self.loop.batch_size
        micro = self.micro_batch or _largest_part(batch // processes)
        if batch % (micro * processes):
            raise ValueError(
                f"a batch of {batch} cannot be dealt out to {processes} process(es) in parts of {micro}: "
                f"take a batch size that is a multiple of {micro * processes}"
            )
        return batch // (micro * processes)


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """One distillation. The defaults are those of BK-SDM's published run (its repository; paper, section 4.1).

    start: "teacher" copies the weights that block removal keeps, "random" draws new ones. compiled: repeated blocks of
    both U-Nets through torch.compile; with gradient checkpointing the teacher's alone."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=50_000,
            batch_size=256,
            learning_rate=5e-5,
            warmup=0,
            decay_share=0.0,
            ema_decay=0.9999,
            checkpoint_every=5000,
        )
    )
    weights: LossWeights = field(default_factory=LossWeights)
    start: str = "teacher"
    compiled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("teacher", "random"):
            raise ValueError(f"start is teacher or random, not {self.start!r}")


@dataclass(frozen=True)
class AdaptConfig(RunConfig):
    """One fine-tuning by low-rank adapters.

    text_encoder: adapt it too. prior_weight: of the loss on class pictures (DreamBooth's prior preservation, arXiv
    2208.12242), which are half of every batch; None where there are none."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=1000, batch_size=4, learning_rate=1e-4, warmup=0, decay_share=0.0, checkpoint_every=250
        )
    )
    rank: int = 8
    alpha: float = 8.0
    text_encoder: bool = False
    prior_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.prior_weight is not None and self.loop.batch_size % 2:
            raise ValueError(
                f"a batch of {self.loop.batch_size} has no halves for instance and class pictures: take an even one"
            )
