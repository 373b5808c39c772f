"""Inspect, verify, publish and download caches.

    python -m shards info CACHE              contents, size, codec error and provenance
    python -m shards ls CACHE --limit 20     one line per utterance
    python -m shards head CACHE --n 3        the first utterances with feature statistics
    python -m shards verify CACHE --deep     compare every byte with the recorded hashes
    python -m shards verify CACHE --source   also check that the source audio has not changed
    python -m shards push CACHE hf://datasets/OWNER/NAME --licence cc-by-4.0
    python -m shards pull hf://datasets/OWNER/NAME FOLDER
    source <(earshard-shards completion bash)

CACHE is a cache folder or its URL. Exit status: 0 success, 1 the cache is not valid, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.config.cli import add_completion, print_completion
from shards.errors import WorkFailed, run_command
from shards.remote.client import is_url

if TYPE_CHECKING:
    from shards.inspect.findings import Problem

RECORDED_FOLDER = ""  # `--source` without a folder
SCRIPT = "earshard-shards"
MAX_LISTED = 40  # problems that `verify` prints without --all


def parser() -> argparse.ArgumentParser:
    """Return the argument parser. Imports nothing heavy."""
    top = argparse.ArgumentParser(
        prog="python -m shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = _command(commands, "info", "show the counts, size, codec error and provenance of a cache", "--json")
    info.add_argument("--json", action="store_true", help="print JSON")
    ls = _command(commands, "ls", "list utterances, one per line: key, frames, seconds, speaker, text", "--limit 20")
    ls.add_argument("--limit", type=_count, default=None, metavar="N", help="stop after N utterances")
    head = _command(commands, "head", "show the first utterances with feature statistics", "--n 3")
    head.add_argument("--n", type=_count, default=5, metavar="N", help="number of utterances (default 5)")
    verify = _command(
        commands, "verify", "check sizes, records and hashes; exit with status 1 if the cache is not valid", "--deep"
    )
    verify.add_argument("--deep", action="store_true", help="also rehash every tar and check each of its members")
    verify.add_argument(
        "--source",
        nargs="?",
        const=RECORDED_FOLDER,
        metavar="FOLDER",
        help="also compare the audio files in FOLDER (default: the folder recorded in the cache)",
    )
    verify.add_argument("--all", action="store_true", help=f"print every problem instead of the first {MAX_LISTED}")
    push = _command(
        commands, "push", "upload a complete cache to a hub or a bucket", "hf://datasets/OWNER/NAME --licence cc-by-4.0"
    )
    push.add_argument("url", metavar="URL", help="hf://datasets/OWNER/NAME[/FOLDER], s3://BUCKET/FOLDER, …")
    push.add_argument(
        "--licence", metavar="ID", help="license named in the dataset card, such as cc-by-4.0 (required by a hub)"
    )
    pull = _command(
        commands,
        "pull",
        "download a remote cache into a folder and verify it",
        "shared/name",
        "hf://datasets/OWNER/NAME",
    )
    pull.add_argument("folder", type=Path, metavar="FOLDER", help="destination folder")
    add_completion(commands, SCRIPT)
    return top


def main(argv: Sequence[str]) -> int | None:
    args = parser().parse_args(argv)
    if args.command == "completion":
        return print_completion(parser(), SCRIPT, args.shell)
    return {"info": _info, "ls": _ls, "head": _head, "verify": _verify, "push": _push, "pull": _pull}[args.command](
        args
    )


def _command(
    commands: Any,
    name: str,
    summary: str,
    example: str,
    cache: str = "caches/speech-0a1b2c3d/whisper-base-L6-f16-4e5f6a7b",
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[:1].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the default formatter would wrap long paths
        epilog=f"example:\n  python -m shards {name} {cache} {example}",
    )
    command.add_argument("cache", type=_path_or_url, metavar="CACHE", help="a cache folder or its URL")
    return command


def _path_or_url(text: str) -> str | Path:
    return text if is_url(text) else Path(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a non-negative integer, got '{text}'")
    return int(text)


def _info(args: argparse.Namespace) -> None:
    import json

    from shards.inspect.info import describe_cache, format_info

    info = describe_cache(args.cache)
    print(json.dumps(info, indent=2, ensure_ascii=False) if args.json else "\n".join(format_info(info)))


def _ls(args: argparse.Namespace) -> None:
    from shards.read.cache import Cache

    cache = Cache.open(args.cache)
    rate, shown = cache.spec.sampling_rate, 0
    columns = ["key", "frames", "samples", "speaker", "text"]
    for batch in cache.manifest.select(columns).slice(0, args.limit).to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            seconds, text = row["samples"] / rate, _printable(row["text"])
            print(f"{row['key']}\t{row['frames']}\t{seconds:.2f}\t{_printable(row['speaker']) or '-'}\t{text}")
            shown += 1
    if shown < len(cache):
        print(f"({shown} of {len(cache)} utterances)", file=sys.stderr)


def _head(args: argparse.Namespace) -> None:
    import numpy as np

    from shards.read.cache import Cache

    cache = Cache.open(args.cache)
    for index in range(min(args.n, len(cache))):
        row, x = cache.row(index), cache.features(index).astype(np.float64)
        seconds = row["samples"] / cache.spec.sampling_rate
        print(
            f"{row['key']}  {row['frames']} frames × {cache.spec.channels}  {seconds:.2f} s  {_printable(row['text'])}"
        )
        print(
            f"  mean {x.mean():+.4f}  std {x.std():.4f}  min {x.min():+.4f}  max {x.max():+.4f}  "
            f"RMS {np.sqrt(np.mean(x * x)):.4f}  codec error {row['error']:.2e}"
        )


def _verify(args: argparse.Namespace) -> None:
    from shards.inspect.verify import verify

    with _progress_bar("verify", "B") as progress:
        problems = verify(args.cache, args.deep, progress)
    if args.source is not None and all(problem.shard is not None for problem in problems):
        problems += _compare_audio(args.cache, args.source)
    if not problems:
        depth = "every byte of every shard" if args.deep else "sizes, records and hashes of records; --deep reads tars"
        print(f"{args.cache}: valid ({depth}{'; every audio file' if args.source is not None else ''})")
        return
    shown = problems if args.all else problems[:MAX_LISTED]
    table = [("shard", "file", "utterance", "problem")]
    table += [(f"{p.shard:06d}" if p.shard is not None else "-", p.file, p.key or "-", p.what) for p in shown]
    lines = [[_printable(cell) for cell in row] for row in table]
    widths = [*(max(len(line[column]) for line in lines) for column in range(3)), 0]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    if len(shown) < len(problems):
        print(f"… and {len(problems) - len(shown)} more (show them with --all)")
    raise WorkFailed(f"'{args.cache}' is not valid: {len(problems)} problem{'s'[: len(problems) != 1]}")


def _compare_audio(cache: str | Path, folder: str) -> list[Problem]:
    from shards.inspect.audio import compare_audio

    with _progress_bar("audio", " files") as progress:
        return compare_audio(cache, Path(folder) if folder else None, progress)


def _push(args: argparse.Namespace) -> None:
    from shards.errors import UserError
    from shards.share.transfer import push

    if is_url(args.cache):
        raise UserError(f"'{args.cache}' is a URL: download it with `python -m shards pull`, then push that folder")

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with _progress_bar("push", "B") as progress:
        push(args.cache, args.url, args.licence, progress, log)
    print(f"pushed: {args.url} (records, tables and sizes verified at the destination)")


def _pull(args: argparse.Namespace) -> None:
    from shards.errors import UserError
    from shards.share.transfer import pull

    if not is_url(args.cache):
        raise UserError(f"'{args.cache}' is not a URL: pass one such as hf://datasets/OWNER/NAME")
    with _progress_bar("pull", "B") as progress:
        pull(args.cache, args.folder, progress)
    print(f"pulled: {args.folder} (every byte of every shard verified)")


@contextmanager
def _progress_bar(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal; yields the callback ``(done, total)`` that updates it."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=unit, unit_scale=unit == "B", delay=0.5, disable=None, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _printable(text: str) -> str:
    """Replace control characters, so that text from a cache cannot control the terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


def console() -> None:
    """Entry point of ``earshard-shards``."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    console()
