"""What was done and by what: RUN (a ledger of job runs), MODEL (encoders and their lineage), UNIT (containers known to be complete)."""

import pyarrow as pa

from schemas import field

MODEL = pa.schema(
    [
        field("fingerprint", pa.string(), "the encoder's fingerprint: equal fingerprints give equal vectors", nullable=False),
        field("dim", pa.int32(), "length of its vectors", nullable=False),
        field("target", pa.string(), "the class that makes the encoder, package.module:Name", nullable=False),
        field("args", pa.string(), "the arguments it was made with, as JSON", nullable=False),
        field(
            "lineage",
            pa.string(),
            "what the fingerprint is a hash of, as JSON: weights, preprocessing, pooling, ...; and `training`, the run that made it",
        ),
        field("created_at", pa.timestamp("us", tz="UTC"), "when it was first used in this database", nullable=False),
        field("run", pa.string(), "the run that first used it", nullable=False),
    ],
    metadata={"tessera.schema": "model"},
)

RUN = pa.schema(
    [
        field("run", pa.string(), "id of the run", nullable=False),
        field("job", pa.string(), "embed, index, ...", nullable=False),
        field("status", pa.string(), "started, done or failed; a run that was killed has only its started row", nullable=False),
        field("at", pa.timestamp("us", tz="UTC"), "when this row was written", nullable=False),
        field("fingerprint", pa.string(), "the encoder's fingerprint"),
        field("config", pa.string(), "the resolved configuration, as JSON; credentials left out", nullable=False),
        field("report", pa.string(), "the report, as JSON; of a run that has not ended only the chunks it planned, or null"),
        field("versions", pa.string(), "versions of Tessera, Python, ray, pylance, lancedb, torch, as JSON", nullable=False),
        field("host", pa.string(), "name of the machine the driver ran on", nullable=False),
    ],
    metadata={"tessera.schema": "run"},
)
"""The ledger: a row when a run starts, another when it ends."""

UNIT = pa.schema(
    [
        field("source", pa.string(), "name of the source", nullable=False),
        field("unit", pa.string(), "URI of the container; empty: of all of the source together", nullable=False),
        field("version", pa.string(), "the container's version when it was completed", nullable=False),
        field("rows", pa.int64(), "rows of the vector table that came from it", nullable=False),
        field("rejected", pa.int64(), "items of it that were rejected", nullable=False),
        field("digest", pa.string(), "hash of those rows' chunks and counts: the note holds only while the table still agrees", nullable=False),
        field("run", pa.string(), "the run that completed it", nullable=False),
    ],
    metadata={"tessera.schema": "unit"},
)
"""Notes that spare a rerun the reading of unchanged containers. Never the proof: a note that the table's rows contradict is ignored."""
