"""Of every container all of the audio that it declares is decoded, or none: cut, joined and hostile files."""

from __future__ import annotations

import io
import math
import random
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
from containers import (
    RATE,
    flac_of_a_pipe,
    muxed,
    tone,
    vbr_mp3,
    whole_files,
    with_size,
    written,
)

from pipeline.audio import AudioError, decode, probe, read_segment
from pipeline.containers import read_blocks

SECONDS = 3.0
WHOLE = whole_files(SECONDS)
UNDECLARED = ("bare.mp3", "adts.aac")  # nothing in these files tells their length


def seconds(data: bytes) -> float:
    return len(decode(data)) / RATE


@pytest.mark.parametrize("name", WHOLE)
def test_all_of_a_whole_file_is_decoded_and_the_plan_knows_its_length(name, tmp_path):
    data = WHOLE[name]
    assert seconds(data) == pytest.approx(SECONDS, abs=0.1)
    assert probe(data) / RATE == pytest.approx(seconds(data), abs=0.1)
    (tmp_path / "named.wrong").write_bytes(data)  # recognised by its bytes
    assert probe(tmp_path / "named.wrong") == probe(data)


@pytest.mark.parametrize("name", [name for name in WHOLE if name not in UNDECLARED])
@pytest.mark.parametrize("part", [0.5, 0.95])
def test_a_cut_file_is_an_error(name, part):
    data = WHOLE[name]
    with pytest.raises(AudioError):
        decode(data[: int(len(data) * part)])


@pytest.mark.parametrize("name", ["wav", "gsm.wav", "rf64", "aiff", "mp3", "mp4", "webm", "mka"])
def test_the_error_of_a_cut_file_has_both_figures(name):
    data = WHOLE[name]
    with pytest.raises(AudioError, match="truncated audio") as caught:
        decode(data[: len(data) // 2])
    found, declared = (float(figure) for figure in re.findall(r"(\d+\.\d+) s", str(caught.value)))
    assert declared == pytest.approx(SECONDS, abs=0.1)
    assert 1 < found < 2


@pytest.mark.parametrize("name", WHOLE)
def test_files_joined_end_to_end_are_decoded_whole_or_refused(name):
    try:
        both = seconds(WHOLE[name] * 2)
    except AudioError:
        assert name in ("wav", "float.wav", "gsm.wav", "adpcm.wav", "rf64", "w64", "aiff", "m4a", "mp4")
    else:
        assert both == pytest.approx(2 * SECONDS, abs=0.2)


def test_an_mp3_of_variable_bit_rate_without_a_header_is_decoded_whole():
    data = vbr_mp3(tone(12.0))
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert file.frames / file.samplerate < 4  # what libsndfile guesses and reads
    assert seconds(data) == pytest.approx(12.0, abs=0.1)
    assert probe(data) / RATE == pytest.approx(12.0, abs=0.1)


def test_mp3s_of_two_bit_rates_joined_are_decoded_whole():
    parts = [
        muxed(tone(5.0), "mp3", "libmp3lame", options={"write_xing": "0"}, encoder={"b": b}) for b in ("96000", "24000")
    ]
    for data in (parts[0] + parts[1], parts[1] + parts[0]):
        assert seconds(data) == pytest.approx(10.1, abs=0.15)
        assert probe(data) / RATE == pytest.approx(seconds(data), abs=0.1)


def test_the_samples_of_joined_and_streamed_files_are_those_of_the_whole_ones():
    samples = (tone(SECONDS) * 2**15).astype(np.int16)
    one = decode(written(samples, "FLAC"))
    np.testing.assert_array_equal(decode(flac_of_a_pipe(samples)), one)
    np.testing.assert_array_equal(decode(written(samples, "FLAC") * 2), np.tile(one, 2))
    for size in (0, 0xFFFFFFFF, 0x7FFFFFFF):
        np.testing.assert_array_equal(decode(with_size(written(samples, "WAV"), size)), one)
    for form in ("RF64", "W64", "AIFF", "AU"):
        np.testing.assert_array_equal(decode(written(samples, form, "PCM_16")), one)
    vorbis = written(samples, "OGG", "VORBIS")
    np.testing.assert_array_equal(decode(vorbis * 2), np.tile(decode(vorbis), 2))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
@pytest.mark.parametrize("channels", [1, 2])
def test_ffmpeg_gives_the_samples_of_libsndfile(subtype, channels):
    samples = tone(0.2, channels=channels)
    expected = decode(written(samples, "WAV", subtype))
    np.testing.assert_array_equal(decode(with_size(written(samples, "WAV", subtype), 0)), expected)


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_wav_and_flac_give_the_bits_of_one_read_by_libsndfile(form, channels):
    data = written(tone(70.0 if channels < 3 else 10.0, channels=channels), form)  # more than a block
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    mono = samples[:, 0] if channels == 1 else samples.mean(axis=1, dtype=np.float32)
    np.testing.assert_array_equal(decode(data), mono)


def test_a_header_that_declares_less_than_follows_is_an_error_with_both_figures():
    wav, flac = WHOLE["wav"], WHOLE["flac"]
    with pytest.raises(AudioError, match=r"declares 1\.5000 s, but data for 1\.5000 s follow"):
        decode(with_size(wav, 48_000))
    total = int.from_bytes(flac[18:26], "big") - 24_000
    assert seconds(flac[:18] + total.to_bytes(8, "big") + flac[26:]) == SECONDS
    for tail in (b"LIST\x04\0\0\0INFO", b"TAG" + bytes(125), b"\0"):
        assert seconds(wav + tail) == SECONDS
    assert seconds(with_size(wav, 96_001)) == SECONDS
    with pytest.raises(AudioError, match=r"truncated audio: 3\.0000 s of 3\.0001 s"):
        decode(with_size(wav, 96_002))


def test_a_pointer_of_git_lfs_is_named():
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 96044\n"
    with pytest.raises(AudioError, match="Git LFS"):
        decode(pointer)
    assert probe(pointer) == 0


def test_other_containers_that_ffmpeg_reads_are_refused():
    for form in ("nut", "avi"):
        refused(muxed(tone(1.0), form, "pcm_s16le"))


def refused(data: bytes) -> None:
    with pytest.raises(AudioError):
        decode(data)


def test_a_file_that_names_addresses_is_not_followed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        for text in (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{address}\n#EXT-X-ENDLIST\n",
            f"ffconcat version 1.0\nfile {address}\n",
        ):
            answer = threading.Thread(target=refused, args=(text.encode(),))
            answer.start()
            with pytest.raises(TimeoutError):
                server.accept()
            answer.join(10)
            assert not answer.is_alive()


@pytest.mark.parametrize("name", ["ogg", "opus"])
def test_an_ogg_that_lacks_its_last_page_is_an_error(name):
    with pytest.raises(AudioError, match="no end-of-stream page"):
        decode(WHOLE[name][: WHOLE[name].rindex(b"OggS")])
    with pytest.raises(AudioError, match="no end-of-stream page"):
        decode(WHOLE[name][: WHOLE[name].rindex(b"OggS")] + WHOLE[name])


def test_the_header_of_the_first_of_joined_mp3s_is_not_taken_for_the_length():
    assert probe(WHOLE["mp3"] * 2) / RATE == pytest.approx(seconds(WHOLE["mp3"] * 2), abs=0.1)
    assert seconds(WHOLE["mp3"] * 2) > 2 * SECONDS - 0.2


def test_a_recording_longer_than_the_limit_is_an_error_before_it_is_decoded():
    for name in ("wav", "flac", "m4a", "opus"):
        with pytest.raises(AudioError, match=r"max_hours is 0\.0005"):
            decode(WHOLE[name], max_hours=0.0005)
    for name in ("pipe.flac", "bare.mp3"):  # those that declare no length: within a block
        with pytest.raises(AudioError, match=r"max_hours is 0\.0005"):
            decode(WHOLE[name], max_hours=0.0005)
    assert len(decode(WHOLE["wav"], max_hours=0.001)) == 3 * RATE


def test_many_channels_of_silence_are_mixed_block_by_block():
    data = written(np.zeros((2_200_000, 8), np.int16), "FLAC")
    assert len(data) < 100_000
    blocks = [block.nbytes for _, block in read_blocks(data, 2.0)]
    assert sum(blocks) == 2_200_000 * 8 * 4
    assert max(blocks) <= 2**22  # 4 MiB


PEAK = """
import resource, sys
from pipeline.audio import decode
import numpy, soundfile, soxr, av
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(len(decode(data)))
except Exception as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "channels"), [(22_000_000, 8), (176_000_000, 1)])
def test_a_flac_that_unpacks_to_700_mb_takes_a_fraction_of_that(tmp_path, frames, channels):
    with soundfile.SoundFile(tmp_path / "a.flac", "w", RATE, channels, format="FLAC") as file:
        for _ in range(0, frames, 1_000_000):
            file.write(np.zeros((1_000_000, channels), np.int16))
    argv = [sys.executable, "-c", PEAK, str(tmp_path / "a.flac")]
    result, kilobytes = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
    assert result == (str(frames) if channels == 8 else "3.06 h or more at 16000 Hz: max_hours is 2")
    assert int(kilobytes) < 250_000


def test_a_segment_of_every_container_is_that_of_the_decoded_file(tmp_path):
    for name, data in WHOLE.items():
        path = tmp_path / name
        path.write_bytes(data)
        blocks = np.concatenate([block for _, block in read_blocks(data, math.inf)])[:, 0]
        for start in (0, 1, 2):
            with soundfile.SoundFile(io.BytesIO(read_segment(path, start, start + 0.5))) as segment:
                samples, rate = segment.read(dtype="float32"), segment.samplerate
            np.testing.assert_allclose(samples, blocks[start * rate : round((start + 0.5) * rate)], 0, 1e-6, name)
        assert len(decode(read_segment(path, 1.0, None))) / RATE == pytest.approx(SECONDS - 1, abs=0.1)
        with pytest.raises(AudioError, match="ends after"):
            read_segment(path, 1.0, 3.5)


@pytest.mark.parametrize("name", ["wav", "flac", "ogg", "mp3", "rf64"])
def test_an_open_ended_segment_of_a_cut_file_is_an_error(name, tmp_path):
    (tmp_path / name).write_bytes(WHOLE[name][: len(WHOLE[name]) // 2])
    with pytest.raises(AudioError, match=r"truncated|lost sync"):
        read_segment(tmp_path / name, 0.0, None)
    with pytest.raises(AudioError):
        read_segment(tmp_path / name, 0.0, 3.0)


def test_the_longest_segment_is_limited(tmp_path):
    (tmp_path / "a.wav").write_bytes(WHOLE["wav"])
    (tmp_path / "a.mp3").write_bytes(WHOLE["mp3"])
    for name in ("a.wav", "a.mp3"):
        assert len(decode(read_segment(tmp_path / name, 2.0, None, max_hours=0.0003))) == RATE
        for stop in (None, 2.0):
            with pytest.raises(AudioError, match="max_hours"):
                read_segment(tmp_path / name, 0.0, stop, max_hours=0.0003)


def mutated(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """``data`` with a few bytes changed, removed, inserted, cut or taken from another file, mostly near its start."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(min(len(made), rng.choice((64, 400, 2**20))))
        how = rng.randrange(7)
        if how == 0:
            made[at] = rng.randrange(256)
        elif how == 1:
            made[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
        elif how == 2:
            del made[at : at + rng.choice((1, 2, 4, 100, 1000))]
        elif how == 3:
            made[at:at] = rng.randbytes(rng.choice((1, 2, 4, 64)))
        elif how == 4:
            other = rng.choice(others)
            made[at : at + 64] = other[(start := rng.randrange(len(other))) : start + 64]
        elif how == 5:
            made[at : at + 256] = bytes(256)
        elif rng.random() < 0.3:
            del made[rng.randrange(1, len(made)) :]
        made = made or bytearray(b"x")
    return bytes(made)


FUZZ = """
import random, resource, sys
from pathlib import Path
from pipeline.audio import AudioError, decode, probe, read_segment
from test_containers import mutated
from containers import whole_files
seed, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
rng, files = random.Random(seed), list(whole_files(2.5).values())
for number in range(count):
    data = mutated(rng.choice(files), rng, files)
    (folder / "last").write_bytes(data)
    for read in (lambda: decode(data, 0.1), lambda: probe(data), lambda: read_segment(folder / "last", 2.1, 2.3)):
        try:
            read()
        except AudioError as error:
            assert "\\n" not in str(error) and "0x" not in str(error), error
"""


def fuzz(count: int, seed: int, folder: Path) -> None:
    here = Path(__file__).resolve()
    paths = [here.parents[2], here.parents[1] / "helpers", here.parent]
    code = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n{FUZZ}"
    argv = [sys.executable, "-c", code, str(seed), str(count), str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60 + count)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # FFmpeg and libsndfile print nothing


def test_mutated_files_raise_only_audio_errors_and_print_nothing(tmp_path):
    fuzz(40, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_hundreds_of_mutated_files_raise_only_audio_errors(seed, tmp_path):
    fuzz(400, seed, tmp_path)
