"""Deterministic speech synthesis with espeak-ng through ctypes.

The library keeps state between sentences (noise, flutter, the phases of its oscillators) that neither
``espeak_Terminate`` nor its random seed resets, so a sentence sounds different after another one. The library is
therefore reloaded for each sentence, which resets its static memory and takes about 5 ms.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pipeline.audio import AudioError
from shards.errors import UserError

_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000  # espeak_AUDIO_OUTPUT, espeakINITIALIZE_DONT_EXIT
_RATE, _VOLUME, _PITCH = 1, 2, 3  # espeak_PARAMETER
_VOLUME_PERCENT = 50  # at 100, loud vowels clip
_CHARACTERS, _UTF8 = 1, 1  # espeak_POSITION_TYPE, espeakCHARS_UTF8
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_lock = threading.Lock()  # the library's state is global


class EspeakError(AudioError):
    """A call of espeak-ng failed; the message names the call."""


def version() -> str:
    """Return the version, such as ``espeak-ng 1.52.0``."""
    with _lock, _library() as (library, _):
        library.espeak_Info.restype = ctypes.c_char_p
        library.espeak_Info.argtypes = [ctypes.c_void_p]
        number: bytes = library.espeak_Info(None)
        return f"espeak-ng {number.decode()}"


def synthesize(text: str, voice: str, words_per_minute: int, pitch: int) -> tuple[np.ndarray, int]:
    """Synthesize ``text``; the result is the same each time.

    Args:
        text: The sentence.
        voice: A language, optionally with a variant: ``en-us``, ``en-us+f2``.
        words_per_minute: 80 to 450.
        pitch: 0 to 100.

    Returns:
        int16 [samples] and their sampling rate in Hz.

    Raises:
        EspeakError: A call failed, for instance for an unknown voice, or the result is empty.
        UserError: The package espeakng-loader is not installed.
    """
    spoken: list[bytes] = []

    def collect(samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int | None) -> int:
        if samples and count > 0:
            spoken.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = _CALLBACK(collect)  # kept in a variable: the library holds no reference
    line = text.encode()
    with _lock, _library() as (library, sampling_rate):
        library.espeak_SetSynthCallback.argtypes = [_CALLBACK]
        library.espeak_SetSynthCallback.restype = None
        library.espeak_SetSynthCallback(callback)
        library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
        _check(library.espeak_SetVoiceByName(voice.encode()), f"espeak_SetVoiceByName('{voice}')")
        library.espeak_SetParameter.argtypes = [ctypes.c_int] * 3
        for parameter, value in ((_RATE, words_per_minute), (_VOLUME, _VOLUME_PERCENT), (_PITCH, pitch)):
            _check(library.espeak_SetParameter(parameter, value, 0), f"espeak_SetParameter({parameter}, {value})")
        # without argument types, ctypes passes the size as a 32-bit integer and the library crashes
        library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int),
            *(ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
        ]
        _check(library.espeak_Synth(line, len(line) + 1, 0, _CHARACTERS, 0, _UTF8, None, None), "espeak_Synth")
        _check(library.espeak_Synchronize(), "espeak_Synchronize")
    if not spoken:
        raise EspeakError(f"espeak-ng returned no audio for '{text}'")
    return np.frombuffer(b"".join(spoken), dtype=np.int16), sampling_rate


def _check(status: int, call: str) -> None:
    if status != 0:
        raise EspeakError(f"{call} failed with status {status}")


@contextmanager
def _library() -> Iterator[tuple[ctypes.CDLL, int]]:
    """Load and initialize the library, yield it and its sampling rate, and unload it at the end."""
    try:
        import espeakng_loader
    except ImportError:
        raise UserError("source.kind speech needs the package espeakng-loader: run `make setup`") from None
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        data = espeakng_loader.get_data_path().encode()
        sampling_rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT)
        if sampling_rate <= 0:
            raise EspeakError(f"espeak_Initialize failed with status {sampling_rate}")
        library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        _check(library.espeak_ng_SetRandSeed(1), "espeak_ng_SetRandSeed")  # the default seed is the time
        try:
            yield library, sampling_rate
        finally:
            library.espeak_Terminate()
    finally:
        import _ctypes

        if sys.platform == "win32":
            _ctypes.FreeLibrary(library._handle)
        else:
            _ctypes.dlclose(library._handle)
