"""Configuration of a training run: one YAML file and ``key=value`` overrides become one :class:`TrainConfig`.

The keys are a stable interface for users' scripts. This module does not import torch. :meth:`TrainConfig.differences`
lists the changed keys that a resumed run does not allow.

    python -m train fit --config configs/train/demo.yaml lr=5e-4 projector.stack=4
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from shards.config.base import Config, flatten
from shards.stream.sampler import SamplerConfig, Weight
from train.config.model import (
    AugmentConfig,
    ContrastiveConfig,
    CtcConfig,
    DecodeConfig,
    DistillConfig,
    LmConfig,
    MlpConfig,
    PretrainConfig,
    ProjectorConfig,
    PromptConfig,
    TextConfig,
)

CTC = "ctc:"  # of lm.model: stage 1, see train/model/ctc.py
STAGE_ONE = "pretrain"  # name of its run folder, in that of the run

# Keys that do not affect the losses of a run: a resumed run may change them.
CHANGEABLE_KEYS = frozenset(
    {
        "caches",  # a cache may move: checkpoints compare manifest ids instead
        "max_label_problems",
        "max_lossy_texts",
        "extract",
        "runs",
        "name",
        "device",
        "eval",
        "eval_every",
        "eval_limit",
        "eval_batch_size",
        "decode_limit",
        "decode_samples",
        "max_new_tokens",
        "decode",
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
# each entry is a cache, or the caches of several layers of one corpus (train/data/layers.py)
Corpora = Annotated[list[str | Annotated[list[str], Field(min_length=2)]], BeforeValidator(_as_list)]


# those of all caches, or one entry per cache
Labels = str | list[str] | None


def _per_cache(labels: Labels, caches: Sequence[Any]) -> Sequence[str | None]:
    return labels if isinstance(labels, list) else [labels] * len(caches)


class ValConfig(Config):
    """The held-out utterances.

    Rows that the extraction marked `val` are never trained on. Evaluation uses them and those of `fraction`, or, if
    `caches` is set, all of `caches`.
    """

    caches: Corpora = Field(default_factory=list)
    """Caches to evaluate on instead of held-out rows. They need as many layers as the run's caches."""
    labels: Labels = None
    """Labels of `caches`, like the key `labels` of a run."""
    fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of each cache to hold out. If speakers are known, whole speakers are held out."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum number of utterances in the final evaluation. null: all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of speakers. It is separate from the run's seed, so that runs with different seeds are
    evaluated on the same utterances."""

    @property
    def cache_labels(self) -> Sequence[str | None]:
        """The labels of each of ``caches``."""
        return _per_cache(self.labels, self.caches)


class EvalKeys(Config):
    """How decoded texts are scored."""

    language: str | None = Field(default=None, pattern=r"^[A-Za-z][A-Za-z0-9 _-]*$")
    """Language of the texts whose labels have no `language`, such as `hi` or `Hindi`. English is scored with Whisper's
    English normalizer; others keep their marks, and those written without spaces, such as Chinese, have no WER. null:
    English if nearly all letters of the texts are ASCII."""


class BatchConfig(Config):
    """How utterances form batches (`shards/stream/sampler.py`). `size` defaults to 8 unless `max_frames` is set."""

    size: int | None = Field(default=None, ge=1)
    """Maximum number of utterances in a batch, over all processes."""
    max_frames: int | None = Field(default=None, ge=1)
    """Maximum number of frames in a batch, padding included."""
    window_shards: int = Field(default=8, ge=1)
    """Shards that are shuffled and sorted by length together. More shards mix better and need less padding; fewer make
    disk reads more local."""
    shuffle: Literal["none", "shard", "window", "global"] = "window"
    """none: stored order. shard: shuffle the shards. window: also shuffle the rows within `window_shards` shards.
    global: shuffle all rows."""
    weights: list[Weight] | dict[str, Weight] | None = None
    """How often an epoch visits the rows of each cache, or of each task: `{transcribe: 1, count: 0.25}`. 0.25: a
    different quarter in each epoch. null: once. The column `weight` of the labels multiplies it."""

    def sampler_config(self) -> SamplerConfig:
        """Return these keys as the sampler's configuration; no batch is dropped."""
        size = 8 if self.size is None and self.max_frames is None else self.size
        return SamplerConfig(
            batch_size=size,
            max_frames=self.max_frames,
            window_shards=self.window_shards,
            shuffle=self.shuffle,
            weights=tuple(self.weights) if isinstance(self.weights, list) else self.weights,
        )


class TrainConfig(Config):
    """All keys of ``python -m train fit``; see ``configs/train/`` for examples."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "accumulate": "gradient_accumulation_steps",
        "clip": "max_grad_norm",
        "ema": "ema_decay",
        "eval_batch": "eval_batch_size",
        "mask_frames": "frame_mask_prob",
        "noise": "noise_std",
    }

    caches: Corpora = Field(min_length=1)
    """Caches to train on: folders, URLs, or glob patterns that each match one complete cache. A name without a slash
    that is no folder is a corpus: `clips` means `caches/clips/*`. An inner list names the caches of several layers of
    one corpus."""
    labels: Labels = None
    """Label set of the caches: a name, or a file or URL of CSV, TSV, JSON lines or parquet; a list for one per cache.
    null: the newest labels of the source."""
    max_label_problems: float = Field(default=0.01, ge=0)
    """Rows of a label file that may have no features, no text, or the key, task and prompt of another row. Below 1: a
    fraction of the rows."""
    max_lossy_texts: float = Field(default=0.01, ge=0)
    """Training texts that the LM's tokenizer cannot write, such as those of a script that it lacks. Below 1: a fraction
    of the texts."""
    extract: Strings = Field(default_factory=list)
    """Extraction configs that create the caches: one for each cache in the same order, or one for all."""
    filter: str | None = None
    """Train on rows that match, such as `duration < 20 and speaker != ''` (`shards/read/filters.py`). null: all."""
    val: ValConfig = ValConfig()

    runs: str = "runs"
    """Folder in which run folders are created."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run folder. null: the time and the projector's kind."""

    projector: ProjectorConfig = MlpConfig()
    normalise_layers: bool = False
    """Scale each layer to mean 0 and variance 1 before the layers are mixed."""
    code_dim: int = Field(default=512, ge=1)
    """Width of the learned embeddings in front of the projector, for caches of codes (Mimi, EnCodec, DAC)."""
    lm: LmConfig = LmConfig()
    prompt: PromptConfig = PromptConfig()
    text: TextConfig = TextConfig()

    distill: DistillConfig = DistillConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    ctc: CtcConfig = CtcConfig()

    pretrain: PretrainConfig = PretrainConfig()

    steps: int = Field(default=1000, ge=1)
    """Number of optimizer steps."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    min_lr: float = Field(default=0.0, ge=0)
    """Final learning rate of the cosine and linear schedules."""
    warmup: float = Field(default=0.03, ge=0)
    """Linear warmup of the learning rate: below 1 a fraction of `steps`, otherwise a number of steps."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after the warmup."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW. It applies to matrices, not to norms and biases."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Betas of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Maximum norm of the gradients, which are clipped to it."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which is evaluated and saved in their place. 0: off."""
    frame_mask_prob: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which each frame is set to zero in training. 0.1 works well."""
    noise_std: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise on features in training, relative to that of each channel."""
    augment: AugmentConfig = AugmentConfig()
    variants: int | None = Field(default=None, ge=1)
    """Versions of an utterance that an epoch reads one of, where a cache has variants (`augment` of an extraction).
    null: all that are there; 1: the untouched recordings only. Held-out utterances are always untouched."""

    batch: BatchConfig = BatchConfig()
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches per optimizer step. Every target token of a step has the same weight."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, of dropout, and of the data order unless `data_seed` is set."""
    data_seed: int | None = Field(default=None, ge=0)
    """Seed of the data order. null: `seed`."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1` … auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of activations. auto: bfloat16 if the device computes it natively. Trained weights are always float32."""

    eval_every: int | None = Field(default=None, ge=0)
    """Steps between evaluations. null: evaluate only at the end. 0: never evaluate."""
    patience: int | None = Field(default=None, ge=1)
    """Early stopping: stop after this many evaluations without a lower held-out loss, and keep the best weights. null:
    off."""
    eval_limit: int | None = Field(default=64, ge=1)
    """Maximum number of utterances in an evaluation during training. null: all."""
    eval_batch_size: int = Field(default=16, ge=1)
    """Utterances per evaluation batch."""
    decode_limit: int = Field(default=200, ge=1)
    """Maximum number of utterances decoded for WER and CER in the final evaluation."""
    decode_samples: int = Field(default=4, ge=0)
    """Number of utterances decoded in an evaluation during training."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Maximum number of generated tokens per utterance."""
    decode: DecodeConfig = DecodeConfig()
    eval: EvalKeys = EvalKeys()
    retrieval_limit: int = Field(default=32, ge=0)
    """Number of utterances in the final retrieval test, which matches audio to text in groups of 16. 0: off."""
    checkpoint_every: int | None = Field(default=500, ge=1)
    """Steps between checkpoints. null: only at the end."""
    trackers: list[Literal["wandb", "tensorboard", "mlflow", "trackio"]] = Field(default_factory=list)
    """Experiment trackers that receive the metrics in addition to `metrics.jsonl`."""
    wandb_project: str | None = None
    """wandb project. null: `nanochat-omni-audio` for a nanochat LM, else `earshard`."""
    min_loss_drop: float | None = None
    """The run fails (exit status 1) if the training loss falls by less than this from the first step to the last. null:
    off."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}: the rate decays from lr to min_lr")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup={self.warmup} is neither a whole number of steps nor a fraction below 1")
        if self.patience is not None and not self.eval_every:
            raise ValueError("patience counts evaluations during training: set eval_every to a number of steps")
        if self.decode.ctc_weight and not (self.ctc.weight or self.projector.kind == "posterior"):
            raise ValueError("decode.ctc_weight needs a CTC head: set ctc.weight, or projector.kind=posterior")
        judged = self.decode.ctc_weight and self.decode.spelling_weight
        if judged and not getattr(self.projector, "spelling", 0):
            raise ValueError(
                "decode.spelling_weight needs a head over bytes: set it to 0, or projector.kind=posterior, with "
                "projector.spelling above 0"
            )
        layers = {1 if isinstance(entry, str) else len(entry) for entry in [*self.caches, *self.val.caches]}
        if len(layers) > 1:
            found = " and ".join(map(str, sorted(layers)))
            raise ValueError(f"caches has entries of {found} layers: list the same number of layers for each corpus")
        for name, part in (("labels", self), ("val.labels", self.val)):
            if len(part.cache_labels) != len(part.caches):
                raise ValueError(
                    f"{name} has {len(part.cache_labels)} entries for {len(part.caches)} caches: list one for each "
                    "cache, or give one for all"
                )
        if self.normalise_layers and self.layers == 1:
            raise ValueError("normalise_layers=true needs several layers: set caches=[[…-L4-…, …-L6-…]]")
        if self.distill.weight and (self.lm.train or self.lm.lora):
            raise ValueError("distill needs a frozen LM: set distill.weight=0, or remove lm.train and lm.lora")
        if self.is_stage_one and (self.is_pretrained or self.distill.weight or self.contrastive.weight):
            raise ValueError(f"lm.model={self.lm.model} is stage 1: remove pretrain, distill and contrastive")
        if self.pretrain.steps and self.pretrain.start:
            raise ValueError("pretrain.start uses the stage 1 of another run: set pretrain.steps=0")
        if self.pretrain.patience is not None and not self.pretrain.eval_every:
            raise ValueError("pretrain.patience counts evaluations: set pretrain.eval_every to a number of steps")
        if self.name == "latest":
            raise ValueError("name=latest is reserved for the link to the newest run: choose another name")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must lie in [0, 1)")
        return self

    @property
    def cache_labels(self) -> Sequence[str | None]:
        """The labels of each of ``caches``."""
        return _per_cache(self.labels, self.caches)

    @property
    def is_stage_one(self) -> bool:
        """Whether this is stage 1, which has a CTC head instead of a language model."""
        return self.lm.model.startswith(CTC)

    @property
    def is_pretrained(self) -> bool:
        """Whether the projector starts from a stage 1."""
        return bool(self.pretrain.steps or self.pretrain.start)

    def stage_one(self, run: str) -> TrainConfig:
        """Return the settings of stage 1 of the run in the folder ``run``."""
        own = self.pretrain
        lm = LmConfig(model=f"{CTC}{self.lm.model}")
        same = {name: getattr(own, name) for name in _STAGE_ONE_KEYS}
        return TrainConfig.model_construct(
            **{name: getattr(self, name) for name in TrainConfig.model_fields if name not in _RESET_KEYS}
            | same
            | {"lm": lm, "runs": run, "name": STAGE_ONE, "retrieval_limit": 0, "eval_limit": None}
            | {"decode_samples": self.decode_limit}  # free: the likeliest path
            | {"pretrain": PretrainConfig(negatives=own.negatives), "min_lr": 0.0, "schedule": "cosine"}
        )

    @property
    def layers(self) -> int:
        """Number of layers of each corpus; each layer has a separate cache."""
        return 1 if isinstance(self.caches[0], str) else len(self.caches[0])

    @property
    def warmup_steps(self) -> int:
        """Length of the warmup in steps."""
        return round(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    @property
    def order_seed(self) -> int:
        """Seed of the data order."""
        return self.seed if self.data_seed is None else self.data_seed

    def differences(self, other: TrainConfig) -> list[str]:
        """Return ``key: mine, not theirs`` for each key that differs and affects the losses of a run."""
        mine, theirs = flatten(self.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
        return [
            f"{key}: {mine.get(key)}, not {theirs.get(key)}"
            for key in sorted(mine.keys() | theirs.keys())
            if key.split(".")[0] not in CHANGEABLE_KEYS and mine.get(key) != theirs.get(key)
            # a file of labels may move: checkpoints compare label ids instead
            if key not in ("labels", "val.labels") or not (_is_file(mine.get(key)) and _is_file(theirs.get(key)))
        ]


# of stage 1: those of the block ``pretrain``, and those that are the defaults whatever the run has
_STAGE_ONE_KEYS = (
    *("steps", "lr", "warmup", "weight_decay", "ema_decay", "frame_mask_prob", "noise_std", "augment"),
    *("eval_every", "patience"),
)
_RESET_KEYS = frozenset(
    {"prompt", "distill", "contrastive", "ctc", "decode", "gradient_accumulation_steps", "min_loss_drop"}
)


def _is_file(labels: Any) -> bool:
    from shards.read.labels import is_label_file  # pyarrow is not needed by --help

    return isinstance(labels, str) and is_label_file(labels)
