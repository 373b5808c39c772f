"""Throughput of the host side of an extraction: a null encoder returns prepared frames at once, the rest is real.

    python bench/host.py                                    # 320 FLAC clips of noise, 1 and 2 cores: 2 minutes
    python bench/host.py --corpus /data/LibriSpeech         # the first 320 utterances of at most 30 s
    python bench/host.py --audio speech --clips 400         # sentences that espeak-ng synthesizes during the run
    python bench/host.py --json host.json --before OTHER    # also with the code of another checkout, in the same rounds

Reading, decoding, batches, tar, sha256, fsync, commit and manifest are those of ``python -m pipeline extract`` on a
GPU; only the device is missing: a batch is there at once, encoded by the codec as the device leaves it in pinned
memory, and is copied out. ``windows/s`` is therefore the rate above which a GPU would wait for the host, and the shares
show which stage it would wait for. Frames have the shape of whisper-base ([1500, 512] per window of 30 s) or large-v3
([1500, 1280]) and are trimmed to the audio, as in an extraction. With ``decode`` off, the samples are already in memory
and only storing is timed. ``--codec-on cpu`` measures an encoder that returns float32 frames: an encoder on a CPU, long
audio, and every checkout before the codec ran on the device. Each measurement runs in a separate process restricted to
its cores; measurements alternate, and the best round is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile

CHANNELS = {"whisper-base": 512, "large-v3": 1280}
HOP, RATE, WINDOW = 320, 16_000, 480_000


@dataclass(frozen=True)
class Setting:
    """One measurement."""

    shape: str
    codec: str
    decode: bool
    cores: int


@dataclass(frozen=True)
class Figures:
    """Result of a measurement; ``shares`` as in ``pipeline/profile.py``, ``cpu_ms`` is per window."""

    windows_per_s: float
    cpu_ms: float
    shares: dict[str, float]


class NullEncoder:
    """Replaces an encoder (``pipeline/encoders/base.py``) on a GPU, or on a CPU with ``codec`` None.

    Its random frames are prepared and encoded before timing starts.
    """

    family, name, n_layers, hop, sampling_rate = "null", "null", 1, HOP, RATE
    window_samples, margin, frontend, dtype = WINDOW, 0.0, dict[str, Any](), "float32"
    window, loaded, was_checked = "full30", True, True
    tensors = "0" * 64

    def __init__(self, channels: int, batch_size: int, codec: str | None) -> None:
        from shards.format.codec import encode

        self.channels, self.batch_size, self.device = channels, batch_size, "cuda" if codec else "cpu"
        self._frames = np.random.default_rng(0).standard_normal((WINDOW // HOP, channels)).astype(np.float32)
        self._encoded = encode(codec, self._frames) if codec else None
        self.batches = SimpleNamespace()  # receives how waits for the device are timed
        self._collector = ThreadPoolExecutor(1, thread_name_prefix="collect")

    def load(self) -> NullEncoder:
        return self

    def encode(
        self, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str = "valid"
    ) -> list[dict[int, np.ndarray]]:
        return [dict.fromkeys(layers, self._frames[: -(-len(clip) // HOP)]) for clip in clips]

    def prepare(self, clip: np.ndarray) -> np.ndarray:
        return clip

    def group(self, samples: int) -> int:
        return WINDOW

    def launch(self, windows: Sequence[np.ndarray], layers: Sequence[int], trim: str, codec: str | None) -> Any:
        return self._collector.submit(lambda: [dict.fromkeys(layers, self._output(len(each))) for each in windows])

    def _output(self, samples: int) -> Any:
        assert self._encoded is not None
        return replace(self._encoded, payload=self._encoded.payload[: -(-samples // HOP)].copy())


class Ready:
    """Replaces the decoders with samples that were decoded before timing starts."""

    def __init__(self, samples: dict[str, np.ndarray]) -> None:
        self._samples = samples

    def read(self, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bytes, np.ndarray]]:
        for row in rows:
            yield row, bytes(32), self._samples[row["audio"]]


def write_clips(folder: Path, clips: int) -> None:
    """Write ``clips`` FLAC files of 10 to 15 s of noise, modulated at the rate of syllables, and their manifest."""
    rng = np.random.default_rng(0)
    with open(folder / "clips.csv", "w", encoding="utf-8") as manifest:
        manifest.write("audio,text\n")
        for i in range(clips):
            n = int(rng.uniform(10, 15) * RATE)
            wave = 0.1 * rng.standard_normal(n) * (1 + np.sin(np.arange(n) * 2 * np.pi * 4 / RATE)) / 2
            soundfile.write(folder / f"{i:05d}.flac", wave.astype(np.float32), RATE, subtype="PCM_16")
            manifest.write(f"{i:05d}.flac,clip number {i}\n")


def measure(setting: Setting, source: dict[str, Any], batch: int, workers: int, on_device: bool) -> Figures:
    """Extract with a null encoder on ``setting.cores`` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setting.cores])
    from pipeline.audio import decode
    from pipeline.config import ExtractConfig
    from pipeline.extract.job import Job, feature_spec, schedule
    from pipeline.extract.listing import list_source
    from pipeline.extract.loop import finish_caches, make_shards
    from pipeline.extract.plan import count_windows, make_plan
    from pipeline.extract.progress import ProgressBar
    from pipeline.extract.reuse import Reuse
    from pipeline.extract.shard import open_decoders
    from pipeline.extract.stats import ExtractionStats
    from pipeline.extract.targets import LABEL_COLUMNS, LabelLookup, Target
    from pipeline.sources import open_source
    from pipeline.weights.resolve import Weights
    from shards.commit.store import open_store
    from shards.config.base import validate_config

    encoder: Any = NullEncoder(CHANNELS[setting.shape], batch, setting.codec if on_device else None)
    with tempfile.TemporaryDirectory() as root:
        tree = {"root": root, "source": source, "codec": setting.codec, "decode_workers": workers}
        config = validate_config(ExtractConfig, tree, "bench/host.py")
        audio = open_source(config.source)
        listing = list_source(audio, Path(root))
        unknown = pa.array([bytes(32)] * len(listing.table), pa.binary(32))
        table = make_plan(
            listing.table,
            np.arange(len(listing.table)),
            unknown,
            shuffle=True,
            seed=0,
            frame_bytes=2 * encoder.channels,
            hop=HOP,
            padded_frames=None,
            shard_mb=64,
        )
        target = Target(1, open_store(f"{root}/corpus/cache", None), feature_spec(config, encoder, 1))
        plan = target.store.write_plan(0, table)
        target.store.add_labels(listing.table.select(["key", *LABEL_COLUMNS]), "source", "bench")
        weights = Weights(Path(root), "null", "")
        reuse, labels = [Reuse(target.spec, plan, ())], LabelLookup(target.store)
        job = Job(config, audio, encoder, weights, [target], 0, plan, reuse, labels)
        schedule(job)
        uris = listing.table["audio"].to_pylist()
        ready = {} if setting.decode else {uri: decode(data) for uri, data in audio.read(uris)}  # type: ignore[arg-type]
        import torch  # noqa: F401 - before timing starts: an encoder has imported it

        stats = ExtractionStats()
        since, used = time.perf_counter(), processor_seconds()
        with (
            job.hold_leases(),
            ProgressBar(plan.sizes, str) as progress,
            open_decoders(job, stats.stage_times) as decoders,
        ):
            make_shards(job, stats, decoders if setting.decode else Ready(ready), progress)  # type: ignore[arg-type]
            finish_caches(job.targets, 0, plan, {}, 0.0)
        stats.stage_times.wall_seconds = time.perf_counter() - since
        if stats.failures:
            raise SystemExit(f"{len(stats.failures)} utterances failed, the first: {stats.failures[0]}")
        windows = count_windows(plan.samples, encoder, config.overlap)
        spent = 1000 * (processor_seconds() - used) / windows
        rate = windows / stats.stage_times.wall_seconds
        return Figures(round(rate, 1), round(spent, 2), stats.stage_times.utilization(job.decode_workers))


def processor_seconds() -> float:
    """Return the CPU seconds of this process and of its finished children."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in found)


def one_round(setting: Setting, source: dict[str, Any], args: argparse.Namespace, checkout: Path) -> Figures:
    """Measure ``setting`` with the code of ``checkout`` in a separate process."""
    # a checkout before the codec ran on the device takes float32 frames
    on_device = args.codec_on == "device" and (checkout / "pipeline/encoders/device.py").exists()
    one = json.dumps([asdict(setting), source, args.batch, args.workers, on_device])
    done = subprocess.run(
        [sys.executable, __file__, "--one", one],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", metavar="FOLDER", help="a LibriSpeech tree (default: clips of noise)")
    parser.add_argument("--audio", choices=("flac", "speech"), default="flac", help="speech: synthesized by espeak-ng")
    parser.add_argument("--clips", type=int, default=320)
    parser.add_argument("--batch", type=int, default=32, help="windows per pass")
    parser.add_argument("--workers", type=int, default=2, help="decoding threads")
    parser.add_argument("--codec-on", choices=("device", "cpu"), default="device", help="where frames are encoded")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="measure the code of another checkout, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", choices=list(CHANNELS), default=list(CHANNELS))
    parser.add_argument("--codecs", nargs="+", default=["f16", "int8"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args()

    if args.one:
        setting, source, batch, workers, on_device = json.loads(args.one)
        print(json.dumps(asdict(measure(Setting(**setting), source, batch, workers, on_device))))
        return
    settings = [
        Setting(shape, codec, decode, cores)
        for cores, shape, codec, decode in product(args.cores, args.shapes, args.codecs, (True, False))
    ]
    checkouts = {"this": Path(__file__).resolve().parent.parent, **({"before": args.before} if args.before else {})}
    with tempfile.TemporaryDirectory() as scratch:
        if args.audio == "speech":
            source = {"kind": "speech", "n": args.clips}
        elif args.corpus:
            source = {"kind": "librispeech", "path": args.corpus, "limit": args.clips, "max_duration": 30}
        else:
            write_clips(Path(scratch), args.clips)
            source = {"kind": "manifest", "path": f"{scratch}/clips.csv"}
        runs = list(product(settings, checkouts))
        fastest: dict[tuple[Setting, str], Figures] = {}
        for _ in range(args.rounds):
            for setting, name in runs:
                found = one_round(setting, source, args, checkouts[name])
                before = fastest.get((setting, name), found)
                fastest[setting, name] = max(before, found, key=lambda figures: figures.windows_per_s)
                if args.json:  # what was measured outlives an interruption
                    write_results(args.json, fastest)

    print(f"{args.clips} clips ({args.corpus or args.audio}), {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    print(f"{'shape':<13} {'codec':<5} {'decode':<6} {'cores':>5} {'code':<6} {'windows/s':>9} {'CPU ms':>7}  busy")
    for (setting, name), figures in fastest.items():
        busy = ", ".join(f"{stage} {share:.0%}" for stage, share in figures.shares.items())
        words = f"{setting.shape:<13} {setting.codec:<5} {'on' if setting.decode else 'off':<6} {setting.cores:>5}"
        print(f"{words} {name:<6} {figures.windows_per_s:>9.1f} {figures.cpu_ms:>7.2f}  {busy}")


def write_results(path: Path, fastest: dict[tuple[Setting, str], Figures]) -> None:
    """Write the best round of each measurement; ``code`` is the checkout, ``this`` or ``before``."""
    results = [{**asdict(setting), **asdict(figures), "code": name} for (setting, name), figures in fastest.items()]
    path.write_text(json.dumps({"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
