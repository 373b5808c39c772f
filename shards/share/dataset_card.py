"""The README of a published cache: a dataset card, as hubs show it.

In: the description of a complete cache (``shards/inspect/info.py``), its URL and a licence. Out: Markdown with a YAML
header.
"""

from __future__ import annotations

import json
from typing import Any

import yaml


def dataset_card(description: dict[str, Any], url: str, license_id: str, folder: str, base_url: str) -> str:
    """The text of ``README.md``.

    Args:
        description: of :func:`shards.inspect.info.describe_cache`.
        url: where the cache will stand, ``hf://datasets/…``.
        licence: an identifier that the hub knows, such as ``cc-by-4.0``, or ``other``.
        folder: of the cache in its repository, "" for the root.
        web: the address that the repository's files are downloaded from.
    """
    spec = description["spec"]
    source = description["provenance"].get("source")
    corpus = str(source.get("name", "a speech corpus")) if isinstance(source, dict) else "a speech corpus"
    title = f"{spec['family']} layer {spec['layer']} features of {corpus}"
    tars = f"{folder}/shards/*.tar" if folder else "shards/*.tar"
    return f"""---
{_header(title, license_id, tars)}
---

# {title}

{_what(description)}

## Open it

{_opening(description, url, f"{base_url}/{tars}")}

## What the features are

```json
{json.dumps(spec, indent=2, ensure_ascii=False)}
```

Caches with the same feature id hold comparable features. The format of every file is written down in earshard's
`docs/format.md`.

## Licence

`{license_id}`, as stated by who published it. Features and transcripts derive from the corpus, {corpus}: its terms hold
for them, too.
"""


def _header(title: str, license_id: str, tars: str) -> str:
    """YAML that a hub reads."""
    tree = {
        "license": license_id,
        "pretty_name": title,
        "task_categories": ["automatic-speech-recognition", "feature-extraction"],
        "tags": ["audio", "speech", "webdataset", "earshard"],
        "configs": [{"config_name": "default", "data_files": tars}],
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).strip()


def _what(description: dict[str, Any]) -> str:
    spec, counts, error = description["spec"], description["counts"], description["codec_error"]
    return f"""Encoder features of speech and their transcripts, ready to train an audio projector or any other model.
Each utterance went through a frozen {spec["family"]} encoder once; what stands here is its layer {spec["layer"]},
{spec["channels"]} channels, {spec["sampling_rate"] / spec["hop"]:g} frames a second, stored as `{spec["codec"]}`.
Made with earshard; the audio itself is not part of it.

| | |
|---|---|
| utterances | {counts["utterances"]:,} of {counts["planned"]:,} planned ({counts["failures"]:,} could not be read) |
| audio | {description["hours"]:.2f} hours |
| frames | {counts["frames"]:,} |
| shards | {counts["shards"]:,}, {counts["bytes"] / 1e9:.3g} GB |
| codec error | mean {error["mean"]:.2e}, worst {error["max"]:.2e} (relative RMS) |
| feature id | `{description["feature_id"]}` |
| manifest id | `{description["manifest_id"]}` |"""


def _opening(description: dict[str, Any], url: str, tars: str) -> str:
    every = tars.replace("*", f"{{000000..{description['counts']['shards'] - 1:06d}}}")
    return f"""```python
import shards

data = shards.open("{url}")
print(len(data), data[0]["features"].shape, data[0]["text"])
```

Shards are fetched as they are needed and checked by their sha256. `python -m shards pull {url} FOLDER` copies and
verifies all of them.

Without earshard, the shards are plain WebDataset tars (`<key>.npy`, `<key>.json`):

```python
import webdataset as wds

data = wds.WebDataset("{every}", shardshuffle=False).decode()
sample = next(iter(data))  # sample["npy"] holds the features as stored, sample["json"]["text"] the transcript
```"""
