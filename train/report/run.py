"""Report of one run: fills in ``templates/run.html.j2`` from a run folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from markupsafe import Markup

from train.config.train import STAGE_ONE
from train.evaluation.listening import time_to_listening
from train.report.audio import recordings
from train.report.charts import Curve, chart, smooth
from train.report.embedding_plot import nearest_tokens, pca_charts
from train.report.page import (
    SPAN,
    WITH_SMALL,
    Row,
    duration,
    format_interval,
    mark_differences,
    percent,
    render,
    setting,
    utterance,
)
from train.report.run_files import Metrics, RunFiles
from train.report.verdict import Tile, verdict, warnings
from train.runs.metrics_log import format_number

MAX_SAMPLES = 24
MAX_AUDIO_SAMPLES = 6  # samples with a player


def render_run(folder: Path) -> str:
    """Return the page as HTML."""
    run = RunFiles(folder)
    metrics = {**_listening_so_far(run), **run.metrics}
    config = folder / "config.yaml"
    no_audio, samples = _samples(run)
    return render(
        "run.html.j2",
        title=run.name,
        finished=bool(run.summary),
        verdict=verdict(metrics),
        summary=_tiles(metrics),
        loss_chart=loss_chart(run),
        stage_one=_stage_one(folder),
        losses_by_input=_losses_by_input(metrics),
        tasks=_tasks(metrics),
        retrieval=_retrieval(metrics.get("retrieval")),
        decoding=_decoding(metrics),
        errors=_errors(metrics),
        silence=_silence(metrics),
        drawings=pca_charts(run.embedding_space, seconds_per_frame(run)),
        nearest=nearest_tokens(run.embedding_space),
        rms_chart=_rms_chart(run.step_metrics),
        no_audio=no_audio,
        samples=samples,
        other_evaluations=_other_evaluations(run.other_evaluations),
        throughput=throughput(metrics),
        speed_charts=_speed_charts(run.step_metrics),
        features=identity(run.cache_info, metrics),
        changed=[(key, setting(value), setting(default)) for key, value, default in run.changed_settings()],
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
    )


def _tiles(metrics: Metrics) -> list[Tile]:
    bad = warnings(metrics)

    def interval(name: str, unit: str, scale: float = 1) -> str:
        return f"{format_interval(metrics, name, scale, 2 if scale == 1 else 1)} {unit}".lstrip()

    def tile(label: str, name: str, value: str, unit: str, scale: float = 1) -> Tile:
        return Tile(label, value, interval(name, unit, scale), bad.get(name, ""))

    rates = [("word", "wer"), ("character", "cer")]  # no words where they are not spaced
    hallucinations = percent(metrics.get("hallucination_rate"), 0)
    return [
        tile("audio gain", "audio_gain", format_number(metrics.get("audio_gain"), 2), "nats per token"),
        tile("held-out loss", "val_loss", format_number(metrics.get("val_loss"), 3), "nats per token"),
        *(
            tile(f"{unit} error rate", name, percent(metrics.get(name)), "%", 100)
            for unit, name in rates[metrics.get("wer") is None and metrics.get("cer") is not None :]
        ),
        Tile("time to listening", *_listening(metrics.get("listening"))),
        Tile("hallucination rate", hallucinations, "of silent inputs", bad.get("hallucination_rate", "")),
        Tile("steps", f"{metrics.get('steps', 0):,}", _time(metrics)),
    ]


def _time(metrics: Metrics) -> str:
    """Time of training and of evaluation; their sum in records of earlier versions."""
    if "evaluation_seconds" not in metrics:
        return duration(metrics.get("seconds", 0.0))
    return f"{duration(metrics['training_seconds'])}, evaluation {duration(metrics['evaluation_seconds'])}"


def _listening_so_far(run: RunFiles) -> Metrics:
    """The key ``listening`` of a run that is not finished; stage 1 has no language model that could listen."""
    if run.config is None or run.config.is_stage_one:
        return {}
    return {"listening": time_to_listening(run.evaluations)}


def _listening(found: Metrics | None) -> tuple[str, str]:
    """What the tile shows: steps of the language model, and seconds with stage 1."""
    if found is None:
        return "–", "audio gain of 1 nat"
    return f"{found['steps']:,} steps", duration(found["seconds"]) if "seconds" in found else ""


def _stage_one(folder: Path) -> dict[str, Any] | None:
    """Return figures and chart of the stage 1 in the folder of a run; None without one."""
    stage = RunFiles(folder / STAGE_ONE)
    if not (folder / STAGE_ONE / "caches.json").is_file():
        return None
    metrics = stage.metrics
    rows = {
        "held-out CTC loss": f"{format_number(metrics.get('val_loss'), 3)} nats per token",
        "word / character error rate": f"{percent(metrics.get('wer'))} / {percent(metrics.get('cer'))}",
        "steps": f"{metrics.get('steps', 0):,}, {duration(metrics.get('seconds', 0.0))}",
        "frames per second": f"{metrics.get('frames_per_second', 0.0):,.0f}",
    }
    return {"rows": rows, "chart": loss_chart(stage)}


def loss_chart(run: RunFiles) -> Markup:
    """Return the chart of training and held-out loss over steps."""
    train = [(line["step"], line["loss"]) for line in run.step_metrics]
    return chart(
        [
            Curve("training, each step", "faint", train),
            Curve("training, smoothed", "c0", smooth(train)),
            Curve(
                "held out, another utterance’s audio",
                "c1",
                metric_points(run.evaluations, "val_loss_shuffled"),
                dots=True,
            ),
            Curve("held out", "c2", metric_points(run.evaluations, "val_loss"), dots=True),
        ],
        "Training loss and held-out loss with the matching and with another utterance’s audio, by step",
        y_label="loss, nats per token",
    )


def _rms_chart(metrics: list[Metrics]) -> Markup:
    curve = Curve("soft tokens / embeddings", "c0", metric_points(metrics, "projector_rms_ratio"))
    title = "Ratio of soft-token RMS to embedding RMS, by step"
    return chart([curve], title, y_label="RMS ratio", height=160)


def _speed_charts(metrics: list[Metrics]) -> Markup:
    lines = [line for line in metrics if line["seconds"] > 0]
    if not lines:
        return Markup()
    speed = Curve("frames per second, smoothed", "c0", smooth([(x["step"], x["frames"] / x["seconds"]) for x in lines]))
    waits = [(line["step"], 100 * line["data_wait"] / line["seconds"]) for line in lines]
    wait = Curve("waiting for data, smoothed", "c1", smooth(waits))
    return chart([speed], "Frames per second, by step", y_label="frames per second", height=160) + chart(
        [wait], "Share of each step spent waiting for data", y_label="% of the step", height=120
    )


def metric_points(lines: list[Metrics], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the lines that have a value for ``key``."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _losses_by_input(metrics: Metrics) -> list[Row]:
    rows = [
        ("the same utterance", "val_loss", None),
        ("another utterance", "val_loss_shuffled", "audio_gain"),
        ("silence", "val_loss_silent", "silent_gain"),
        ("none (text only)", "val_loss_text_only", "text_only_gain"),
    ]
    return [
        (what, format_number(metrics[loss], 3), "–" if gain is None or metrics.get(gain) is None
         else WITH_SMALL.format(f"{metrics[gain]:+.2f}", format_interval(metrics, gain, signed=True)))
        for what, loss, gain in rows if metrics.get(loss) is not None
    ]  # fmt: skip


def _tasks(metrics: Metrics) -> list[Row]:
    return [
        (name or "(none)", f"{each['n_val']:,}", format_number(each.get("val_loss"), 3),
         WITH_SMALL.format(format_number(each.get("audio_gain"), 2), format_interval(each, "audio_gain", signed=True)),
         percent(each.get("wer")), percent(each.get("cer")), percent(each.get("accuracy")))
        for name, each in metrics.get("tasks", {}).items()
    ]  # fmt: skip


def _retrieval(found: Metrics | None) -> dict[str, Any] | None:
    if not found:
        return None
    rows = [
        ("text for an audio, by LM likelihood", "by_likelihood"),
        ("audio for a text, by LM likelihood", "audio_by_likelihood"),
        ("text for an audio, by pooled embeddings", "by_embedding"),
    ]
    cells = [(what, percent(found[name], 0), format_interval(found, name, 100, 0)) for what, name in rows]
    cells.append(("chance", percent(found["chance"], 0), f"one of {found['candidates']}"))
    return {"utterances": found["utterances"], "rows": cells}


def _decoding(metrics: Metrics) -> str:
    found = metrics.get("decoding")
    return f"Decoded {found}." if found else ""


def _errors(metrics: Metrics) -> list[Row]:
    rows: list[Row] = []
    for name, rate, key in (("words", "wer", "word_edits"), ("characters", "cer", "character_edits")):
        edits = metrics.get(key)
        if edits:
            kinds = (f"{edits[kind]:,}" for kind in ("insertions", "deletions", "substitutions", "length"))
            rows.append((name, percent(metrics.get(rate)), *kinds))
    return rows


def _silence(metrics: Metrics) -> dict[str, str]:
    found = metrics.get("hallucination")
    if not found:
        return {}
    counts = Counter(text for text in found["texts"] if text)
    examples = "; ".join(f"“{text}”" + f" × {count}" * (count > 1) for text, count in counts.most_common())
    share = percent(metrics.get("hallucination_rate"), 0)
    answered = f"{share} of {found['inputs']} silent inputs, {found['words']:.1f} words on average"
    rows = {"answered with words": answered, "silent input": str(metrics.get("silence", "–"))}
    return rows | ({"output": examples} if examples else {})


def _samples(run: RunFiles) -> tuple[str, list[Row]]:
    """(reason why there is no audio, empty if there is; one row per sample)."""
    shown = run.samples[:MAX_SAMPLES]
    sounds: dict[str, str] = {}
    reason = "Audio is added when the run is finished."
    if run.summary:
        sounds, reason = recordings(run.cache_paths(), [sample["key"] for sample in shown[:MAX_AUDIO_SAMPLES]])
    return reason, [
        (
            utterance(sample["key"], sounds, sample.get("task", "")),
            *map(SPAN.format, mark_differences(sample["reference"], sample["hypothesis"])),
            percent(sample["wer"]),
        )
        for sample in shown
    ]  # fmt: skip


def _other_evaluations(evaluations: list[Metrics]) -> list[Row]:
    return [
        (", ".join(each["judged_on"]), f"{each.get('n_val', 0):,}", format_number(each.get("val_loss"), 3),
         format_number(each.get("audio_gain"), 2), percent(each.get("wer")), percent(each.get("hallucination_rate"), 0))
        for each in evaluations
    ]  # fmt: skip


def throughput(metrics: Metrics) -> dict[str, str]:
    """Return the rows of the throughput section, by label."""
    first, last = format_number(metrics.get("train_loss_first")), format_number(metrics.get("train_loss_last"))
    return {
        "frames per second": f"{metrics.get('frames_per_second', 0.0):,.0f} (50 frames are one second of audio)",
        "waiting for data": percent(metrics.get("data_wait_fraction")),
        "padding": percent(metrics.get("padding_fraction")),
        "training loss, first and last step": f"{first} → {last}",
        "device": f"{metrics.get('device', '–')}, {metrics.get('dtype', '–')}",
        "trained parameters": f"{metrics.get('trained_parameters', 0):,}" if metrics.get("trained_parameters") else "–",
    }


def identity(cache_info: dict[str, Any], metrics: Metrics) -> dict[str, str]:
    """Return the rows that identify features and language model, by label."""
    spec = cache_info.get("spec", {})
    rows = {
        "feature id": str(cache_info.get("feature_id")),
        "encoder": f"{cache_info.get('encoder')} · layer {spec.get('layer')} · {spec.get('channels')} channels",
        "window, trim, dtype, codec": ", ".join(str(spec.get(key)) for key in ("window", "trim", "dtype", "codec")),
        "language model": str(metrics.get("language_model", "–")),
    }
    for number, cache in enumerate(cache_info.get("caches", []), 1):
        variants = f" and {cache['variants']:,} variants of them" if cache.get("variants") else ""
        size = f"{cache['utterances']:,} utterances{variants}"
        rows[f"cache {number}"] = f"{cache['path']} · {size} · {cache['manifest_id']}"
        if labels := cache.get("labels"):
            rows[f"labels {number}"] = f"{labels['name']} · {labels['id']} · generation {cache.get('generation')}"
    return rows


def seconds_per_frame(run: RunFiles) -> float:
    """Return the duration in seconds of one feature frame of the run."""
    spec = run.cache_info.get("spec", {})
    return float(spec.get("hop", 320)) / float(spec.get("sampling_rate", 16_000))
