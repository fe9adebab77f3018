"""`syncline-sim`: simulate runs of the real services in virtual time, each with the faults of a seed."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from itertools import chain

from syncline_sim.seeds import explain, failing

BATCH = 10  # seeds that a process takes at a time
SHOWN = 20  # failures that are printed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="syncline-sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="number of seeds (default: 1000)")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument(
        "--seed", type=int, help="run one seed and print its timeline, with as few faults as the failure needs"
    )
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return _one(options.seed)
    return _many(options.first, options.seeds, options.jobs)


def _one(seed: int) -> int:
    failure = explain(seed)
    print(failure if failure is not None else f"seed {seed}: nothing is wrong")
    return 0 if failure is None else 1


def _many(first: int, count: int, jobs: int) -> int:
    began = time.monotonic()
    batches = [range(i, min(i + BATCH, first + count)) for i in range(first, first + count, BATCH)]
    failures = []
    os.environ["PYTHONSAFEPATH"] = "1"  # keeps the working directory off the path of the pool's processes
    with multiprocessing.get_context("spawn").Pool(jobs, _rarely_collect) as pool:
        for seed, problem in chain.from_iterable(pool.imap(failing, batches)):
            failures.append((seed, problem))
            if len(failures) <= SHOWN:
                print(f"seed {seed}: {problem}", flush=True)
    seconds = time.monotonic() - began
    if len(failures) > SHOWN:
        print(f"and {len(failures) - SHOWN} more")
    if failures:
        print(f"\n{explain(failures[0][0])}\n\nsee it again with: syncline-sim --seed {failures[0][0]}\n")
    print(f"{count} seeds in {seconds:.1f} s, {count / seconds:.0f} a second: {len(failures)} failed")
    return 1 if failures else 0


def _rarely_collect() -> None:
    """Exclude the imported modules from garbage collection: a run takes a tenth less time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


if __name__ == "__main__":
    sys.exit(main())
