"""Inspect, verify, label, compact, publish and download caches.

    python -m shards find ROOT               caches below a folder, in a bucket, or of an owner: hf://OWNER/*
    python -m shards info CACHE              contents, size, codec error and provenance
    python -m shards ls CACHE --limit 20     one line per utterance
    python -m shards head CACHE --n 3        the first utterances with feature statistics
    python -m shards verify CACHE --deep     compare every byte with the recorded hashes
    python -m shards verify CACHE --source   also check that the source audio has not changed
    python -m shards labels CACHE            label sets: rows, coverage, what changed
    python -m shards label CACHE mine.csv --name mine
    python -m shards compact CACHE FOLDER    copy without superseded and unlabeled rows
    python -m shards push CACHE hf://datasets/OWNER/NAME --licence cc-by-4.0
    python -m shards pull hf://datasets/OWNER/NAME FOLDER

CACHE is a cache folder or its URL. Exit status: 0 success, 1 the cache is not valid, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import WorkFailed, run_command
from shards.remote.client import is_url
from shards.share.publish import add_options

if TYPE_CHECKING:
    from shards.labels.table import LabelSet
    from shards.share.findings import Problem

RECORDED_FOLDER = ""  # `--source` without a folder
MAX_LISTED = 40  # problems that `verify` prints without --all


def parser() -> argparse.ArgumentParser:
    """Return the argument parser. Imports nothing heavy."""
    top = argparse.ArgumentParser(
        prog="python -m shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = _command(commands, "info", "show the counts, size, codec error and provenance of a cache", "--json")
    info.add_argument("--json", action="store_true", help="print JSON")
    _add_find(commands)
    ls = _command(commands, "ls", "list utterances, one per line: key, frames, seconds, speaker, text", "--limit 20")
    ls.add_argument("--limit", type=_count, default=None, metavar="N", help="stop after N utterances")
    _add_selection(ls)
    ls.add_argument("--variants", action="store_true", help="list the variants of utterances (KEY~1), too")
    head = _command(commands, "head", "show the first utterances with feature statistics", "--n 3")
    head.add_argument("--n", type=_count, default=5, metavar="N", help="number of utterances (default 5)")
    _add_selection(head)
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
    _command(commands, "labels", "list the label sets of a cache, oldest first, and what each one changed")
    label = _command(commands, "label", "add a label set to a cache", "mine.csv --name mine")
    label.add_argument("file", metavar="FILE", help="CSV, TSV, JSON lines or parquet with a column key or id; or a URL")
    label.add_argument("--name", required=True, metavar="NAME", help="name of the label set")
    label.add_argument(
        "--max-problems",
        type=_amount,
        default=0.01,
        metavar="X",
        help="how many rows may lack features or text, or be doubled; below 1 a fraction (default 0.01)",
    )
    compacting = _command(
        commands,
        "compact",
        "copy a cache without superseded rows and without utterances that no current label set names",
        "caches/compacted",
    )
    compacting.add_argument("folder", type=Path, metavar="FOLDER", help="new folder, or an interrupted copy")
    push = _command(
        commands, "push", "upload a complete cache to a hub or a bucket", "hf://datasets/OWNER/NAME --licence cc-by-4.0"
    )
    push.add_argument(
        "url", metavar="URL", help="hf://datasets/OWNER/NAME[/FOLDER], modelscope://datasets/…, s3://BUCKET/…"
    )
    push.add_argument(
        "--licence", metavar="ID", help="license named in the dataset card, such as cc-by-4.0 (required by a hub)"
    )
    add_options(push)
    pull = _command(
        commands,
        "pull",
        "copy a cache from a URL or a folder into a folder and verify it",
        "shared/name",
        "hf://datasets/OWNER/NAME",
    )
    pull.add_argument("folder", type=Path, metavar="FOLDER", help="destination folder")
    return top


def main(argv: Sequence[str]) -> int | None:
    args = parser().parse_args(argv)
    commands = (_info, _find, _ls, _head, _verify, _labels, _label, _compact, _push, _pull)
    status: int | None = next(command for command in commands if command.__name__ == f"_{args.command}")(args)
    return status


def _command(
    commands: Any,
    name: str,
    summary: str,
    example: str = "",
    cache: str = "caches/speech-1800/whisper-base-L6-tight-f16-4e5f6a7b",
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[:1].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the default formatter would wrap long paths
        epilog=f"example:\n  python -m shards {name} {cache} {example}".rstrip(),
    )
    command.add_argument("cache", type=_path_or_url, metavar="CACHE", help="a cache folder or its URL")
    return command


def _add_find(commands: Any) -> None:
    summary = "list the caches below a folder, in a bucket, or in the datasets of an owner on the Hugging Face hub"
    find = commands.add_parser(
        "find",
        help=summary,
        description=f"{summary[:1].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m shards find caches --encoder whisper\n  python -m shards find 'hf://OWNER/*'",
    )
    find.add_argument(
        "root", type=_path_or_url, nargs="?", default=Path("caches"), metavar="ROOT", help="a folder or URL (caches)"
    )
    find.add_argument("--encoder", default="", metavar="WORD", help="only caches whose encoder's name contains WORD")
    find.add_argument("--corpus", default="", metavar="WORD", help="only caches whose corpus's name contains WORD")
    find.add_argument("--feature-id", default="", metavar="ID", help="only caches whose feature id begins with ID")
    find.add_argument("--labels", default="", metavar="NAME", help="only caches with a label set of this name")
    find.add_argument("--json", action="store_true", help="print a JSON object per cache")


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument("--labels", metavar="LABELS", help="name, id or file of a label set (default source)")
    command.add_argument("--generation", type=_count, metavar="N", help="last generation to read (default newest)")


def _path_or_url(text: str) -> str | Path:
    return text if is_url(text) else Path(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a non-negative integer, got '{text}'")
    return int(text)


def _amount(text: str) -> float:
    try:
        amount = float(text)
        if not 0 <= amount < float("inf"):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number from 0 on, got '{text}'") from None
    return amount


def _info(args: argparse.Namespace) -> None:
    import json

    from shards.inspect.info import describe_cache, format_info

    info = describe_cache(args.cache)
    print(json.dumps(info, indent=2, ensure_ascii=False) if args.json else "\n".join(format_info(info)))


def _find(args: argparse.Namespace) -> int:
    import json

    from shards.share.find import find_caches

    table: list[Sequence[str]] = [
        ("cache", "corpus", "encoder", "layer", "codec", "feature id", "utterances", "hours", "labels")
    ]
    wanted = {name: getattr(args, name) for name in ("encoder", "corpus", "feature_id", "labels")}
    count = 0
    for each in find_caches(args.root):
        if not each.matches(**wanted):
            continue
        count += 1
        if args.json:
            print(json.dumps(each.to_json(), ensure_ascii=False), flush=True)
        elif each.problem:
            table.append((each.path, each.problem, *[""] * 7))
        else:
            sizes = f"{each.utterances:,}", f"{each.hours:.2f}"
            names = each.path, each.corpus, each.encoder, str(each.layer), each.codec, each.feature_id[:8]
            table.append((*names, *sizes, " ".join(each.labels)))
    if not count:
        print(f"no cache {'fits' if any(wanted.values()) else 'found'} below '{args.root}'", file=sys.stderr)
        return 1
    if not args.json:
        _print_table(table)
    return 0


def _ls(args: argparse.Namespace) -> None:
    from shards.read.cache import Cache

    cache = Cache.open(args.cache, args.labels, generation=args.generation, variants=args.variants)
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

    cache = Cache.open(args.cache, args.labels, generation=args.generation)
    for index in range(min(args.n, len(cache))):
        row, x = cache.row(index), cache.features(index).astype(np.float64)
        seconds = row["samples"] / cache.spec.sampling_rate
        print(
            f"{row['key']}  {row['frames']} frames × {cache.spec.channels}  {seconds:.2f} s  {_printable(row['text'])}"
        )
        if cache.spec.codebook_size:
            values = f"{len(np.unique(x)):,} of {cache.spec.codebook_size:,} values"
            print(f"  codes {int(x.min())} to {int(x.max())}, {values}")
            continue
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
    _print_table(table)
    if len(shown) < len(problems):
        print(f"… and {len(problems) - len(shown)} more (show them with --all)")
    raise WorkFailed(f"'{args.cache}' is not valid: {len(problems)} problem{'s'[: len(problems) != 1]}")


def _compare_audio(cache: str | Path, folder: str) -> list[Problem]:
    from shards.inspect.audio import compare_audio

    with _progress_bar("audio", " files") as progress:
        return compare_audio(cache, Path(folder) if folder else None, progress)


def _labels(args: argparse.Namespace) -> None:
    from shards.labels.join import differences, join
    from shards.read.cache import open_features
    from shards.read.labels import label_index, open_stored

    _, features = open_features(args.cache)
    index, (_, keys) = label_index(features), features.current()
    table = [("name", "id", "rows", "utterances", "made", "columns", "from", "changes")]
    before: dict[str, LabelSet] = {}
    for entry in index.sets:
        labels = open_stored(entry, features)
        covered = len(set(join(labels.table, keys)[1].tolist()))
        mark = "*" if index.current(entry.name) is entry else ""  # the current set of its name
        changes = differences(before[entry.name], labels) if entry.name in before else "-"
        sizes = f"{entry.rows:,}", f"{covered:,} of {len(keys):,}"
        columns = " ".join(labels.table.column_names)
        table.append((entry.name + mark, entry.id[:8], *sizes, entry.made, columns, entry.origin or "-", changes))
        before[entry.name] = labels
    _print_table(table)


def _label(args: argparse.Namespace) -> None:
    import errno

    from shards.commit.folder import add_labels
    from shards.errors import UserError
    from shards.labels.join import enforce
    from shards.labels.store import check_set_name
    from shards.read.cache import open_features
    from shards.read.labels import check_label_file

    instead = f"pass `labels={args.file}` to training instead"
    if is_url(args.cache):
        raise UserError(f"'{args.cache}' is a URL, and label sets are added to folders only: {instead}")
    check_set_name(args.name)
    _, features = open_features(args.cache)
    report = check_label_file(args.file, features)
    enforce(report, args.max_problems, f"'{args.file}'", "--max-problems")
    try:
        entry = add_labels(features.layout, report.table, args.name, args.file)
    except UserError as error:
        if isinstance(cause := error.__cause__, OSError) and cause.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(f"'{args.cache}' cannot be written ({cause.strerror}): {instead}") from None
        raise
    utterances = len(features.current()[1])
    matched = utterances - report.unlabelled.count
    print(f"label set '{entry.name}' {entry.id[:8]}: {entry.rows:,} rows with {', '.join(report.table.column_names)}")
    print(f"{matched:,} of {utterances:,} utterances have labels (joined by {report.joined_by})")
    for problem in report.problems():
        print(_printable(problem))


def _compact(args: argparse.Namespace) -> None:
    from shards.commit.compact import compact
    from shards.errors import UserError

    if is_url(args.cache):
        raise UserError(f"'{args.cache}' is a URL: download it with `python -m shards pull`, then compact that folder")
    with _progress_bar("compact", " utterances") as progress:
        done = compact(args.cache, args.folder, progress)
    print(
        f"compacted: {args.folder} ({done.utterances:,} utterances; left out {done.superseded:,} superseded and "
        f"{done.unlabeled:,} unlabeled rows; {done.freed:,} bytes smaller)"
    )


def _push(args: argparse.Namespace) -> None:
    from shards.errors import UserError
    from shards.share.hub import parse_dataset_url
    from shards.share.publish import HUBS, is_agreed
    from shards.share.transfer import describe_push, push

    if is_url(args.cache):
        raise UserError(f"'{args.cache}' is a URL: download it with `python -m shards pull`, then push that folder")

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.url.startswith(HUBS) and not args.dry_run:
        parse_dataset_url(args.url, args.licence)
    if not is_agreed(args, args.url, describe_push(args.cache)):
        return
    with _progress_bar("push", "B") as progress:
        push(args.cache, args.url, args.licence, progress, log, args.private)
    print(f"pushed: {args.url} (records, tables and sizes verified at the destination)")


def _pull(args: argparse.Namespace) -> None:
    from shards.share.transfer import pull

    with _progress_bar("pull", "B") as progress:
        pull(str(args.cache), args.folder, progress)
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


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    lines = [[_printable(cell) for cell in row] for row in rows]
    widths = [*(max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)), 0]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _printable(text: str) -> str:
    """Replace control characters, so that text from a cache cannot control the terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


if __name__ == "__main__":
    sys.exit(run_command(main))
