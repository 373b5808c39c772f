"""What a push would publish, and the question before anything becomes public.

Only hubs publish: whether a bucket can be read by others is decided there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError, printable

HUBS = ("hf://", "modelscope://")


@dataclass(frozen=True)
class Publication:
    """What is to be published: files, and further facts about them as (label, text)."""

    files: Sequence[Path]
    facts: Sequence[tuple[str, str]] = ()

    def lines(self) -> list[str]:
        """Return it as lines for people."""
        size = sum(path.stat().st_size for path in self.files)
        rows = [("files", f"{len(self.files):,}"), ("bytes", f"{size:,}"), *self.facts]
        return [printable(f"  {label:<12}  {text}") for label, text in rows]


def add_options(command: argparse.ArgumentParser) -> None:
    """Add ``--private``, ``--dry-run`` and ``--yes``."""
    command.add_argument("--private", action="store_true", help="publish to a private repository of a hub")
    command.add_argument("--dry-run", action="store_true", help="print what would be published, and send nothing")
    command.add_argument("--yes", action="store_true", help="publish to a public repository without a question")


def is_agreed(args: argparse.Namespace, url: str, publication: Publication) -> bool:
    """Print what would be published if it is a dry run, and ask if it would become public; return whether to push.

    Raises:
        UserError: it would become public, and nobody can be asked, or the answer is no; or ``--private`` is given for
            a place that is not a hub.
    """
    if args.private and not url.startswith(HUBS):
        raise UserError(f"--private is for repositories of a hub, and '{url}' is none: set the permissions there")
    visible = "a private repository" if args.private else "a public repository" if url.startswith(HUBS) else "a store"
    told = [f"{'would push' if args.dry_run else 'pushing'} to {url}, {visible}:", *publication.lines()]
    if args.dry_run:
        print("\n".join(told))
        return False
    if args.private or args.yes or not url.startswith(HUBS):
        return True
    if not sys.stdin.isatty():
        raise UserError(
            f"'{url}' would become public: add --yes to publish it, --private for a private repository, or --dry-run "
            "to see what it contains"
        )
    print("\n".join(told), file=sys.stderr)
    print("Anyone can then download it. Publish? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was published: answer y, or add --private for a private repository")
    return True
