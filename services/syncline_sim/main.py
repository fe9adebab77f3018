"""`syncline-sim`: whole runs of the real services in one process, in virtual time, each with faults of its own seed."""

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

AT_ONCE = 10  # seeds that a process takes at a time
SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="syncline-sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds to run (default: 1000)")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first of them (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--seed", type=int, help="one seed alone: its story, with as few faults as it needs")
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
    batches = [range(i, min(i + AT_ONCE, first + count)) for i in range(first, first + count, AT_ONCE)]
    failures = []
    os.environ["PYTHONSAFEPATH"] = "1"  # else the working directory would be on the path of the pool's processes
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
    """What was imported stays, and is much: without it to look at, a run takes a tenth less time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


if __name__ == "__main__":
    sys.exit(main())
