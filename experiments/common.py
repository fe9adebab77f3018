"""Shared code of the experiments: runs in a simulated fleet, a cache of their results, tables for docs/results.md, plots."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from syncline.errors import ConfigError
from syncline.extras import require_modules
from syncline.settings import parse
from syncline.spec.run_spec import RunSpec
from syncline_sim.fleet import FleetResult, run_fleet
from syncline_sim.settings import SimSettings

HERE = Path(__file__).parent
PICTURES = HERE.parent / "docs" / "pictures"
FLUSH = {"file": sys.stderr, "flush": True}


def fleet(spec: dict[str, Any], sim: dict[str, Any]) -> FleetResult:
    """Return the result of one run in virtual time.

    Args:
        spec: the settings of the run.
        sim: the section `sim` of the simulated fleet.
    """
    return run_fleet(parse(RunSpec, spec), parse(SimSettings, sim, "sim"), task_dir=HERE)


class Kept:
    """A cache of results in a file, by their settings, so that an interrupted experiment continues with the missing runs."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file is not None and file.exists() else []
        self._known = [json.loads(line) for line in lines]

    def of(self, what: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result for the settings `what`, from the cache or from `make`."""
        what = json.loads(json.dumps(what))
        for known in self._known:
            if known["what"] == what:
                return dict(known["result"])
        began_s = time.monotonic()
        result = make()
        known = {"what": what, "result": result, "took_s": round(time.monotonic() - began_s, 1)}
        self._known.append(known)
        if self._file is not None:
            with self._file.open("a") as file:
                print(json.dumps(known), file=file)
        return result


def arguments(description: str | None, *, seeds: int = 3, **lists: Sequence[float]) -> tuple[argparse.Namespace, Kept]:
    """Parse the command line.

    Args:
        description: the help text.
        seeds: default number of seeds.
        lists: options that take several numbers, with their defaults.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help=f"seeds 1 to N; default: {seeds}")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="file of finished results, which are not computed again"
    )
    parser.add_argument(
        "--directory", default="", metavar="DIR", help="directory of the data, unless it is the default"
    )
    parser.add_argument("--real", action="store_true", help="use real processes, if the experiment supports them")
    parser.add_argument("--no-plot", action="store_true", help="print the table alone")
    for name, default in lists.items():
        shown = ",".join(f"{x:g}" for x in default)
        parser.add_argument(f"--{name}", type=_numbers, default=tuple(default), metavar="X,Y", help=f"default: {shown}")
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error("--seeds must be 1 or more")
    if not given.no_plot:
        try:
            require_modules("plots", "experiments", "matplotlib")
        except ConfigError as error:
            parser.error(f"{error}, or leave the plots out: --no-plot")
    return given, Kept(given.keep)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(x) for x in text.split(","))


Measure = Callable[[float, str, int], dict[str, Any]]  # learning rate, split (models.py), seed
CHOOSING_SEED = 101


def tuned(
    kept: Kept, what: dict[str, Any], rates: Sequence[float], seeds: int, measure: Measure, score: str
) -> tuple[float, list[dict[str, Any]]]:
    """Choose the learning rate on the validation rows, then measure with it on the test rows, once for each seed.

    Args:
        kept: the cache of results.
        what: the settings of the results, without learning rate, split and seed.
        rates: the grid of learning rates.
        seeds: number of runs on the test rows.
        measure: makes one run.
        score: the key of a result by which rates are compared; smaller is better, None is the worst.

    Returns:
        The learning rate, and a result for each seed.
    """

    def result(lr: float, split: str, seed: int) -> dict[str, Any]:
        return kept.of({**what, "lr": lr, "split": split, "seed": seed}, lambda: measure(lr, split, seed))

    scores = {lr: or_never(result(lr, "choose", CHOOSING_SEED)[score]) for lr in rates}
    lr = min(rates, key=lambda lr: scores[lr])
    say(f"{what}: lr {lr:g} of {scores}")
    return lr, [result(lr, "final", seed) for seed in range(1, seeds + 1)]


def or_never(value: float | None) -> float:
    return float("inf") if value is None else float(value)


def median_and_range(values: Sequence[float], digits: int, unit: str = "") -> str:
    """Median (lowest – highest); `never` for what was not reached."""
    low, middle, high = (
        "never" if x == float("inf") else f"{x:.{digits}f}"
        for x in (min(values), statistics.median(values), max(values))
    )
    return f"{middle}{unit if middle != 'never' else ''} ({low} – {high})"


def say(text: str) -> None:
    print(text, **FLUSH)  # type: ignore[call-overload]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")


def picture(name: str, *draw: Callable[[Any], None], width: float = 8.0, height: float = 4.5) -> None:
    """Write the plots of the functions `draw(axes)`, side by side on one scale, to docs/pictures/<name>.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(draw), squeeze=False, sharey=True, figsize=(width, height), layout="constrained"
    )
    for axes, one in zip(panels[0], draw, strict=True):
        one(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"{name}.png", dpi=110)
    pyplot.close(figure)
    say(f"wrote {PICTURES / name}.png")


def bars(axes: Any, groups: Sequence[str], values: dict[str, Sequence[float]], most: Sequence[float]) -> None:
    """Draw grouped bars with their values on a logarithmic scale; a pale bar stands for a value above `most`."""
    wide = 0.8 / len(values)
    for i, (label, heights) in enumerate(values.items()):
        places = [g + (i - (len(values) - 1) / 2) * wide for g in range(len(groups))]
        drawn = axes.bar(places, [min(*both) for both in zip(heights, most, strict=True)], 0.92 * wide, label=label)
        shown = [f"> {m:g}" if h > m else f"{h:g}" for h, m in zip(heights, most, strict=True)]
        axes.bar_label(drawn, labels=shown, padding=2, fontsize=8)
        for bar, height, limit in zip(drawn, heights, most, strict=True):
            bar.set_alpha(0.4 if height > limit else 1.0)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1, top=1.8 * max(min(*both) for v in values.values() for both in zip(v, most, strict=True)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(groups)), groups)
    axes.legend(frameon=False)
