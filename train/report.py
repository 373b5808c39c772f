"""One self-contained page about a run: figures, curves, decoded samples, settings, identity of the features.

In: a run folder (``metrics.jsonl``, ``evaluations.jsonl``, ``config.yaml``, ``caches.json`` and, when finished,
``summary.json``). Out: ``report.html`` beside them. No script, no network: curves are inline SVG (``train/charts.py``).

    python -m train report runs/demo
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from shards.disk import atomic_write, told
from train.charts import Curve, chart, smooth
from train.runs import read_json
from train.track import EVALUATIONS, METRICS, figure, read_lines

REPORT = "report.html"
SHOWN_SAMPLES = 24


def write_report(run: Path) -> Path:
    """Write ``report.html`` into ``run`` from what stands there; returns its path."""
    path = run / REPORT
    with told("writing the report", path):
        atomic_write(path, render(run).encode(), str(os.getpid()))
    return path


def render(run: Path) -> str:
    """The page as text; everything that comes from data is escaped."""
    metrics, evaluations = read_lines(run / METRICS), read_lines(run / EVALUATIONS)
    summary = read_json(run / "summary.json") if (run / "summary.json").is_file() else {}
    about = read_json(run / "caches.json")
    latest = evaluations[-1] if evaluations else {}
    figures = {**_progress(metrics), **latest, **summary}
    state = "finished" if summary else "running or stopped"
    name = escape(run.name)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{name} · earshard</title><style>{STYLE}</style></head>
<body><main>
<header><p class="over">earshard run · {state}</p><h1>{name}</h1>{_verdict(figures)}</header>
{_tiles(figures)}
<section><h2>Loss</h2>{_loss_chart(metrics, evaluations)}
<p class="note">Nats per target token. The distance between held-out loss with the right audio and with another
utterance’s audio is the audio gain: what the language model takes from listening.</p></section>
<section><h2>Size of the soft tokens</h2>{_rms_chart(metrics)}
<p class="note">RMS of the projector’s output over RMS of the language model’s embeddings; far from 1 the gradient
starves.</p>
</section>
{_samples(latest.get("samples", []))}
<section><h2>Throughput</h2>{_rows(_throughput(figures))}</section>
<section><h2>Features</h2>{_rows(_identity(about, figures))}</section>
<section><h2>Settings</h2><pre>{escape(_text(run / "config.yaml"))}</pre></section>
</main></body></html>
"""


def _progress(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``summary.json`` will hold, from the steps so far."""
    if not metrics:
        return {}
    seconds = sum(line["seconds"] for line in metrics) or 1e-9
    return {
        "steps": metrics[-1]["step"],
        "seconds": seconds,
        "frames_per_second": sum(line["frames"] for line in metrics) / seconds,
        "data_wait_fraction": sum(line["data_wait"] for line in metrics) / seconds,
        "train_loss_first": metrics[0]["loss"],
        "train_loss_last": metrics[-1]["loss"],
    }


def _verdict(figures: dict[str, Any]) -> str:
    gain = figures.get("audio_gain")
    if gain is None:
        return '<p class="lead">Not evaluated yet.</p>'
    if gain < 0.1:
        text = "The language model does not listen yet: another utterance’s audio serves it as well as the right one."
    else:
        text = f"The right audio saves {gain:.2f} nats on every target token."
    return f'<p class="lead">{text}</p>'


def _tiles(figures: dict[str, Any]) -> str:
    tiles = [
        ("audio gain", figure(figures.get("audio_gain"), 2), "nats a token"),
        ("held-out loss", figure(figures.get("val_loss"), 3), "nats a token"),
        ("… other audio", figure(figures.get("val_loss_shuffled"), 3), "nats a token"),
        ("WER", _percent(figures.get("wer")), f"{figures.get('n_decoded', 0)} decoded"),
        ("CER", _percent(figures.get("cer")), f"{figures.get('n_without_reference', 0)} without reference"),
        ("steps", f"{figures.get('steps', 0):,}", _duration(figures.get("seconds", 0.0))),
    ]
    return '<section class="tiles">' + "".join(
        f"<div><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(unit)}</small></div>"
        for label, value, unit in tiles
    ) + "</section>"  # fmt: skip


def _loss_chart(metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> str:
    train = [(line["step"], line["loss"]) for line in metrics]
    return chart(
        [
            Curve("training, each step", "faint", train),
            Curve("training, smoothed", "train", smooth(train)),
            Curve("held out, other audio", "other", _points(evaluations, "val_loss_shuffled"), dots=True),
            Curve("held out", "held", _points(evaluations, "val_loss"), dots=True),
        ],
        "Training loss and held-out loss with matched and with shuffled audio, over steps",
    )


def _rms_chart(metrics: list[dict[str, Any]]) -> str:
    curve = Curve("soft tokens / embeddings", "train", _points(metrics, "projector_rms_ratio"))
    return chart([curve], "Ratio of soft-token RMS to embedding RMS, over steps", height=160)


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    rows = "".join(
        f'<tr><td class="key">{escape(sample["key"])}</td><td data-label="said">{escape(sample["reference"])}</td>'
        f'<td data-label="decoded">{escape(sample["hypothesis"])}</td>'
        f'<td class="number" data-label="WER">{_percent(sample["wer"])}</td></tr>'
        for sample in samples[:SHOWN_SAMPLES]
    )
    return (
        "<section><h2>Held-out utterances, decoded</h2><table><thead><tr><th>utterance</th><th>said</th>"
        f'<th>decoded</th><th class="number">WER</th></tr></thead><tbody>{rows}</tbody></table></section>'
    )


def _throughput(figures: dict[str, Any]) -> dict[str, str]:
    return {
        "frames a second": f"{figures.get('frames_per_second', 0.0):,.0f} (50 frames are one second of audio)",
        "waiting for data": _percent(figures.get("data_wait_fraction")),
        "padding": _percent(figures.get("padding_fraction")),
        "training loss, first to last step": f"{figure(figures.get('train_loss_first'))} → "
        f"{figure(figures.get('train_loss_last'))}",
        "device": f"{figures.get('device', '–')}, {figures.get('dtype', '–')}",
    }


def _identity(about: dict[str, Any], figures: dict[str, Any]) -> dict[str, str]:
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


def _rows(rows: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows.items()) + "</dl>"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


STYLE = """
:root{--paper:#fbfaf7;--ink:#1d1f21;--soft:#5f6368;--line:#dcd8cf;--card:#fff;--train:#3465a4;--held:#1f7a4d;--other:#b5541c}
@media(prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e8e6e1;--soft:#9aa0a6;--line:#33373d;--card:#1c1f23;
--train:#7aa7e0;--held:#5fc08f;--other:#e79a63}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,"Segoe UI",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:58rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:2rem;line-height:1.15;margin:.1rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.6rem 0 .7rem}
.over{margin:0;color:var(--soft);font-size:.85rem}
.lead{font-size:1.1rem;max-width:42rem;margin:0}
.note{color:var(--soft);font-size:.875rem;max-width:46rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.2rem,1fr));gap:1px;margin-top:1.8rem;
background:var(--line);border:1px solid var(--line);border-radius:.5rem;overflow:hidden}
.tiles div{background:var(--card);padding:.8rem .9rem}
.tiles span,.tiles small{display:block;color:var(--soft);font-size:.8rem}
.tiles b{font-size:1.45rem;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.3}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:12px;font-family:inherit}
.grid{stroke:var(--line);stroke-width:1}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}
.train{stroke:var(--train)}.held{stroke:var(--held)}.other{stroke:var(--other)}.faint{stroke:var(--train);opacity:.28;stroke-width:1}
circle{stroke:none}circle.held{fill:var(--held)}circle.other{fill:var(--other)}circle.train{fill:var(--train)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.4rem 0 0;padding:0;list-style:none;font-size:.875rem}
.legend svg{display:inline-block;width:1.6rem;height:.6rem;margin-right:.4rem;vertical-align:.05rem}
table{width:100%;border-collapse:collapse;font-size:.94rem}
th{text-align:left;font-weight:500;color:var(--soft);font-size:.8rem}
th,td{padding:.5rem .9rem .5rem 0;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
.key{color:var(--soft);font-size:.8rem;max-width:11rem}
.number{text-align:right;padding-right:0;white-space:nowrap;font-variant-numeric:tabular-nums}
dl{display:grid;grid-template-columns:minmax(9rem,14rem) 1fr;gap:.4rem 1.2rem;margin:0;font-size:.94rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem;overflow-x:auto;
font-size:.82rem;line-height:1.5;margin:0}
@media(max-width:40rem){main{padding-top:1.5rem}dl{grid-template-columns:1fr;gap:.1rem}dd{margin-bottom:.6rem}
thead{display:none}tr{display:block;padding:.7rem 0;border-bottom:1px solid var(--line)}
td{display:block;border:0;padding:.1rem 0;text-align:left;max-width:none}
td[data-label]::before{content:attr(data-label);display:inline-block;min-width:4.5rem;color:var(--soft);font-size:.8rem}.number{text-align:left}
svg text{font-size:22px}}
"""
