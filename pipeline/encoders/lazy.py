"""What an encoder computes, without loading it: a memo of its attributes, for an extraction that has nothing to do.

:func:`open_encoder_lazily` returns a :class:`LazyEncoder`. Its attributes come from the memo, a small sealed JSON file
that an earlier run wrote; torch is imported and the weights are read only when frames are computed. The memo's name is
the sha256 of everything that determines the attributes: the files of the model, its reference, the settings, the code
and the versions of the libraries. A memo that is corrupt or was made from anything else is ignored.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.encoders.base import Encoder
from pipeline.encoders.load import auto_dtype, may_have_gpu
from pipeline.weights.resolve import Weights, weight_files
from shards.commit.claims import new_owner
from shards.errors import UserError
from shards.files import atomic_write, make_folder
from shards.format.records import RecordError, seal, unseal
from shards.format.spec import WindowMode, canonical_json

ATTRIBUTES = (
    *("family", "name", "n_layers", "channels", "hop", "sampling_rate", "window_samples"),
    *("window", "margin", "tensors", "frontend", "dtype", "device"),
)
RACY_SECONDS = 2.0  # a file changed later than this may change again without a new modification time
# at most this many bytes at this many places of each file are part of the key, in case a time stamp was preserved
SAMPLE_BYTES, SAMPLES = 1 << 16, 16
NVIDIA_DRIVER = Path("/proc/driver/nvidia")


class LazyEncoder:
    """An :class:`Encoder` that is loaded when frames are computed, or when anything but ``ATTRIBUTES`` is needed.

    Args:
        attributes: Values of ``ATTRIBUTES``.
        load: Loads the encoder.
        memo: The file that ``attributes`` were read from.
        encoder: The encoder, if it is loaded.
    """

    family: str
    name: str
    n_layers: int
    channels: int
    hop: int
    sampling_rate: int
    window_samples: int
    window: WindowMode
    margin: float
    tensors: str
    frontend: dict[str, int | float | str | bool | None]
    dtype: str
    device: str
    was_checked: bool = False

    def __init__(
        self, attributes: dict[str, Any], load: Callable[[], Encoder], memo: Path | None, encoder: Encoder | None = None
    ) -> None:
        vars(self).update(attributes)
        self._load, self._memo, self._encoder = load, memo, encoder

    @property
    def loaded(self) -> bool:
        """Whether the encoder is in memory."""
        return self._encoder is not None

    @property
    def batch_size(self) -> int:
        """See :class:`Encoder`. It depends on the free memory, so this loads the encoder."""
        return self.load().batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self.load().batch_size = value

    def load(self) -> Encoder:
        """Return the encoder itself, loaded at the first call. Not thread-safe.

        Raises:
            UserError: It cannot be loaded, or an attribute differs from the memo, which is then deleted.
        """
        if self._encoder is None:
            encoder = self._load()
            found = _attributes(encoder)
            different = [
                f"{name} is {value}, not {getattr(self, name)}"
                for name, value in found.items()
                # the index of the GPU is not part of what is computed
                if (_kind(value) != _kind(self.device) if name == "device" else value != getattr(self, name))
            ]
            if different:
                assert self._memo is not None
                with suppress(OSError):
                    self._memo.unlink(missing_ok=True)
                fix = "delete that file" if self._memo.exists() else "it was deleted"
                raise UserError(
                    f"'{self._memo}' describes another encoder than the one in use ({'; '.join(different)}): {fix}, "
                    "run the command again"
                )
            self._encoder, self.device = encoder, encoder.device
        return self._encoder

    def encode(
        self, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str = "valid"
    ) -> list[dict[int, np.ndarray]]:
        """See :meth:`Encoder.encode`. Raises what :meth:`load` raises."""
        return self.load().encode(clips, layers, trim)


def open_encoder_lazily(
    load: Callable[[], Encoder],
    weights: Weights,
    *,
    device: str,
    dtype: str,
    window: WindowMode | None,
    margin: float,
    memo: Path | None,
    codebooks: int | None = None,
) -> LazyEncoder:
    """Return the encoder that ``load`` loads: unloaded if a memo describes it, else loaded, with a new memo.

    Args:
        load: Calls :func:`pipeline.encoders.load.load_encoder` with the following settings; may choose another GPU.
        weights: See :func:`pipeline.encoders.load.load_encoder`, as the next four.
        device: As configured, such as ``auto``.
        dtype: As configured, such as ``auto``.
        window: As configured.
        margin: As passed to ``load_encoder``.
        memo: Folder of the memos, created if necessary. None: load the encoder. A folder that cannot be written to is
            no error.
        codebooks: As configured.

    Raises:
        UserError: The encoder cannot be loaded.
    """
    settings = _settings(device, dtype, window, margin) if memo is not None else None
    if settings is not None:
        settings["codebooks"] = codebooks
    key = settings and _key(weights, settings)
    if memo is None or settings is None or key is None:
        encoder = load()
        return LazyEncoder(_attributes(encoder), load, None, encoder)
    path = memo / f"{hashlib.sha256(canonical_json(key).encode()).hexdigest()}.json"
    with suppress(FileNotFoundError, RecordError):
        tree = unseal(path)
        attributes = tree.get("attributes")
        if tree.get("key") == key and isinstance(attributes, dict) and set(attributes) == set(ATTRIBUTES):
            return LazyEncoder(attributes, load, path)
    encoder = load()
    attributes = _attributes(encoder)
    newest = max(file[2] for file in key["files"]) / 1e9
    expected_kind = "cuda" if settings["device"] == "auto" else _kind(settings["device"])
    if (
        newest < time.time() - RACY_SECONDS
        and _kind(encoder.device) == expected_kind  # a GPU that fails today may work tomorrow
        and _key(weights, settings) == key  # the files did not change while they were read
    ):
        with suppress(OSError):
            make_folder(memo)
            atomic_write(path, seal({"key": key, "attributes": attributes}), new_owner())
    return LazyEncoder(attributes, load, path, encoder)


def _attributes(encoder: Encoder) -> dict[str, Any]:
    return {name: getattr(encoder, name) for name in ATTRIBUTES}


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _key(weights: Weights, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return everything that determines the attributes, as JSON values; None if a part of it cannot be read."""
    try:
        files = {path for path in weights.folder.iterdir() if path.is_file()} | set(weight_files(weights.folder))
        digest = hashlib.sha256()
        for path in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(path.read_bytes())
        return {
            "reference": weights.reference,
            "files": [[str(path.relative_to(weights.folder)), *_file_state(path)] for path in sorted(files)],
            "settings": settings,
            "code": digest.hexdigest(),
            "versions": {name: metadata.version(name) for name in ("earshard", "torch", "transformers")},
        }
    except (OSError, ValueError, UserError, metadata.PackageNotFoundError):
        return None


def _file_state(path: Path) -> tuple[int, int, str]:
    """Return the size, modification time in ns, and sha256 of samples, which are the whole file up to 1 MiB."""
    state, digest = path.stat(), hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for start in range(0, state.st_size, max(SAMPLE_BYTES, -(-state.st_size // SAMPLES))):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return state.st_size, state.st_mtime_ns, digest.hexdigest()


def _settings(device: str, dtype: str, window: WindowMode | None, margin: float) -> dict[str, Any] | None:
    """Return the settings with ``auto`` resolved, or with the GPUs that determine what it stands for; None: unknown."""
    if device == "auto" and not may_have_gpu():
        device = "cpu"
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "window": window, "margin": margin}
    if device != "auto" and not device.startswith("cuda"):
        settings["dtype"] = auto_dtype(device) if dtype == "auto" else dtype
    elif "auto" in (device, dtype):
        settings["gpus"] = nvidia_gpus()
        settings["visible"] = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")]
        if not settings["gpus"] or not may_have_gpu():
            return None
    return settings


def nvidia_gpus() -> list[str]:
    """Return the driver's version and the model of every NVIDIA GPU as the Linux driver states them; [] if it does not.

    ``auto`` stands for the same device and dtype wherever these are the same.
    """
    try:
        models = sorted(
            line
            for path in NVIDIA_DRIVER.glob("gpus/*/information")
            for line in path.read_text().splitlines()
            if line.startswith("Model:")
        )
        return [*models, (NVIDIA_DRIVER / "version").read_text()] if models else []
    except OSError:
        return []
