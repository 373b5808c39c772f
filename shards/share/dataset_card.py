"""Generates the dataset card (``README.md``) of a published cache.

Takes the description of a complete cache (``shards/inspect/info.py``), its URL and a license; returns Markdown with a
YAML header.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote

import yaml

from shards.format.records import CacheInfo

LIST_MARK = "<!-- list of caches, written by earshard -->"


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
    configs = [{"config_name": _config_name(folder), "data_files": f"{folder}/shards/*.tar"} for folder in caches]
    rows = "\n".join(
        f"| [`{folder}`]({quote(folder)}/README.md) | {info.spec['family']}, layer {info.spec['layer']}, "
        f"{info.spec['codec']} | {info.counts['utterances']:,} | `{info.feature_id[:16]}` |"
        for folder, info in caches.items()
    )
    name = url.rpartition("/")[2].partition("@")[0]
    return f"""---
{_header(name, license_id, configs)}
---
{LIST_MARK}

# {name}

Speech features and transcripts, ready for training an audio projector or any other model. Each folder is one cache,
with a card of its own:

| cache | features | utterances | feature id |
|---|---|---|---|
{rows}

```python
import shards

data = shards.open("{url}/{next(iter(caches))}")
```
"""


def _config_name(folder: str) -> str:
    return re.sub(r"[^\w.-]+", "-", folder)


def _header(title: str, license_id: str, configs: list[dict[str, str]]) -> str:
    """Return the metadata of the card as YAML."""
    tree = {
        "license": license_id,
        "pretty_name": title,
        "task_categories": ["automatic-speech-recognition", "feature-extraction"],
        "tags": ["audio", "speech", "webdataset", "earshard"],
        "configs": configs,
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).strip()


def _what(description: dict[str, Any]) -> str:
    spec, counts, error = description["spec"], description["counts"], description["codec_error"]
    return f"""Speech features and transcripts, ready for training an audio projector or any other model.
Each utterance was encoded once with a frozen {spec["family"]} encoder. The features are the output of layer
{spec["layer"]}: {spec["channels"]} channels, {spec["sampling_rate"] / spec["hop"]:g} frames per second, stored as
`{spec["codec"]}`. Extracted with earshard; the audio itself is not included.

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
