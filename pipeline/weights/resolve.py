"""Resolve a model reference to a local transformers folder and its revision.

A reference is ``path:/folder`` (or the bare path of an existing folder), ``hf:owner/name[@revision]``,
``modelscope:owner/name[@revision]``, ``wheel:whisper-base``, or a list of these, tried in order. ``None`` stands for
the default: for the encoder ``modelscope:$WHISPER_MS_ID`` if that is set, ``hf:${WHISPER_HF_ID:-openai/whisper-base}``,
then ``wheel:whisper-base``; for the language model ``wheel:smollm2-135m-instruct``. An encoder may also be a class of
the user's own, ``my_module:MyEncoder`` (``pipeline/encoders/own.py``), if the user typed it: what a cache or a run
recorded is not imported.

The returned folder is checked: its config is of the right kind, and its weight files have the length that their headers
state, so a truncated download is rejected. Safetensors are preferred; a folder that has only PyTorch files is accepted
and read with ``weights_only=True``. When an earlier reference failed, the one that is used and the reasons are printed
to standard error.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards.errors import UserError
from shards.files import read_json

SELF_SUPERVISED = ("hubert", "wav2vec2", "wavlm", "wav2vec2-bert", "mert_model")  # model_type in config.json
TOWERS = (  # models with an audio encoder inside
    *("qwen2_audio", "voxtral", "audioflamingo3", "glmasr", "moonshine"),
    *("parakeet_ctc", "parakeet_rnnt", "parakeet_tdt"),
)
CODECS = ("mimi", "encodec", "dac")  # neural codecs, whose features are integer codes
ENCODERS = ("whisper", *SELF_SUPERVISED, *TOWERS, *CODECS)
_SHARD = re.compile(r"\w[\w.+-]{0,199}")  # a name without a path: a folder's index comes from a stranger
SCHEMES = ("path", "hf", "modelscope", "wheel")
_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Weights:
    """A checked transformers folder, or a class of the user's own that the user typed.

    Attributes:
        folder: Contains ``config.json`` and the weights; the working directory for a class.
        reference: The reference that was resolved, with its scheme (``hf:openai/whisper-base``).
        revision: Commit hash (``hf``), branch or tag (``modelscope``), package version (``wheel``) or "" (``path``).
    """

    folder: Path
    reference: str
    revision: str


def resolve_weights(
    reference: str | Sequence[str] | None,
    *,
    role: Literal["encoder", "lm"],
    cache: Path | None = None,
    typed: bool = False,
) -> Weights:
    """Return the weights of the first reference that resolves to a valid folder.

    Args:
        reference: One reference, several in order of preference, or None for the default (see the module docstring).
        role: ``encoder`` requires a model type of ``ENCODERS``; ``lm`` accepts any folder with a config.
        cache: Folder for converted wheels; None: ``$EARSHARD_HOME/weights``. The hubs' libraries use their own caches.
        typed: The user wrote the reference, in this command or in a configuration that it reads: only then may an
            encoder be a class to import.

    Raises:
        UserError: No reference resolved; the message has the reason for each.
    """
    if reference is None:
        references = default_references(role)
    else:
        references = [reference] if isinstance(reference, str) else list(reference)
    if not references:
        raise UserError(f"the list of {role} models is empty: name one, such as {default_references(role)[-1]}")
    failures: list[str] = []
    for candidate in references:
        try:
            found = _resolve_one(candidate, role, cache, typed)
        except UserError as error:
            failures.append(str(error))
            continue
        if failures:
            print(f"{role}: using {found.reference}, because {'; and '.join(failures)}", file=sys.stderr)
        return found
    if len(failures) == 1:
        raise UserError(failures[0])
    reasons = "; ".join(f"({i}) {failure}" for i, failure in enumerate(failures, 1))
    raise UserError(f"none of the {len(failures)} {role} models {', '.join(references)} is available: {reasons}")


def default_references(role: str) -> list[str]:
    """Return the references that ``None`` stands for. Reads the environment on each call."""
    if role == "lm":
        return ["wheel:smollm2-135m-instruct"]
    first = [f"modelscope:{name}"] if (name := os.environ.get("WHISPER_MS_ID")) else []
    return [*first, f"hf:{os.environ.get('WHISPER_HF_ID') or 'openai/whisper-base'}", "wheel:whisper-base"]


def is_own(reference: str) -> bool:
    """Return whether ``reference`` is the import path of a class, ``module:Class``."""
    return bool(_OWN.fullmatch(reference)) and reference.partition(":")[0] not in SCHEMES


def _resolve_one(reference: str, role: str, cache: Path | None, typed: bool) -> Weights:
    if role == "encoder" and is_own(reference):
        if typed:
            return Weights(Path(), reference, "")
        raise UserError(
            f"{reference} is an encoder class that is not part of earshard, and a folder does not decide what is "
            f"imported: if you know this class, name it in the command with --encoder {reference} (check, transcribe) "
            f"or encoder.model={reference} (extract)"
        )
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
                f"the folder '{name}' of {reference} does not exist: name a folder with a config.json and its weights"
            )
    elif scheme == "wheel":
        from pipeline.weights.wheels import convert_wheel

        folder, revision = convert_wheel(name, cache)
        fix = f"delete the folder '{folder}' and run the command again"
    else:
        from pipeline.weights import hubs

        name, _, requested = name.partition("@")
        if name.count("/") != 1 or name.startswith("/") or name.endswith("/"):
            raise UserError(
                f"'{reference}' does not name a model: write {scheme}:OWNER/NAME or {scheme}:OWNER/NAME@REVISION"
            )
        download = hubs.download_hf if scheme == "hf" else hubs.download_modelscope
        folder, revision = download(name, requested or None)
        fix = "the file was removed, run the command again to download it"
    try:
        check_weights_folder(folder, role)
    except _CorruptFileError as error:
        if scheme in ("hf", "modelscope"):  # the hubs' libraries do not check a cached file again
            error.path.resolve().unlink(missing_ok=True)
            error.path.unlink(missing_ok=True)
        raise UserError(f"{reference}: {error}; {fix}") from None
    except UserError as error:
        raise UserError(f"{reference}: {error}") from None
    return Weights(folder, f"{scheme}:{name}", revision)


class _CorruptFileError(Exception):
    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"'{path}' {problem}")
        self.path = path


def check_weights_folder(folder: Path, role: str) -> None:
    """Check that a folder has a suitable ``config.json`` and weight files of the right length.

    Raises:
        UserError: The config or the weights are missing, or the model does not fit ``role``.
        _CorruptFileError: A weight file has the wrong length.
    """
    config = read_model_json(folder / "config.json")
    kind = config.get("model_type")
    if role == "encoder" and kind not in ENCODERS:
        raise UserError(
            f"expected a Whisper encoder in '{folder / 'config.json'}', got {kind or 'no model_type'}: name a Whisper "
            f"model or one of {', '.join(ENCODERS[1:])}"
        )
    for path in weight_files(folder):
        problem = safetensors_problem(path) if path.suffix == ".safetensors" else _zip_problem(path)
        if problem:
            raise _CorruptFileError(path, problem)


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, sorted by name: safetensors (one file, or the shards of an index) if any,
    else PyTorch files.

    Raises:
        UserError: There are none, or a file that the index names is missing or outside of the folder.
    """
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            weight_map = read_model_json(index).get("weight_map")
            names = list(dict.fromkeys(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
            problem = "" if names else "names no files"
            for name in names:
                if not _SHARD.fullmatch(name) or not name.endswith(Path(whole).suffix):
                    problem = f"names {name[:100]!r}, which is not the name of a weight file in this folder"
                elif not (folder / name).is_file():
                    problem = f"names {name}, which does not exist"
                if problem:
                    break
            if problem:
                raise UserError(f"'{index}' {problem}: copy the folder again")
            return [folder / name for name in sorted(names)]
    raise UserError(
        f"'{folder}' contains no model.safetensors and no pytorch_model.bin: name a folder of transformers weights"
    )


def safetensors_problem(path: Path) -> str | None:
    """Check the length of a safetensors file against its header; return the problem, or None if there is none."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = int.from_bytes(stream.read(8), "little")
        if size < 8 + head:
            # a web page saved under this name also ends here, with an absurd length
            return f"has {size} bytes, expected at least {8 + head}: it is truncated or not a safetensors file"
        try:
            header = json.loads(stream.read(head))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + head + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "does not have a safetensors header"
    if size != expected:
        return f"has {size} bytes, expected {expected}: it is {'truncated' if size < expected else 'too long'}"
    return None


def _zip_problem(path: Path) -> str | None:
    # a zip archive ends with its directory: a PyTorch file without one is truncated, or older than PyTorch 1.6
    if zipfile.is_zipfile(path):
        return None
    return f"has {path.stat().st_size} bytes and no zip directory at its end: it is truncated or not a PyTorch file"


def read_model_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a model folder; raises UserError."""
    return read_json(
        path, missing_hint="name a folder of transformers weights", corrupt_hint="copy or download it again"
    )
