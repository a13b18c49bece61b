"""The end of a run: what has vanished, the containers that need no reading any more, and the proof that the rows are there."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import JobFailed
from pipeline.known import WHOLE, added_up, hash64, member
from pipeline.plan import listing_version, noted_version
from pipeline.prepare import Prepared, Sync
from pipeline.table.commit import Committer
from pipeline.table.contents import double_sums, id_sums, quoted, read_batches, unit_states
from pipeline.table.ledger import record_notes
from pipeline.table.rejects import forget_duplicates, forget_rejects, rejects_of
from pipeline.table.stage import Unproved


@dataclass(frozen=True)
class Closing:
    """The end of a run whose receipts are all committed."""

    prepared: Prepared
    committer: Committer

    def vanished(self) -> pa.ChunkedArray:
        """Ids of this source's rows whose item was not met. As Arrow strings: they may be half of the source, and most runs only count them."""
        p = self.prepared
        gone: list[pa.Array] = []
        if p.plan.vanished_ids is None or len(p.plan.vanished_ids):
            for batch in read_batches(p.table.require(), ["id", "_unit"], f"source = {quoted(p.reader.source)}"):
                gone.append(batch["id"].filter(pa.array(self._is_gone(batch))))
        return pa.chunked_array(gone, pa.string())

    def _is_gone(self, rows: pa.RecordBatch) -> np.ndarray:
        """Whether the item of each row (N,) was not met."""
        hashes, vanished = hash64(rows["id"]), self.prepared.plan.vanished_ids
        if vanished is not None:
            return member(hashes, vanished)
        known = self.prepared.contents.own.find(hashes)[0]  # what another job has brought since the plan is not ours to miss
        met = self.committer.own.find(hashes)[0] | self.committer.refused.find(hashes)[0]
        return np.asarray(known & ~met & self._is_known(rows["_unit"]))

    def _is_known(self, units: pa.Array) -> np.ndarray:
        """Whether it is known what became of the rows (N,) of some containers that this run has not met.

        Not of those that need no reading; and while some cannot be read only of those that were: the rest may have moved to where nobody can look.
        """
        if self.committer.unread:
            return np.asarray(pc.is_in(units, pa.array(sorted(self._whole_units()), pa.string())))
        return ~np.asarray(pc.is_in(units, pa.array(sorted(self.prepared.plan.complete_units), pa.string())))

    def _whole_units(self) -> set[str]:
        """The containers of which this run has read every item."""
        committer, listed = self.committer, self.prepared.plan.unit_items
        return {unit for unit, (items, _) in committer.units.items() if items == listed[unit]} - committer.unread

    def delete(self, vanished: pa.ChunkedArray, sync: Sync) -> int:
        """Delete the rows of these ids in one commit. Raises JobFailed if they are more of the source than `sync.max_vanished` allows."""
        rows = len(self.prepared.contents.own)
        if not sync.allows(len(vanished), rows=rows):
            raise JobFailed(
                f"{len(vanished)} of the source's {rows} rows would be deleted, more than sync.max_vanished={sync.max_vanished:g}; nothing was "
                "deleted. Is the source complete? If it is, raise sync.max_vanished"
            )
        return self.committer.delete(vanished.to_pylist())

    def forget_outdated_rejects(self, *, duplicates: bool) -> None:
        """Those of containers that were read whole and have them no more: of rows that are gone, or of when a container could not be read.

        `duplicates`: also those that have taken the place of the item that came first.
        """
        p = self.prepared
        if not p.plan.units or not (len(p.contents.rejected) or len(p.contents.duplicates)):
            return
        rejects = rejects_of(p.table, source=p.reader.source)
        whole = np.asarray(pc.is_in(rejects["_unit"], pa.array(sorted(self._whole_units()), pa.string())))
        ids, double = hash64(rejects["id"]), np.asarray(pc.equal(rejects["reason"], "duplicate_id"))
        forget_rejects(p.table, rejects["id"].filter(pa.array(whole & ~double & ~self.committer.refused.find(ids)[0])).to_pylist())
        if duplicates:
            forget_duplicates(p.table, rejects["id"].filter(pa.array(whole & double & ~self.committer.doubles.find(ids)[0])).to_pylist())

    def note_units(self, *, exact: bool) -> None:
        """Note the containers that need no reading any more. `exact`: the table has no row of this source whose item is not listed.

        A row that has moved to another container keeps the name of the old one, so that neither has the rows of its own items, be there as many
        of them. If all containers together add up, the source is noted as a whole: it needs no reading as long as nothing of it changes.
        """
        p = self.prepared
        if not p.plan.units:
            return
        dataset = p.table.require()
        states = unit_states(dataset, source=p.reader.source)
        notes, done = [], self._whole_units() - self.committer.again
        counts = {unit: tuple(self.committer.units[unit]) for unit in done}
        versions = {unit: p.plan.units[unit] for unit in done}
        if exact and done == set(p.plan.units) and self.committer.alone(dataset.version) and p.plan.listing is not None:
            listed, rejected = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
            counts[WHOLE] = (listed + p.plan.unchanged + p.plan.rejected, rejected + p.plan.rejected)
            versions[WHOLE] = listing_version(p.plan.listing)
        counts = {unit: count for unit, count in counts.items() if states.get(unit, (0, ""))[0] == count[0] - count[1]}
        sums, recorded = id_sums(dataset, counts, source=p.reader.source), double_sums(p.table, source=p.reader.source)
        for unit, (_, rejected) in sorted(counts.items()):
            rows, digest = states.get(unit, (0, ""))
            met = self.committer.doubles_of.get(unit, np.empty(0, np.uint64)).tolist()
            double = added_up(recorded.values() if unit == WHOLE else met)
            # A duplicate that is not on record under its container's name will not be found when it is to take the other one's place.
            if unit == WHOLE or (sums[unit] == self.committer.accepted[unit] and double == recorded.get(unit, 0)):
                version = noted_version(versions[unit], double)
                row = {"source": p.reader.source, "unit": unit, "version": version, "rows": rows, "rejected": rejected, "digest": digest}
                notes.append({**row, "run": p.run})
        record_notes(p.table, notes)

    def prove(self) -> None:
        """Count the committed chunks' rows in the table as it is now. Raises Unproved if some are missing and nobody else has written."""
        dataset = self.prepared.table.require()
        found: Counter[str] = Counter()
        for batch in read_batches(dataset, ["_chunk"], f"source = {quoted(self.prepared.reader.source)}"):
            found.update({entry["values"]: entry["counts"] for entry in pc.value_counts(batch["_chunk"]).to_pylist()})
        lost = sum(max(0, committed - found[chunk]) for chunk, committed in self.committer.chunks.items())
        if lost and self.committer.alone(dataset.version):
            raise Unproved(f"{lost} of the rows that were committed are not in {self.prepared.table.path()}; did something else delete them?")
