"""The label sets of a remote cache."""

from __future__ import annotations

from shards.format.records import MAX_JSON, RecordError, is_claim, unseal_bytes
from shards.labels.store import FOLDER, INDEX, LabelIndex, parse_index
from shards.remote.client import Remote, TransientError


def fetch_label_index(remote: Remote) -> tuple[bytes | None, LabelIndex]:
    """Fetch ``labels/LABELS.json``; returns its bytes and content, None and an empty index if it does not exist.

    Raises:
        UserError: it is corrupt, has another format, or cannot be reached.
    """
    name = f"{FOLDER}/{INDEX}"
    if remote.size(name) is None:
        return None, LabelIndex()

    def parse(data: bytes) -> tuple[bytes | None, LabelIndex]:
        if is_claim(data):
            return None, LabelIndex()
        try:
            unseal_bytes(data, name)
        except RecordError as error:
            raise TransientError(str(error)) from None
        return data, parse_index(data, f"'{remote.url}/{name}'")

    return remote.read(name, MAX_JSON + 1, parse)
