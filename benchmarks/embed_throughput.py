"""What the embed job reaches of the floor: `python -m benchmarks.embed_throughput [--model tiny|b32] [--dtype float32|bfloat16]`.

All contenders embed the same JPEGs with the same weights and write the vectors with Lance; they take turns, round by
round. `rate` is images a second after the first vectors: start-up apart. Only ratios mean anything on another machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.throughput.material import make_images, make_model

OBVIOUS = {"dataloader", "obvious"}
"""These keep to float32: that is what one writes first."""


def main() -> None:
    """Prints each run, and at the end the medians and the ratios, as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", choices=["tiny", "b32"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", default=["floor", "tessera", "obvious", "dataloader"])
    given = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in given.contenders}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "images", given.images)
        make_model(folder / "model", given.model)
        for number in range(given.rounds):
            for contender in given.contenders:
                dtype = "float32" if contender in OBVIOUS else given.dtype
                result = timed(contender, folder, dtype, folder / f"{contender}{number}")
                rates[contender].append(result["rate"])
                print(json.dumps({"contender": contender, "round": number, "dtype": dtype, **result}), flush=True)
    median = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    ratios = {f"tessera/{name}": round(median["tessera"] / rate, 2) for name, rate in median.items() if name != "tessera"}
    print(json.dumps({"model": given.model, "dtype": given.dtype, "images": given.images, "images_per_s": median, **ratios}))


def timed(contender: str, folder: Path, dtype: str, out: Path) -> dict[str, float]:
    """One contender in a process of its own. Ray's workers run at the same priority as everything else."""
    command = [sys.executable, "-m", "benchmarks.throughput.contenders", contender, "--images", str(folder / "images")]
    command += ["--model", str(folder / "model"), "--dtype", dtype, "--out", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "RAY_worker_niceness": "0"})
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
