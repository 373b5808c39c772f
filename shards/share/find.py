"""Finds caches below a folder, in a bucket, or in the datasets of an owner on the Hugging Face hub.

    python -m shards find caches
    python -m shards find s3://bucket/caches --encoder whisper
    python -m shards find 'hf://OWNER/*' --feature-id 4e5f6a7b

A cache is a folder with ``CACHE.json``, or with ``plans/000.parquet``, if its extraction is not finished; on a hub
only complete ones are found. Folders inside a cache are not searched. What a hub or a bucket
lists is read as names only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.format.layout import Layout
from shards.inspect.info import describe_cache
from shards.remote.client import Remote, is_url
from shards.remote.object_store import SCHEMES, connect, translate_errors
from shards.share.hub import hub_errors

MAX_DEPTH = 8  # levels below the root that are searched
HUB_URL = re.compile(r"hf://(?:datasets/)?(?P<owner>[\w.-]+)/(?P<name>[\w.-]+|\*)(?:/(?P<folder>[^@]+))?")
DATASET_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Found:
    """A cache, complete or not, or one that cannot be read.

    Attributes:
        path: folder or URL.
        encoder: last part of the encoder's reference; "" if it is not known yet.
        corpus: name of its source.
        labels: names of its label sets.
        hours: hours of audio.
        problem: why there is no more to tell, "" for a complete cache.
    """

    path: str
    encoder: str = ""
    layer: int | None = None
    codec: str = ""
    corpus: str = ""
    feature_id: str = ""
    utterances: int = 0
    hours: float = 0.0
    labels: list[str] = field(default_factory=list)
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)

    def matches(self, encoder: str = "", corpus: str = "", feature_id: str = "", labels: str = "") -> bool:
        """Return whether names contain the given words, the feature id begins so, and a label set has that name."""
        return (
            encoder.lower() in self.encoder.lower()
            and corpus.lower() in self.corpus.lower()
            and self.feature_id.startswith(feature_id.lower())
            and (not labels or labels in self.labels)
        )


def find_caches(root: str | Path) -> Iterator[Found]:
    """Yield the caches below ``root`` in the order of their paths.

    Args:
        root: a folder; a folder in a bucket (``s3://``, ``gs://``, ``az://``); ``hf://OWNER/*`` or
            ``hf://datasets/OWNER/NAME[/FOLDER]``.

    Raises:
        UserError: there is no such folder, bucket or owner, or ``root`` is a web server, which cannot list files.
    """
    for path in sorted(_paths(root)):
        yield _describe(path)


def _describe(path: str) -> Found:
    try:
        about = describe_cache(path)
    except UserError as error:
        return Found(path, problem=str(error))
    counts = about["counts"]
    if not about["complete"]:
        return Found(path, problem=f"not finished: {counts['committed']} of {counts['shards']} shards")
    spec, provenance = about["spec"], about["provenance"]
    encoder, source = (part if isinstance(part, dict) else {} for part in map(provenance.get, ("encoder", "source")))
    reference = str(encoder.get("reference", "")).partition("@")[0].rstrip("/")
    return Found(
        path,
        encoder=re.split(r"[/:]", reference)[-1] or spec["family"],
        layer=spec["layer"],
        codec=spec["codec"],
        corpus=str(source.get("name", "")),
        feature_id=about["feature_id"],
        utterances=counts["utterances"] - counts.get("superseded", 0) - counts.get("variants", 0),
        hours=about["hours"],
        labels=sorted({entry["name"] for entry in about["labels"]}),
    )


def _paths(root: str | Path) -> Iterator[str]:
    if not is_url(root):
        return _in_folder(Path(root))
    url = str(root).rstrip("/")
    scheme = url.partition("://")[0]
    if scheme in SCHEMES:
        return _in_bucket(url)
    if scheme == "hf":
        return _on_hub(url)
    raise UserError(f"the files at '{url}' cannot be listed: name a folder, a bucket or hf://OWNER/*")


def _in_folder(root: Path) -> Iterator[str]:
    if not root.is_dir():
        raise UserError(f"'{root}' is not a folder: name one that has caches below it, such as caches")
    for folder, names, _ in os.walk(root):  # links are not followed
        layout, depth = Layout(Path(folder)), len(Path(folder).relative_to(root).parts)
        if layout.cache.is_file() or layout.plan(0).is_file():
            names.clear()
            yield folder
        elif depth >= MAX_DEPTH:
            names.clear()


def _in_bucket(url: str) -> Iterator[str]:
    Remote(url)  # refuses a URL with a password
    store = connect(url)

    def search(prefix: str, depth: int) -> Iterator[str]:
        try:
            with translate_errors(url):
                listed = store.list_with_delimiter(prefix or None)
        except OSError as error:
            raise UserError(f"'{url}' cannot be listed ({error}): check the name and the credentials") from None
        names = {str(each["path"]).removeprefix(prefix).strip("/") for each in listed["objects"]}
        folders = [str(each).strip("/") for each in listed["common_prefixes"]]
        if "CACHE.json" in names or f"{prefix}/plans".strip("/") in folders:
            yield f"{url}/{prefix}".rstrip("/")
        elif depth < MAX_DEPTH:
            for folder in folders:
                yield from search(folder, depth + 1)

    return search("", 0)


def _on_hub(url: str) -> Iterator[str]:
    match = HUB_URL.fullmatch(url)
    if match is None:
        raise UserError(f"'{url}' names no owner or dataset: write hf://OWNER/*, or hf://datasets/OWNER/NAME")

    from huggingface_hub import HfApi

    api, folder = HfApi(), f"{match['folder']}/" if match["folder"] else ""
    try:
        if match["name"] == "*":
            names = sorted(str(each.id) for each in api.list_datasets(author=match["owner"]))
        else:
            names = [f"{match['owner']}/{match['name']}"]
        listed = {name: api.list_repo_files(name, repo_type="dataset") for name in names if DATASET_ID.fullmatch(name)}
    except hub_errors() as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the datasets of '{url}' cannot be listed ({reason}): check the name, `hf auth login` and the connection"
        ) from None
    for name, paths in listed.items():
        for path in paths:
            above, _, last = path.rpartition("/")
            if last == "CACHE.json" and path.startswith(folder):
                yield f"hf://datasets/{name}/{above}".rstrip("/")
