"""Report of a sweep: experiments side by side, with paired differences over the same held-out utterances.

Fills in ``templates/sweep.html.j2`` from the run folders of a sweep and its ``sweep.json``. Experiments are compared
with the sweep's baseline or, if it names none, with the experiment that has the lowest held-out loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from shards.errors import UserError
from train.evaluation.bootstrap import NATS, TOKENS, WORD_ERRORS, WORDS, Interval, paired_difference
from train.report.audio import recordings
from train.report.charts import Curve, chart, smooth
from train.report.embedding_plot import pca_charts
from train.report.page import (
    BAD,
    DIV,
    NUM_COLORS,
    SPAN,
    WITH_SMALL,
    Row,
    breakable,
    format_interval,
    mark_differences,
    percent,
    render,
    setting,
    utterance,
)
from train.report.run import MAX_AUDIO_SAMPLES, identity, metric_points, seconds_per_frame
from train.report.run_files import RunFiles
from train.report.verdict import Tile, listens, warnings
from train.runs.metrics_log import format_number

MAX_SAMPLES = 8
PER_RUN_KEYS = ("name", "runs")


def render_sweep(folder: Path, runs: Sequence[Path], state: dict[str, Any]) -> str:
    """Return the page as HTML."""
    found = [RunFiles(run) for run in runs]
    evaluated = [run for run in found if run.metrics.get("val_loss") is not None]
    best = min(evaluated, key=lambda run: float(run.metrics["val_loss"]), default=None)
    baseline = next((run for run in evaluated if run.name == state.get("baseline")), best)
    states = {each["name"]: each for each in state.get("experiments", [])}
    no_audio, samples = _samples(found)
    return render(
        "sweep.html.j2",
        title=folder.name,
        runs=len(found),
        finished=sum(bool(run.summary) for run in found),
        best=best and {
            "name": best.name, "loss": best.metrics["val_loss"],
            "listens": best.metrics.get("audio_gain") is None or listens(best.metrics),
        },
        disagreement=_disagreement(found, best),
        baseline="–" if baseline is None else baseline.name,
        difference=None if best is None or baseline is None or best is baseline
        else _paired_difference(best, baseline, NATS, TOKENS),
        summary=_tiles(found, best),
        experiments=_experiments(found, baseline, states),
        held_out_chart=_curves(found, held_out=True),
        training_chart=_curves(found, held_out=False),
        gain_chart=_gain_curves(found),
        differences=_differences(found),
        no_audio=no_audio,
        samples=samples,
        spaces=[
            (run.name, run is best, drawn)
            for run in found
            if (drawn := pca_charts(run.embedding_space, seconds_per_frame(run)))
        ],
        throughput=_throughput(found),
        features=_identities(found),
    )  # fmt: skip


def _lowest_rate(runs: Sequence[RunFiles]) -> tuple[str, float | None, str]:
    """(its unit, the lowest error rate, name of the experiment)."""
    rate = "wer" if any(run.metrics.get("wer") is not None for run in runs) else "cer"
    rates = [(float(run.metrics[rate]), run.name) for run in runs if run.metrics.get(rate) is not None]
    return "word" if rate == "wer" else "character", *min(rates, default=(None, "–"))


def _disagreement(runs: Sequence[RunFiles], best: RunFiles | None) -> str:
    """A sentence, if another experiment than the one with the lowest loss has the lowest error rate."""
    unit, low, name = _lowest_rate(runs)
    rate = None if best is None else best.metrics.get("wer" if unit == "word" else "cer")
    if rate is None or low is None or rate <= low:
        return ""
    return f"Loss and errors disagree: {name} has the lowest {unit} error rate, {percent(low)} against {percent(rate)}."


def _tiles(runs: Sequence[RunFiles], best: RunFiles | None) -> list[Tile]:
    metrics = {} if best is None else best.metrics
    unit, low, name = _lowest_rate(runs)
    bad = warnings(metrics)
    loss, gain = format_number(metrics.get("val_loss"), 3), format_number(metrics.get("audio_gain"), 2)
    return [
        Tile("lowest held-out loss", loss, "–" if best is None else best.name, bad.get("val_loss", "")),
        Tile("its audio gain", gain, "nats per token", bad.get("audio_gain", "")),
        Tile(f"lowest {unit} error rate", percent(low), name),
        Tile("experiments", str(len(runs)), f"{sum(bool(run.summary) for run in runs)} finished"),
    ]


def _experiments(runs: Sequence[RunFiles], baseline: RunFiles | None, states: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for run in runs:
        metrics, state = run.metrics, states.get(run.name, {})
        status = "" if run.summary else state.get("reason") or f"at step {metrics.get('steps', 0):,}"
        rows.append(
            (
                DIV.format(WITH_SMALL.format(breakable(run.name), status)),
                format_number(metrics.get("val_loss"), 3),
                _difference(run, baseline, NATS, TOKENS, 1, 3),
                _gain(metrics),
                _listening(metrics.get("listening")),
                percent(metrics.get("wer")),
                _difference(run, baseline, WORD_ERRORS, WORDS, 100, 1),
                f"{metrics['trained_parameters']:,}" if metrics.get("trained_parameters") else "–",
            )
        )
    return rows


def _gain(metrics: dict[str, Any]) -> str:
    """Audio gain and interval, marked if it is no evidence of listening."""
    gain = format_number(metrics.get("audio_gain"), 2)
    bad = metrics.get("audio_gain") is not None and not listens(metrics)
    return DIV.format(WITH_SMALL.format(BAD.format(gain) if bad else gain, format_interval(metrics, "audio_gain")))


def _listening(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    seconds = f"{found['seconds']:,.0f} s" if "seconds" in found else ""
    return DIV.format(WITH_SMALL.format(f"{found['steps']:,} steps", seconds))


def _difference(
    run: RunFiles, baseline: RunFiles | None, counts: Sequence[str], per: str, scale: float, digits: int
) -> str:
    difference = None if baseline is None or run is baseline else _paired_difference(run, baseline, counts, per)
    if difference is None:
        return "–"
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in difference)
    return DIV.format(WITH_SMALL.format(mean, f"[{low}, {high}]"))


def _paired_difference(run: RunFiles, baseline: RunFiles, counts: Sequence[str], per: str) -> Interval | None:
    """``run`` minus ``baseline``; None if they have no utterances in common."""
    if run.table is None or baseline.table is None:
        return None
    try:
        return paired_difference(run.table, baseline.table, counts=counts, per=per)
    except UserError:
        return None


def _curves(runs: Sequence[RunFiles], held_out: bool) -> Markup:
    curves = []
    for number, run in enumerate(runs):
        train = [(line["step"], line["loss"]) for line in run.step_metrics]
        line = metric_points(run.evaluations, "val_loss") if held_out else smooth(train)
        curves.append(Curve(run.name, f"c{number % NUM_COLORS}", line, dots=held_out))
    metric = "Held-out loss" if held_out else "Training loss, smoothed"
    return chart(curves, f"{metric} of every experiment, by step", y_label=f"{metric.lower()}, nats per token")


def _gain_curves(runs: Sequence[RunFiles]) -> Markup:
    curves = [
        Curve(run.name, f"c{number % NUM_COLORS}", metric_points(run.evaluations, "audio_gain"), dots=True)
        for number, run in enumerate(runs)
    ]
    title = "Audio gain of every experiment, by step of the language model"
    return chart(curves, title, y_label="audio gain, nats per token")


def _differences(runs: Sequence[RunFiles]) -> tuple[Sequence[str], list[Row]]:
    """Headings and rows of the settings that differ: one row per setting, or per experiment if they are many."""
    settings = [(run.name, run.settings) for run in runs if run.settings]
    values = {
        key: [setting(own.get(key)) for _, own in settings]
        for key in dict.fromkeys(k for _, own in settings for k in own)
    }
    differ = {key: each for key, each in values.items() if len(set(each)) > 1 and key not in PER_RUN_KEYS}
    if not differ:
        return (), []
    if len(settings) <= 4:
        return ("setting", *(name for name, _ in settings)), [(key, *each) for key, each in differ.items()]
    return ("experiment", "settings"), [
        (breakable(name), ", ".join(f"{key} {setting(own[key])}" for key in differ if own.get(key) is not None))
        for name, own in settings
    ]


def _samples(runs: Sequence[RunFiles]) -> tuple[str, list[dict[str, Any]]]:
    """(reason why there is no audio, empty if there is; each utterance with the text that every experiment decoded)."""
    decoded = {run.name: {sample["key"]: sample for sample in run.samples} for run in runs}
    first = next((run for run in runs if run.samples), None)
    if first is None:
        return "", []
    shown = first.samples[:MAX_SAMPLES]
    paths = list(dict.fromkeys(path for run in runs for path in run.cache_paths()))
    sounds, reason = recordings(paths, [sample["key"] for sample in shown[:MAX_AUDIO_SAMPLES]])
    return reason, [
        {
            "reference": sample["reference"],
            "utterance": utterance(sample["key"], sounds),
            "rows": [
                (
                    breakable(name),
                    SPAN.format(mark_differences(own["reference"], own["hypothesis"])[1]),
                    percent(own["wer"]),
                )
                for name, samples in decoded.items()
                if (own := samples.get(sample["key"])) is not None
            ],
        }
        for sample in shown
    ]


def _throughput(runs: Sequence[RunFiles]) -> list[Row]:
    return [
        (breakable(run.name), f"{run.metrics.get('frames_per_second', 0.0):,.0f}",
         percent(run.metrics.get("data_wait_fraction")), percent(run.metrics.get("padding_fraction")),
         f"{run.metrics.get('seconds', 0.0):,.0f}")
        for run in runs
    ]  # fmt: skip


def _identities(runs: Sequence[RunFiles]) -> list[tuple[str, dict[str, str]]]:
    """(names of the experiments, rows) of each identity that they share."""
    seen: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run in runs:
        seen.setdefault(tuple(identity(run.cache_info, run.metrics).items()), []).append(run.name)
    return [(", ".join(names), dict(rows)) for rows, names in seen.items()]
