"""What training does for held-out emoji, both ways, three times: python -m benchmarks.train_emoji [SEED ...]

Each time another split by concept and another order; the job is the demonstration's (`demo/emoji-train.yaml`), on two workers of Ray Train.
Exit status 1 if recall@10 rises by less than GOAL in either direction, in the mean.
"""

import shutil
import sys
import threading
import time

import psutil

from demo.commands import OUTPUT, tessera
from demo.packages import Unavailable
from demo.train import DIRECTIONS, prepare

SEEDS = (0, 1, 2)
GOAL = 0.25


class Processor:
    """CPU seconds of all processes that this one starts, Ray's among them, while it is entered; looked at every half second."""

    def __enter__(self) -> "Processor":
        self._seconds: dict[tuple[int, float], float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """So far."""
        return sum(self._seconds.values())

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    times = process.cpu_times()
                    self._seconds[process.pid, process.create_time()] = times.user + times.system
                except psutil.NoSuchProcess:
                    continue


def measured(seed: int) -> dict:
    """The report of one run, and its `cpu_s`."""
    prepare(seed)
    name = f"emoji-{seed}"
    shutil.rmtree(OUTPUT / "runs" / name, ignore_errors=True)
    with Processor() as processor:
        report = tessera("train", "demo/emoji-train.yaml", f"run.name={name}", f"mixture.seed={seed}", log=OUTPUT / f"{name}.log")
    return {**report, "cpu_s": processor.seconds}


def main() -> None:
    """Run, and print a table."""
    OUTPUT.mkdir(exist_ok=True)
    started = time.monotonic()
    seeds = [int(each) for each in sys.argv[1:]] or SEEDS
    reports = [measured(seed) for seed in seeds]
    print(f"\n| recall@10, held out | {' | '.join(f'seed {seed}' for seed in seeds)} | mean rise |")
    print(f"|{' --- |' * (len(seeds) + 2)}")
    rises = []
    for name in DIRECTIONS:
        pairs = [[report[when][f"{name}/recall@10"] for when in ("before", "after")] for report in reports]
        rises.append(sum(after - before for before, after in pairs) / len(pairs))
        print(f"| {name} | {' | '.join(f'{before:.3f} to {after:.3f}' for before, after in pairs)} | {rises[-1]:+.3f} |")
    print(f"\nCPU seconds of a run, the start of Ray included: {', '.join(str(round(report['cpu_s'])) for report in reports)}")
    print(f"wall seconds of all: {time.monotonic() - started:.0f}")
    if min(rises) < GOAL:
        sys.exit(f"the goal is a rise of {GOAL}")


if __name__ == "__main__":
    try:
        main()
    except Unavailable as error:
        raise SystemExit(f"benchmarks.train_emoji: {error}") from None
