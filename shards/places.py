"""Places of one's own machine that a cache's provenance tells: who publishes the cache publishes them, too.

In: the provenance of ``CACHE.json``. Out: the absolute paths in it, and one line that names them, which ``shards push``
tells before it sends anything. They are not taken out: the file is sealed, and what arrives is compared with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shards.config import flatten

_LOCAL = re.compile(r"(path:|file://)?(/|~|[A-Za-z]:[\\/])")


def local_places(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(dotted key, text) of every absolute path of a file system in ``provenance``."""
    found = []
    for key, value in flatten(dict(provenance)).items():
        texts = value if isinstance(value, list) else [value]
        found += [(key, text) for text in texts if isinstance(text, str) and _LOCAL.match(text)]
    return found


def notice(provenance: Mapping[str, Any]) -> str | None:
    """One line for who is about to publish; None where nothing local is told."""
    listed = ", ".join(f"{key} '{text}'" for key, text in local_places(provenance))
    if not listed:
        return None
    return f"note: CACHE.json and job.json name places of this machine, which are published with them: {listed}"
