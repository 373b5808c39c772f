"""The notebook runs from top to bottom, and its tiny model has learned to listen."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from docs_text import ROOT

from pipeline.weights.wheels import installed_files
from shards.errors import UserError

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    try:
        installed_files("whisper-tiny.en")
    except UserError as error:
        pytest.skip(str(error))
    for name in ("TMPDIR", "EARSHARD_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    shown = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    ((gain, errors),) = re.findall(r"audio gain (-?[\d.]+) nats per token, word error rate (\d+)%", shown)
    assert float(gain) > 0.3
    assert int(errors) <= 30
    assert len(re.findall(r"^clips/\d+\.wav -> (?:low|middle|high) (?:low|middle|high)$", shown, re.MULTILINE)) == 4
    assert list(Path(tmp_path).glob("earshard-*/runs/tones/report.html"))


def test_the_notebook_is_committed_without_outputs():
    assert '"outputs": []' in NOTEBOOK.read_text(encoding="utf-8")
    assert '"output_type"' not in NOTEBOOK.read_text(encoding="utf-8")
