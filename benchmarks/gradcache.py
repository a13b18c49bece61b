"""Peak memory and time of one step, plain, by our GradCache, and by sentence-transformers' CachedMultipleNegativesRankingLoss.

    python -m benchmarks.gradcache                 # text pairs to 65,536, image-text pairs to 4,096; JSON lines, a Markdown table, docs/gradcache.png
    python -m benchmarks.gradcache --short         # to 2,048 and 512: a minute

Each step runs in a process of its own, the methods in turn. The same models (random weights, float32), rows and chunks of 128 rows for all.
Memory is the peak of the resident set during the step beyond what stood before it: model, data, and a warm-up step of 8 rows.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CHUNK = 128
METHODS = ("plain", "ours", "theirs")
SIZES = {"text": (512, 2_048, 8_192, 32_768, 65_536), "image-text": (512, 1_024, 2_048, 4_096)}
SHORT = {"text": (512, 2_048), "image-text": (256, 512)}
EXACT_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
"""Buffers above 256 KiB go back to the system when freed; it costs a quarter to a half more time, for all methods alike. By default how glibc's
heap happens to be cut decides the peak: 142 to 218 MiB for the same step of 4,096 pairs; with 4 MiB still 543 in place of 168 MiB at 32,768."""

PLAIN_AT_MOST = 2_048
"""The plain step grows with the batch; beyond this it would not fit beside other work."""


def main() -> None:
    """Run all sizes, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--figure", type=Path, default=Path("docs/gradcache.png"))
    parser.add_argument("--child", nargs=3, metavar=("KIND", "METHOD", "PAIRS"))
    args = parser.parse_args()
    if args.child:
        kind, method, num_pairs = args.child
        print(json.dumps(step(kind, method, int(num_pairs))))
        return
    found = []
    for kind, sizes in (SHORT if args.short else SIZES).items():
        for num_pairs in sizes:
            for method in METHODS:
                if method != "plain" or num_pairs <= PLAIN_AT_MOST:
                    found.append(measure(kind, method, num_pairs))
                    print(json.dumps(found[-1]), flush=True)
    print(table(found))
    if not args.short:
        from benchmarks.chart import draw

        draw(found, args.figure)


def measure(kind: str, method: str, num_pairs: int) -> dict:
    """`step` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gradcache", "--child", kind, method, str(num_pairs)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | EXACT_HEAP)
    return json.loads(done.stdout.splitlines()[-1])


def step(kind: str, method: str, num_pairs: int) -> dict:
    """One step: seconds (wall, and of all CPUs), peak of memory beyond the start in MiB, and the loss."""
    import torch

    from benchmarks.gradcache_models import runner

    torch.manual_seed(0)
    # One thread: CPU seconds then hold on a machine that does other work too.
    torch.set_num_threads(1)
    run = runner(kind, method, num_pairs, CHUNK)
    run(8)
    # The kernel's mark of the highest resident set starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before, started, cpu = memory_mib("VmRSS"), time.perf_counter(), time.process_time()
    loss = run(num_pairs)
    return {
        "kind": kind,
        "method": method,
        "pairs": num_pairs,
        "wall_s": round(time.perf_counter() - started, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_mib": round(memory_mib("VmHWM") - before),
        "process_mib": round(memory_mib("VmHWM")),
        "loss": round(loss, 5),
    }


def memory_mib(field: str) -> float:
    """A field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def table(found: list[dict]) -> str:
    """Markdown: each size, peaks and CPU seconds of the methods, and ours beside theirs."""
    lines = ["| pairs | plain MiB / CPU s | ours | theirs | memory, ours / theirs | time, ours / theirs |", "|---|---|---|---|---|---|"]
    by = {(row["kind"], row["pairs"], row["method"]): row for row in found}
    for kind, num_pairs in dict.fromkeys((row["kind"], row["pairs"]) for row in found):
        rows = [by.get((kind, num_pairs, method)) for method in METHODS]
        cells = ["-" if row is None else f"{row['peak_mib']:,} / {row['cpu_s']:,}" for row in rows]
        _, ours, theirs = rows
        cells += [f"{ours['peak_mib'] / theirs['peak_mib']:.2f}", f"{ours['cpu_s'] / theirs['cpu_s']:.2f}"]
        lines.append(f"| {num_pairs:,} {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
