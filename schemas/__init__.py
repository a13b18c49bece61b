"""What the data is: every row that Tessera reads or writes, as Arrow schemas. Imports pyarrow only.

Each schema is stated once, in one module: `items` (what is embedded), `vectors` (a table of vectors),
`rejects` (items that could not be embedded, and why), `runs` (what was done, by which model),
`slides` (whole slides, and what their tiles carry).
A field's documentation is its metadata: `schemas.describe(schema)` prints it.
"""

import pyarrow as pa


def field(name: str, kind: pa.DataType, doc: str, *, nullable: bool = True) -> pa.Field:
    """A field that carries its own documentation: what it holds, its unit, what null means."""
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


def describe(schema: pa.Schema) -> str:
    """The schema as a Markdown table: field, type, meaning."""
    rows = ["| field | type | meaning |", "|---|---|---|"]
    for entry in schema:
        kind = str(entry.type) + ("" if entry.nullable else ", never null")
        doc = (entry.metadata or {}).get(b"doc", b"").decode()
        rows.append(f"| `{entry.name}` | {kind} | {doc} |")
    return "\n".join(rows)
