"""Table 1 of FedAvg (McMahan et al., arXiv:1602.05629) on Fashion-MNIST: the rounds that local work saves.

100 agents with 600 images each, ten of them drawn for each round, a two-layer network (199,210 parameters). The parts are IID,
or the paper's 200 shards by label, two for each agent. Agents train E local epochs with batches of B rows (∞: the whole part).
Each row of the table has the learning rate that reaches the target first, as in the paper. Target accuracy: 85 %, shards 80 %.
"""

from __future__ import annotations

import statistics
from typing import Any

from common import arguments, bars, fleet, picture, say, table

AGENTS, SHARE = 100, 0.1
TARGETS = {"iid": 0.85, "shards": 0.80}
MOST_ROUNDS = 1000
ROWS: tuple[tuple[int, int | str, tuple[float, ...], int], ...] = (  # E, B, learning rates, rounds between evaluations
    (1, "all", (0.2, 0.5), 5),
    (5, "all", (0.1, 0.3), 2),
    (1, 10, (0.03, 0.1), 1),
    (5, 10, (0.03, 0.1), 1),
)
PAPER = {  # MNIST, 2NN, 97 %: rounds IID, rounds non-IID
    (1, "all"): ("1474", "1796"),
    (5, "all"): ("–", "–"),
    (1, 10): ("87 (16.9×)", "664 (2.7×)"),
    (5, 10): ("–", "–"),
}


def spec(split: str, epochs: int, batch: int | str, lr: float, every: int, seed: int) -> dict[str, Any]:
    partition = {"kind": "iid"} if split == "iid" else {"kind": "shards", "per_agent": 2}
    return {
        "task": "models.py:TwoLayers",
        "agents": {"min": AGENTS, "lost_after_s": 600},
        "partition": partition,
        "sync": {"kind": "rounds", "sample": SHARE},
        "local": {"epochs": epochs, "batch_size": batch, "optimizer": {"kind": "sgd", "lr": lr}},
        "merge": {"weights": "samples"},
        "evaluate": {"every": every},
        "stop": {"versions": MOST_ROUNDS, "target": {"metric": "accuracy", "at_least": TARGETS[split]}},
        "seed": seed,
    }


def rounds(split: str, epochs: int, batch: int | str, lr: float, every: int, seed: int) -> dict[str, Any]:
    result = fleet(spec(split, epochs, batch, lr, every, seed), {"step_s": 0.0001, "longest_s": 1e6})
    target = TARGETS[split]
    reached = next((p.version for p in result.timeline if (p.metrics.get("accuracy") or 0.0) >= target), None)
    best = max((p.metrics.get("accuracy") or 0.0 for p in result.timeline), default=0.0)
    return {"rounds": reached, "best": best, "versions": result.versions}


def main() -> None:
    given, kept = arguments(__doc__, seeds=2)
    base: dict[str, float] = {}
    medians: dict[str, list[float]] = {split: [] for split in TARGETS}
    lines = []
    for epochs, batch, rates, every in ROWS:
        cells = []
        for split in TARGETS:
            best: tuple[float, float, list[float]] = (float("inf"), 0.0, [])
            for lr in rates:
                found = []
                for seed in range(1, given.seeds + 1):
                    key = {"experiment": "fedavg", "split": split, "E": epochs, "B": batch, "lr": lr, "seed": seed}
                    made = kept.of(
                        {**key, "most": MOST_ROUNDS, "every": every},
                        lambda a=(split, epochs, batch, lr, every, seed): rounds(*a),
                    )
                    found.append(float("inf") if made["rounds"] is None else float(made["rounds"]))
                say(f"{split} E={epochs} B={batch} lr={lr}: {found}")
                best = min(best, (statistics.median(found), lr, found))
            median, lr, found = best
            base.setdefault(split, median)
            medians[split].append(median)
            shown = f"> {MOST_ROUNDS}" if median == float("inf") else f"{median:g} ({min(found):g} – {max(found):g})"
            cells.append(f"{shown}, lr {lr:g}: {base[split] / median:.1f}×" if median < float("inf") else shown)
        size = "∞" if batch == "all" else str(batch)
        paper_iid, paper_shards = PAPER[epochs, batch]
        lines.append([f"E {epochs}, B {size}", cells[0], paper_iid, cells[1], paper_shards])
    head = ["", "rounds to 85 %, IID", "paper (MNIST, 97 %)", "rounds to 80 %, shards", "paper, shards"]
    table(head, lines)
    if not given.no_plot:
        picture("fedavg", lambda axes: _draw(axes, [line[0] for line in lines], medians))


def _draw(axes: Any, rows: list[str], medians: dict[str, list[float]]) -> None:
    bars(
        axes,
        rows,
        {f"{split}, to {TARGETS[split]:.0%}": found for split, found in medians.items()},
        [MOST_ROUNDS] * len(rows),
    )
    axes.set(ylabel="rounds", title="What local work saves: rounds to the target, ten of 100 agents in each")


if __name__ == "__main__":
    main()
