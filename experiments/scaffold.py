"""The shape of SCAFFOLD's table 3 (Karimireddy et al., arXiv:1910.06378): local epochs on heterogeneous data.

Fashion-MNIST instead of EMNIST, multinomial logistic regression, 100 agents, 20 drawn for each round, batches of a fifth of an
agent's rows. Similarity s % is the share of every agent's rows that is drawn at random; the rest is sorted by label. The table
shows the rounds until the accuracy is 75 %. Each cell has the learning rate (`--rates`; ten times as large for SGD) that
reaches this target first on 10,000 validation images; it is measured on the test images, with the seeds 1 to `--seeds`.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from common import arguments, fleet, median_and_range, or_never, picture, table, tuned

AGENTS, SHARE = 100, 0.2
ROWS_EACH = 500
TARGET = 0.75
MOST_ROUNDS = 400
RATES = (0.01, 0.03, 0.1)
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


def spec(way: str, similarity: float, epochs: int, lr: float, seed: int, **options: Any) -> dict[str, Any]:
    local: dict[str, Any] = {"epochs": epochs, "batch_size": ROWS_EACH // 5, "optimizer": {"kind": "sgd", "lr": lr}}
    if way == "sgd":
        local["batch_size"] = "all"
    if way == "scaffold":
        local["control_variates"] = "scaffold"
    return {
        "task": "models.py:Logistic",
        "task_options": {"similarity": similarity, **options},
        "agents": {"min": AGENTS, "lost_after_s": 600},
        "sync": {"kind": "rounds", "sample": SHARE},
        "local": local,
        "stop": {"versions": MOST_ROUNDS, "target": {"metric": "accuracy", "at_least": TARGET}},
        "seed": seed,
    }


def rounds(way: str, similarity: float, epochs: int, lr: float, seed: int, **options: Any) -> dict[str, Any]:
    result = fleet(spec(way, similarity, epochs, lr, seed, **options), {"step_s": 0.0001, "longest_s": 1e6})
    reached = next((p.version for p in result.timeline if (p.metrics.get("accuracy") or 0.0) >= TARGET), None)
    return {"rounds": reached, "best": max((p.metrics.get("accuracy") or 0.0 for p in result.timeline), default=0.0)}


def main() -> None:
    given, kept = arguments(__doc__, rates=RATES, similarities=SIMILARITIES, epochs=EPOCHS)
    options = {"directory": given.directory} if given.directory else {}
    epochs_of = [int(e) for e in given.epochs]
    lines = []
    found: dict[tuple[float, str], list[float]] = {}

    def cell(way: str, similarity: float, epochs: int) -> str:
        what = {"experiment": "scaffold", "way": way, "similarity": similarity, "E": epochs, "most": MOST_ROUNDS}
        lr, results = tuned(
            kept,
            {**what, "target": TARGET},
            [10 * lr for lr in given.rates] if way == "sgd" else given.rates,
            given.seeds,
            lambda lr, split, seed: rounds(way, similarity, epochs, lr, seed, split=split, **options),
            "rounds",
        )
        reached = [or_never(r["rounds"]) for r in results]
        found.setdefault((similarity, way), []).append(statistics.median(reached))
        return f"{median_and_range(reached, 0)}, lr {lr:g}"

    for similarity in given.similarities:
        for way in ("sgd", "scaffold", "fedavg"):
            cells = [cell(way, similarity, epochs) for epochs in ((1,) if way == "sgd" else epochs_of)]
            cells += ["–"] * (len(epochs_of) - len(cells))
            lines.append([f"{similarity:.0%}", way, *cells, PAPER.get((similarity, way), "–")])
    table(["similarity", "", *(f"E {e}" for e in epochs_of), "paper (EMNIST, to 50 %) at 1 / 5 / 10 / 20"], lines)
    if not given.no_plot:
        draw = [partial(_draw, found, s, epochs_of) for s in given.similarities]
        picture("scaffold", *draw, width=10.0, height=3.6)


def _draw(found: dict[tuple[float, str], list[float]], similarity: float, epochs: list[int], axes: Any) -> None:
    for way in ("scaffold", "fedavg"):
        axes.plot(epochs, found[similarity, way], marker="o", label=way)
    axes.axhline(found[similarity, "sgd"][0], color="grey", linestyle="dashed", label="sgd")
    axes.set(xlabel="local epochs", yscale="log", xticks=epochs, title=f"{similarity:.0%} of the rows alike")
    axes.set_yticks((1, 2, 5, 10, 20, 50, 100))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylim(
        bottom=0.8, top=1.5 * max(rounds for cells in found.values() for rounds in cells if rounds < float("inf"))
    )
    if similarity == min(s for s, _ in found):
        axes.set_ylabel(f"rounds to {TARGET:.0%}")
        axes.legend(frameon=False)


if __name__ == "__main__":
    main()
