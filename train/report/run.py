"""The page about one run.

In: a run's folder. Out: HTML text.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from train.report.audio import recordings
from train.report.charts import Curve, chart, smooth
from train.report.embedding_plot import nearest, planes
from train.report.page import bounds, duration, folded, listing, marked, page, percent, section, table, tiles
from train.report.run_files import Figures, RunFiles
from train.runs.metrics_log import figure

SHOWN_SAMPLES = 24
LISTENS = 0.1  # nats a token of audio gain from which a model is said to listen
HEARD_SAMPLES = 6  # with their sound

LOSS_NOTE = (
    "The distance between held-out loss with the right audio and with another utterance’s audio is the audio gain: "
    "what the language model takes from listening."
)
LISTEN_NOTE = (
    "Differences to the right audio, in nats a token, with 95 % bootstrap intervals over utterances. A model that does "
    "not listen shows none."
)
RETRIEVAL_NOTE = (
    "Candidates differ in their text and are of like length. By embedding: mean soft token against mean text "
    "embedding, which a projector need not be good at."
)
SPACE_NOTE = (
    "Main components (PCA) of the soft tokens of up to eight held-out utterances and of vocabulary embeddings (grey). "
    "A picture, not a measure: two components hold only a part of the variance."
)
RMS_NOTE = "RMS of the projector’s output over RMS of the language model’s embeddings; far from 1 the gradient starves."


def render(folder: Path) -> str:
    """The page as text; everything that comes from data is escaped."""
    run = RunFiles(folder)
    figures = run.figures
    state = "finished" if run.summary else "running or stopped"
    changed = table(
        ("setting", "this run", "default"),
        [
            (escape(key), escape(str(value)), "–" if default is None else escape(str(default)))
            for key, value, default in run.changed_settings()
        ],
    )
    text = (folder / "config.yaml").read_text(encoding="utf-8") if (folder / "config.yaml").is_file() else ""
    parts = [
        f'<header><p class="over">earshard run · {state}</p><h1>{escape(run.name)}</h1>{_verdict(figures)}</header>',
        _tiles(figures),
        section("Loss", loss_chart(run), note=LOSS_NOTE),
        section("What it hears", _listening(figures), note=LISTEN_NOTE),
        section("Telling utterances apart", _retrieval(figures.get("retrieval")), note=RETRIEVAL_NOTE),
        section("Errors and inventions", _errors(figures), _silence(figures)),
        section("Soft tokens among the embeddings", planes(run.space, seconds_a_frame(run)), note=SPACE_NOTE),
        section("Nearest vocabulary tokens", nearest(run.space)),
        section("Size of the soft tokens", _rms_chart(run.metrics), note=RMS_NOTE),
        section("Held-out utterances, decoded", *_samples(run)),
        section("Judged elsewhere", _elsewhere(run.judged)),
        section("Throughput", listing(throughput(figures)), _speed_chart(run.metrics)),
        section("Features", listing(identity(run.about, figures))),
        section("Settings", changed, folded("all settings", f"<pre>{escape(text)}</pre>")),
    ]
    return page(run.name, "\n".join(filter(None, parts)))


def _verdict(figures: Figures) -> str:
    gain = figures.get("audio_gain")
    if gain is None:
        return '<p class="lead">Not evaluated yet.</p>'
    if gain < LISTENS:
        text = "The language model does not listen yet: another utterance’s audio serves it as well as the right one."
    else:
        text = f"The right audio saves {gain:.2f} nats on every target token."
    return f'<p class="lead">{text}</p>'


def _tiles(figures: Figures) -> str:
    def beside(name: str, unit: str, scale: float = 1) -> str:
        return f"{bounds(figures, name, scale, 2 if scale == 1 else 1)} {unit}".lstrip()

    return tiles(
        [
            ("audio gain", figure(figures.get("audio_gain"), 2), beside("audio_gain", "nats a token")),
            ("held-out loss", figure(figures.get("val_loss"), 3), beside("val_loss", "nats a token")),
            ("word error rate", percent(figures.get("wer")), beside("wer", "%", 100)),
            ("character error rate", percent(figures.get("cer")), beside("cer", "%", 100)),
            ("words to silence", percent(figures.get("hallucination_rate"), 0), "of silent inputs"),
            ("steps", f"{figures.get('steps', 0):,}", duration(figures.get("seconds", 0.0))),
        ]
    )


def loss_chart(run: RunFiles) -> str:
    """Training and held-out loss over steps."""
    train = [(line["step"], line["loss"]) for line in run.metrics]
    return chart(
        [
            Curve("training, each step", "faint", train),
            Curve("training, smoothed", "c0", smooth(train)),
            Curve("held out, other audio", "c1", points(run.evaluations, "val_loss_shuffled"), dots=True),
            Curve("held out", "c2", points(run.evaluations, "val_loss"), dots=True),
        ],
        "Training loss and held-out loss with matched and with shuffled audio, over steps",
        y_label="loss, nats a target token",
    )


def _rms_chart(metrics: list[Figures]) -> str:
    curve = Curve("soft tokens / embeddings", "c0", points(metrics, "projector_rms_ratio"))
    title = "Ratio of soft-token RMS to embedding RMS, over steps"
    return chart([curve], title, y_label="RMS ratio", height=160)


def _speed_chart(metrics: list[Figures]) -> str:
    lines = [line for line in metrics if line["seconds"] > 0]
    if not lines:
        return ""
    speed = Curve("frames a second, smoothed", "c0", smooth([(x["step"], x["frames"] / x["seconds"]) for x in lines]))
    waits = [(line["step"], 100 * line["data_wait"] / line["seconds"]) for line in lines]
    wait = Curve("waiting for data, smoothed", "c1", smooth(waits))
    return chart([speed], "Frames a second, over steps", y_label="frames a second", height=160) + chart(
        [wait], "Share of each step spent waiting for data", y_label="% of the step", height=120
    )


def points(lines: list[Figures], key: str) -> list[tuple[float, float]]:
    """(step, value) where there is one."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _listening(figures: Figures) -> str:
    rows = [
        ("the utterance itself", "val_loss", None),
        ("another utterance", "val_loss_shuffled", "audio_gain"),
        ("silence", "val_loss_silent", "silent_gain"),
        ("nothing: text alone", "val_loss_text_only", "text_only_gain"),
    ]
    known = [row for row in rows if figures.get(row[1]) is not None]
    cells = [
        (escape(what), figure(figures[loss], 3), "–" if gain is None or figures.get(gain) is None
         else f"{figures[gain]:+.2f} <small>{bounds(figures, gain, signed=True)}</small>")
        for what, loss, gain in known
    ]  # fmt: skip
    return table(("it hears", "loss, nats a token", "worse by"), cells, (1, 2))


def _retrieval(found: Figures | None) -> str:
    if not found:
        return ""
    rows = [
        ("audio finds its text, by the LM’s likelihood", "by_likelihood"),
        ("text finds its audio, by the LM’s likelihood", "audio_by_likelihood"),
        ("audio finds its text, by pooled embedding", "by_embedding"),
    ]
    cells = [(escape(what), percent(found[name], 0), bounds(found, name, 100, 0)) for what, name in rows]
    cells.append(("by chance", percent(found["chance"], 0), f"one of {found['candidates']}"))
    return table((f"first choice right, {found['utterances']} utterances", "share", "95 % interval"), cells, (1, 2))


def _errors(figures: Figures) -> str:
    rows = []
    for name, rate, key in (("words", "wer", "word_edits"), ("characters", "cer", "character_edits")):
        edits = figures.get(key)
        if edits:
            kinds = (f"{edits[kind]:,}" for kind in ("insertions", "deletions", "substitutions", "length"))
            rows.append((name, percent(figures.get(rate)), *kinds))
    headings = ("of", "error rate", "insertions", "deletions", "substitutions", "in the reference")
    return table(headings, rows, range(1, 6))


def _silence(figures: Figures) -> str:
    found = figures.get("hallucination")
    if not found:
        return ""
    examples = "; ".join(f"“{text}”" for text in found["texts"] if text)
    share = percent(figures["hallucination_rate"], 0)
    answered = f"{share} of {found['inputs']} silent inputs, {found['words']:.1f} words each"
    rows = {"answered with words": answered, "silence is": figures["silence"]}
    return "<h3>To silence</h3>" + listing(rows | ({"it says": examples} if examples else {}))


def _samples(run: RunFiles) -> tuple[str, str]:
    shown = run.samples[:SHOWN_SAMPLES]
    if not shown:
        return "", ""
    sounds: dict[str, str] = {}
    reason = "Audio is put in when the run is finished."
    if run.summary:
        sounds, reason = recordings(run.cache_paths(), [sample["key"] for sample in shown[:HEARD_SAMPLES]])
    rows = []
    for sample in shown:
        reference, hypothesis = marked(sample["reference"], sample["hypothesis"])
        rows.append((name_cell(sample["key"], sounds), f"<span>{reference}</span>", f"<span>{hypothesis}</span>",
                     percent(sample["wer"])))  # fmt: skip
    note = f'<p class="note">{escape(reason)}</p>' if reason else ""
    return note, table(("utterance", "said", "decoded", "WER"), rows, (3,))


def name_cell(key: str, sounds: dict[str, str]) -> str:
    """An utterance's key with a player where there is sound."""
    sound = sounds.get(key)
    player = "" if sound is None else f'<audio controls preload="metadata" src="{escape(sound)}"></audio>'
    return f'<div><span class="key">{escape(key)}</span>{player}</div>'


def _elsewhere(judged: list[Figures]) -> str:
    rows = [
        (escape(", ".join(each["judged_on"])), f"{each['n_val']:,}", figure(each["val_loss"], 3),
         figure(each["audio_gain"], 2), percent(each["wer"]), percent(each["hallucination_rate"], 0))
        for each in judged
    ]  # fmt: skip
    return table(("cache", "utterances", "loss", "audio gain", "WER", "words to silence"), rows, range(1, 6))


def throughput(figures: Figures) -> dict[str, str]:
    """Speed, waiting, padding."""
    first, last = figure(figures.get("train_loss_first")), figure(figures.get("train_loss_last"))
    return {
        "frames a second": f"{figures.get('frames_per_second', 0.0):,.0f} (50 frames are one second of audio)",
        "waiting for data": percent(figures.get("data_wait_fraction")),
        "padding": percent(figures.get("padding_fraction")),
        "training loss, first to last step": f"{first} → {last}",
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
