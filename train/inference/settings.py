"""``config.json`` of an export, and the names of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from shards import files as disk
from shards.config.base import Config, validate_config
from shards.errors import UserError
from train.config.model import DecodeConfig, LmConfig, ProjectorConfig, PromptConfig
from train.model.ctc import MAX_TOKENS

FORMAT = 1
WEIGHTS, SETTINGS, MODEL_CARD, LM_WEIGHTS = "projector.safetensors", "config.json", "README.md", "lm.safetensors"
TASK = "automatic-speech-recognition"  # of transformers


class InferenceConfig(Config):
    """What ``transcribe`` needs of a run's settings besides those of the model."""

    dtype: str
    max_new_tokens: int
    decode: DecodeConfig
    order_seed: int
    val_seed: int


class ExportConfig(Config):
    """``config.json`` of an export: everything that ``train.load_projector`` or another program needs."""

    format: int
    projector: ProjectorConfig
    source: str = ""  # module:Class in the package; exports of earlier versions have no package
    layers: int
    normalise_layers: bool
    channels: int  # per layer; of codes, the number of codebooks
    code_dim: int = 0  # width of the embeddings of codes; 0: the features are floats
    width: int  # of a soft token
    embedding_rms: float = 1.0  # RMS of the LM's embeddings
    lm: LmConfig
    lm_identity: str
    prompt: PromptConfig
    instructions: dict[str, list[str]] = Field(
        default_factory=dict
    )  # by task, the content of the file prompt.prompts; "": all tasks
    specs: list[dict[str, Any]]  # feature specs, one per layer
    feature_ids: list[str]
    manifest_ids: list[str]
    encoder: str | None  # encoder reference recorded by the run
    tokens: list[int] = Field(default_factory=list, max_length=MAX_TOKENS)  # ids of the tokens of its CTC head
    inference: InferenceConfig | None = None  # None, and the next four empty: transformers does not load the export
    model_type: str = ""
    architectures: list[str] = Field(default_factory=list)
    auto_map: dict[str, str] = Field(default_factory=dict)
    custom_pipelines: dict[str, dict[str, Any]] = Field(default_factory=dict)


def read_settings(folder: Path) -> ExportConfig:
    """Read ``config.json`` of an export; raises UserError like :func:`train.inference.export.load_projector`."""
    path = folder / SETTINGS
    if not path.exists():
        raise UserError(f"'{folder}' is not an export: it has no {SETTINGS}; create one with `python -m train export`")
    tree = disk.read_json(path, missing_hint="export the run again", corrupt_hint="export the run again")
    if tree.get("format") != FORMAT:
        raise UserError(f"'{path}' does not have export format {FORMAT}: update earshard, or export the run again")
    return validate_config(ExportConfig, tree, f"'{path}'")
