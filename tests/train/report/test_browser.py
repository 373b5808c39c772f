"""Reports in a real browser: headless Chromium opens the page of a run and of a sweep, in desktop and phone widths."""

from __future__ import annotations

import json
import shutil

import pytest
from browser import Browser, find_browser
from extraction import only_cache, run, words
from tiny_lm import save_tiny_lm
from tiny_run import make_config

from train.evaluation.run import evaluate_run
from train.report import experiment_folders, write_report, write_sweep_report
from train.trainer.fit import fit

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium on the path (Debian: apt install chromium)")

PICTURES = """
[...document.querySelectorAll("svg, img, canvas")].map(picture => {
  const box = picture.getBoundingClientRect();
  const marks = picture.querySelectorAll("polyline, circle, polygon, line").length;
  return {width: box.width, height: box.height, marks};
})
"""

SOUNDS = """
Promise.all([...document.querySelectorAll("audio")].map(audio => new Promise(done => {
  if (audio.readyState) done(audio.duration);
  audio.onloadedmetadata = () => done(audio.duration);
  audio.onerror = () => done(-1);
})))
"""

TOO_WIDE = """
[...document.querySelectorAll("main *:not(pre *)")].filter(element => !element.closest("svg") &&
  element.getBoundingClientRect().right > 360.5).map(element => element.outerHTML.slice(0, 200))
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, whisper, corpus):
    """Two experiments over features of real audio files; one is also evaluated on a named cache."""
    folder = tmp_path_factory.mktemp("report")
    assert run(words(folder / "caches", corpus, whisper, "source.val_fraction=0.5")) == 0
    cache = only_cache(folder / "caches")
    lm = save_tiny_lm(folder / "lm")
    runs = folder / "sweep"
    for name, rate in (("slow", 1e-3), ("fast", 1e-2)):
        config = make_config(folder, cache, f"path:{lm}", name=name, runs=str(runs), lr=rate, eval_every=4)
        last = fit(config)
    evaluate_run(last, config, str(cache))
    (runs / "sweep.json").write_text(json.dumps({"experiments": [{"name": "slow"}, {"name": "fast"}]}))
    return runs


@pytest.fixture(scope="module")
def pages(sweep):
    return [write_report(sweep / "fast"), write_sweep_report(sweep)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    assert program is not None
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_pages_load_nothing_and_log_no_errors(browser, pages):
    for page in pages:
        browser.open(page)
        assert browser.complaints() == []
        assert [url for url in browser.requested() if not url.startswith(("data:", page.resolve().as_uri()))] == []


def test_injected_markup_cannot_run_load_or_restyle(browser, pages, tmp_path):
    injected = (
        "<script>document.title = 'ran'</script><style>h1 {color: rgb(1, 2, 3)}</style><h1 style='color: rgb(1, 2, 3)'>"
        "<img src='file:///x.png' onerror='document.title = 1'>"
    )
    (tmp_path / "page.html").write_text(pages[0].read_text().replace("<h1>", injected, 1))
    browser.open(tmp_path / "page.html")
    assert len([line for line in browser.complaints() if "Content Security Policy" in line]) >= 4
    assert browser.run("document.title").startswith("fast")
    assert browser.run("getComputedStyle(document.querySelector('h1')).color") != "rgb(1, 2, 3)"


def test_every_chart_is_visible_and_has_marks(browser, pages):
    for page, least in zip(pages, (6, 4), strict=True):
        browser.open(page)
        browser.run("document.querySelectorAll('details').forEach(details => details.open = true)")
        pictures = browser.run(PICTURES)
        assert sum(picture["width"] > 300 for picture in pictures) >= least
        assert all(p["width"] > 0 and p["height"] > 0 and p["marks"] > 0 for p in pictures)


def test_recordings_can_be_played(browser, pages):
    for page in pages:
        browser.open(page)
        seconds = browser.run(SOUNDS)
        assert len(seconds) >= 3
        assert all(0.1 < each < 3 for each in seconds)


def test_pages_fit_a_phone_without_horizontal_scrolling(browser, pages):
    for page in pages:
        browser.open(page, width=360, height=740)
        browser.run("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert browser.run("document.documentElement.scrollWidth") == 360
        assert browser.run(TOO_WIDE) == []


LONG = "linear-stack5-norm-rms-hidden1024-lr0.002-seed0-mask_frames0.1-ema0.999"

NAMES = """
[...document.querySelectorAll("td:first-child")].filter(cell => cell.textContent.startsWith("linear-")).map(cell => {
  const range = document.createRange();
  const text = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  const words = [], tops = new Set();
  for (let node = text.nextNode(); node; node = text.nextNode())
    for (const word of node.textContent.matchAll(/[A-Za-z0-9]+/g)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      words.push(range.getClientRects().length);
      tops.add(Math.round(range.getBoundingClientRect().top));
    }
  return {height: cell.getBoundingClientRect().height / parseFloat(getComputedStyle(cell).lineHeight),
          lines: tops.size, broken: words.filter(pieces => pieces > 1).length};
})
"""


@pytest.fixture(scope="module")
def long_names(sweep, tmp_path_factory):
    """The sweep's page, with one experiment that has a long name as a grid generates it."""
    folder = tmp_path_factory.mktemp("long") / "sweep"
    for name, source in (("slow", "slow"), (LONG, "fast")):
        shutil.copytree(sweep / source, folder / name)
    (folder / "sweep.json").write_text(json.dumps({"experiments": [{"name": "slow"}, {"name": LONG}]}))
    return write_sweep_report(folder)


@pytest.mark.parametrize(("width", "most"), [(390, 3), (700, 5), (1000, 5)])
def test_a_long_name_wraps_between_words_into_few_lines(browser, long_names, width, most):
    browser.open(long_names, width=width)
    assert browser.run("document.documentElement.scrollWidth") == width
    cells = browser.run(NAMES)
    assert len(cells) >= 3
    assert all(cell["broken"] == 0 for cell in cells)
    assert max(cell["lines"] for cell in cells) <= most
    if width == 390:
        assert max(cell["height"] for cell in cells) <= most + 0.5  # with the cell's padding


def test_silence_of_a_real_cache_is_encoded_with_its_encoder(sweep):
    summary = json.loads((sweep / "fast" / "summary.json").read_text())
    assert summary["silence"] == "digital silence through the encoder"


def test_experiments_are_in_the_order_of_the_sweep(sweep):
    assert [folder.name for folder in experiment_folders(sweep)] == ["slow", "fast"]
