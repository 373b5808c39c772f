"""Generates the dataset card (``README.md``) of a published cache.

Takes the description of a complete cache (``shards/inspect/info.py``), its URL and a license; returns Markdown with a
YAML header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set
from typing import Any
from urllib.parse import quote

import yaml

from shards.format.records import CacheInfo

LIST_MARK = "<!-- list of caches, written by earshard -->"
LIST_END = "<!-- end of the list -->"
CACHE_MARK = "Extracted with earshard; the audio itself is not included."  # in the card of a cache
_LIST = re.compile(rf"\n*{LIST_MARK}.*?{LIST_END}\n*", re.DOTALL)
_CARD = re.compile(r"---\n(.*?)\n---\n(.*)", re.DOTALL)


def dataset_card(description: dict[str, Any], url: str, license_id: str, folder: str, base_url: str) -> str:
    """Return the text of ``README.md``.

    Args:
        description: the result of :func:`shards.inspect.info.describe_cache`.
        url: destination of the cache, ``hf://datasets/…``.
        license_id: a license identifier known to the hub, such as ``cc-by-4.0``, or ``other``.
        folder: folder of the cache in its repository; "" is the root.
        base_url: URL from which the files of the repository are downloaded.
    """
    spec = description["spec"]
    source = description["provenance"].get("source")
    corpus = str(source.get("name", "a speech corpus")) if isinstance(source, dict) else "a speech corpus"
    title = f"{spec['family']} layer {spec['layer']} features of {corpus}"
    tars = f"{folder}/shards/*.tar" if folder else "shards/*.tar"
    return f"""---
{_header(title, license_id, [{"config_name": "default", "data_files": tars}])}
---

# {title}

{_what(description)}

## Usage

{_opening(description, url, f"{base_url}/{tars}")}

## Features

```json
{json.dumps(spec, indent=2, ensure_ascii=False)}
```

Caches with the same feature id contain comparable features. The file formats are documented in earshard's
`docs/format.md`.

## License

`{license_id}`, as stated by the publisher. Features and transcripts are derived from the corpus, {corpus}; its terms
also apply to them.
"""


def list_card(caches: dict[str, CacheInfo], url: str, license_id: str) -> str:
    """Return the card at the root of a repository whose folders are ``caches``; each is a subset of the hub's viewer.

    Arguments as in :func:`dataset_card`; the license is that of the newest cache.
    """
    name = url.rpartition("/")[2].partition("@")[0]
    return f"""---
{_header(name, license_id, _configs(caches))}
---
{LIST_MARK}

# {name}

Speech features and transcripts, ready for training an audio projector or any other model. Each folder is one cache,
with a card of its own:

{_rows(caches)}

```python
import shards

data = shards.open("{url}/{next(iter(caches))}")
```
"""


def with_list(card: str, caches: dict[str, CacheInfo]) -> str | None:
    """Return the card of the cache at the root of a repository with a list of the caches in its folders.

    The rest of the card stays as it is, except for the formatting of its header.

    Args:
        card: text of the card, with or without an earlier list.
        caches: as in :func:`list_card`.

    Returns:
        None if ``card`` has no header that can be read.
    """
    found = _CARD.fullmatch(card)
    try:
        header = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError):  # such as a date that does not exist
        header = None
    if found is None or not isinstance(header, dict):
        return None
    before = header.get("configs")
    own = [each for each in before if isinstance(each, dict)] if isinstance(before, list) else []
    kept = [each for each in own if not str(each.get("data_files")).endswith("/shards/*.tar")]
    header["configs"] = [*kept, *_configs(caches, {str(each.get("config_name")) for each in kept})]
    body = _LIST.sub("\n", found[2]).rstrip()
    what = f"## Caches in folders of this repository\n\nEach has a card of its own.\n\n{_rows(caches)}"
    return f"---\n{_yaml(header)}\n---\n{body}\n\n{LIST_MARK}\n\n{what}\n\n{LIST_END}\n"


def _configs(caches: dict[str, CacheInfo], taken: Set[str] = frozenset()) -> list[dict[str, str]]:
    """Return a subset of the hub's viewer for each of ``caches``, with names that differ from each other."""
    found: dict[str, str] = {}
    for folder in caches:
        name = re.sub(r"[^\w.-]+", "-", folder)
        while name in taken or name in found:
            name += "-"
        found[name] = f"{folder}/shards/*.tar"
    return [{"config_name": name, "data_files": tars} for name, tars in found.items()]


def _rows(caches: dict[str, CacheInfo]) -> str:
    rows = "\n".join(
        f"| [`{folder}`]({quote(folder)}/README.md) | {info.spec['family']}, layer {info.spec['layer']}, "
        f"{info.spec['codec']} | {info.counts['utterances']:,} | `{info.feature_id[:16]}` |"
        for folder, info in caches.items()
    )
    return f"| cache | features | utterances | feature id |\n|---|---|---|---|\n{rows}"


def _header(title: str, license_id: str, configs: list[dict[str, str]]) -> str:
    """Return the metadata of the card as YAML."""
    tree = {
        "license": license_id,
        "pretty_name": title,
        "task_categories": ["automatic-speech-recognition", "feature-extraction"],
        "tags": ["audio", "speech", "webdataset", "earshard"],
        "configs": configs,
    }
    return _yaml(tree)


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).strip()


def _what(description: dict[str, Any]) -> str:
    spec, counts, error = description["spec"], description["counts"], description["codec_error"]
    return f"""Speech features and transcripts, ready for training an audio projector or any other model.
Each utterance was encoded once with a frozen {spec["family"]} encoder. The features are the output of layer
{spec["layer"]}: {spec["channels"]} channels, {spec["sampling_rate"] / spec["hop"]:g} frames per second, stored as
`{spec["codec"]}`. {CACHE_MARK}

| | |
|---|---|
| utterances | {counts["utterances"]:,} of {counts["planned"]:,} planned ({counts["failures"]:,} failed) |
| audio | {description["hours"]:.2f} hours |
| frames | {counts["frames"]:,} |{_variants(counts)}
| shards | {counts["shards"]:,}, {counts["bytes"] / 1e9:.3g} GB |
| label sets | {_label_sets(description)} |
| generations | {len(description["generations"])}{_superseded(counts)} |
| codec error | mean {error["mean"]:.2e}, worst {error["max"]:.2e} (relative RMS) |
| feature id | `{description["feature_id"]}` |
| manifest id | `{description["manifest_id"]}` |"""


def _label_sets(description: dict[str, Any]) -> str:
    current = [entry for entry in description["labels"] if entry["current"]]
    return ", ".join(f"`{entry['name']}` ({entry['rows']:,} rows)" for entry in current) or "none"


def _variants(counts: dict[str, Any]) -> str:
    return f"\n| of them variants with changed audio | {counts['variants']:,} |" if counts.get("variants") else ""


def _superseded(counts: dict[str, Any]) -> str:
    return f", {counts['superseded']:,} utterances extracted again since" if counts.get("superseded") else ""


def _opening(description: dict[str, Any], url: str, tars: str) -> str:
    every = tars.replace("*", f"{{000000..{description['counts']['shards'] - 1:06d}}}")
    return f"""```python
import shards

data = shards.open("{url}")
print(len(data), data[0]["features"].shape, data[0]["text"])
```

`shards.open(URL, labels=NAME)` takes another label set, or a file of your own labels, joined by key.
Shards are downloaded on demand and verified against their sha256. `python -m shards pull {url} FOLDER` downloads and
verifies all of them.

The shards are plain WebDataset tars (`<key>.npy`, `<key>.json`) and can be read without earshard:

```python
import webdataset as wds

data = wds.WebDataset("{every}", shardshuffle=False).decode()
sample = next(iter(data))  # sample["npy"]: features as stored; sample["json"]["text"]: transcript
```"""
