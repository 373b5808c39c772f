"""The shell of a report: one HTML page that loads nothing, and the small pieces that pages are made of.

In: text of sections. Out: the page. Whatever comes from data passes ``escape`` here or where it is put in. Readable at
a width of 360 px (tables become blocks, pictures shrink) and in dark mode; the colours of curves and groups are chosen
to differ for colour-blind eyes and to stand out from both papers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from typing import Any

COLOURS = 8  # classes c0 … c7, categories
SCALE = 5  # classes s0 … s4, low to high

Row = Sequence[str]  # of HTML


def page(title: str, body: str) -> str:
    """A whole document; ``body`` is HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · earshard</title><style>{STYLE}</style></head>
<body><main>
{body}
</main></body></html>
"""


def section(heading: str, *parts: str, note: str = "") -> str:
    """A section of HTML parts with a note below; nothing where all parts are empty."""
    inside = "".join(parts)
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(heading)}</h2>{inside}{told}</section>" if inside else ""


def tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    """(label, value, unit) of each tile."""
    return '<section class="tiles">' + "".join(
        f"<div><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(unit)}</small></div>"
        for label, value, unit in rows
    ) + "</section>"  # fmt: skip


def breakable(name: str) -> str:
    """A name as HTML that may break behind its signs: a narrow column need not break it within a word."""
    broken = re.sub(r"([-_/=]+)(?=\w)", r"\1<wbr>", escape(name))
    return f'<span class="name">{broken}</span>'


def table(headings: Sequence[str], rows: Sequence[Row], numbers: Sequence[int] = ()) -> str:
    """A table of HTML cells that becomes blocks on a phone, and scrolls by itself where it is wider than the page.

    ``numbers`` are the columns that are set to the right.
    """
    if not rows:
        return ""
    sides = ["number" if column in numbers else "" for column in range(len(headings))]
    head = "".join(f'<th class="{side}">{escape(text)}</th>' for side, text in zip(sides, headings, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{side}" data-label="{escape(heading)}">{cell}</td>'
            for side, heading, cell in zip(sides, headings, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def listing(rows: Mapping[str, str]) -> str:
    """Names and texts."""
    return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows.items()) + "</dl>"


def folded(summary: str, inside: str) -> str:
    """HTML that a click unfolds."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction for people; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def bounds(figures: Mapping[str, Any], name: str, scale: float = 1, digits: int = 2, signed: bool = False) -> str:
    """``[low, high]`` of a figure's interval; nothing where the evaluation gave none."""
    found = (figures.get("intervals") or {}).get(name)
    sign = "+" if signed else ""
    return "" if found is None else f"[{scale * found[0]:{sign}.{digits}f}, {scale * found[1]:{sign}.{digits}f}]"


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


LIGHT = ("0063a3", "c04a00", "00724f", "99307a", "7d5f00", "3b3b98", "5a5a5a", "1c7686")
DARK = ("62b5ef", "ff9c57", "3dd1a0", "e899cb", "e6cf45", "aea9ff", "bdbdbd", "74d7e6")
LIGHT_SCALE = ("b08700", "8a7c47", "66717a", "3d5590", "14296b")
DARK_SCALE = ("ffe45c", "d8b94f", "a99d80", "8499c0", "6da0ff")


def _variables(colours: Sequence[str], scale: Sequence[str]) -> str:
    names = [f"--c{i}:#{colour}" for i, colour in enumerate(colours)]
    return ";".join([*names, *(f"--s{i}:#{colour}" for i, colour in enumerate(scale))])


def _classes(letter: str, count: int) -> str:
    return "".join(
        f".curve.{letter}{i}{{stroke:var(--{letter}{i})}}.mark.{letter}{i},circle.{letter}{i}"
        f"{{fill:var(--{letter}{i})}}"
        for i in range(count)
    )


STYLE = f"""
:root{{--paper:#fbfaf7;--ink:#1d1f21;--soft:#5a5f64;--line:#dcd8cf;--card:#fff;--lost:#fbe3d6;--added:#dcebf8;
{_variables(LIGHT, LIGHT_SCALE)}}}
@media(prefers-color-scheme:dark){{:root{{--paper:#15171a;--ink:#e8e6e1;--soft:#a3a9af;--line:#33373d;--card:#1c1f23;
--lost:#4a2b1a;--added:#17364f;{_variables(DARK, DARK_SCALE)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,"Segoe UI",sans-serif;
-webkit-text-size-adjust:100%}}
main{{max-width:58rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}}
h1{{font-size:2rem;line-height:1.15;margin:.1rem 0 .6rem;overflow-wrap:anywhere}}
h2{{font-size:1.1rem;margin:2.6rem 0 .7rem}}
h3{{font-size:.95rem;margin:1.4rem 0 .3rem;font-weight:600}}
.over{{margin:0;color:var(--soft);font-size:.85rem}}
.lead{{font-size:1.1rem;max-width:42rem;margin:0}}
.note{{color:var(--soft);font-size:.875rem;max-width:46rem}}
.tiles{{display:flex;flex-wrap:wrap;gap:1px;margin-top:1.8rem;
background:var(--line);border:1px solid var(--line);border-radius:.5rem;overflow:hidden}}
.tiles div{{flex:1 1 8.6rem;background:var(--card);padding:.8rem .9rem}}
.tiles span,.tiles small{{display:block;color:var(--soft);font-size:.8rem}}
.tiles b{{font-size:1.45rem;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.3}}
figure{{margin:0}}
figure>svg{{display:block;width:100%;height:auto;overflow:visible}}
svg text{{fill:var(--soft);font-size:11px;font-family:inherit}}
.axis{{margin:.2rem 0;color:var(--soft);font-size:.8rem}}.across{{text-align:right}}
.grid{{stroke:var(--line);stroke-width:1}}
.curve{{fill:none;stroke-width:2;stroke-linejoin:round}}
.dash1{{stroke-dasharray:7 3}}.dash2{{stroke-dasharray:2 3}}.dash3{{stroke-dasharray:9 3 2 3}}
.curve.faint{{stroke:var(--c0);opacity:.3;stroke-width:1;stroke-dasharray:none}}
.unseen{{fill:transparent}}.mark{{opacity:.85}}.mark.word{{fill:var(--soft);opacity:.35}}
{_classes("c", COLOURS)}{_classes("s", SCALE)}
.legend{{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.4rem 0 0;padding:0;list-style:none;font-size:.875rem}}
.legend li{{overflow-wrap:anywhere;min-width:0}}
.legend svg{{display:inline-block;width:1.6rem;height:.6rem;margin-right:.4rem;vertical-align:.05rem;overflow:visible}}
table{{width:100%;border-collapse:collapse;font-size:.94rem}}
th{{text-align:left;font-weight:500;color:var(--soft);font-size:.8rem;vertical-align:bottom}}
th,td{{padding:.5rem .9rem .5rem 0;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}}
.key{{color:var(--soft);font-size:.8rem;display:block}}
small{{color:var(--soft);font-size:.8rem}}
.number{{text-align:right;padding-left:.7rem;padding-right:.2rem;font-variant-numeric:tabular-nums}}
td.number{{white-space:nowrap}}
td.number>div{{white-space:normal}}td.number small{{white-space:nowrap;display:inline-block}}
.wide{{overflow-x:auto}}
.name{{display:inline-block;min-width:10rem;overflow-wrap:break-word}}
ins,del{{text-decoration-thickness:2px;border-radius:.2rem;padding:0 .15rem;color:var(--ink)}}
ins{{background:var(--added);text-decoration:underline}}del{{background:var(--lost);text-decoration:underline dotted}}
audio{{display:block;width:14rem;max-width:100%;height:2.2rem;margin-top:.3rem}}
td audio{{min-width:12rem}}
.tokens{{display:flex;flex-wrap:wrap;gap:.25rem;margin:.2rem 0 0;padding:0;list-style:none;font-size:.8rem}}
.tokens li{{border:1px solid var(--line);border-radius:.25rem;padding:0 .3rem;background:var(--card);
white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,monospace}}
dl{{display:grid;grid-template-columns:minmax(9rem,14rem) 1fr;gap:.4rem 1.2rem;margin:0;font-size:.94rem}}
dt{{color:var(--soft)}}dd{{margin:0;overflow-wrap:anywhere}}
summary{{cursor:pointer;color:var(--soft);font-size:.9rem;margin:.8rem 0}}
pre{{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem;overflow-x:auto;
font-size:.82rem;line-height:1.5;margin:0}}
@media(max-width:40rem){{main{{padding-top:1.5rem}}dl{{grid-template-columns:1fr;gap:.1rem}}dd{{margin-bottom:.6rem}}
thead{{display:none}}table,tbody{{display:block}}tr{{display:block;padding:.7rem 0;border-bottom:1px solid var(--line)}}
td,td.number{{display:flex;gap:.6rem;border:0;padding:.1rem 0;text-align:left;white-space:normal}}
td::before{{content:attr(data-label);flex:0 0 6.5rem;color:var(--soft);font-size:.8rem;padding-top:.15rem}}
td>*{{min-width:0}}td:first-child{{display:block;font-weight:600}}td:first-child::before{{content:none}}
svg text{{font-size:23px}}}}
"""


def marked(reference: str, hypothesis: str) -> tuple[str, str]:
    """Both as HTML; a hypothesis without a word is a dash."""
    said, heard = reference.split(), hypothesis.split()
    left, right = [], []
    matcher = SequenceMatcher(None, list(map(_plain, said)), list(map(_plain, heard)), autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        left.append(_run(said[a:b], "del" if kind != "equal" else ""))
        right.append(_run(heard[c:d], "ins" if kind != "equal" else ""))
    return " ".join(filter(None, left)), " ".join(filter(None, right)) or "–"


def _plain(word: str) -> str:
    return "".join(letter for letter in word.casefold() if letter.isalnum()) or word


def _run(words: Sequence[str], tag: str) -> str:
    text = escape(" ".join(words))
    return f"<{tag}>{text}</{tag}>" if text and tag else text
