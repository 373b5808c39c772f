"""Whisper's log-mel spectrogram in torch, batched, on the encoder's device.

Maps float32 [clips, samples] to float32 [clips, n_mels, frames], within 1e-4 of ``WhisperFeatureExtractor`` of
transformers, which uses NumPy or processes one clip at a time. Only frames that overlap audio are transformed; frames
of padding are filled with a constant.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.errors import UserError

if TYPE_CHECKING:
    import torch

MEL_FLOOR = 1e-10
_MAX_SETTING = 2**20


@dataclass(frozen=True)
class MelSettings:
    """Settings of the spectrogram, as in ``preprocessor_config.json``.

    ``n_fft`` and ``hop_length`` are in samples, ``chunk_length`` is in seconds, ``sampling_rate`` is in Hz.
    """

    n_mels: int
    n_fft: int = 400
    hop_length: int = 160
    chunk_length: int = 30
    sampling_rate: int = 16000

    @classmethod
    def from_preprocessor(cls, tree: dict[str, Any], path: Path, n_mels: int) -> MelSettings:
        """Read the settings of a ``WhisperFeatureExtractor``.

        Args:
            tree: The JSON object of ``preprocessor_config.json``.
            path: The path of that file, for error messages.
            n_mels: Mel bands that the encoder takes.

        Raises:
            UserError: A setting is not supported, or the number of mel bands differs from ``n_mels``.
        """
        for key, supported in (("dither", 0.0), ("padding_value", 0.0), ("do_normalize", False)):
            if tree.get(key) not in (None, supported):
                raise UserError(
                    f"'{path}' sets {key} to {tree[key]!r}, and only {supported!r} is supported: remove the setting"
                )
        names = {
            "feature_size": "n_mels",
            **{key: key for key in ("n_fft", "hop_length", "chunk_length", "sampling_rate")},
        }
        for key in names.keys() & tree.keys():
            if type(tree[key]) is not int or not 0 < tree[key] < _MAX_SETTING:
                raise UserError(
                    f"'{path}' sets {key} to {tree[key]!r:.40}, not a positive integer: copy the file again"
                )
        if tree.get("sampling_rate", 16_000) != 16_000:
            raise UserError(f"expected 16000 Hz in '{path}', got {tree['sampling_rate']} Hz: copy the file again")
        settings = cls(**{"n_mels": n_mels, **{names[key]: tree[key] for key in names if key in tree}})
        if settings.n_mels != n_mels:
            raise UserError(
                f"'{path}' sets {settings.n_mels} mels, but the encoder expects {n_mels}: copy the file again"
            )
        return settings

    @property
    def samples(self) -> int:
        """Number of samples in a padded window."""
        return self.chunk_length * self.sampling_rate

    @property
    def frames(self) -> int:
        """Number of mel frames in a padded window."""
        return self.samples // self.hop_length

    def frontend(self) -> dict[str, int | float | str | bool | None]:
        """Return the settings as stored in the feature spec."""
        return {"type": "whisper-log-mel", **asdict(self)}


def mel_filters(settings: MelSettings) -> np.ndarray:
    """Return triangular filters of unit area on Slaney's mel scale, 0 Hz to 8 kHz: float64 [n_mels, n_fft // 2 + 1].

    Source: Slaney, Auditory Toolbox (1998), as in librosa and OpenAI's Whisper.
    """
    break_hz, break_mel, step = 1000.0, 15.0, np.log(6.4) / 27  # linear below 1 kHz, logarithmic above
    top = break_mel + np.log(8000.0 / break_hz) / step
    mels = np.linspace(0.0, top, settings.n_mels + 2)
    corners = np.where(mels < break_mel, mels * break_hz / break_mel, break_hz * np.exp(step * (mels - break_mel)))
    bins = np.linspace(0.0, settings.sampling_rate / 2, settings.n_fft // 2 + 1)
    widths = np.diff(corners)
    distance = corners[:, None] - bins[None, :]
    rising, falling = -distance[:-2] / widths[:-1, None], distance[2:] / widths[1:, None]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (corners[2:] - corners[:-2]))[:, None]


class LogMel:
    """The spectrogram transform, with its window and filters on ``device``."""

    def __init__(self, settings: MelSettings, device: torch.device) -> None:
        import torch

        self.settings = settings
        self.window = torch.hann_window(settings.n_fft, device=device)
        self.filters = torch.from_numpy(mel_filters(settings)).to(device, torch.float32)
        self._silence = torch.tensor(MEL_FLOOR).log10().item()

    def __call__(self, audio: torch.Tensor, frames: int | None = None) -> torch.Tensor:
        """Compute the spectrogram of a batch.

        Args:
            audio: float32 [clips, n], n <= ``settings.samples``.
            frames: Number of frames to return; None: ``settings.frames``. The values do not depend on it: they are
                clamped relative to the maximum of the window, which never lies in the padding.

        Returns:
            float32 [clips, n_mels, frames].
        """
        import torch
        import torch.nn.functional as F

        settings, half = self.settings, self.settings.n_fft // 2
        # frames that overlap at least one sample of audio
        audio_frames = min(settings.frames, -(-(audio.shape[1] + half) // settings.hop_length))
        audio = F.pad(audio, (0, settings.samples - audio.shape[1]))
        audio = F.pad(audio, (half, half), mode="reflect")[
            :, : (audio_frames - 1) * settings.hop_length + settings.n_fft
        ]
        spectrum = torch.stft(
            audio, settings.n_fft, settings.hop_length, window=self.window, center=False, return_complex=True
        )
        power = torch.view_as_real(spectrum).square().sum(-1)
        log_mel = (self.filters @ power).clamp(min=MEL_FLOOR).log10()
        loudest = log_mel.amax(dim=(1, 2), keepdim=True)
        log_mel = F.pad(log_mel, (0, (frames or settings.frames) - audio_frames), value=self._silence)
        return (torch.maximum(log_mel, loudest - 8.0) + 4.0) / 4.0
