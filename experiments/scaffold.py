"""The shape of SCAFFOLD's table 3 (Karimireddy et al., arXiv:1910.06378): what local epochs are worth where data differ.

Fashion-MNIST instead of EMNIST, multinomial logistic regression, 100 agents, 20 drawn for each round, batches of a fifth of an
agent's rows. Similarity s %: so much of every agent's rows is drawn at random, the rest is sorted by label. Rounds until 75 %
of the held-out images are right; for each cell the learning rate that is there first.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from common import arguments, fleet, picture, say, table

AGENTS, SHARE = 100, 0.2
ROWS_EACH = 600
TARGET = 0.75
MOST_ROUNDS = 400
RATES = (0.003, 0.01, 0.03)
SIMILARITIES = (0.0, 0.1, 1.0)
EPOCHS = (1, 5, 10, 20)
PAPER = {  # EMNIST, 50 %: rounds at 1, 5, 10, 20 epochs; 1k+ is more than a thousand
    (0.0, "sgd"): "317",
    (0.0, "scaffold"): "77 / 152 / 286 / 266",
    (0.0, "fedavg"): "258 / 428 / 711 / 1k+",
    (0.1, "sgd"): "365",
    (0.1, "scaffold"): "62 / 20 / 16 / 11",
    (0.1, "fedavg"): "74 / 34 / 25 / 18",
    (1.0, "sgd"): "416",
    (1.0, "scaffold"): "– / 10 / – / –",
    (1.0, "fedavg"): "– / 10 / – / –",
}


def spec(way: str, similarity: float, epochs: int, lr: float, seed: int) -> dict[str, Any]:
    local: dict[str, Any] = {"epochs": epochs, "batch_size": ROWS_EACH // 5, "optimizer": {"kind": "sgd", "lr": lr}}
    if way == "sgd":
        local["batch_size"] = "all"
    if way == "scaffold":
        local["control_variates"] = "scaffold"
    return {
        "task": "models.py:Logistic",
        "task_options": {"similarity": similarity},
        "agents": {"min": AGENTS, "lost_after_s": 600},
        "sync": {"kind": "rounds", "sample": SHARE},
        "local": local,
        "stop": {"versions": MOST_ROUNDS, "target": {"metric": "accuracy", "at_least": TARGET}},
        "seed": seed,
    }


def rounds(way: str, similarity: float, epochs: int, lr: float, seed: int) -> dict[str, Any]:
    result = fleet(spec(way, similarity, epochs, lr, seed), {"step_s": 0.0001, "longest_s": 1e6})
    reached = next((p.version for p in result.timeline if (p.metrics.get("accuracy") or 0.0) >= TARGET), None)
    return {"rounds": reached, "best": max((p.metrics.get("accuracy") or 0.0 for p in result.timeline), default=0.0)}


def main() -> None:
    given, kept = arguments(__doc__, seeds=1)

    def first(way: str, similarity: float, epochs: int) -> float:
        """The fewest rounds, over the learning rates; infinite where none of them gets there."""
        best = float("inf")
        rates = tuple(10 * lr for lr in RATES) if way == "sgd" else RATES
        for lr in rates:
            found = []
            for seed in range(1, given.seeds + 1):
                what = {"experiment": "scaffold", "way": way, "similarity": similarity, "E": epochs, "lr": lr}
                made = kept.of(
                    {**what, "seed": seed, "most": MOST_ROUNDS, "target": TARGET},
                    lambda lr=lr, seed=seed: rounds(way, similarity, epochs, lr, seed),
                )
                found.append(float("inf") if made["rounds"] is None else float(made["rounds"]))
            best = min(best, statistics.median(found))
        say(f"{way}, similarity {similarity:.0%}, {epochs} epochs: {_shown(best)}")
        return best

    lines, found = [], {}
    for similarity in SIMILARITIES:
        for way in ("sgd", "scaffold", "fedavg"):
            cells = [first(way, similarity, epochs) for epochs in ((1,) if way == "sgd" else EPOCHS)]
            lines.append([f"{similarity:.0%}", way, " / ".join(map(_shown, cells)), PAPER[similarity, way]])
            found[similarity, way] = cells
    table(["similarity", "", "rounds to 75 % at 1 / 5 / 10 / 20 epochs", "paper (EMNIST, 50 %)"], lines)
    if not given.no_plot:
        picture("scaffold", *(partial(_draw, found, similarity) for similarity in SIMILARITIES), width=10.0, height=3.6)


def _shown(rounds: float) -> str:
    return f"> {MOST_ROUNDS}" if rounds == float("inf") else f"{rounds:g}"


def _draw(found: dict[tuple[float, str], list[float]], similarity: float, axes: Any) -> None:
    for way in ("scaffold", "fedavg"):
        axes.plot(EPOCHS, found[similarity, way], marker="o", label=way)
    axes.axhline(found[similarity, "sgd"][0], color="grey", linestyle="dashed", label="sgd")
    axes.set(xlabel="local epochs", yscale="log", xticks=EPOCHS, title=f"{similarity:.0%} of the rows alike")
    axes.set_yticks((1, 2, 5, 10, 20, 50, 100))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylim(
        bottom=0.8, top=1.5 * max(rounds for cells in found.values() for rounds in cells if rounds < float("inf"))
    )
    if similarity == SIMILARITIES[0]:
        axes.set_ylabel(f"rounds to {TARGET:.0%}")
        axes.legend(frameon=False)


if __name__ == "__main__":
    main()
