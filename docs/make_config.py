"""Write docs/config.md from the typed configuration models: every key, its values, its default, what it is about.

    make docs          (python docs/make_config.py)

In: the models and the strings below their fields. Out: the page; a test compares it with what this script writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from pipeline.config import ExtractConfig
from shards.config.fields import Key, KeyGroup, groups, old_names, submodels
from train.config.model import KindConfig, MlpConfig
from train.config.train import TrainConfig
from train.sweeps.config import SweepConfig

PAGE = Path(__file__).resolve().with_name("config.md")
HEAD = """\
# Configuration

This page is written by `make docs` from the docstrings in the code. Set a key in the YAML file given by `--config`, or
on the command line as `key=value` with dots (`lm.lora.rank=16`), which overrides the file. Unknown keys are errors.
YAML anchors and aliases are not supported.

```
python -m train config --config configs/train/demo.yaml lr=5e-4             # check, and print the keys that are set
python -m train config --print --config configs/train/demo.yaml lr=5e-4     # print every key
```
"""
RENAMED = """\
## Renamed keys

The old names are still accepted. Setting a key by both names is an error.

| old name | name |
|---|---|"""
PARTS: list[tuple[str, str, type[BaseModel]]] = [
    ("Extraction", "`python -m pipeline extract`, files in `configs/extract/`", ExtractConfig),
    ("Training", "`python -m train fit`, files in `configs/train/`", TrainConfig),
    ("Sweeps", "`python -m train sweep`, files in `configs/sweep/`", SweepConfig),
]


def page() -> str:
    lines = [HEAD]
    for title, about, model in PARTS:
        lines += [f"## {title}", "", f"{about}.", ""]
        lines += [line for group in groups(model) for line in section(group, model)]
    lines += [RENAMED]
    for _, _, model in PARTS:
        old = {
            prefix + name: prefix + new for prefix, each in submodels(model) for name, new in old_names(each).items()
        }
        lines += [f"| `{name}` | `{new}` |" for name, new in old.items()]
    return "\n".join(lines).rstrip() + "\n"


def section(group: KeyGroup, top: type[BaseModel]) -> Iterator[str]:
    """The heading, the docstring and the table of one model."""
    kind = group.model.model_fields.get("kind") if issubclass(group.model, KindConfig) else None
    keys = group.keys
    if group.model is not top:
        yield f"### `{group.prefix.removesuffix('.')}`{f' of kind `{kind.default}`' if kind else ''}"
        yield ""
        yield " ".join((group.model.__doc__ or "").split())
        yield ""
    if kind is not None:  # the keys that all kinds share stand with the first of them, last
        shared = [key for key in keys if key.name.removeprefix(group.prefix) in KindConfig.model_fields]
        keys = [key for key in keys if key not in shared and key.name != f"{group.prefix}kind"]
        if group.model is MlpConfig:
            yield f"{' and '.join(f'`{key.name}`' for key in shared)} are keys of every kind."
            yield ""
            keys += shared
    yield "| key | values | default | |"
    yield "|---|---|---|---|"
    for key in keys:
        yield row(key)
    yield ""


def row(key: Key) -> str:
    default = "required" if key.default == "required" else f"`{key.default}`"
    cells = [f"`{key.name}`", key.values, default, key.about]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
