"""``summary.json`` of a finished run as a table for a terminal."""

from __future__ import annotations

from typing import Any

from train.runs.metrics_log import format_number


def format_summary(summary: dict[str, Any]) -> str:
    """Format the metrics of a finished run as a table."""

    def percent(key: str) -> str:
        return "–" if summary[key] is None else f"{100 * summary[key]:.1f} %"

    def seconds(part: str) -> str:  # a run of an earlier version has their sum only
        found = summary.get(f"{part}_seconds")
        return "–" if found is None else f"{found:,.1f} s"

    low, high = (summary.get("intervals") or {}).get("audio_gain", (None, None))
    bounds = "" if low is None else f"  [{low:.2f}, {high:.2f}] 95 % interval"
    retrieval, accuracy = summary.get("retrieval"), "–"
    if retrieval is not None:
        accuracy = f"{100 * retrieval['by_likelihood']:.0f} % (chance: {100 * retrieval['chance']:.0f} %)"

    def task_line(metrics: dict[str, Any]) -> str:
        rates = [(name, metrics.get(name.lower())) for name in ("WER", "CER", "accuracy")]
        return (
            f"{format_number(metrics.get('val_loss'))}, audio gain {format_number(metrics.get('audio_gain'))}"
            + "".join(f", {name} {100 * rate:.1f} %" for name, rate in rates if rate is not None)
        )

    lines = [
        (
            "training loss, first -> last",
            f"{format_number(summary['train_loss_first'])} -> {format_number(summary['train_loss_last'])}",
        ),
        ("held-out loss, nats per token", format_number(summary["val_loss"])),
        ("  with shuffled audio", format_number(summary["val_loss_shuffled"])),
        ("  with silence", format_number(summary.get("val_loss_silent"))),
        ("  with text only", format_number(summary.get("val_loss_text_only"))),
        ("audio gain", f"{format_number(summary['audio_gain'])}{bounds}"),
        ("time to listening", _listening(summary.get("listening"))),
        ("WER / CER", f"{percent('wer')} / {percent('cer')}")
        if summary["wer"] is not None or summary["cer"] is None
        else ("CER (no WER: words have no spaces)", percent("cer")),
        *([("  decoded", summary["decoding"])] if "decoding" in summary else []),
        ("retrieval accuracy", accuracy),
        ("hallucination rate on silence", percent("hallucination_rate") if "hallucination_rate" in summary else "–"),
        ("steps", f"{summary['steps']:,}"),
        ("training, evaluation", f"{seconds('training')}, {seconds('evaluation')}"),
        ("frames per second", f"{summary['frames_per_second']:,.0f}"),
        ("data wait, padding", f"{percent('data_wait_fraction')}, {percent('padding_fraction')}"),
        *((f"task {name or '(none)'}: loss", task_line(each)) for name, each in summary.get("tasks", {}).items()),
    ]
    return "\n".join(f"{name:<30} {value}" for name, value in lines)


def _listening(found: dict[str, Any] | None) -> str:
    if found is None:
        return "– (audio gain of 1 nat, interval above 0.5)"
    seconds = f", {found['seconds']:,.0f} s" if "seconds" in found else ""
    return f"{found['steps']:,} steps of the LM{seconds}"
