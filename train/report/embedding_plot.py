"""Pictures of the soft tokens: among the LM's embeddings by utterance and by length, and their nearest tokens.

In: the tree of ``space.json`` (``train/evaluation/embedding_space.py``). Out: HTML.
"""

from __future__ import annotations

from html import escape
from typing import Any

from train.report.charts import Cloud, scatter
from train.report.page import COLOURS, SCALE

SHOWN_TOKENS = 40  # of an utterance


def planes(space: dict[str, Any], seconds: float) -> str:
    """Both pictures; ``seconds`` a frame."""
    plane = space.get("plane")
    if not plane:
        return ""
    words = Cloud(
        "vocabulary", "word", [(x, y) for x, y, _ in plane["vocabulary"]],
        [f"token {text!r}" for *_, text in plane["vocabulary"]], radius=2.5,
    )  # fmt: skip
    labels = [f"{name} component ({100 * share:.0f} % of the variance)"
              for name, share in zip(("first", "second"), plane["explained"], strict=True)]  # fmt: skip
    by_utterance = [
        _cloud(each, seconds, _short(each["reference"]), f"c{i % COLOURS}", i)
        for i, each in enumerate(plane["utterances"])
    ]
    ordered = sorted(plane["utterances"], key=lambda each: each["frames"])
    last = max(1, len(ordered) - 1)
    by_length = [
        _cloud(each, seconds, f"{each['frames'] * seconds:.1f} s", f"s{round(i / last * (SCALE - 1))}", 0)
        for i, each in enumerate(ordered)
    ]
    pictures = (("by utterance", by_utterance), ("by length", by_length))
    return "".join(
        f"<h3>Coloured {how}</h3>"
        + scatter([words, *clouds], f"PCA of soft tokens among the embeddings, coloured {how}", labels[0], labels[1])
        for how, clouds in pictures
    )


def nearest(space: dict[str, Any]) -> str:
    """The nearest vocabulary token of every soft token of a few utterances."""
    blocks = []
    for each in space.get("tokens", []):
        shown = each["nearest"][:SHOWN_TOKENS]
        tokens = "".join(
            f'<li title="cosine {cosine:.2f}">{escape(text.replace(chr(10), "⏎").strip() or "␣")}</li>'
            for text, cosine in shown
        )
        mean = sum(cosine for _, cosine in shown) / max(1, len(shown))
        heading = f"{escape(each['reference'])} <small>mean cosine {mean:.2f}</small>"
        blocks.append(f'<h3>{heading}</h3><ul class="tokens">{tokens}</ul>')
    return "".join(blocks)


def _cloud(each: dict[str, Any], seconds: float, name: str, style: str, shape: int) -> Cloud:
    told = [f"{each['key']}, {each['frames'] * seconds:.1f} s, soft token {i + 1}" for i in range(len(each["points"]))]
    return Cloud(name, style, [(x, y) for x, y in each["points"]], told, shape)


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
