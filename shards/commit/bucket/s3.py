"""s3."""

from __future__ import annotations

WRITE_ID_ATTRIBUTE = (
    "earshardput"  # metadata that tells a write of ours whose answer was lost from another's; Azure wants an identifier
)
