"""The page about a sweep: experiments side by side, with paired differences over the same held-out utterances.

In: the run folders of a sweep, and its ``sweep.json``. Out: HTML text. The sweep's baseline, or where it names none the
experiment of the lowest held-out loss, is what the others are compared with; a difference whose interval holds 0 may be
chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from shards.errors import UserError
from train.evaluation.bootstrap import NATS, TOKENS, WORD_ERRORS, WORDS, Interval, paired_difference
from train.report.audio import recordings
from train.report.charts import Curve, chart, smooth
from train.report.embedding_plot import planes
from train.report.page import COLOURS, breakable, folded, listing, marked, page, percent, section, table, tiles
from train.report.run import HEARD_SAMPLES, LISTENS, identity, name_cell, points, seconds_a_frame
from train.report.run_files import RunFiles
from train.runs.metrics_log import figure

SHOWN_SAMPLES = 8
OWN_KEYS = ("name", "runs")

DIFFERENCE_NOTE = (
    "Held-out figures. Differences are paired over the same utterances, with 95 % bootstrap intervals: one that "
    "holds 0 may be chance. The best of many experiments looks better than it is."
)


def render(folder: Path, runs: Sequence[Path], state: dict[str, Any]) -> str:
    """The page as text; everything that comes from data is escaped."""
    found = [RunFiles(run) for run in runs]
    judged = [run for run in found if run.figures.get("val_loss") is not None]
    best = min(judged, key=lambda run: float(run.figures["val_loss"]), default=None)
    base = next((run for run in judged if run.name == state.get("baseline")), best)
    states = {each["name"]: each for each in state.get("experiments", [])}
    done = sum(bool(run.summary) for run in found)
    parts = [
        f'<header><p class="over">earshard sweep · {done} of {len(found)} experiments finished</p>'
        f"<h1>{escape(folder.name)}</h1>{_verdict(best, base)}</header>",
        _tiles(found, best),
        section("Experiments", _experiments(found, base, states), note=DIFFERENCE_NOTE),
        section("Held-out loss", _curves(found, held_out=True)),
        section("Training loss", _curves(found, held_out=False)),
        section("What differs", _differences(found)),
        section("The same utterances, decoded by each", *_samples(found)),
        section("Soft tokens among the embeddings", *(_space(run, run is best) for run in found)),
        section("Throughput", _throughput(found)),
        section("Features", *_identities(found)),
    ]
    return page(folder.name, "\n".join(filter(None, parts)))


def _verdict(best: RunFiles | None, base: RunFiles | None) -> str:
    if best is None or base is None:
        return '<p class="lead">Not evaluated yet.</p>'
    text = f"{best.name} has the lowest held-out loss, {best.figures['val_loss']:.3f} nats a token"
    gap = None if best is base else _gap(best, base, NATS, TOKENS)
    if gap is not None:
        sure = "beyond chance" if gap.high < 0 else "which may be chance"
        text += f", {-gap.mean:.3f} below the baseline {base.name}, {sure}"
    text += "."
    gain = best.figures.get("audio_gain")
    if gain is not None and gain < LISTENS:
        text += (
            " It does not listen yet: another utterance’s audio serves it as well as the right one, so the losses "
            "compare what was learned of the texts."
        )
    return f'<p class="lead">{escape(text)}</p>'


def _tiles(runs: Sequence[RunFiles], best: RunFiles | None) -> str:
    figures = {} if best is None else best.figures
    wers = [(float(run.figures["wer"]), run.name) for run in runs if run.figures.get("wer") is not None]
    low, name = min(wers, default=(None, "–"))
    return tiles(
        [
            ("lowest held-out loss", figure(figures.get("val_loss"), 3), "–" if best is None else best.name),
            ("its audio gain", figure(figures.get("audio_gain"), 2), "nats a token"),
            ("lowest word error rate", percent(low), name),
            ("experiments", str(len(runs)), f"{sum(bool(run.summary) for run in runs)} finished"),
        ]
    )


def _experiments(runs: Sequence[RunFiles], base: RunFiles | None, states: dict[str, Any]) -> str:
    rows = []
    for run in runs:
        figures, state = run.figures, states.get(run.name, {})
        told = "" if run.summary else state.get("reason") or f"at step {figures.get('steps', 0):,}"
        rows.append(
            (
                f"<div>{breakable(run.name)} <small>{escape(told)}</small></div>",
                figure(figures.get("val_loss"), 3),
                _told(run, base, NATS, TOKENS, 1, 3),
                figure(figures.get("audio_gain"), 2),
                percent(figures.get("wer")),
                _told(run, base, WORD_ERRORS, WORDS, 100, 1),
                f"{figures['trained_parameters']:,}" if figures.get("trained_parameters") else "–",
            )
        )
    other = "–" if base is None else base.name
    headings = ("experiment", "loss", f"loss minus {other}", "audio gain", "WER", f"WER minus {other}, %", "parameters")
    return table(headings, rows, range(1, 7))


def _told(run: RunFiles, base: RunFiles | None, counts: Sequence[str], per: str, scale: float, digits: int) -> str:
    gap = None if base is None or run is base else _gap(run, base, counts, per)
    if gap is None:
        return "–"
    mean, low, high = (scale * value for value in gap)
    return f"<div>{mean:+.{digits}f} <small>[{low:+.{digits}f}, {high:+.{digits}f}]</small></div>"


def _gap(run: RunFiles, base: RunFiles, counts: Sequence[str], per: str) -> Interval | None:
    """``run`` minus ``base``; None where they have no utterances in common."""
    if run.table is None or base.table is None:
        return None
    try:
        return paired_difference(run.table, base.table, counts=counts, per=per)
    except UserError:
        return None


def _curves(runs: Sequence[RunFiles], held_out: bool) -> str:
    curves = []
    for number, run in enumerate(runs):
        train = [(line["step"], line["loss"]) for line in run.metrics]
        line = points(run.evaluations, "val_loss") if held_out else smooth(train)
        curves.append(Curve(run.name, f"c{number % COLOURS}", line, dots=held_out))
    what = "Held-out loss" if held_out else "Training loss, smoothed"
    return chart(curves, f"{what} of every experiment, over steps", y_label=f"{what.lower()}, nats a target token")


def _differences(runs: Sequence[RunFiles]) -> str:
    """What is not the same in all: a row a setting where experiments are few, else a row an experiment."""
    settings = [(run.name, run.settings) for run in runs if run.settings]
    values = {
        key: [str(own.get(key, "–")) for _, own in settings]
        for key in dict.fromkeys(k for _, own in settings for k in own)
    }
    differ = {key: each for key, each in values.items() if len(set(each)) > 1 and key not in OWN_KEYS}
    if not differ:
        return ""
    if len(settings) <= 4:
        rows = [(escape(key), *map(escape, each)) for key, each in differ.items()]
        return table(("setting", *(name for name, _ in settings)), rows)
    told = [
        (breakable(name), escape(", ".join(f"{key} {own[key]}" for key in differ if own.get(key) is not None)))
        for name, own in settings
    ]
    return table(("experiment", "settings"), told)


def _samples(runs: Sequence[RunFiles]) -> tuple[str, str]:
    decoded = {run.name: {sample["key"]: sample for sample in run.samples} for run in runs}
    first = next((run for run in runs if run.samples), None)
    if first is None:
        return "", ""
    shown = first.samples[:SHOWN_SAMPLES]
    paths = list(dict.fromkeys(path for run in runs for path in run.cache_paths()))
    sounds, reason = recordings(paths, [sample["key"] for sample in shown[:HEARD_SAMPLES]])
    blocks = [f'<p class="note">{escape(reason)}</p>' if reason else ""]
    for sample in shown:
        rows = []
        for name, samples in decoded.items():
            if (own := samples.get(sample["key"])) is not None:
                hypothesis = marked(own["reference"], own["hypothesis"])[1]
                rows.append((breakable(name), f"<span>{hypothesis}</span>", percent(own["wer"])))
        heading = f"<h3>{escape(sample['reference'])}</h3>{name_cell(sample['key'], sounds)}"
        blocks.append(heading + table(("experiment", "decoded", "WER"), rows, (2,)))
    return "", "".join(blocks)


def _space(run: RunFiles, is_best: bool) -> str:
    picture = planes(run.space, seconds_a_frame(run))
    if not picture:
        return ""
    return f"<h3>{escape(run.name)}</h3>{picture}" if is_best else folded(run.name, picture)


def _throughput(runs: Sequence[RunFiles]) -> str:
    rows = [
        (breakable(run.name), f"{run.figures.get('frames_per_second', 0.0):,.0f}",
         percent(run.figures.get("data_wait_fraction")), percent(run.figures.get("padding_fraction")),
         f"{run.figures.get('seconds', 0.0):,.0f}")
        for run in runs
    ]  # fmt: skip
    return table(("experiment", "frames a second", "waiting for data", "padding", "seconds"), rows, range(1, 5))


def _identities(runs: Sequence[RunFiles]) -> list[str]:
    """Once for all experiments that share it."""
    seen: dict[str, list[str]] = {}
    for run in runs:
        seen.setdefault(listing(identity(run.about, run.figures)), []).append(run.name)
    return [text if len(seen) == 1 else f"<h3>{escape(', '.join(names))}</h3>{text}" for text, names in seen.items()]
