"""``README.md`` of an export: what it is, what it was trained with, and the lines that run it."""

from __future__ import annotations

from typing import Any

from train.config.model import CustomConfig
from train.inference.settings import LM_WEIGHTS, TASK, ExportConfig

HUBS = ("hf:", "modelscope:")
_SPELLING = """
In front of the soft tokens, the language model also read the text that the projector's byte scores spell
(`read_spelling`). The projector alone does not give it."""
_CARD_METRICS = (
    ("held-out loss, nats per token", "val_loss"),
    ("held-out loss with another utterance's audio", "val_loss_shuffled"),
    ("audio gain, nats per token", "audio_gain"),
    ("WER", "wer"),
    ("CER", "cer"),
)


def model_card(settings: ExportConfig, summary: dict[str, Any], name: str, has_lm: bool, problem: str = "") -> str:
    """Return the text of ``README.md`` of an export.

    Args:
        settings: ``config.json``.
        summary: ``summary.json`` of the run.
        name: name of the export.
        has_lm: whether the export includes the trained LM.
        problem: why transformers cannot load it, see :func:`train.inference.export.not_runnable`.
    """
    spec = settings.specs[0]
    channels = settings.layers * settings.channels
    source = f"`{settings.encoder}`" if settings.encoder else "an encoder whose reference was not recorded"
    codes = f"codes of {channels} codebooks, embedded in {settings.code_dim} channels," if settings.code_dim else ""
    values = "integer codes" if settings.code_dim else "float32"
    is_custom = isinstance(settings.projector, CustomConfig)
    requirements = ", and what `projector/own.py` imports" if is_custom else ""
    exception = ", except for `own.py`, which belongs to its author" if is_custom else ""
    layers = ", ".join(str(each["layer"]) for each in settings.specs)
    rows = [
        ("encoder", f"{source}, {spec['family']}, layer {layers}, window {spec['window']}, {spec['dtype']}"),
        ("sha256 of the encoder's tensors", f"`{spec['tensors']}`"),
        ("feature id", ", ".join(f"`{each}`" for each in settings.feature_ids)),
        ("trained on caches (manifest id)", ", ".join(f"`{each}`" for each in settings.manifest_ids)),
        ("language model", f"`{settings.lm.model}` ({settings.lm_identity}), {_trained_part(settings, has_lm)}"),
        ("projector", f"`{settings.projector.kind}`, {codes or f'{channels} channels'} to width {settings.width}"),
        ("prompt", f"`{settings.prompt.template}`: {settings.prompt.instruction}"),
        *(
            (f"instructions{f' of {task}' if task else ''}, one of", " / ".join(listed))
            for task, listed in settings.instructions.items()
        ),
        *([("text", f"decoded {settings.inference.decode.description}")] if settings.inference else []),
        ("steps", str(summary.get("steps", "–"))),
        *((label, f"{summary[key]:.4g}") for label, key in _CARD_METRICS if isinstance(summary.get(key), int | float)),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    spelling = _SPELLING if getattr(settings.projector, "read_spelling", False) else ""
    keys = "" if problem else f"\npipeline_tag: {TASK}"
    return f"""\
---
library_name: {"earshard" if problem else "transformers"}{keys}
tags: [audio, speech, projector, earshard]
---

# {name}

A projector that maps features of a frozen speech encoder to input embeddings of a language model, trained with
earshard.

| | |
|---|---|
{table}

The projector works only with features of this encoder, layer, window and codec: compare the feature id.

## Use

{_how_to_run(settings, name, problem)}
### The projector alone

`features` are {values} [B, frames, {channels}]; `mask` is bool [B, frames], True for valid frames. The result is
`soft` [B, soft tokens, {settings.width}] and its mask. The valid soft tokens replace `<|audio|>` in the prompt. This
code requires torch and safetensors{requirements}:

```python
import sys; sys.path.insert(0, "{name}")  # this folder
from projector import load
soft, soft_mask = load("{name}")(features, mask)
```

`lm.json` identifies the language model by hashes of its configs, its tokenizer's files and its weights. With
`load("{name}", lm="FOLDER")`, a model in FOLDER that differs is refused. It also holds the ids of the prompt in
training: `prefix` before the soft tokens, `suffix` after them, and `ends`, which end an answer.{spelling}

The `.py` files are source code at the time of export. They are part of earshard (MIT license){exception}.
With earshard installed, `train.load_projector("{name}")` loads the projector without running code from this folder.
"""


def _trained_part(settings: ExportConfig, has_lm: bool) -> str:
    if settings.lm.lora is None:
        return "trained" if has_lm else "frozen"
    return f"frozen, with trained LoRA adapters of rank {settings.lm.lora.rank}, which are in `{LM_WEIGHTS}`"


def _how_to_run(settings: ExportConfig, name: str, problem: str) -> str:
    """Return the section of the model card about transformers."""
    from train.lms.hf.adapters import PACKAGES

    if problem:
        return f"transformers does not load this export, because {problem}.\n"
    given = {"encoder": settings.encoder or "", "lm": settings.lm.model}
    missing = [key for key, reference in given.items() if not reference.startswith(HUBS)]
    arguments = "".join(f', {key}="{key.upper()}"' for key in missing)
    named = ", ".join(f'"{key}": "{key.upper()}"' for key in missing)
    model_kwargs = f", model_kwargs={{{named}}}" if missing else ""
    needs = "torch, transformers, safetensors, soundfile and soxr (and av for MP3 and MP4)"
    extra = [name for key, names in PACKAGES.items() if getattr(settings.lm, key) for name in names]
    packages = ", and ".join([needs, *extra])
    own = "".join(
        f" `{key.upper()}` is the folder or the name on the hub of the {what} (recorded: `{given[key] or None}`)."
        for key, what in (("encoder", "encoder"), ("lm", "language model"))
        if key in missing
    )
    return f"""\
This code requires {packages}. It runs the code of this folder.{own} An encoder or a language model other than those of
the training is refused.

```python
from transformers import AutoModel
model = AutoModel.from_pretrained("{name}", trust_remote_code=True{arguments})
print(model.transcribe("speech.wav"))
```

Or as a pipeline of transformers, which takes file names, bytes of files, samples at 16 kHz,
`{{"raw": samples, "sampling_rate": 44100}}`, and lists of these:

```python
from transformers import pipeline
asr = pipeline("{TASK}", model="{name}", trust_remote_code=True{model_kwargs})
print(asr("speech.wav")["text"])
```

The text is that of `python -m train transcribe`, and on the same processor and libraries the soft tokens have the same
bits.
"""
