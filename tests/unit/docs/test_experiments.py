"""The experiments choose learning rates on rows apart from those of the tables, and every table names its command."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from syncline.tasks.classification import Labelled

ROOT = Path(__file__).parents[3]
COMMAND = re.compile(r"`[^`]*\b(make [a-z-]+|syncline(?:-sim)? |python [a-z_/]+\.py|pytest )")


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    yield ROOT / "experiments"
    for name in ("common", "models"):
        sys.modules.pop(name, None)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_a_learning_rate_is_chosen_on_validation_rows_and_measured_on_the_test_rows(experiments: Path) -> None:
    common, made = module("common"), list[tuple[float, str, int]]()

    def measure(lr: float, split: str, seed: int) -> dict[str, Any]:
        made.append((lr, split, seed))
        better = 0.2 if split == "choose" else 0.1  # on the test rows another one would look best
        return {"rounds": 5 if lr == better else 9 if lr == 0.1 else None}

    lr, found = common.tuned(common.Kept(None), {"experiment": "x"}, (0.1, 0.2, 0.4), 2, measure, "rounds")
    assert lr == 0.2 and found == [{"rounds": None}] * 2
    chosen = common.CHOOSING_SEED
    assert made == [(rate, "choose", chosen) for rate in (0.1, 0.2, 0.4)] + [(0.2, "final", 1), (0.2, "final", 2)]
    assert chosen not in (1, 2, 3), "the seeds of the table have no part in the choice"


def test_what_was_not_reached_is_shown_so(experiments: Path) -> None:
    shown = module("common").median_and_range
    assert shown([3.0, 1.0, 2.0], 1, " s") == "2.0 s (1.0 – 3.0)"
    assert shown([3.0, float("inf"), float("inf")], 0) == "never (3 – never)"


@pytest.mark.parametrize(
    ("split", "trained", "held_out"),
    [
        ("all", (0, 60_000), ("t10k", 0)),
        ("choose", (0, 50_000), ("train", 50_000)),
        ("final", (0, 50_000), ("t10k", 0)),
    ],
)
def test_rows_that_settings_are_chosen_on_are_neither_trained_on_nor_test_rows(
    experiments: Path, split: str, trained: tuple[int, int], held_out: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels tell the rows by their numbers, and those of the test images by being negative."""
    logistic = module("models").Logistic

    def read(task: object, which: str) -> Labelled:
        numbers = np.arange(60_000) if which == "train" else -np.arange(1, 10_001)
        return Labelled(np.zeros((len(numbers), 0, 0), np.uint8), numbers)

    monkeypatch.setattr(logistic, "_read", read)
    task = logistic(split=split)
    assert (task.train_rows.labels[0], task.train_rows.labels[-1] + 1) == trained
    which, first = held_out
    assert len(task.test_rows.labels) == 10_000
    assert task.test_rows.labels[0] == (first if which == "train" else -1)


def test_every_table_of_results_names_the_command_that_prints_it() -> None:
    sections = re.split(r"^## ", (ROOT / "docs" / "results.md").read_text(), flags=re.MULTILINE)[1:]
    for section in sections:
        title, _, text = section.partition("\n")
        for before, _ in re.findall(r"((?:^(?!\|).*\n)+)((?:^\|.*\n)+)", text, re.MULTILINE):
            assert COMMAND.search(before), f"{title}: a table without a command"
        for name in re.findall(r"NAME=(\w+)", text):
            assert (ROOT / "experiments" / f"{name}.py").exists()
