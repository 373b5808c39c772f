"""The documentation site builds without a warning and loads nothing from elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs_text import ROOT

import earshard

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 14
    loaded = re.compile(
        r'<(?:script|img|source|iframe)[^>]*\ssrc(?:set)?="?(https?:[^"\s>]*)|<link[^>]*rel="?(?:stylesheet|preconnect|icon)"?[^>]*href="?(https?:[^"\s>]*)'
    )
    assert [found for page in pages for found in loaded.findall(page.read_text(encoding="utf-8"))] == []


def test_every_page_of_the_docs_is_in_the_navigation_and_found_by_the_search(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} | {"CONTRIBUTING", "CHANGELOG"}
    assert {name for name in pages if f'href="{name}.html"' not in home} == set()
    found = {
        entry["location"].partition(".html")[0]
        for entry in json.loads((site / "search" / "search_index.json").read_text())["docs"]
    }
    assert pages - found == set()


def test_every_public_name_is_explained_with_its_arguments(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in set(earshard.__all__) - {"__version__", "open"}:
        assert re.search(rf'id="[\w.]+\.{name}"', page), name
    assert "max_frames" in page


def test_the_files_that_pages_link_to_are_part_of_the_site(site):
    assert (site / "configs" / "cluster" / "slurm-train.sh").is_file()
    assert (site / "report-light.webp").is_file()
    assert 'href="configs/cluster/slurm-train.sh"' in (site / "scale.html").read_text(encoding="utf-8")
