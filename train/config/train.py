"""The settings of a training run: one YAML file and ``key=value`` words in, one :class:`TrainConfig` out.

The keys are a contract with users' scripts. Nothing here imports torch. :meth:`TrainConfig.differences` says which
keys a resumed run may not change.

    python -m train fit --config configs/train/demo.yaml lr=5e-4 projector.stack=4
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from shards.config.base import Config, flatten
from shards.stream.sampler import Rules
from train.config.model import ContrastiveConfig, DistillConfig, LmConfig, MlpConfig, ProjectorConfig, PromptConfig

# Keys that leave the losses of a run alone: a resumed run may change them.
FREE_KEYS = frozenset(
    {
        "caches",  # a cache may be moved: the checkpoint compares manifest ids instead
        "extract",
        "runs",
        "name",
        "device",
        "eval_every",
        "eval_limit",
        "eval_batch",
        "decode_limit",
        "decode_samples",
        "max_new_tokens",
        "retrieval_limit",
        "checkpoint_every",
        "min_loss_drop",
        "trackers",
        "wandb_project",
    }
)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Strings = Annotated[list[str], BeforeValidator(_as_list)]
# a cache, or the caches of several layers of one corpus (train/data/layers.py)
Corpora = Annotated[list[str | Annotated[list[str], Field(min_length=2)]], BeforeValidator(_as_list)]


class ValConfig(Config):
    """Which utterances are held out.

    Rows that the extraction marked ``val`` are never trained on. ``caches`` names what is evaluated instead of them,
    whole caches; else ``fraction`` holds out further speakers until that part of each cache is held out.
    """

    caches: Corpora = Field(default_factory=list)  # whole caches to judge on, layers as in the run's
    fraction: float = Field(default=0.0, ge=0, lt=1)  # of each cache, by speaker where speakers are known
    limit: int | None = Field(default=None, ge=1)  # most utterances in a final evaluation; None: all held out
    seed: int = Field(
        default=0, ge=0
    )  # apart from the run's seed: runs that differ in seed are judged on the same utterances


class BatchConfig(Config):
    """How utterances form batches (``shards/stream/sampler.py``); ``size`` is 8 without it and ``max_frames``."""

    size: int | None = Field(default=None, ge=1)  # most utterances of a batch
    max_frames: int | None = Field(default=None, ge=1)  # padded frames of a batch
    window_shards: int = Field(default=8, ge=1)  # shards whose rows are mixed and grouped by length together
    # none: stored order; shard: order of shards; window: also rows within window_shards; global: all rows
    shuffle: Literal["none", "shard", "window", "global"] = "window"
    # of each cache: how often an epoch takes its rows (shards/stream/sampler.py); None: once
    weights: list[Annotated[float, Field(gt=0, le=1000)]] | None = None

    def rules(self) -> Rules:
        """The same as the stream's rules; no batch is dropped."""
        size = 8 if self.size is None and self.max_frames is None else self.size
        return Rules(
            batch_size=size,
            max_frames=self.max_frames,
            window_shards=self.window_shards,
            shuffle=self.shuffle,
            weights=None if self.weights is None else tuple(self.weights),
        )


class TrainConfig(Config):
    """Every key of ``python -m train fit``; see ``configs/train/`` for files."""

    # cache folders or glob patterns that match one complete cache each; a list in this list names layers of one corpus
    caches: Corpora = Field(min_length=1)
    # extraction configs that make the caches: one each in order, or all for any
    extract: Strings = Field(default_factory=list)
    filter: str | None = None  # train on the rows that pass: "duration < 20 and speaker != ''" (shards/read/filters.py)
    val: ValConfig = ValConfig()

    runs: str = "runs"  # folder under which run folders are made
    # None: the time and the projector's kind
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

    projector: ProjectorConfig = MlpConfig()
    normalise_layers: bool = False  # each of several layers to mean 0 and variance 1 before they are mixed
    lm: LmConfig = LmConfig()
    prompt: PromptConfig = PromptConfig()

    distill: DistillConfig = DistillConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()

    steps: int = Field(default=1000, ge=1)  # optimiser steps of the whole run
    lr: float = Field(default=1e-3, gt=0)  # highest learning rate
    min_lr: float = Field(default=0.0, ge=0)  # where cosine and linear end
    warmup: float = Field(default=0.03, ge=0)  # steps, or a fraction of ``steps`` when below 1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # of the learning rate after the warm-up
    weight_decay: float = Field(default=0.0, ge=0)  # of matrices alone: norms' gains and biases are not decayed
    betas: tuple[float, float] = (0.9, 0.99)  # of AdamW
    clip: float = Field(default=1.0, gt=0)  # largest norm of a step's gradient
    ema: float = Field(default=0.0, ge=0, lt=1)  # decay of a moving average of the weights, judged and kept; 0: none
    mask_frames: float = Field(default=0.0, ge=0, lt=1)  # part of the frames set to zero in training (0.1 works well)
    noise: float = Field(default=0.0, ge=0)  # Gaussian, in standard deviations of each channel, in training

    batch: BatchConfig = BatchConfig()
    accumulate: int = Field(default=1, ge=1)  # batches in a step; every target token of the step weighs the same
    seed: int = Field(default=0, ge=0)  # of the order of the data, the initialisation and dropout
    data_seed: int | None = Field(default=None, ge=0)  # of the order of the data alone; None: seed
    device: str = "auto"  # cpu, cuda, cuda:1 …; auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; weights that are trained are float32

    eval_every: int | None = Field(default=None, ge=0)  # steps; None: only at the end; 0: never, not even at the end
    # evaluations on the way without a lower held-out loss before the run ends; the best weights are kept
    patience: int | None = Field(default=None, ge=1)
    eval_limit: int | None = Field(default=64, ge=1)  # most utterances in an evaluation on the way
    eval_batch: int = Field(default=16, ge=1)  # utterances in a batch of an evaluation
    decode_limit: int = Field(default=200, ge=1)  # most utterances decoded for WER and CER in a final evaluation
    decode_samples: int = Field(default=4, ge=0)  # utterances decoded in an evaluation on the way
    max_new_tokens: int = Field(default=64, ge=1)  # of a decoded text
    retrieval_limit: int = Field(default=32, ge=0)  # utterances told apart in groups of 16 at the end; 0: none
    checkpoint_every: int | None = Field(default=500, ge=1)  # steps; None: only at the end
    # where figures go beside metrics.jsonl (train/runs/trackers.py)
    trackers: list[Literal["wandb", "tensorboard"]] = Field(default_factory=list)
    wandb_project: str | None = None  # None: nanochat-omni-audio for a nanochat LM, else earshard
    min_loss_drop: float | None = None  # first minus last training loss below this: the run fails (exit status 1)

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}: the rate falls from lr to min_lr")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup={self.warmup} is neither whole steps nor a fraction below 1")
        if self.patience is not None and not self.eval_every:
            raise ValueError("patience counts evaluations on the way: set eval_every to a number of steps")
        layers = {1 if isinstance(entry, str) else len(entry) for entry in [*self.caches, *self.val.caches]}
        if len(layers) > 1:
            found = " and ".join(map(str, sorted(layers)))
            raise ValueError(f"caches names {found} layers: name as many of each corpus")
        if self.normalise_layers and self.layers == 1:
            raise ValueError("normalise_layers=true needs layers to mix: write caches: [[…-L4-…, …-L6-…]]")
        if self.distill.weight and (self.lm.train or self.lm.lora):
            raise ValueError(
                "distill reads the transcript by a frozen LM: set distill.weight=0, or drop lm.train and lora"
            )
        if self.name == "latest":
            raise ValueError("name=latest is the link to the newest run: choose another name")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must lie in [0, 1)")
        return self

    @property
    def layers(self) -> int:
        """How many caches stand side by side in each corpus."""
        return 1 if isinstance(self.caches[0], str) else len(self.caches[0])

    @property
    def warmup_steps(self) -> int:
        """``warmup`` in steps."""
        return round(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    @property
    def order_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    def differences(self, other: TrainConfig) -> list[str]:
        """``key: mine, not theirs`` for each key that differs and changes the numbers of a run."""
        mine, theirs = flatten(self.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
        return [
            f"{key}: {mine.get(key)}, not {theirs.get(key)}"
            for key in sorted(mine.keys() | theirs.keys())
            if key.split(".")[0] not in FREE_KEYS and mine.get(key) != theirs.get(key)
        ]
