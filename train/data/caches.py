"""The caches that a run reads, the utterances it trains on, and the utterances it is evaluated on.

Reads the keys ``caches``, ``labels``, ``extract`` and ``val`` of a run; returns opened caches, the joined rows to train
on, and the held-out :class:`Utterances`. A joined row is an index into the concatenation of all caches, in the order of
the config. Rows without a text are left out. The held-out set is a pure function of the cache, its labels and the
``val`` keys: it is chosen by hashes of speakers, without random state.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shards.errors import UserError
from shards.format.layout import Layout
from shards.format.spec import FeatureSpec
from shards.read.cache import Cache
from shards.read.filters import select_rows
from shards.stream.concat import ConcatCache
from train.config.model import AUDIO_PLACEHOLDER, INSTRUCTION, PromptConfig
from train.config.train import TrainConfig, ValConfig
from train.data.layers import LayeredCaches
from train.data.pins import Pin, growth_note, open_pinned

Rows = npt.NDArray[np.int64]
VAL = "val"  # the split name that an extraction gives to held-out rows


class MissingCache(UserError):
    """No complete cache matches a pattern; an extraction can create it."""


@dataclass(frozen=True)
class Utterances:
    """Selected rows of concatenated caches."""

    caches: Sequence[Cache]
    rows: Rows
    layers: LayeredCaches | None = None  # of the same corpora; ``caches`` holds the first of each

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def specs(self) -> list[FeatureSpec]:
        """The feature specs, one per layer."""
        caches = [self.caches[0]] if self.layers is None else self.layers.joined[0].caches
        return [cache.spec for cache in caches]

    def columns(self, *names: str) -> dict[str, list[Any]]:
        """Return manifest columns of the selected rows, in the order of ``rows``."""
        chunks = {name: [c for cache in self.caches for c in cache.column(name).chunks] for name in names}
        return {name: pa.chunked_array(chunks[name]).take(self.rows).to_pylist() for name in names}

    def features(self, index: int) -> npt.NDArray[Any]:
        """Return the features of the ``index``-th selected utterance: [frames, channels], float16 or float32.

        With several layers, [frames, layers · channels]. Codes are int32.

        Raises:
            IndexError: ``index`` is out of range.
        """
        row = int(self.rows[index])
        if self.layers is not None:
            return self.layers.features(row)
        for cache in self.caches:
            if row < len(cache):
                return cache.features(row)
            row -= len(cache)
        raise IndexError(index)

    def subset(self, count: int | None) -> Utterances:
        """Return at most ``count`` utterances, those with the lowest hashes of keys: a sample of all speakers."""
        if count is None or len(self) <= count:
            return self
        keys = self.columns("key")["key"]
        chosen = sorted(range(len(self)), key=lambda index: _hash(0, f"{keys[index]}\0{self.rows[index]}"))[:count]
        return Utterances(self.caches, self.rows[sorted(chosen)], self.layers)


@dataclass(frozen=True)
class TrainData:
    """The data that a run trains on and is evaluated on."""

    caches: list[Cache]  # with several layers, the first of each corpus
    train_rows: Rows  # joined rows over ``caches``
    held_out: Utterances
    layers: LayeredCaches | None = None  # the corpora of ``caches`` with all their layers
    notes: tuple[str, ...] = ()  # about the caches, for people
    tasks: tuple[str, ...] = ("",)  # of the training rows and the held-out rows, sorted

    def identity(self) -> dict[str, Any]:
        """Return the ids that must be unchanged when a run resumes."""
        return {
            "feature id": self.caches[0].feature_id,
            "manifest ids": [cache.manifest_id for cache in self.caches],
            "label ids": [cache.labels.id for cache in self.caches],
            **({} if self.layers is None else self.layers.identity()),
        }


def open_data(config: TrainConfig, pins: Sequence[Pin] = (), val_pins: Sequence[Pin] = ()) -> TrainData:
    """Open the caches of a run and split their rows into training and held-out rows.

    Args:
        pins, val_pins: what an earlier session of the run read of ``caches`` and of ``val.caches``.

    Raises:
        UserError: a cache is missing or ambiguous, caches differ in feature spec, no utterance is left to train on, the
            run evaluates and no utterance is held out, or the template cannot show the prompts of the rows.
    """
    options: dict[str, Any] = {"extract": config.extract, "max_label_problems": config.max_label_problems}
    caches, layers = open_corpora(config.caches, labels=config.cache_labels, pins=pins, **options)
    require_changes_fit(config, caches[0].spec)
    known = usable_rows(caches, layers)
    masks = np.split(known, np.cumsum(list(map(len, caches)))[:-1])
    held = np.concatenate([held_out_mask(cache, config.val, own) for cache, own in zip(caches, masks, strict=True)])
    train_rows = np.flatnonzero(~held & known)
    held_out_notes = [] if config.val.caches else _held_out_notes(caches, config.val, held)
    if not len(train_rows):
        raise UserError(
            f"no utterances are left to train on in {_names(caches)}, because all are held out: lower val.fraction or "
            "add a cache to caches"
        )
    if config.filter is not None:
        train_rows = np.intersect1d(train_rows, select_rows(caches, config.filter), assume_unique=True)
        if not len(train_rows):
            raise UserError(
                f"no training utterance of {_names(caches)} matches the filter '{config.filter}': relax filter"
            )
    notes = cache_notes(caches, config.cache_labels, bool(pins)) + held_out_notes
    notes += _variant_notes(caches, config.variants)
    if config.val.caches:
        held_out = open_utterances(config.val.caches, labels=config.val.cache_labels, pins=val_pins, **options)
        require_same_layers(held_out, caches, layers)
        notes += cache_notes(held_out.caches, config.val.cache_labels, bool(val_pins))
    else:
        held_out = Utterances(caches, np.flatnonzero(held & known), layers)
    if not len(held_out) and config.eval_every != 0:
        raise UserError(
            f"no utterances are held out in {_names(caches)}: set val.fraction=0.1, name a cache in val.caches, or set "
            "eval_every=0 to train without evaluation"
        )
    held_out = held_out.subset(config.val.limit)
    tasks = sorted(require_prompts(config.prompt, caches, train_rows) | require_prompts(config.prompt, *_of(held_out)))
    return TrainData(caches, train_rows, held_out, layers, tuple(dict.fromkeys(notes)), tuple(tasks))


def require_changes_fit(config: TrainConfig, spec: FeatureSpec) -> None:
    """Raise UserError if the run would change codes in ways that only floats can be changed.

    Masks of frames and ``augment.silence`` are for both.
    """
    changes = {
        "noise_std": config.noise_std,
        "augment.speed": config.augment.speed,
        "augment.channel_masks": config.augment.channel_masks,
    }
    for name, value in changes.items():
        if spec.codebook_size and value:
            raise UserError(
                f"{name}={value} changes values of features, and the caches hold the integer codes of {spec.family}: "
                f"set {name}=0 (augment.time_masks, augment.silence and frame_mask_prob are for codes too)"
            )


def print_notes(notes: Sequence[str]) -> None:
    """Print what a user should know about the caches to standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


def usable_rows(caches: Sequence[Cache], layers: LayeredCaches | None = None) -> npt.NDArray[np.bool_]:
    """Return the mask, bool [rows], of the rows that all layers contain and that have a text.

    Raises:
        UserError: no row has a text.
    """
    known = np.ones(sum(map(len, caches)), dtype=bool) if layers is None else layers.in_all_layers
    texts = np.concatenate([_has_text(cache) for cache in caches])
    if not texts.any():
        raise UserError(
            f"none of the {len(texts):,} utterances of {_names(caches)} has a text: set labels to a label set or file "
            "with the column 'text'"
        )
    usable: npt.NDArray[np.bool_] = known & texts
    return usable


def _has_text(cache: Cache) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = pc.not_equal(pc.utf8_trim_whitespace(cache.column("text")), "").to_numpy()
    return found


def cache_notes(caches: Sequence[Cache], labels: Sequence[str | None], pinned: bool) -> list[str]:
    """Return notes about rows that are left out, and, for ``pinned`` caches, about newer features and labels."""
    notes = []
    for index, cache in enumerate(caches):
        own = f"the labels {cache.labels.name}-{cache.labels.id[:8]} of '{cache.location}'"
        if cache.labels.problems:
            notes.append(f"{own} have {'; '.join(cache.labels.problems)}")
        elif cache.num_missing or cache.num_unlabeled:
            notes.append(
                f"{own}: {cache.num_missing:,} rows have no features, {cache.num_unlabeled:,} utterances have no labels"
            )
        if empty := int((~_has_text(cache)).sum()):
            notes.append(f"{empty:,} rows of '{cache.location}' have no text and are left out")
        grown = growth_note(cache, labels[index]) if pinned else None
        notes += [grown] if grown else []
    return notes


def _variant_notes(caches: Sequence[Cache], limit: int | None) -> list[str]:
    """Return a note for each cache with variants: how many versions of an utterance an epoch draws from."""
    notes = []
    for cache in caches:
        if cache.variants is not None:
            most = int(cache.num_versions(limit).max(initial=1))
            what = (
                f"an epoch reads one of up to {most} versions of each utterance" if most > 1 else "no variants are read"
            )
            notes.append(f"{what} of '{cache.location}'")
    return notes


def require_prompts(prompt: PromptConfig, caches: Sequence[Cache], rows: Rows) -> set[str]:
    """Check that the template can show the prompts of ``rows``, and return the tasks of these rows.

    Raises:
        UserError: rows have prompts and the template has no ``{instruction}``, or a prompt contains ``<|audio|>``.
    """
    joined = ConcatCache(caches)
    if joined.has_column("prompt"):
        prompts = joined.column("prompt", "").take(pa.array(rows))
        if not prompt.has_instruction and pc.any(pc.not_equal(prompts, "")).as_py():
            raise UserError(
                f"the labels of {_names(caches)} have prompts, and prompt.template {prompt.template!r} has no "
                f"{INSTRUCTION} to show them: set prompt.template to chat, slam or a text with {INSTRUCTION}"
            )
        if pc.any(pc.match_substring(prompts, AUDIO_PLACEHOLDER)).as_py():
            raise UserError(
                f"a prompt in the labels of {_names(caches)} contains {AUDIO_PLACEHOLDER}, which belongs into "
                "prompt.template: remove it from the labels"
            )
    if not len(rows) or not joined.has_column("task"):
        return {""} if len(rows) else set()
    return set(joined.column("task", "").take(pa.array(rows)).unique().to_pylist())


def _of(utterances: Utterances) -> tuple[Sequence[Cache], Rows]:
    return utterances.caches, utterances.rows


def require_same_features(found: Cache, wanted: Cache) -> None:
    """Check that both caches have the same feature spec.

    Raises:
        UserError: they differ; the message lists the fields.
    """
    if found.feature_id != wanted.feature_id:
        fields = "; ".join(found.spec.differences(wanted.spec))
        raise UserError(
            f"'{found.path}' has different features from '{wanted.path}' ({fields}): "
            "extract it with the same encoder, layer, window, dtype and codec"
        )


def open_corpora(
    entries: Sequence[str | Sequence[str]],
    extract: Sequence[str] = (),
    *,
    labels: Sequence[str | None] | None = None,
    pins: Sequence[Pin] = (),
    max_label_problems: float = 0.01,
) -> tuple[list[Cache], LayeredCaches | None]:
    """Open the first cache of each corpus and, if the entries list several, the caches of all layers.

    Args:
        entries: a cache, or one cache per layer, for each corpus.
        extract: extraction configs, named in messages.
        labels: the labels of each corpus, which all its layers share; see :meth:`shards.read.cache.Cache.open`.
        pins: what a run read of each corpus.
        max_label_problems: see :meth:`shards.read.cache.Cache.open`.

    Raises:
        UserError: a cache is missing or listed twice, or caches differ in what they must share.
    """
    corpora: list[list[Cache]] = []
    for index, entry in enumerate(entries):
        hint = _extract_hint(len(entries), extract, index)
        own = labels[index] if labels else None
        corpora.append([])
        for layer, pattern in enumerate(_patterns(entry)):
            path = find_cache(pattern)
            if path is None:
                raise MissingCache(f"there is no complete cache at '{pattern}': {hint}")
            if layer:
                generation = pins[index].generations[layer] if pins else None
                cache = Cache.open(path, corpora[-1][0].labels, generation=generation)
            elif pins:
                cache = open_pinned(path, own, pins[index], max_label_problems)
            else:
                cache = Cache.open(path, own, max_label_problems=max_label_problems)
            if any(same_folder(cache.path, other.path) for caches in corpora for other in caches):
                raise UserError(f"caches lists '{cache.path}' twice, so its utterances would count twice: list it once")
            corpora[-1].append(cache)
    firsts = [caches[0] for caches in corpora]
    for cache in firsts[1:]:
        require_same_features(cache, firsts[0])
    return firsts, LayeredCaches(corpora) if len(corpora[0]) > 1 else None


def open_utterances(entries: Sequence[str | Sequence[str]], **options: Any) -> Utterances:
    """Return all utterances with a text of whole corpora, opened by :func:`open_corpora` with ``options``."""
    caches, layers = open_corpora(entries, **options)
    return Utterances(caches, np.flatnonzero(usable_rows(caches, layers)), layers)


def require_same_layers(evaluated: Utterances, caches: Sequence[Cache], layers: LayeredCaches | None) -> None:
    """Check that ``evaluated`` has the features of ``caches`` and ``layers``, layer by layer.

    Raises:
        UserError: the features of a layer differ.
    """
    ours = [caches[0]] if layers is None else layers.joined[0].caches
    theirs = [evaluated.caches[0]] if evaluated.layers is None else evaluated.layers.joined[0].caches
    for found, wanted in zip(theirs, ours, strict=True):
        require_same_features(found, wanted)


def find_cache(pattern: str) -> str | None:
    """Return the one complete cache that ``pattern`` matches, or None.

    Args:
        pattern: a folder, a glob pattern or a URL; or, without a slash, the corpus of a cache below ``caches``.

    Raises:
        UserError: several caches match, or a URL contains a pattern.
    """
    if "://" in pattern:
        if "*" in pattern:
            raise UserError(
                f"'{pattern}' is a glob pattern in a URL, and servers cannot be listed: give the URL of one cache"
            )
        return pattern
    pattern = os.path.expanduser(pattern)
    if "/" not in pattern and not glob.glob(pattern):
        pattern = f"caches/{pattern}/*"
    if _is_complete(pattern):
        return pattern
    found = sorted(path for path in glob.glob(pattern) if _is_complete(path))
    if len(found) > 1:
        raise UserError(f"'{pattern}' matches {len(found)} caches ({', '.join(found)}): name one, or delete the others")
    return found[0] if found else None


def missing_extractions(config: TrainConfig) -> list[str]:
    """Return the extraction configs to run to create missing caches; empty if no cache is missing.

    ``extract`` pairs with ``caches`` if both have the same length; otherwise a missing cache needs all of ``extract``.

    Raises:
        UserError: a cache is missing and ``extract`` is empty.
    """
    paired = len(config.extract) == len(config.caches)
    files: list[str] = []
    for index, entry in enumerate([*config.caches, *config.val.caches]):
        missing = [pattern for pattern in _patterns(entry) if find_cache(pattern) is None]
        if not missing:
            continue
        if not config.extract:
            raise MissingCache(
                f"there is no complete cache at '{missing[0]}': {_extract_hint(len(config.caches), (), index)}"
            )
        if entry in config.caches and paired:
            files.append(config.extract[config.caches.index(entry)])
        else:
            files.extend(config.extract)
    return list(dict.fromkeys(files))


def held_out_mask(cache: Cache, val: ValConfig, usable: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.bool_]:
    """Return the mask, bool [rows], of the rows of ``cache`` that are never trained on.

    These are the rows of the split ``val`` and, unless ``val.caches`` is set, rows of other speakers in the order of a
    seeded hash until ``val.fraction`` of the cache is held out. If fewer than two speakers are known, each key counts
    as a speaker. All rows of a key are on the same side. ``usable`` limits the choice to some of the rows.
    """
    table = pa.table({name: cache.column(name) for name in ("key", "speaker", "split")})
    if usable is not None and not usable.all():
        chosen = np.zeros(len(usable), dtype=bool)
        chosen[usable] = _held_out_mask(table.filter(pa.array(usable)), val)
        return chosen
    return _held_out_mask(table, val)


def _held_out_notes(caches: Sequence[Cache], val: ValConfig, held: npt.NDArray[np.bool_]) -> list[str]:
    """Return a note for each cache of which far more is held out than ``val.fraction``."""
    notes = []
    for cache, mask in zip(caches, np.split(held, np.cumsum([len(cache) for cache in caches])[:-1]), strict=True):
        if val.fraction and mask.sum() > 2 * max(1, round(val.fraction * len(cache))):
            by_label = VAL in cache.column("split").to_pylist()
            reason = f"the labels put them into split '{VAL}'" if by_label else "speakers are held out whole"
            notes.append(
                f"{mask.sum():,} of {len(cache):,} utterances of '{cache.location}' are held out, more than twice what "
                f"val.fraction={val.fraction:g} asks for, because {reason}"
            )
    return notes


def _held_out_mask(table: pa.Table, val: ValConfig) -> npt.NDArray[np.bool_]:
    speakers, keys = table["speaker"].to_pylist(), table["key"].to_pylist()
    marked = {key for key, split in zip(keys, table["split"].to_pylist(), strict=True) if split == VAL}
    mask = np.array([key in marked for key in keys], dtype=bool)
    wanted = 0 if val.caches else round(val.fraction * len(table))
    if mask.sum() >= wanted:
        return mask
    by_key: dict[str, str] = {}
    speakers = [by_key.setdefault(key, speaker) for key, speaker in zip(keys, speakers, strict=True)]
    if len(set(speakers) - {""}) < 2:
        speakers = keys
    speakers = [speaker or f"\0{key}" for speaker, key in zip(speakers, keys, strict=True)]
    seen = {speaker for speaker, is_held in zip(speakers, mask, strict=True) if is_held}
    groups: dict[str, list[int]] = {}
    for row, speaker in enumerate(speakers):
        if not mask[row]:
            groups.setdefault(speaker, []).append(row)
    # speakers with rows that are already held out come first
    for speaker in sorted(groups, key=lambda name: (name not in seen, _hash(val.seed, name))):
        rows = groups[speaker]
        if mask.sum() + len(rows) <= wanted:
            mask[rows] = True
    if not mask.any():  # every speaker has more rows than wanted: hold out the one with the fewest rows
        mask[min(groups.values(), key=len)] = True
    return mask


def _is_complete(path: str) -> bool:
    return Layout(Path(path)).cache.is_file()


def _hash(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()


def same_folder(one: str | Path, other: str | Path) -> bool:
    """Return whether both paths resolve to the same folder."""
    return os.path.realpath(one) == os.path.realpath(other)


def _names(caches: Sequence[Cache]) -> str:
    return ", ".join(f"'{cache.location}'" for cache in caches)


def _patterns(entry: str | Sequence[str]) -> list[str]:
    """Return the patterns of one corpus: one, or one per layer."""
    return [entry] if isinstance(entry, str) else list(entry)


def _extract_hint(entries: int, extract: Sequence[str], index: int) -> str:
    if not extract:
        return "run `make extract CONFIG=configs/extract/….yaml`, or correct the path in caches"
    files = [extract[index]] if len(extract) == entries else extract
    return "run " + " and ".join(f"`make extract CONFIG={file}`" for file in files)
