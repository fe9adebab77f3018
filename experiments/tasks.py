"""Joint training compared with centralised and separate training, on the real data of examples/.

Run it with `make results-tasks`, or with the name of an example. Each run is a `syncline run SPEC --local N` of real processes.
Four variants are compared for each seed, with the same model, batch size and optimiser:

    together          the unchanged spec: N agents, each with its part
    centralised       one agent with all the data, for as many samples as the N agents see together
    ... 0.4 × lr      the same with a smaller learning rate, because one agent makes N times as many steps in sequence, and no
                      mean of N models reduces their noise
    alone             each of the N agents on its own part, for as many steps as in the joint run

Prints a line for each run on standard error, and at the end a table in Markdown for docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("digits", "mnist5k", "fashion_mnist")
WAYS = ("together", "centralised", "centralised, 0.4 × lr", "alone")
MOST_S = 1800.0  # of one run


def settings(name: str, seed: int) -> dict[str, dict[str, Any]]:
    """Return the specs of the four variants."""
    together: dict[str, Any] = {**yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()), "seed": seed}
    agents, steps, versions = together["agents"]["min"], together["local"]["steps"], together["stop"]["versions"]
    centralised = {
        **together,
        "agents": {"min": 1, "max": 1},
        "partition": {"kind": "iid"},
        "local": {**together["local"], "steps": agents * steps},
    }
    alone = {
        **together,
        "agents": {"min": agents, "lost_after_s": 600},
        "local": {**together["local"], "steps": versions * steps},
        "mix": {"alpha": 0.0},
        "evaluate": {"center": False, "agents": True},
        "stop": {"versions": 1},
    }
    optimizer = together["local"]["optimizer"]
    gentle = {**centralised["local"], "optimizer": {**optimizer, "lr": round(0.4 * optimizer["lr"], 6)}}
    return dict(zip(WAYS, (together, centralised, {**centralised, "local": gentle}, alone), strict=True))


def run(spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return the JSON object that `syncline run --json` prints at its end."""
    file = directory / "spec.yaml"
    file.write_text(yaml.safe_dump(spec))
    local = max(2, spec["agents"]["min"])  # one more than a single agent, so that in all ways a process has one thread
    command = [sys.executable, "-m", "syncline_cli", "run", str(file), "--local", str(local), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_S)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def accuracies(way: str, result: dict[str, Any], agents: int) -> list[float]:
    if way != "alone":
        return [result["accuracy"]]
    found = [metrics["accuracy"] for metrics in result["agents"].values()]
    assert len(found) == agents, f"{len(found)} of {agents} agents told what they reached"
    return found


def shown(values: list[float]) -> str:
    """Format the median and the range in percent."""
    low, middle, high = (f"{100 * f(values):.1f}" for f in (min, statistics.median, max))
    return f"{middle} %" if low == high else f"{middle} % ({low} – {high})"


class Runs:
    """Results of runs, with a file that keeps them between calls."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file is not None and file.exists() else []
        self.kept: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def outcome(self, way: str, spec: dict[str, Any]) -> tuple[list[float], float]:
        """Return the accuracies and the duration of a run in seconds."""
        found = next((kept for kept in self.kept if kept["way"] == way and kept["spec"] == spec), None)
        if found is None:
            with tempfile.TemporaryDirectory() as directory:
                result = run(spec, Path(directory))
            values = accuracies(way, result, spec["agents"]["min"])
            found = {"way": way, "spec": spec, "accuracies": values, "seconds": result["seconds"]}
            self.kept.append(found)
            if self.file is not None:
                with self.file.open("a") as kept:
                    print(json.dumps(found), file=kept)
        return found["accuracies"], found["seconds"]


def row(name: str, seeds: list[int], runs: Runs) -> str:
    """Return one line of the table."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    together = []
    for seed in seeds:
        for way, spec in settings(name, seed).items():
            values, seconds = runs.outcome(way, spec)
            found[way] += values
            together += [seconds] if way == "together" else []
            print(f"{name} seed {seed} {way}: {shown(values)} in {seconds:.0f} s", file=sys.stderr, flush=True)
    cells = [f"`{name}`", *(shown(found[way]) for way in WAYS), f"{statistics.median(together):.0f} s"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N; default: 3")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="runs that are done are kept there, and not made again"
    )
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in NAMES]:
        parser.error(f"there is no {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    if given.seeds < 1:
        parser.error("--seeds must be 1 or more")
    seeds, runs = list(range(1, given.seeds + 1)), Runs(given.keep)
    rows = [row(name, seeds, runs) for name in given.names or NAMES]
    print(f"| task, seeds 1 to {given.seeds} | {' | '.join(WAYS)} | a run together |")
    print("\n".join([f"|{'---|' * (len(WAYS) + 2)}", *rows]))


if __name__ == "__main__":
    main()
