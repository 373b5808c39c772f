"""The page about one run.

In: a run's folder. Out: its page, ``templates/run.html.j2`` filled in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from train.report.audio import recordings
from train.report.charts import Curve, chart, smooth
from train.report.embedding_plot import nearest, planes
from train.report.page import SPAN, WITH_SMALL, Row, bounds, duration, marked, percent, render, utterance
from train.report.run_files import Figures, RunFiles
from train.runs.metrics_log import figure

SHOWN_SAMPLES = 24
LISTENS = 0.1  # nats per token of audio gain from which a model is said to listen
HEARD_SAMPLES = 6  # with their sound


def render_run(folder: Path) -> str:
    """The page as text."""
    run = RunFiles(folder)
    figures = run.figures
    gain = figures.get("audio_gain")
    config = folder / "config.yaml"
    no_audio, samples = _samples(run)
    return render(
        "run.html.j2",
        title=run.name,
        finished=bool(run.summary),
        gain=gain,
        listens=gain is not None and gain >= LISTENS,
        summary=_tiles(figures),
        loss_chart=loss_chart(run),
        listening=_listening(figures),
        retrieval=_retrieval(figures.get("retrieval")),
        errors=_errors(figures),
        silence=_silence(figures),
        drawings=planes(run.space, seconds_a_frame(run)),
        nearest=nearest(run.space),
        rms_chart=_rms_chart(run.metrics),
        no_audio=no_audio,
        samples=samples,
        elsewhere=_elsewhere(run.judged),
        throughput=throughput(figures),
        speed_charts=_speed_charts(run.metrics),
        features=identity(run.about, figures),
        changed=[(key, value, "–" if default is None else default) for key, value, default in run.changed_settings()],
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def _tiles(figures: Figures) -> list[tuple[str, str, str]]:
    def beside(name: str, unit: str, scale: float = 1) -> str:
        return f"{bounds(figures, name, scale, 2 if scale == 1 else 1)} {unit}".lstrip()

    return [
        ("audio gain", figure(figures.get("audio_gain"), 2), beside("audio_gain", "nats per token")),
        ("held-out loss", figure(figures.get("val_loss"), 3), beside("val_loss", "nats per token")),
        ("word error rate", percent(figures.get("wer")), beside("wer", "%", 100)),
        ("character error rate", percent(figures.get("cer")), beside("cer", "%", 100)),
        ("hallucination rate", percent(figures.get("hallucination_rate"), 0), "of silent inputs"),
        ("steps", f"{figures.get('steps', 0):,}", duration(figures.get("seconds", 0.0))),
    ]


def loss_chart(run: RunFiles) -> Markup:
    """Training and held-out loss over steps."""
    train = [(line["step"], line["loss"]) for line in run.metrics]
    return chart(
        [
            Curve("training, each step", "faint", train),
            Curve("training, smoothed", "c0", smooth(train)),
            Curve("held out, another utterance’s audio", "c1", points(run.evaluations, "val_loss_shuffled"), dots=True),
            Curve("held out", "c2", points(run.evaluations, "val_loss"), dots=True),
        ],
        "Training loss and held-out loss with the right and with another utterance’s audio, by step",
        y_label="loss, nats per token",
    )


def _rms_chart(metrics: list[Figures]) -> Markup:
    curve = Curve("soft tokens / embeddings", "c0", points(metrics, "projector_rms_ratio"))
    title = "Ratio of soft-token RMS to embedding RMS, by step"
    return chart([curve], title, y_label="RMS ratio", height=160)


def _speed_charts(metrics: list[Figures]) -> Markup:
    lines = [line for line in metrics if line["seconds"] > 0]
    if not lines:
        return Markup()
    speed = Curve("frames per second, smoothed", "c0", smooth([(x["step"], x["frames"] / x["seconds"]) for x in lines]))
    waits = [(line["step"], 100 * line["data_wait"] / line["seconds"]) for line in lines]
    wait = Curve("waiting for data, smoothed", "c1", smooth(waits))
    return chart([speed], "Frames per second, by step", y_label="frames per second", height=160) + chart(
        [wait], "Share of each step spent waiting for data", y_label="% of the step", height=120
    )


def points(lines: list[Figures], key: str) -> list[tuple[float, float]]:
    """(step, value) where there is one."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _listening(figures: Figures) -> list[Row]:
    rows = [
        ("the right utterance", "val_loss", None),
        ("another utterance", "val_loss_shuffled", "audio_gain"),
        ("silence", "val_loss_silent", "silent_gain"),
        ("none (text only)", "val_loss_text_only", "text_only_gain"),
    ]
    return [
        (what, figure(figures[loss], 3), "–" if gain is None or figures.get(gain) is None
         else WITH_SMALL.format(f"{figures[gain]:+.2f}", bounds(figures, gain, signed=True)))
        for what, loss, gain in rows if figures.get(loss) is not None
    ]  # fmt: skip


def _retrieval(found: Figures | None) -> dict[str, Any] | None:
    if not found:
        return None
    rows = [
        ("text for an audio, by LM likelihood", "by_likelihood"),
        ("audio for a text, by LM likelihood", "audio_by_likelihood"),
        ("text for an audio, by pooled embeddings", "by_embedding"),
    ]
    cells = [(what, percent(found[name], 0), bounds(found, name, 100, 0)) for what, name in rows]
    cells.append(("chance", percent(found["chance"], 0), f"one of {found['candidates']}"))
    return {"utterances": found["utterances"], "rows": cells}


def _errors(figures: Figures) -> list[Row]:
    rows: list[Row] = []
    for name, rate, key in (("words", "wer", "word_edits"), ("characters", "cer", "character_edits")):
        edits = figures.get(key)
        if edits:
            kinds = (f"{edits[kind]:,}" for kind in ("insertions", "deletions", "substitutions", "length"))
            rows.append((name, percent(figures.get(rate)), *kinds))
    return rows


def _silence(figures: Figures) -> dict[str, str]:
    found = figures.get("hallucination")
    if not found:
        return {}
    examples = "; ".join(f"“{text}”" for text in found["texts"] if text)
    share = percent(figures["hallucination_rate"], 0)
    answered = f"{share} of {found['inputs']} silent inputs, {found['words']:.1f} words on average"
    rows = {"answered with words": answered, "silent input": figures["silence"]}
    return rows | ({"output": examples} if examples else {})


def _samples(run: RunFiles) -> tuple[str, list[Row]]:
    """Why no audio is in the page ("" when it is), and a row a sample."""
    shown = run.samples[:SHOWN_SAMPLES]
    sounds: dict[str, str] = {}
    reason = "Audio is added when the run is finished."
    if run.summary:
        sounds, reason = recordings(run.cache_paths(), [sample["key"] for sample in shown[:HEARD_SAMPLES]])
    return reason, [
        (utterance(sample["key"], sounds), *map(SPAN.format, marked(sample["reference"], sample["hypothesis"])),
         percent(sample["wer"]))
        for sample in shown
    ]  # fmt: skip


def _elsewhere(judged: list[Figures]) -> list[Row]:
    return [
        (", ".join(each["judged_on"]), f"{each['n_val']:,}", figure(each["val_loss"], 3),
         figure(each["audio_gain"], 2), percent(each["wer"]), percent(each["hallucination_rate"], 0))
        for each in judged
    ]  # fmt: skip


def throughput(figures: Figures) -> dict[str, str]:
    """Speed, waiting, padding."""
    first, last = figure(figures.get("train_loss_first")), figure(figures.get("train_loss_last"))
    return {
        "frames per second": f"{figures.get('frames_per_second', 0.0):,.0f} (50 frames are one second of audio)",
        "waiting for data": percent(figures.get("data_wait_fraction")),
        "padding": percent(figures.get("padding_fraction")),
        "training loss, first and last step": f"{first} → {last}",
        "device": f"{figures.get('device', '–')}, {figures.get('dtype', '–')}",
        "trained parameters": f"{figures.get('trained_parameters', 0):,}" if figures.get("trained_parameters") else "–",
    }


def identity(about: dict[str, Any], figures: Figures) -> dict[str, str]:
    """Which features, which language model."""
    spec = about.get("spec", {})
    rows = {
        "feature id": str(about.get("feature_id")),
        "encoder": f"{about.get('encoder')} · layer {spec.get('layer')} · {spec.get('channels')} channels",
        "window, trim, dtype, codec": ", ".join(str(spec.get(key)) for key in ("window", "trim", "dtype", "codec")),
        "language model": str(figures.get("language_model", "–")),
    }
    for number, cache in enumerate(about.get("caches", []), 1):
        rows[f"cache {number}"] = f"{cache['path']} · {cache['utterances']:,} utterances · {cache['manifest_id']}"
    return rows


def seconds_a_frame(run: RunFiles) -> float:
    """Of the run's features."""
    spec = run.about.get("spec", {})
    return float(spec.get("hop", 320)) / float(spec.get("sampling_rate", 16_000))
