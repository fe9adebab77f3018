"""One agent is five times slower than the others: a comparison of averaging schemes.

Fashion-MNIST, IID, four and eight agents, a two-layer network (199,210 parameters), ten local steps per period; a step takes
20 ms of virtual time, 100 ms on the slow agent. Each scheme trains until the center's held-out accuracy is 85 %.

    rounds       synchronous: every round waits for the slow agent
    max_ahead    bounded clocks, at most three periods ahead
    fedbuff      a buffer of half the agents, weights 1/√(1 + τ)
    fedasync     every update is merged at once, weights 1/√(1 + τ), server learning rate 0.6
    elastic      asynchronous elastic averaging, α = 0.9 / N

Each scheme has the local learning rate (`--rates`) that reaches the target first on 10,000 validation images; the table is
measured on the test images, with the seeds 1 to `--seeds`. The versions of a scheme are its server's steps.

With `--real`, four agents run as real processes, with steps of 60 ms (slow agent: 300 ms) of real time. Only the rate of
updates is measured, by the updates of half a minute of additional training.

The rate of updates of an asynchronous run is (r (N − 1) + 1) / N times that of rounds, for one agent r times slower.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import yaml
from common import HERE, arguments, fleet, median_and_range, or_never, picture, table, tuned

RATES = (0.05, 0.1, 0.2)
SLOW = 5
STEP_S = 0.02
TARGET = 0.85
VERSIONS = 4000
REAL_STEP_S, REAL_S = 0.06, 30.0


def ways(n: int) -> dict[str, dict[str, Any]]:
    return {
        "rounds": {"sync": {"kind": "rounds"}},
        "max_ahead": {"sync": {"kind": "async", "max_ahead": 3, "buffer": n // 2}},
        "fedbuff": {"sync": {"kind": "async", "buffer": n // 2}},
        "fedasync": {"sync": {"kind": "async", "buffer": 1, "max_lag": 100}, "outer": {"kind": "sgd", "lr": 0.6}},
        "elastic": {"sync": {"kind": "async", "buffer": 1}, "mix": {"kind": "elastic", "alpha": round(0.9 / n, 4)}},
    }


def spec(n: int, way: dict[str, Any], seed: int, lr: float, **options: Any) -> dict[str, Any]:
    size = way["sync"].get("buffer", n)
    return {
        "task": "models.py:TwoLayers",
        "task_options": options,
        "agents": {"min": n},
        "local": {"steps": 10, "batch_size": 32, "optimizer": {"kind": "sgd", "lr": lr}},
        "evaluate": {"every": max(1, n // size)},
        "stop": {"versions": VERSIONS, "target": {"metric": "accuracy", "at_least": TARGET}},
        "seed": seed,
        **way,
    }


def outcome(n: int, way: dict[str, Any], seed: int, lr: float, **options: Any) -> dict[str, Any]:
    result = fleet(spec(n, way, seed, lr, **options), {"step_s": [STEP_S] * (n - 1) + [STEP_S * SLOW]})
    curve = [(p.time_s - result.opened_s, p.metrics.get("accuracy")) for p in result.timeline]
    slow = result.agents[-1]
    reached = next((p.version for p in result.timeline if (p.metrics.get("accuracy") or 0.0) >= TARGET), None)
    return {
        "reached_s": result.first("accuracy", TARGET),
        "versions": reached,
        "updates_per_s": result.updates / result.seconds,
        "slow_lag": slow.mean_lag,
        "slow_merged": slow.merged,
        "slow_dropped": slow.dropped,
        "curve": curve[:: max(1, len(curve) // 200)],
    }


def real_rate(name: str, way: dict[str, Any]) -> float:
    """Return the merged updates per second of four real agents, one of them slow: the difference of a long and a short run."""
    size = way["sync"].get("buffer", 4)
    rounds_a_s = expected(4, name) * 4 / (10 * REAL_STEP_S * SLOW) / size
    short, long = (round(rounds_a_s * seconds) for seconds in (6, 6 + REAL_S))
    return (long - short) * size / (real_seconds(way, long) - real_seconds(way, short))


def real_seconds(way: dict[str, Any], versions: int) -> float:
    n = 4
    options = {"agents": n, "step_s": REAL_STEP_S, "slow": SLOW}
    changes = {
        "task": "models.py:Sleepy",
        "task_options": options,
        "evaluate": {"center": False},
        "stop": {"versions": versions},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=HERE) as file:
        yaml.safe_dump({**spec(n, way, 1, RATES[0]), **changes}, file)
        file.flush()
        command = [sys.executable, "-m", "syncline_cli", "run", file.name, "--local", str(n), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def real() -> None:
    rates = {name: real_rate(name, way) for name, way in ways(4).items()}
    rows = [
        [f"`{name}`", f"{rate:.2f}", f"{rate / rates['rounds']:.2f} ({expected(4, name):.2f})"]
        for name, rate in rates.items()
    ]
    table(["way, real processes, N = 4", "updates/s", "ratio (theory)"], rows)


def expected(n: int, name: str) -> float:
    return (SLOW * (n - 1) + 1) / n if name in ("fedbuff", "fedasync", "elastic") else 1.0


def main() -> None:
    given, kept = arguments(__doc__, rates=RATES, agents=(4, 8))
    if given.real:
        real()
        return
    options = {"directory": given.directory} if given.directory else {}
    rows, curves = [], {}
    for n in map(int, given.agents):
        base: dict[str, float] = {}
        for name, way in ways(n).items():
            what = {"experiment": "straggler", "n": n, "way": way, "slow": SLOW, "target": TARGET}
            lr, found = tuned(
                kept,
                what,
                given.rates,
                given.seeds,
                lambda lr, split, seed, n=n, way=way: outcome(n, way, seed, lr, split=split, **options),
                "reached_s",
            )
            rate = statistics.median(f["updates_per_s"] for f in found)
            reached = [or_never(f["reached_s"]) for f in found]
            base = base or {"rate": rate, "s": statistics.median(reached)}
            rows.append(
                [
                    str(n),
                    f"`{name}`",
                    f"{lr:g}",
                    f"{rate:.2f}",
                    f"{rate / base['rate']:.2f} ({expected(n, name):.2f})",
                    median_and_range(reached, 1, " s"),
                    f"{base['s'] / statistics.median(reached):.1f}",
                    median_and_range([or_never(f["versions"]) for f in found], 0),
                    f"{statistics.median(f['slow_lag'] for f in found):.1f}",
                ]
            )
            curves[n, name] = found[0]["curve"]
    head = ["N", "way", "lr", "updates/s", "ratio (theory)", f"to {TARGET:.0%}, virtual", "times faster"]
    table([*head, "versions", "lag of the slow one"], rows)
    if not given.no_plot:
        picture("straggler", lambda axes: _draw(axes, {name: c for (n, name), c in curves.items() if n == 4}))


def _draw(axes: Any, curves: dict[str, list[tuple[float, float]]]) -> None:
    for name, curve in curves.items():
        axes.plot([t for t, _ in curve], [100 * a for _, a in curve], label=name, linewidth=1.6)
    axes.axhline(100 * TARGET, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="virtual seconds", ylabel="held-out accuracy, %", ylim=(60, 87))
    axes.set_title("One of four agents is five times slower (Fashion-MNIST, IID)")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
