"""``python -m train probe``: the probes of all layers, ``probe.json``, ``probe.html`` and a table.

```
caches -> rows that all have -> folds of whole speakers -> columns: logistic or ridge regression, cross-validated
                                                        -> words: linear CTC over characters, one fold held out
```
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.errors import UserError
from shards.files import atomic_write, translate_os_errors
from train.distributed.device import flushed_denormals
from train.probes.data import Column, Layers, choose_columns, make_folds, open_layers
from train.probes.linear import FOLDS, Floats, Ints, Score, classify, interval, regress
from train.probes.words import character_errors
from train.report.charts import Curve, chart
from train.report.page import NUM_COLORS, render
from train.runs.folder import write_json

JSON, PAGE = "probe.json", "probe.html"
WORDS = "words"
ACCURACY, R2, CORRECT = "accuracy", "R²", "1 − CER"


@flushed_denormals()
def probe(
    caches: Sequence[str],
    out: Path,
    *,
    labels: str | None = None,
    columns: Sequence[str] | None = None,
    words: bool = True,
    by: str = "speaker",
    pool: int = 1,
    steps: int,
    limit: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Probe the caches, one per layer, write ``probe.json`` and ``probe.html`` into ``out`` and return the former.

    Args:
        labels: label set or file, as in training.
        columns: label columns; ``None`` is all of the label set.
        by: ``speaker``: no speaker is on both sides of a fold, except for the column ``speaker``; ``utterance``.
        pool: neighbouring frames that are averaged before the probe for words.
        steps: steps of the probe for words.
        limit: the most utterances.

    Raises:
        UserError: ``out`` has a probe, caches cannot be joined, or there is nothing to probe.
    """
    if (out / JSON).exists():
        raise UserError(f"'{out}' already holds a probe: give another folder with --out, or delete it")
    layers = open_layers(caches, labels, limit, seed)
    chosen, notes = choose_columns(layers, columns)
    texts = [text.casefold() for text in layers.column("text")]
    keys, speakers = layers.column("key"), layers.column("speaker")
    groups = keys
    if by == "speaker":
        if len(set(speakers) - {""}) >= FOLDS:
            groups = [f"speaker {one}" if one else f"key {key}" for one, key in zip(speakers, keys, strict=True)]
        else:
            notes.append(f"fewer than {FOLDS} speakers are known: held-out utterances may be of a speaker seen before")
    of_one_speaker = {column.name for column in chosen if _names_speakers(column, speakers)}
    notes += [
        f"each value of '{name}' is of one speaker, so it is held out by utterance"
        for name in sorted(of_one_speaker - {"speaker"})
    ]
    words = words and sum(map(bool, texts)) >= FOLDS
    if not chosen and not words:
        raise UserError(
            f"there is nothing to probe in '{layers.caches[0].location}': give labels with a text or columns"
        )
    names = [_name(layers, index) for index in range(len(caches))]
    results: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        vectors = layers.vectors(index) if chosen else torch.empty(0)
        for column in chosen:
            own = keys if column.name in of_one_speaker else groups
            score, kind = _column_score(vectors, column, [own[row] for row in column.rows.tolist()], seed)
            results.append(_result(name, column.name, kind, score, len(column.rows), len(column.names)))
        if words:
            score, rows = _words_score(layers, index, texts, groups, pool, steps, seed)
            results.append(_result(name, WORDS, CORRECT, score, rows, 0))
    notes += [f"{c.left_out:,} utterances have no or a rare '{c.name}' and are left out" for c in chosen if c.left_out]
    found = {
        "caches": [
            {"layer": name, "feature_id": cache.feature_id, "manifest_id": cache.manifest_id, "codec": cache.spec.codec}
            for name, cache in zip(names, layers.caches, strict=True)
        ],
        "labels": f"{layers.caches[0].labels.name}-{layers.caches[0].labels.id[:8]}",
        "utterances": len(layers.rows),
        "held out by": by,
        "pool": pool,
        "steps": steps,
        "seed": seed,
        "notes": [*layers.notes, *notes],
        "results": results,
    }
    with translate_os_errors("writing a probe", out):
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / PAGE, page(found, out.name).encode(), str(os.getpid()))
    write_json(out / JSON, found)
    return found


def table(found: dict[str, Any]) -> str:
    """Format the results for a terminal: a line per layer, a column per probe, with its interval."""
    probes = _probes(found)
    heads = [f"{name} ({kind})" for name, kind in probes]
    rows = [["layer", *heads]]
    for layer in _layers(found):
        rows.append([layer, *(_cell(_find(found, layer, name)) for name, _ in probes)])
    rows.append(["chance", *(f"{_find(found, _layers(found)[0], name)['chance']:.3f}" for name, _ in probes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def page(found: dict[str, Any], title: str) -> str:
    """Return the page: a chart with a curve per probe over the layers, and the table. It has no scripts."""
    probes, layers = _probes(found), _layers(found)
    curves = [
        Curve(
            f"{name} ({kind})",
            f"c{index % NUM_COLORS}",
            [(float(place), max(0.0, _find(found, layer, name)["value"])) for place, layer in enumerate(layers, 1)],
            dots=True,
        )
        for index, (name, kind) in enumerate(probes)
    ]
    rows = [[layer, *(_cell(_find(found, layer, name)) for name, _ in probes)] for layer in layers]
    rows.append(["chance", *(f"{_find(found, layers[0], name)['chance']:.3f}" for name, _ in probes)])
    return render(
        "probe.html.j2",
        title=title,
        utterances=found["utterances"],
        best=[(name, kind, _best(found, name)) for name, kind in probes],
        chart=chart(curves, "Score of each probe by layer", "cache, in the order given", "score"),
        headings=["layer", *(f"{name} ({kind})" for name, kind in probes)],
        rows=rows,
        notes=found["notes"],
        features={each["layer"]: f"{each['feature_id'][:8]}, codec {each['codec']}" for each in found["caches"]},
    )  # fmt: skip


def _column_score(vectors: torch.Tensor, column: Column, groups: Sequence[str], seed: int) -> tuple[Score, str]:
    x, folds = vectors[torch.from_numpy(column.rows)], make_folds(groups, seed)
    if column.names:
        right = (classify(x, column.classes, folds) == column.classes).astype(np.float64)
        chance = float(np.bincount(column.classes).max() / len(column.rows))  # the best constant guess
        return Score(*interval(right, np.ones_like(right), groups, seed), chance), ACCURACY
    predicted_values, mean = regress(x, column.values, folds)
    explained: Floats = (column.values - mean) ** 2 - (column.values - predicted_values) ** 2
    return Score(*interval(explained, (column.values - mean) ** 2, groups, seed), 0.0), R2


def _names_speakers(column: Column, speakers: Sequence[str]) -> bool:
    """Return whether each class is of one speaker: such classes cannot be known of a speaker never seen."""
    pairs = {(value, speakers[row]) for value, row in zip(column.values.tolist(), column.rows.tolist(), strict=True)}
    known = all(speaker for _, speaker in pairs)
    return column.name == "speaker" or (bool(column.names) and known and len(pairs) == len(column.names))


def _words_score(
    layers: Layers, index: int, texts: Sequence[str], groups: Sequence[str], pool: int, steps: int, seed: int
) -> tuple[Score, int]:
    rows = [row for row, text in enumerate(texts) if text]
    folds: Ints = make_folds([groups[row] for row in rows], seed)
    train = [row for row, fold in zip(rows, folds, strict=True) if fold]
    test = [row for row, fold in zip(rows, folds, strict=True) if not fold]
    wrong = character_errors(lambda row: layers.features(index, row), texts, train, test, pool, steps)
    sizes = np.array([len(texts[row]) for row in test], dtype=np.float64)
    return Score(*interval(sizes - wrong, sizes, [groups[row] for row in test], seed), 0.0), len(test)


def _result(layer: str, name: str, kind: str, score: Score, rows: int, classes: int) -> dict[str, Any]:
    return {"layer": layer, "probe": name, "score": kind, **vars(score), "rows": rows, "classes": classes}


def _name(layers: Layers, index: int) -> str:
    """Return a name that is unique among the caches: the layer if all differ in it, else the name of the folder."""
    numbers = [cache.spec.layer for cache in layers.caches]
    return f"L{numbers[index]}" if len(set(numbers)) == len(numbers) else layers.caches[index].path.name


def _layers(found: dict[str, Any]) -> list[str]:
    return [each["layer"] for each in found["caches"]]


def _probes(found: dict[str, Any]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((each["probe"], each["score"]) for each in found["results"]))


def _find(found: dict[str, Any], layer: str, name: str) -> dict[str, Any]:
    return next(each for each in found["results"] if (each["layer"], each["probe"]) == (layer, name))


def _best(found: dict[str, Any], name: str) -> str:
    own = (each for each in found["results"] if each["probe"] == name)
    values: dict[str, float] = {each["layer"]: float(each["value"]) for each in own}
    return max(values, key=lambda layer: values[layer])


def _cell(result: dict[str, Any]) -> str:
    return f"{result['value']:.3f} [{result['low']:.3f}, {result['high']:.3f}]"
