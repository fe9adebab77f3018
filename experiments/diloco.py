"""DiLoCo on a small model (Douillard et al., arXiv:2311.08105): rare synchronisation with an outer Nesterov step.

A two-layer character transformer (0.23 M parameters) on Shakespeare's plays, four agents with IID parts, AdamW as the inner
optimiser, 50 local steps between two synchronisations, 2,000 local steps in all. `directory`: see the task `shakespeare`.
"""

from __future__ import annotations

import math
import statistics
import sys
from typing import Any

from common import arguments, fleet, picture, say, table

STEPS, H, K, BATCH = 2000, 50, 4, 8
INNER = {"kind": "adamw", "lr": 2e-3}
WAYS: dict[str, dict[str, Any]] = {
    "one agent": {"agents": {"min": 1}},
    "one agent, 4 × the batch": {"agents": {"min": 1}, "batch": K * BATCH},
    "4 agents, outer SGD 1.0": {"outer": {"kind": "sgd", "lr": 1.0}},
    "4 agents, DiLoCo": {"outer": {"kind": "nesterov", "lr": 0.7, "momentum": 0.9}},
    "4 agents, DiLoCo, half of them a round": {
        "outer": {"kind": "nesterov", "lr": 0.7, "momentum": 0.9},
        "sync": {"kind": "rounds", "sample": 0.5},
    },
}
PAPER = {
    "one agent": "16.23",
    "one agent, 4 × the batch": "15.30 (8 ×)",
    "4 agents, outer SGD 1.0": "–",
    "4 agents, DiLoCo": "15.02 (8 agents, H = 500)",
    "4 agents, DiLoCo, half of them a round": "+2.1 % (half of the messages dropped)",
}


def spec(way: dict[str, Any], directory: str, seed: int) -> dict[str, Any]:
    way = dict(way)
    batch = way.pop("batch", BATCH)
    return {
        "task": "models.py:CharacterTransformer",
        "task_options": {"directory": directory},
        "agents": {"min": K},
        "local": {"steps": H, "batch_size": batch, "optimizer": INNER, "clip_norm": 1.0},
        "stop": {"versions": STEPS // H},
        "seed": seed,
        **way,
    }


def outcome(way: dict[str, Any], directory: str, seed: int) -> dict[str, Any]:
    result = fleet(spec(way, directory, seed), {"step_s": 0.01})
    curve = [(p.version * H, p.metrics.get("loss")) for p in result.timeline]
    up = sum(agent.bytes_up for agent in result.agents)
    return {"loss": result.metrics["loss"], "curve": curve, "bytes_up": up}


def main() -> None:
    given, kept = arguments(__doc__, seeds=2)
    directory = given.directory
    if not directory:
        sys.exit("name the directory of the plays with --directory (the task `shakespeare` says how to get them)")
    lines, curves, base = [], {}, 0.0
    for name, way in WAYS.items():
        found = []
        for seed in range(1, given.seeds + 1):
            what = {"experiment": "diloco", "way": way, "seed": seed, "steps": STEPS, "H": H, "batch": BATCH}
            found.append(kept.of(what, lambda way=way, seed=seed: outcome(way, directory, seed)))
        perplexity = statistics.median(math.exp(f["loss"]) for f in found)
        base = base or perplexity
        say(f"{name}: {perplexity:.3f}")
        sent = statistics.median(f["bytes_up"] for f in found) / 1e6
        low, high = (f(math.exp(x["loss"]) for x in found) for f in (min, max))
        lines.append(
            [
                name,
                f"{perplexity:.2f} ({low:.2f} – {high:.2f})",
                f"{100 * (perplexity / base - 1):+.1f} %",
                f"{sent:.0f} MB",
                PAPER[name],
            ]
        )
        curves[name] = found[0]["curve"]
    table(["", "perplexity of characters, held out", "against one agent", "sent up", "paper (C4, words)"], lines)
    if not given.no_plot:
        picture("diloco", lambda axes: _draw(axes, curves))


def _draw(axes: Any, curves: dict[str, list[tuple[int, float]]]) -> None:
    for name, curve in curves.items():
        axes.plot([s for s, _ in curve], [math.exp(loss) for _, loss in curve], label=name, linewidth=1.6)
    axes.set(xlabel="local steps of each agent", ylabel="held-out perplexity (characters)", yscale="log")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"A small DiLoCo: {H} local steps between two meetings")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
