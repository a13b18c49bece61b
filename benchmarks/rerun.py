"""What a run with nothing to do costs, beside the first run: `python -m benchmarks.rerun [ROWS]`. Prints one JSON line."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    """200,000 Parquet rows, hashing encoder; whole processes, imports included."""
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    with tempfile.TemporaryDirectory() as folder:
        texts = [f"row {i} of a table about {i % 997} things and {i % 31} others" for i in range(num_rows)]
        pq.write_table(pa.table({"key": [f"k{i}" for i in range(num_rows)], "text": texts}), f"{folder}/rows.parquet", row_group_size=20_000)
        job = Path(folder) / "job.yaml"
        job.write_text(
            f"source: {{target: 'pipeline.readers.parquet:Parquet', args: {{uri: {folder}/rows.parquet, id: key, text: text}}}}\n"
            "encoder: {target: 'pipeline.encoders.hashing:Hashing', args: {dim: 64}}\n"
            f"table: {{uri: {folder}/db, name: t}}\n"
        )
        first, again = timed(job), timed(job)
    print(json.dumps({"rows": num_rows, "first_s": first, "rerun_s": again, "ratio": round(again / first, 3)}))


def timed(job: Path) -> float:
    """Wall seconds of one run."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "jobs.embed", str(job)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return round(time.perf_counter() - started, 2)


if __name__ == "__main__":
    main()
