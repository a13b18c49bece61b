"""One pass over a vector table's rows: ids, vectors, provenance; texts, thumbnails and metadata columns are not read.

Memory: about 25 bytes a row (hashes of the ids), 300 MB for vectors on their way, and some hundred bytes for each duplicate id.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.known import hash64, member, repeated_hashes
from pipeline.progress import Meter
from pipeline.table.findings import MAX_EXAMPLES
from pipeline.vectorise import NORM_TOLERANCE
from schemas.vectors import HEAD, TAIL

REQUIRED = [entry.name for entry in [*HEAD, *TAIL] if not entry.nullable] + ["vector"]
"""Columns of every table of vectors that hold no null."""
BATCH_BYTES = 16 * 2**20
READ_AHEAD_BYTES = 64 * 2**20
FLOAT16_ROUNDING = 2.0**-11
"""Rounding to float16 changes a number, and so a norm, by at most this share of it."""
FAULTS = ("not_finite", "zero_vectors", "unnormalised")

Unreadable = (OSError, ValueError)
"""What Lance raises when a file is gone, cut off or damaged."""


@dataclass
class Scan:
    """What a pass found."""

    rows: int = 0
    ids: int = 0
    """Different ids."""
    duplicates: dict[str, int] = field(default_factory=dict)
    """Rows of each id that stands more than once."""
    sources: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    chunks: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """Vectors with each of FAULTS."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Ids of some rows with each fault."""
    met: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Those of the wanted pairs that the table holds, sorted."""


def pair64(ids: np.ndarray, versions: np.ndarray) -> np.ndarray:
    """One uint64 hash (N,) for each pair of id hash and version hash."""
    hashes: np.ndarray = ids * np.uint64(0x9E3779B97F4A7C15) + versions
    return hashes


def vector_faults(column: pa.Array) -> dict[str, np.ndarray]:
    """Which vectors (N,) bool of a fixed-size-list column have each of FAULTS. A null vector has none of them.

    A norm may differ from 1 by what the embed job accepts, and for float16 by the rounding.
    """
    valid = np.asarray(column.is_valid())
    flat = column.drop_null().flatten().to_numpy(zero_copy_only=False)
    norms = np.ones(len(column))
    norms[valid] = np.linalg.norm(flat.astype(np.float64).reshape(-1, column.type.list_size), axis=1)
    finite = np.isfinite(norms)
    rounding = FLOAT16_ROUNDING if pa.types.is_float16(column.type.value_type) else 0.0
    off = np.abs(norms - 1) > NORM_TOLERANCE + rounding
    return {"not_finite": ~finite, "zero_vectors": norms == 0, "unnormalised": finite & (norms > 0) & off}


def is_vector(kind: pa.DataType) -> bool:
    """Whether a column's type is one that vectors are stored in."""
    return bool(pa.types.is_fixed_size_list(kind)) and kind.value_type in (pa.float32(), pa.float16())


def missing_columns(dataset: lance.LanceDataset) -> list[str]:
    """Columns that every table of vectors has, and this one lacks."""
    return [name for name in [*REQUIRED, "_unit"] if name not in dataset.schema.names]


def scan(dataset: lance.LanceDataset, fragments: list[lance.LanceFragment], wanted: np.ndarray) -> Scan:
    """Read these fragments of a table. `wanted`: `pair64` of items to be looked for."""
    result = Scan()
    wanted = np.sort(wanted)
    names = [name for name in ("id", "source", "_version", "_chunk", "_run", "vector") if name in dataset.schema.names]
    hashes: list[np.ndarray] = []
    met: list[np.ndarray] = []
    with Meter(sum(fragment.count_rows() for fragment in fragments), what="verifying") as meter:
        for batch in batches(dataset, names, fragments):
            _take(batch, result)
            ids = hash64(batch["id"].drop_null()) if "id" in names else np.empty(0, np.uint64)
            hashes.append(ids)
            if len(wanted) and {"id", "_version"} <= set(names):
                present = batch.filter(batch["id"].is_valid())
                pairs = pair64(ids, hash64(present["_version"].fill_null("")))
                met.append(pairs[member(pairs, wanted)])
            meter.add(batch.num_rows, rejected=0)
    result.met = np.unique(np.concatenate([result.met, *met]))
    nulls = result.rows - sum(map(len, hashes))
    result.duplicates = _duplicates(dataset, fragments, hashes)
    result.ids = result.rows - nulls - sum(count - 1 for count in result.duplicates.values())
    return result


def batches(dataset: lance.LanceDataset, columns: list[str], fragments: list[lance.LanceFragment]) -> Iterator[pa.RecordBatch]:
    """Rows of some fragments, BATCH_BYTES of vectors at a time."""
    kind = dataset.schema.field("vector").type if "vector" in dataset.schema.names else None
    dim = kind.list_size if kind is not None and is_vector(kind) else 1024
    rows = max(64, min(65_536, BATCH_BYTES // (dim * 4)))
    # Lance would read up to 2 GB ahead, and is no faster for it.
    reading = dataset.scanner(
        columns=columns, fragments=fragments, batch_size=rows, batch_readahead=2, fragment_readahead=1, io_buffer_size=READ_AHEAD_BYTES
    )
    yield from reading.to_batches()


def _take(batch: pa.RecordBatch, result: Scan) -> None:
    result.rows += batch.num_rows
    for name, counter in (("source", result.sources), ("_run", result.runs), ("_chunk", result.chunks)):
        if name in batch.schema.names:
            for entry in pc.value_counts(batch[name].drop_null()).to_pylist():
                counter[entry["values"]] += entry["counts"]
    if "vector" not in batch.schema.names or not is_vector(batch.schema.field("vector").type):
        return
    for fault, mask in vector_faults(batch["vector"]).items():
        result.faults[fault] += int(mask.sum())
        shown = result.examples.setdefault(fault, [])
        if "id" in batch.schema.names:
            shown += batch["id"].filter(pa.array(mask))[: MAX_EXAMPLES - len(shown)].to_pylist()


def _duplicates(dataset: lance.LanceDataset, fragments: list[lance.LanceFragment], hashes: list[np.ndarray]) -> dict[str, int]:
    """Rows of each id that stands more than once. Equal hashes only say where to look: the ids themselves are compared."""
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    hashes.clear()
    suspects = repeated_hashes(every)
    del every
    counts: Counter[str] = Counter()
    if len(suspects):
        for batch in dataset.scanner(columns=["id"], fragments=fragments).to_batches():
            ids = batch["id"].drop_null()
            counts.update(ids.filter(pa.array(member(hash64(ids), suspects))).to_pylist())
    return {item: count for item, count in counts.items() if count > 1}


def null_counts(dataset: lance.LanceDataset) -> dict[str, int]:
    """Nulls in each column that must not hold any. Lance refuses them itself unless the column was made nullable."""
    loose = [entry.name for entry in dataset.schema if entry.nullable and entry.name in REQUIRED]
    counts = {name: dataset.count_rows(f"{name} IS NULL") for name in loose}
    return {name: count for name, count in counts.items() if count}


def readable(dataset: lance.LanceDataset) -> tuple[list[lance.LanceFragment], list[str]]:
    """The fragments that can be read, and the data files of those that cannot. Reads what `scan` reads."""
    whole, broken = [], []
    names = [name for name in REQUIRED if name in dataset.schema.names]
    for fragment in dataset.get_fragments():
        try:
            for _ in batches(dataset, names, [fragment]):
                pass
            whole.append(fragment)
        except Unreadable:
            broken += [f"data/{entry.path}" for entry in fragment.data_files()]
    return whole, broken
