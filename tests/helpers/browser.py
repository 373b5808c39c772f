"""Control a headless Chromium over the DevTools protocol, with two pipes and JSON instead of a library.

Loads a file at a screen size and color scheme; returns JavaScript results, console messages and screenshots.
Protocol: chromedevtools.github.io/devtools-protocol, with ``--remote-debugging-pipe`` (messages end with a NUL).
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--remote-debugging-pipe", "--disable-background-networking", "--disable-dev-shm-usage"),
)


def find_browser() -> str | None:
    """Return the path of a Chromium on this machine, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab; a context manager."""

    def __init__(self, program: str, profile: Path) -> None:
        mine_in, theirs_out = os.pipe()
        theirs_in, mine_out = os.pipe()
        words = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]

        # the browser reads from descriptor 3 and writes to descriptor 4; duplicate first, because they may overlap
        def place() -> None:
            read, write = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self._process = subprocess.Popen(
            words, close_fds=False, preexec_fn=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = os.fdopen(mine_in, "rb", buffering=0), os.fdopen(mine_out, "wb", buffering=0)
        self._rest, self._count, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that arrive first are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        session = {"sessionId": self._session} if self._session else {}
        self._out.write(json.dumps({**message, **session}).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, path: Path, width: int = 1000, height: int = 900, scheme: str = "light") -> None:
        """Load a file at a screen size, in ``light`` or ``dark``, and wait until it is loaded."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 500)  # fmt: skip
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """Return the JSON value of a JavaScript expression; wait for it if it is a promise."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Return console errors and warnings, exceptions, and failed loads since ``open``."""
        self.run("0")  # all events of the load arrive before this answer
        wanted = ("Runtime.exceptionThrown", "Network.loadingFailed")
        found = [event for event in self.events if event.get("method") in wanted]
        for event in self.events:
            entry = event.get("params", {}).get("entry", event.get("params", {}))
            if event.get("method") == "Log.entryAdded" and entry.get("level") in ("error", "warning"):
                found.append(event)
            if event.get("method") == "Runtime.consoleAPICalled" and entry.get("type") in ("error", "warning"):
                found.append(event)
        return [json.dumps(event["params"])[:500] for event in found]

    def requested(self) -> list[str]:
        """Return the URLs that the page requested since ``open``."""
        asked = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [str(event["params"]["request"]["url"])[:200] for event in asked]

    def picture(self, path: Path) -> None:
        """Save the whole page as PNG."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = self._in.read(1 << 16)
            if not piece:
                raise RuntimeError("the browser ended")
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer
