"""HTML of a report: Jinja2 templates that escape every value, and building blocks for table cells.

Takes a template of ``templates/`` and its values; returns ``Markup``, the only type that a template does not escape.
Besides the templates, only the constants of this module create it. An undefined template variable is an error, not an
empty string.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from hashlib import sha256
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

NUM_COLORS = 8  # classes c0 … c7 of report.css, for categories
NUM_SHADES = 5  # classes s0 … s4 of report.css, from low to high

Row = Sequence[object]  # the cells of a table; strings are escaped

WITH_SMALL = Markup("{} <small>{}</small>")
DIV = Markup("<div>{}</div>")
SPAN = Markup("<span>{}</span>")
KEY = Markup('<span class="key">{}</span>')
BAD = Markup('<span class="bad">{}</span>')
NAME = Markup('<span class="name">{}</span>')
PLAYER = Markup('<audio controls preload="metadata" src="{}"></audio>')
DELETED, INSERTED = Markup("<del>{}</del>"), Markup("<ins>{}</ins>")
LINE_BREAK = Markup("<wbr>")


@cache
def environment() -> Environment:
    """Return the template environment, with the style sheet and its hash for the Content-Security-Policy."""
    loader = PackageLoader("train.report")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style, _, _ = loader.get_source(found, "report.css")
    found.filters |= {"headings": headings, "slug": slug}
    found.globals |= {"style": Markup(style), "style_hash": b64encode(sha256(style.encode()).digest()).decode()}
    return found


def render(template: str, **values: Any) -> Markup:
    """Render a template; ``values`` are escaped unless they are ``Markup``."""
    return Markup(environment().get_template(template).render(values))


def breakable(name: str) -> Markup:
    """Return a name with line break opportunities after its punctuation, so that lines do not break within words."""
    return NAME.format(LINE_BREAK.join(re.split(r"(?<=[-_/=])(?=[^\W_])", name)))


def utterance(key: str, sounds: Mapping[str, str], task: str = "") -> Markup:
    """Return the cell of an utterance: its key and its task, and a player if ``sounds`` has its audio."""
    player = PLAYER.format(sounds[key]) if key in sounds else ""
    name = WITH_SMALL.format(KEY.format(key), task) if task else KEY.format(key)
    return DIV.format(name + player)


def mark_differences(reference: str, hypothesis: str) -> tuple[Markup, Markup]:
    """Return both texts, with words only in the reference in ``<del>`` and words only in the hypothesis in ``<ins>``.

    Case and punctuation are ignored, as in the error rates (which also normalize spellings and numbers). An empty
    hypothesis becomes a dash.
    """
    texts = reference.split(), hypothesis.split()
    left, right = ([_plain(word) for word in words] for words in texts)
    sides: tuple[list[Markup], list[Markup]] = ([], [])
    for kind, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        for side, words, change in zip(sides, (texts[0][a:b], texts[1][c:d]), (DELETED, INSERTED), strict=True):
            if words:
                side.append((Markup("{}") if kind == "equal" else change).format(" ".join(words)))
    return Markup(" ").join(sides[0]), Markup(" ").join(sides[1]) or Markup("–")


def _plain(word: str) -> str:
    return "".join(letter for letter in word.casefold() if letter.isalnum()) or word


def percent(value: float | None, digits: int = 1) -> str:
    """Format a fraction as a percentage; None as a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def format_interval(
    metrics: Mapping[str, Any], name: str, scale: float = 1, digits: int = 2, signed: bool = False
) -> str:
    """Format the interval of a metric as ``[low, high]``; empty if the evaluation has none."""
    found = (metrics.get("intervals") or {}).get(name)
    sign = "+" if signed else ""
    return "" if found is None else f"[{scale * found[0]:{sign}.{digits}f}, {scale * found[1]:{sign}.{digits}f}]"


def setting(value: Any) -> str:
    """Format a setting without the punctuation of a programming language: lists by commas, layers side by side by +."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {setting(each)}" for key, each in value.items()) or "–"
    if isinstance(value, list | tuple):
        parts = (" + ".join(map(setting, each)) if isinstance(each, list | tuple) else setting(each) for each in value)
        return ", ".join(parts) or "–"
    return "–" if value is None or value == "" else str(value)


def headings(inside: Markup) -> list[tuple[str, Markup]]:
    """Return (id, heading) of every section of a page, for its table of contents."""
    found = re.finditer(r'<section id="([a-z0-9-]+)"><h2>([^<]*)</h2>', inside)
    return [(each[1], Markup(each[2])) for each in found]


def slug(heading: str) -> str:
    """Return the id of a section."""
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def duration(seconds: float) -> str:
    """Format a duration as minutes and seconds, or as hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
