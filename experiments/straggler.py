"""One agent is five times slower than the others: what each way of averaging makes of it.

Fashion-MNIST, IID, four and eight agents, a two-layer network (199,210 parameters), ten local steps a period; 20 ms a step,
100 ms for the slow one, in virtual time. Each way trains until the center has 85 % of the held-out images right.

    rounds       synchronous: every round waits for the slow one
    max_ahead    bounded clocks, three periods ahead at most
    fedbuff      a buffer of half the agents, weights 1/√(1 + τ)
    fedasync     every update at once, weights 1/√(1 + τ), server learning rate 0.6
    elastic      asynchronous elastic averaging, α = 0.9 / N

With `--real`: four agents as real processes, of which a step takes 60 ms (300 ms) of real time. The rate of updates alone, from
what half a minute more of training brings.

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
from common import HERE, arguments, fleet, picture, say, table

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


def spec(n: int, way: dict[str, Any], seed: int) -> dict[str, Any]:
    size = way["sync"].get("buffer", n)
    return {
        "task": "models.py:TwoLayers",
        "agents": {"min": n},
        "local": {"steps": 10, "batch_size": 32, "optimizer": {"kind": "sgd", "lr": 0.05}},
        "evaluate": {"every": max(1, n // size)},
        "stop": {"versions": VERSIONS, "target": {"metric": "accuracy", "at_least": TARGET}},
        "seed": seed,
        **way,
    }


def outcome(n: int, way: dict[str, Any], seed: int) -> dict[str, Any]:
    result = fleet(spec(n, way, seed), {"step_s": [STEP_S] * (n - 1) + [STEP_S * SLOW]})
    curve = [(p.time_s - result.opened_s, p.metrics.get("accuracy")) for p in result.timeline]
    slow = result.agents[-1]
    return {
        "reached_s": result.first("accuracy", TARGET),
        "updates_per_s": result.updates / result.seconds,
        "slow_lag": slow.mean_lag,
        "slow_merged": slow.merged,
        "slow_dropped": slow.dropped,
        "curve": curve[:: max(1, len(curve) // 200)],
    }


def real_rate(name: str, way: dict[str, Any]) -> float:
    """Merged updates a second of four real agents, the last of them slow: of a long run without those of a short one."""
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
        yaml.safe_dump({**spec(n, way, 1), **changes}, file)
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
    given, kept = arguments(__doc__)
    if given.real:
        real()
        return
    rows, curves = [], {}
    for n in (4, 8):
        rate = time = 0.0
        for name, way in ways(n).items():
            found = []
            for seed in range(1, given.seeds + 1):
                what = {"experiment": "straggler", "n": n, "way": way, "seed": seed, "slow": SLOW}
                found.append(kept.of(what, lambda n=n, way=way, seed=seed: outcome(n, way, seed)))
            rates = statistics.median(f["updates_per_s"] for f in found)
            reached = [f["reached_s"] for f in found if f["reached_s"] is not None]
            seconds = statistics.median(reached) if len(reached) == len(found) else float("inf")
            if name == "rounds":
                rate, time = rates, seconds
            say(f"N = {n} {name}: {rates:.2f} updates/s, {TARGET:.0%} after {seconds:.1f} s")
            rows.append(
                [
                    str(n),
                    f"`{name}`",
                    f"{rates:.2f}",
                    f"{rates / rate:.2f} ({expected(n, name):.2f})",
                    f"{seconds:.1f} s ({min(reached, default=0):.1f} – {max(reached, default=0):.1f})",
                    f"{time / seconds:.2f}",
                    f"{statistics.median(f['slow_lag'] for f in found):.1f}",
                ]
            )
            curves[n, name] = found[0]["curve"]
    table(
        ["N", "way", "updates/s", "ratio (theory)", f"to {TARGET:.0%}, virtual", "times faster", "lag of the slow one"],
        rows,
    )
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
