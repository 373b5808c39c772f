"""Take the pictures of a run's report that the README shows: docs/report-light.webp and docs/report-dark.webp.

    python docs/make_pictures.py runs/demo

In: a finished run (its report.html is written anew) and a Chromium on the path (Debian: ``apt install chromium``). Out:
the top of the page in light and in dark, each below 150 KB.
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

from shards.errors import UserError, run_command

DOCS = Path(__file__).resolve().parent
WIDTH, HEIGHT = 1000, 1240
LIMIT = 150_000  # bytes


def main(argv: list[str]) -> None:
    sys.path.append(str(DOCS.parent / "tests" / "helpers"))  # the browser that the tests of the report open it with
    from browser import Browser, find_browser

    from train.report import write_report
    from train.runs.folder import find_run

    program = find_browser()
    if program is None:
        raise UserError("there is no Chromium on the path: install one, on Debian by `apt install chromium`")
    page = write_report(find_run(argv[0] if argv else None))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(program, Path(profile)) as browser:
        for scheme in ("light", "dark"):
            browser.open(page, WIDTH, HEIGHT, scheme)
            told = browser.ask("Page.captureScreenshot", format="webp", quality=80)
            picture = base64.b64decode(told["data"])
            if len(picture) > LIMIT:
                raise UserError(f"the picture has {len(picture)} bytes and may have {LIMIT}: lower HEIGHT")
            (DOCS / f"report-{scheme}.webp").write_bytes(picture)
            print(f"docs/report-{scheme}.webp: {len(picture)} bytes")


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: main(list(argv))))
