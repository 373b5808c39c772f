"""Charts of the soft tokens among the LM's embeddings, by utterance and by length, and their nearest tokens.

Takes the content of ``space.json`` (see ``train/evaluation/embedding_space.py``); returns what the templates show.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from train.report.charts import Cloud, scatter
from train.report.page import NUM_COLORS, NUM_SHADES

MAX_TOKENS = 40  # nearest tokens per utterance


def pca_charts(space: dict[str, Any], seconds: float) -> list[tuple[str, Markup]]:
    """Return (meaning of the colors, chart) of both charts; ``seconds`` is the duration of a frame."""
    plane = space.get("plane")
    if not plane:
        return []
    words = Cloud(
        "vocabulary", "word", [(x, y) for x, y, _ in plane["vocabulary"]],
        [f"token {text!r}" for *_, text in plane["vocabulary"]], radius=2.5,
    )  # fmt: skip
    across, up = [f"{name} component ({100 * share:.0f} % of the variance)"
                  for name, share in zip(("first", "second"), plane["explained"], strict=True)]  # fmt: skip
    by_utterance = [
        _cloud(each, seconds, _shorten(each["reference"]), f"c{i % NUM_COLORS}", i)
        for i, each in enumerate(plane["utterances"])
    ]
    ordered = sorted(plane["utterances"], key=lambda each: each["frames"])
    last = max(1, len(ordered) - 1)
    by_length = [
        _cloud(each, seconds, f"{each['frames'] * seconds:.1f} s", f"s{round(i / last * (NUM_SHADES - 1))}", 0)
        for i, each in enumerate(ordered)
    ]
    title = "PCA of soft tokens and vocabulary embeddings, colored"
    groupings = (("by utterance", by_utterance), ("by length", by_length))
    return [(how, scatter([words, *clouds], f"{title} {how}", across, up)) for how, clouds in groupings]


def nearest_tokens(space: dict[str, Any]) -> list[dict[str, Any]]:
    """Return ``reference``, nearest ``tokens`` as (text, cosine) and their ``mean`` cosine for a few utterances."""
    found = []
    for each in space.get("tokens", []):
        tokens = [(text.replace("\n", "⏎").strip() or "␣", cosine) for text, cosine in each["nearest"][:MAX_TOKENS]]
        mean = sum(cosine for _, cosine in tokens) / max(1, len(tokens))
        found.append({"reference": each["reference"], "mean": mean, "tokens": tokens})
    return found


def _cloud(each: dict[str, Any], seconds: float, name: str, style: str, shape: int) -> Cloud:
    texts = [f"{each['key']}, {each['frames'] * seconds:.1f} s, soft token {i + 1}" for i in range(len(each["points"]))]
    return Cloud(name, style, [(x, y) for x, y in each["points"]], texts, shape)


def _shorten(text: str, max_length: int = 40) -> str:
    return text if len(text) <= max_length else text[: max_length - 1].rstrip() + "…"
