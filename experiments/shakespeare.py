"""Shakespeare by role (McMahan et al., arXiv:1602.05629, table 2): one agent per role against an even split.

The 100 roles with the longest texts, ten of them drawn for each round, a GRU of 128 units (66,281 parameters) that predicts the
next character in windows of 80. FedSGD (one step on the whole part) is compared with E = 5 local epochs and batches of ten.
`--directory`: the directory of the plays.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from common import arguments, bars, fleet, picture, say, table

ROLES, SHARE = 100, 0.1
TARGET = 0.40
WAYS: dict[str, dict[str, Any]] = {  # epochs, batch, learning rates, rounds at most
    "FedSGD": {"epochs": 1, "batch_size": "all", "rates": (4.0,), "most": 300},
    "E 5, B 10": {"epochs": 5, "batch_size": 10, "rates": (1.0,), "most": 60},
}
SPLITS = {"roles": {"kind": "natural", "column": "role"}, "IID": {"kind": "iid"}}
PAPER = {
    ("FedSGD", "roles"): "3906",
    ("FedSGD", "IID"): "2488",
    ("E 5, B 10", "roles"): "41 (95×)",
    ("E 5, B 10", "IID"): "192 (13×)",
}


def outcome(way: dict[str, Any], split: str, lr: float, directory: str, seed: int) -> dict[str, Any]:
    result = fleet(
        {
            "task": "syncline.tasks.shakespeare:Shakespeare",
            "task_options": {"directory": directory, "roles": ROLES},
            "agents": {"min": ROLES, "lost_after_s": 600},
            "partition": SPLITS[split],
            "sync": {"kind": "rounds", "sample": SHARE},
            "local": {
                "epochs": way["epochs"],
                "batch_size": way["batch_size"],
                "optimizer": {"kind": "sgd", "lr": lr},
                "clip_norm": 5.0,
            },
            "merge": {"weights": "samples"},
            "evaluate": {"every": max(1, way["most"] // 60)},
            "stop": {"versions": way["most"], "target": {"metric": "accuracy", "at_least": TARGET}},
            "seed": seed,
        },
        {"step_s": 0.0001, "longest_s": 1e6},
    )
    reached = next((p.version for p in result.timeline if (p.metrics.get("accuracy") or 0.0) >= TARGET), None)
    up = sum(agent.bytes_up for agent in result.agents)
    best = max((p.metrics.get("accuracy") or 0.0 for p in result.timeline), default=0.0)
    return {"rounds": reached, "best": best, "bytes_up": up}


def main() -> None:
    given, kept = arguments(__doc__, seeds=1)
    if not given.directory:
        sys.exit("name the directory of the plays with --directory (the task `shakespeare` says how to get them)")
    lines = []
    drawn: dict[str, list[float]] = {split: [] for split in SPLITS}
    for name, way in WAYS.items():
        for split in SPLITS:
            best: tuple[float, float, float] = (float("inf"), 0.0, 0.0)
            for lr in way["rates"]:
                found = []
                for seed in range(1, given.seeds + 1):
                    what = {"experiment": "shakespeare", "way": way, "split": split, "lr": lr, "seed": seed}
                    found.append(
                        kept.of(
                            {**what, "target": TARGET, "roles": ROLES},
                            lambda a=(way, split, lr, given.directory, seed): outcome(*a),
                        )
                    )
                median = statistics.median(float("inf") if f["rounds"] is None else f["rounds"] for f in found)
                best = min(best, (median, -max(f["best"] for f in found), found[0]["bytes_up"]))
            rounds, top, up = best
            shown = f"> {way['most']} (best {-top:.1%})" if rounds == float("inf") else f"{rounds:g}"
            say(f"{name} {split}: {shown}")
            drawn[split].append(rounds)
            lines.append([name, split, shown, f"{up / 1e6:.0f} MB", PAPER[name, split]])
    table(["", "split", f"rounds to {TARGET:.0%}", "sent up", "paper: rounds to 54 % (LSTM, 1,146 roles)"], lines)
    if not given.no_plot:
        picture("shakespeare", lambda axes: _draw(axes, drawn))


def _draw(axes: Any, drawn: dict[str, list[float]]) -> None:
    bars(axes, list(WAYS), drawn, [way["most"] for way in WAYS.values()])
    axes.set(
        ylabel="rounds",
        title=f"Shakespeare: rounds to {TARGET:.0%} of the next characters, ten of {ROLES} roles in each",
    )


if __name__ == "__main__":
    main()
