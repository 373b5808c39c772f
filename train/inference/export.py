"""A trained projector to give away: weights, settings, and a card that says what it was trained on.

    python -m train export runs/demo exported/demo

    exported/demo/   projector.safetensors  config.json  README.md  [lm.safetensors, where the LM was trained too]

In: a finished run. Out: that folder, which needs neither the run nor its cache. One line loads it,
``load_exported(folder)``; the card shows how plain PyTorch does.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.config.base import Config, validate_config
from shards.errors import UserError
from shards.files import atomic_write, told
from train.config.model import LmConfig, ProjectorConfig, PromptConfig
from train.config.train import TrainConfig
from train.inference.pytorch_card import plain
from train.model.build import load_model
from train.runs.folder import read_json, run_caches, run_config

if TYPE_CHECKING:
    from train.projectors import Projector

FORMAT = 1
WEIGHTS, SETTINGS, CARD, LM_WEIGHTS = "projector.safetensors", "config.json", "README.md", "lm.safetensors"


class Exported(Config):
    """``config.json`` of an export: all that ``load_exported`` and a reader of another program need."""

    format: int
    projector: ProjectorConfig
    layers: int
    normalise_layers: bool
    channels: int  # of each layer
    width: int  # of a soft token
    lm: LmConfig
    lm_identity: str
    prompt: PromptConfig
    specs: list[dict[str, Any]]  # of the features, one a layer
    feature_ids: list[str]
    manifest_ids: list[str]
    encoder: str | None  # the reference that the run recorded


def export(run: Path, folder: Path) -> Path:
    """Write the projector of ``run`` into ``folder``, which must not stand yet; returns it.

    Raises:
        UserError: the run is not finished, the folder stands, or it cannot be written.
    """
    import torch

    from train.model.checkpoint import trained_parameters, write_tensors

    if folder.exists():
        raise UserError(f"'{folder}' exists already: name another folder, or delete it")
    config, about = run_config(run), run_caches(run)
    model = load_model(run, config, torch.device("cpu"), torch.float32)
    trained = {name: parameter.detach() for name, parameter in trained_parameters(model).items()}
    settings = _settings(config, about, model.lm.width, model.lm.identity)
    parts = {"projector.": WEIGHTS, "lm.": LM_WEIGHTS}
    with told("exporting", folder):
        folder.mkdir(parents=True)
    for prefix, file in parts.items():
        tensors = {name.removeprefix(prefix): value for name, value in trained.items() if name.startswith(prefix)}
        if tensors:
            write_tensors(folder / file, tensors, {"feature_id": settings.feature_ids[0]})
    owner = str(os.getpid())
    with told("exporting", folder):
        atomic_write(folder / SETTINGS, (json.dumps(settings.model_dump(mode="json"), indent=1) + "\n").encode(), owner)
        has_lm = any(name.startswith("lm.") for name in trained)
        atomic_write(
            folder / CARD, card(settings, read_json(run / "summary.json"), folder.name, has_lm).encode(), owner
        )
    return folder


def _settings(config: TrainConfig, about: dict[str, Any], width: int, identity: str) -> Exported:
    from shards.format.spec import FeatureSpec

    specs = about.get("layers") or [about["spec"].model_dump()]
    return Exported(
        format=FORMAT,
        projector=config.projector,
        layers=config.layers,
        normalise_layers=config.normalise_layers,
        channels=about["spec"].channels,
        width=width,
        lm=config.lm,
        lm_identity=identity,
        prompt=config.prompt,
        specs=specs,
        feature_ids=[FeatureSpec.parse(spec, "caches.json").feature_id for spec in specs],
        manifest_ids=[cache["manifest_id"] for cache in about["caches"]],
        encoder=about.get("encoder"),
    )


def load_exported(folder: str | Path) -> Projector:
    """The projector in ``folder``, in evaluation mode, float32 on the CPU; see :class:`train.projectors.Projector`.

    Raises:
        UserError: the folder is no export, of a newer format, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from train.model.checkpoint import restore_parameters
    from train.projectors import LayerMixer, MixedProjector, build_projector

    settings = read_settings(Path(folder))
    weights = Path(folder) / WEIGHTS
    projector = build_projector(settings.projector, settings.channels, settings.width, 1.0)
    if settings.layers > 1:
        projector = MixedProjector(LayerMixer(settings.layers, settings.normalise_layers), projector)
    try:
        restore_parameters(projector, load_file(weights), str(weights))
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{weights}' cannot be read ({error}): export the run again") from None
    return projector.eval()


def read_settings(folder: Path) -> Exported:
    """``config.json`` of an export; raises UserError as :func:`load_exported`."""
    path = folder / SETTINGS
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"'{folder}' is no export: it has no {SETTINGS}; make one with python -m train export"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): export the run again") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise UserError(f"'{path}' is not of export format {FORMAT}: update earshard, or export the run again")
    return validate_config(Exported, tree, str(path))


def card(settings: Exported, summary: dict[str, Any], name: str, has_lm: bool) -> str:
    """``README.md`` of an export."""
    text = plain(settings.projector, settings.layers, settings.normalise_layers)
    spec = settings.specs[0]
    channels = settings.layers * settings.channels
    source = f"`{settings.encoder}`" if settings.encoder else "an encoder whose reference was not recorded"
    layers = ", ".join(str(each["layer"]) for each in settings.specs)
    rows = [
        ("encoder", f"{source}, {spec['family']}, layer {layers}, window {spec['window']}, {spec['dtype']}"),
        ("encoder's tensors, sha256", f"`{spec['tensors']}`"),
        ("feature id", ", ".join(f"`{each}`" for each in settings.feature_ids)),
        ("trained on caches (manifest id)", ", ".join(f"`{each}`" for each in settings.manifest_ids)),
        ("language model", f"`{settings.lm.model}` ({settings.lm_identity}), {'trained too' if has_lm else 'frozen'}"),
        ("projector", f"`{settings.projector.kind}`, {channels} channels to width {settings.width}"),
        ("prompt", f"`{settings.prompt.template}`: {settings.prompt.instruction}"),
        ("steps", str(summary.get("steps", "–"))),
        *((label, f"{summary[key]:.4g}") for label, key in _FIGURES if isinstance(summary.get(key), int | float)),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    own = (
        f"The projector is the class `{settings.projector.kind}` of the person who trained it: its module must be on "
        "Python's path."
    )
    return f"""\
---
library_name: earshard
tags: [audio, speech, projector]
---

# {name}

A projector from features of a frozen speech encoder into the input of a language model, trained by earshard.

| | |
|---|---|
{table}

Features of another encoder, layer, window or codec are another language to it: compare the feature id.

## Use

With earshard: `features` float32 [B, frames, {channels}] and their `mask` [B, frames] give `soft` [B, soft tokens,
{settings.width}], which stand where `<|audio|>` stands in the prompt, and their mask.

```python
from train.inference.export import load_exported
soft, soft_mask = load_exported("{name}")(features, mask)
```

With PyTorch alone: `x` is one utterance, float32 [1, frames, {channels}].

{f"```python{chr(10)}{text}```" if text else own}
"""


_FIGURES = (
    ("held-out loss, nats a token", "val_loss"),
    ("the same with other audio", "val_loss_shuffled"),
    ("audio gain, nats a token", "audio_gain"),
    ("WER", "wer"),
    ("CER", "cer"),
)
