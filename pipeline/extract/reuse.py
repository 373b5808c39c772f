"""Features that other caches already hold: rows of equal feature id and audio id are copied, not encoded.

:func:`find_donors` names the caches to copy from: those below the same root, and those that ``reuse`` lists.
:class:`Reuse` finds the rows of a plan in them. A row is copied byte for byte, with its checksum, scale and error.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.extract.plan import id_words
from shards.commit.finalize import read_info
from shards.commit.writer import StoredMembers
from shards.errors import UserError
from shards.format.layout import Layout, Plan
from shards.format.spec import FeatureSpec
from shards.read.cache import open_features
from shards.read.features import FeatureRows
from shards.remote.client import is_url


class Donor(NamedTuple):
    """A cache to copy from.

    Attributes:
        location: its folder or URL.
        last: the last generation to read; None: the newest.
        required: whether the configuration names it; others are skipped if they cannot be read.
    """

    location: str
    last: int | None = None
    required: bool = False


class Reuse:
    """The rows of a plan that can be copied.

    Args:
        spec: spec of the cache that is made.
        plan: its plan; rows whose audio id is not known yet are never copied.
        donors: complete caches of the same spec.

    Attributes:
        sources: number of rows to copy by location.

    Raises:
        UserError: a required cache cannot be reached, or is corrupt.
    """

    def __init__(self, spec: FeatureSpec, plan: Plan, donors: Sequence[Donor]) -> None:
        self.donors = list(donors)
        self.sources: dict[str, int] = {}
        self._open: list[FeatureRows] = []
        self._donor = np.full(len(plan), -1, dtype=np.int16)
        self._row = np.zeros(len(plan), dtype=np.int64)
        self._samples = np.zeros(len(plan) if donors else 0, dtype=np.int64)
        self._error = np.zeros(len(plan) if donors else 0, dtype=np.float32)
        self._plan = plan
        if not donors:
            return
        ids = self._ids = plan.columns("audio_id")["audio_id"].combine_chunks()
        missing = np.any(id_words(ids) != 0, axis=1)
        for donor in self.donors:
            if not missing.any():
                break
            try:
                features = open_features(donor.location, generation=donor.last)[1]
            except UserError as error:
                if donor.required:
                    raise
                print(f"note: nothing is copied from '{donor.location}': {error}", file=sys.stderr)
                continue
            self._search(features, donor.location, ids, missing)

    def __bool__(self) -> bool:
        return bool(self.sources)

    @property
    def count(self) -> int:
        """Number of rows to copy."""
        return sum(self.sources.values())

    @property
    def copied(self) -> npt.NDArray[np.bool_]:
        """Whether each planned row can be copied, bool [rows]."""
        return self._donor >= 0

    def members(self, index: int) -> StoredMembers:
        """Return the stored bytes of the planned row ``index``; UserError if they cannot be read."""
        donor, row = self._open[self._donor[index]], int(self._row[index])
        payload, scale, crc = donor.members(row)
        return StoredMembers(
            payload,
            scale,
            crc,
            frames=int(donor.frames[row]),
            samples=int(self._samples[index]),
            error=float(self._error[index]),
            audio_id=self._ids[index].as_py(),
        )

    def _search(
        self, donor: FeatureRows, location: str, ids: pa.FixedSizeBinaryArray, missing: npt.NDArray[np.bool_]
    ) -> None:
        """Find the ``missing`` rows of the plan in ``donor``, and clear them in ``missing``."""
        tables = [
            pq.read_table(donor.layout.manifest(n), columns=["audio_id", "samples", "error"], use_threads=False)
            for n in range(len(donor.generations))
        ]
        table = pa.concat_tables(tables)
        wanted = np.flatnonzero(missing)
        at = pc.index_in(ids.take(pa.array(wanted)), value_set=table["audio_id"].combine_chunks())
        found = wanted[at.is_valid().to_numpy(zero_copy_only=False)]
        if not len(found):
            return
        rows = at.drop_null().to_numpy()
        self._donor[found], self._row[found] = len(self._open), rows
        self._samples[found], self._error[found] = table["samples"].to_numpy()[rows], table["error"].to_numpy()[rows]
        self._open.append(donor)
        self.sources[location] = len(found)
        missing[found] = False


def find_donors(root: str, spec: FeatureSpec, extra: Mapping[str, FeatureSpec], own: Donor | None) -> list[Donor]:
    """Return the complete caches of ``spec`` below ``root``, if that is a folder, and those of ``extra`` that fit.

    Args:
        extra: what :func:`open_extra` returned.
        own: the cache that is extended; None if it has no generation yet.
    """
    found = [] if own is None else [own]
    own_location = None if own is None else own.location
    if not is_url(root):
        for path in sorted(Path(root).glob(f"*/*-{spec.feature_id[:8]}/CACHE.json")):
            info = read_info(Layout(path.parent))
            if info is not None and info["feature_id"] == spec.feature_id and str(path.parent) != own_location:
                found.append(Donor(str(path.parent)))
    return [*found, *(Donor(location, required=True) for location, theirs in extra.items() if theirs == spec)]


def open_extra(extra: Sequence[str], specs: Sequence[FeatureSpec]) -> dict[str, FeatureSpec]:
    """Return the spec of each cache that ``reuse`` names.

    Raises:
        UserError: a cache does not exist, cannot be reached, or has the features of none of ``specs``.
    """
    found = {location: open_features(location)[1].spec for location in extra}
    for location, spec in found.items():
        if spec not in specs:
            different = "; ".join(specs[0].differences(spec))
            raise UserError(f"reuse names '{location}', which holds other features ({different}): remove it from reuse")
    return found
