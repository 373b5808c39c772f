from __future__ import annotations

import pytest
from scripts import load_script


@pytest.fixture(scope="module")
def audit():
    return load_script(".ci/audit.py")


SOUND = {"name": "torch", "version": "2", "vulns": []}
HOLED = {"name": "yaml", "version": "5", "vulns": [{"id": "X-1", "fix_versions": ["6"]}]}
UNKNOWN = {"name": "tqdm", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("found", "status", "told"),
    [
        ([SOUND], 0, "a.lock: 1 packages looked up, 0 vulnerable"),
        ([SOUND, HOLED], 1, "yaml 5: X-1, mended in 6"),
        ([SOUND, UNKNOWN], 2, "1 packages of a.lock are unknown to the service (tqdm"),
        ([HOLED, UNKNOWN], 1, "yaml 5: X-1"),
    ],
)
def test_sound_vulnerable_and_not_looked_up_are_three_answers(audit, capsys, found, status, told):
    assert audit.report("a.lock", found) == status
    assert told in "".join(capsys.readouterr())


def test_without_an_answer_one_sentence_is_told(audit, capsys, monkeypatch, tmp_path):
    broken = tmp_path / "pip-audit"
    broken.write_text("#!/bin/sh\necho 'ConnectionError: no network' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(audit.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SystemExit) as stop:
        audit.ask("a.lock")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert (
        error
        == "error: a.lock could not be audited (ConnectionError: no network): try again where there is a network\n"
    )
