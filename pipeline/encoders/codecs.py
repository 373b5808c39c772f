"""Neural audio codecs as encoders of integer codes: Mimi, EnCodec and DAC.

Maps float32 clips at the codec's own sampling rate to codes, int32 [frames, codebooks], with the modules of
transformers. A codec has one layer, number 0. Only the tensors of the encoder and of the quantizer are read from the
checkpoint. Each clip is encoded alone at its own length, in float32: rounding to a shorter dtype changes codes.

The number of codebooks is ``encoder.codebooks``; without it, that of transformers' ``encode``: all of Mimi's and DAC's,
those of EnCodec's lowest bandwidth. Fewer are the first ones, because each codebook encodes what those before it left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.encoders.base import check_encode_args, encoder_name, tensors_hash
from pipeline.encoders.device import real_float32
from pipeline.encoders.selfcheck import refuse_corrupt_values
from pipeline.threads import ThreadPool
from pipeline.weights.pretrained import forbid_hub_kernels, load_pretrained
from pipeline.weights.resolve import Weights, read_model_json
from pipeline.weights.tensors import read_tensors, refuse_quantized, require_tensors, stored_tensors
from shards.errors import UserError
from shards.format.spec import MAX_CODEBOOK, WindowMode

if TYPE_CHECKING:
    import torch

WINDOW_SECONDS = 30


@dataclass(frozen=True)
class Family:
    """A family of codecs: its classes in transformers and its names of tensors.

    Attributes:
        config, model: Names of the classes.
        decoder: Prefixes in a checkpoint of what makes audio from codes, which is not read.
        unused: How tensors end that no code depends on.
        renamed: Prefixes in the model and in a checkpoint, where they differ.
    """

    config: str
    model: str
    decoder: tuple[str, ...]
    unused: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()


FAMILIES = {  # config.json's model_type
    "mimi": Family(
        "MimiConfig",
        "MimiModel",
        ("decoder.", "decoder_transformer.", "upsample."),
        (".initialized",),
        (
            ("encoder.encoder_seanet.", "encoder."),
            ("encoder.encoder_transformer.", "encoder_transformer."),
            ("encoder.downsample.", "downsample."),
        ),
    ),
    "encodec": Family("EncodecConfig", "EncodecModel", ("decoder.",), (".inited", ".cluster_size", ".embed_avg")),
    "dac": Family("DacConfig", "DacModel", ("decoder.",)),
}
WEIGHT_NORM = (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"))


class CodecEncoder:
    """A codec of ``FAMILIES``; see :class:`pipeline.encoders.base.Encoder`. Its features are integers.

    Raises:
        UserError: ``weights`` does not load as ``family``, has other tensors or fewer codebooks, or is a codec of
            stereo or of chunks.
    """

    def __init__(
        self, weights: Weights, family: str, *, device: str, batch_size: int | None, codebooks: int | None
    ) -> None:
        import torch

        model, tensors = load_codec(weights.folder, family)
        config = model.config
        self.family, self.name = family, encoder_name(weights.reference)
        self.sampling_rate: int = config.sampling_rate
        self.hop = _hop(config, family)
        self._bandwidths = _bandwidths(model) if family == "encodec" else {}
        self.channels = self._count(model, codebooks)
        self.n_layers = 0
        self.window_samples = WINDOW_SECONDS * self.sampling_rate // self.hop * self.hop
        self.window: WindowMode = "clip"
        self.margin = 0.0
        self.tensors = tensors_hash(tensors)
        self.frontend: dict[str, int | float | str | bool | None] = {
            "type": "codes",
            "codebook_size": int(config.codebook_size),
        }
        self.dtype, self.device, self.was_checked = "float32", device, False
        self._torch_device = torch.device(device)
        self._model = model.to(self._torch_device).eval()
        self._pool = ThreadPool(torch.get_num_threads()) if device == "cpu" else None
        self.batch_size = max(batch_size or 8, 4 * self._pool.num_threads if self._pool else 0)

    def encode(
        self, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str = "valid"
    ) -> list[dict[int, np.ndarray]]:
        """See :meth:`pipeline.encoders.base.Encoder.encode`; returns codes, int32 [frames, codebooks]."""
        check_encode_args(self, clips, layers, trim)
        results: list[dict[int, np.ndarray]] = [{} for _ in clips]

        def encode_one(index: int) -> None:
            results[index] = {0: self._encode(clips[index])}

        calls = [(i,) for i in sorted(range(len(clips)), key=lambda i: -len(clips[i]))]
        if self._pool:
            self._pool.run(encode_one, calls)
        else:
            for call in calls:
                encode_one(*call)
        return results

    def _encode(self, clip: np.ndarray) -> np.ndarray:
        import torch

        frames = -(-len(clip) // self.hop)
        if not frames:
            return np.zeros((0, self.channels), np.int32)
        if self.family == "dac":  # as its feature extractor does
            clip = np.pad(clip, (0, frames * self.hop - len(clip)))
        values = torch.tensor(clip, dtype=torch.float32, device=self._torch_device)[None, None]
        with torch.inference_mode(), real_float32("float32" if self._pool is None else ""):
            codes = self._codes(values)[0, : self.channels].T.to("cpu", torch.int32).numpy()
        if codes.shape != (frames, self.channels):
            raise UserError(
                f"the codec '{self.name}' made codes {list(codes.shape)} of a clip of {len(clip)} samples, expected "
                f"{[frames, self.channels]}: its config.json does not describe it; copy it again"
            )
        return np.ascontiguousarray(codes)

    def _codes(self, values: torch.Tensor) -> torch.Tensor:
        """Return the codes [1, codebooks, frames] of samples [1, 1, samples]; they may be of further codebooks."""
        found: torch.Tensor
        if self.family == "mimi":
            found = self._model.encode(values, num_quantizers=self.channels).audio_codes
        elif self.family == "encodec":
            bandwidth = next(rate for rate, count in self._bandwidths.items() if count >= self.channels)
            found = self._model.encode(values, bandwidth=bandwidth).audio_codes[0]
        else:
            found = self._model.encode(values, n_quantizers=self.channels).audio_codes
        return found

    def _count(self, model: Any, asked: int | None) -> int:
        """Return the number of codebooks to use."""
        config = model.config
        if self.family == "encodec":
            default, least, most = min(self._bandwidths.values()), 1, max(self._bandwidths.values())
        elif self.family == "mimi":
            default, least, most = config.num_quantizers, config.num_semantic_quantizers, config.num_quantizers
        else:
            default, least, most = config.n_codebooks, 1, config.n_codebooks
        if asked is not None and not least <= asked <= most:
            raise UserError(f"encoder.codebooks={asked}, but the codec '{self.name}' has {most}: set {least} to {most}")
        return asked or default


def load_codec(folder: Path, family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the codec of ``folder`` without its decoder, in float32 on the CPU, and its tensors by their names.

    Raises:
        UserError: the folder has other tensors than its config describes, quantized or corrupt ones, or another config.
    """
    forbid_hub_kernels()  # before the first import of transformers
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    kind, stored = FAMILIES[family], stored_tensors(folder)
    module: Any = transformers
    model_class = getattr(module, kind.model)
    try:
        config = load_pretrained(getattr(module, kind.config), folder)
        _require_supported(folder, config, family)
        with torch.device("meta"):  # sizes are compared before memory is taken
            expected = _needed(model_class(config).state_dict(), kind)
    except (
        *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError),
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{folder / 'config.json'}' is not a config of {family} ({reason}): copy it again") from None
    names = {
        _with_plain_norm(name): name
        for name in stored
        if not name.startswith(kind.decoder) and not name.endswith(kind.unused or ("\0",))
    }
    own = {name: stored[stored_name] for name, stored_name in names.items()}
    refuse_quantized(folder, read_model_json(folder / "config.json"), own)
    shapes = {name: tuple(tensor.shape) for name, (_, tensor) in expected.items()}
    require_tensors(folder, own, shapes, f"{family} codec")
    found = read_tensors(folder, "", list(names.values()))
    tensors = {name: found[stored_name].float() for name, stored_name in names.items()}
    refuse_corrupt_values(folder, tensors)
    with torch.random.fork_rng(devices=[]):
        model = model_class(config).float()
    model.load_state_dict({expected[name][0]: tensor for name, tensor in tensors.items()}, strict=False)
    model.decoder = None
    return model, tensors


def _needed(state: dict[str, torch.Tensor], kind: Family) -> dict[str, tuple[str, torch.Tensor]]:
    """Return name in the model and tensor of what codes depend on, by their names in a checkpoint."""
    found = {}
    for name, tensor in state.items():
        if name.startswith(("encoder.", "quantizer.")) and not name.endswith(kind.unused or ("\0",)):
            own, theirs = next(((a, b) for a, b in kind.renamed if name.startswith(a)), ("", ""))
            found[_with_plain_norm(theirs + name.removeprefix(own))] = name, tensor
    return found


def _with_plain_norm(name: str) -> str:
    """Return the name of a weight-normed tensor as older versions of torch write it."""
    for new, old in WEIGHT_NORM:
        name = name.replace(new, old)
    return name


def _require_supported(folder: Path, config: Any, family: str) -> None:
    preprocessor = folder / "preprocessor_config.json"
    rate = read_model_json(preprocessor).get("sampling_rate") if preprocessor.is_file() else None
    if rate not in (None, config.sampling_rate):
        raise UserError(
            f"'{preprocessor}' is for {rate} Hz and the codec's config.json for {config.sampling_rate} Hz: copy the "
            "folder again"
        )
    chunks = getattr(config, "chunk_length_s", None) is not None or getattr(config, "normalize", False)
    if getattr(config, "audio_channels", 1) != 1 or chunks:
        raise UserError(
            f"the codec in '{folder}' is for stereo, or normalizes chunks of audio, which is not supported: name one "
            "for mono, such as facebook/encodec_24khz"
        )
    size, hop = config.codebook_size, _hop(config, family)
    if not (1 <= size <= MAX_CODEBOOK and 1 <= hop <= WINDOW_SECONDS * config.sampling_rate <= 1 << 31):
        raise UserError(
            f"the codec in '{folder}' has codebooks of {size} entries and frames of {hop} samples, which is not "
            "supported: name another codec"
        )


def _hop(config: Any, family: str) -> int:
    """Return the samples per frame; ValueError if they are not a whole number."""
    if family == "mimi":
        hop: float = config.sampling_rate / config.frame_rate
        if not math.isclose(hop, round(hop)):
            raise ValueError(f"a frame of {hop:g} samples")
        return round(hop)
    return int(math.prod(config.upsampling_ratios if family == "encodec" else config.downsampling_ratios))


def _bandwidths(model: Any) -> dict[float, int]:
    """Return the number of codebooks of each of EnCodec's bandwidths, in kbit/s, from the lowest."""
    count = model.quantizer.get_num_quantizers_for_bandwidth
    most = len(model.quantizer.layers)
    return {rate: min(most, count(rate)) for rate in sorted(model.config.target_bandwidths)}
