"""SCAFFOLD (arXiv:1910.06378, algorithm 1) with real training children, held against a few lines of reference code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from syncline_agent.control_variates import ControlVariates
from unit.trainers import Child

BOWLS = f"{Path(__file__).parents[2] / 'system' / 'tasks.py'}:Bowls"
CURVATURES = [0.3, 0.7, 1.1, 1.6, 2.0]
LR = 0.3
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}
N = len(CURVATURES)


@pytest.fixture(autouse=True)
def quick_and_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Isolate random numbers, and skip the writes to the disk after every period."""
    monkeypatch.setattr("os.fsync", lambda fd: None)
    with torch.random.fork_rng(devices=[]):
        yield


def whole_run(steps: int, **local: Any) -> dict[str, Any]:
    optimizer = {"kind": "sgd", "lr": LR}
    return {
        "task": BOWLS,
        "task_options": {"curvatures": CURVATURES},
        "local": {"steps": steps, "optimizer": optimizer, **local},
    }


class Run:
    """Five agents and a coordinator that sums; it drops the updates that `late(version, number)` selects."""

    def __init__(self, directory: Path, spec: dict[str, Any], late: Callable[[int, int], bool] = lambda v, i: False):
        self.spec, self.directory, self.late = spec, directory, late
        self.children = [self.child(i) for i in range(N)]
        self.w = self.children[0].initial_P.clone()
        self.sum = torch.zeros_like(self.w)
        self.verdicts: list[dict[int, bool]] = [{} for _ in range(N)]
        self.version = 0

    def child(self, number: int) -> Child:
        return Child(self.directory / f"a{number}.safetensors", self.spec, number=number, parts=N)

    def round(self) -> None:
        answers = [c.period(self.w, self.sum, v) for c, v in zip(self.children, self.verdicts, strict=True)]
        merged = [i for i in range(N) if not self.late(self.version, i)]
        self.w = self.w + torch.stack([answers[i].update_P for i in merged]).mean(0)
        for i in merged:
            self.sum = self.sum + answers[i].control_P
        self.verdicts = [{c.clock: i in merged} for i, c in enumerate(self.children)]
        self.version += 1

    def committed(self) -> Tensor:
        """Return Σ c_i after every agent has applied its verdicts."""
        total = torch.zeros_like(self.sum)
        for child, verdicts in zip(self.children, self.verdicts, strict=True):
            variates = child.trainer._local.variates
            assert variates is not None
            total += variates.own_P + sum(d for c, d in variates.pending.items() if verdicts.get(c, False))
        return total


def centre(number: int) -> Tensor:
    return torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def by_the_paper(
    rounds: int, steps: int, late: Callable[[int, int], bool] = lambda v, i: False
) -> tuple[Tensor, Tensor]:
    """Return x and c of algorithm 1 with option II, η_g = 1, after some rounds."""
    x, c = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    own = [torch.zeros_like(c) for _ in range(N)]
    for version in range(rounds):
        sampled = [i for i in range(N) if not late(version, i)]
        ys, fresh = {}, {}
        for i in sampled:
            y = x.clone()
            for _ in range(steps):
                y = y - LR * (CURVATURES[i] * (y - centre(i)) - own[i] + c)
            ys[i], fresh[i] = y, own[i] - c + (x - y) / (steps * LR)
        x = x + torch.stack([ys[i] - x for i in sampled]).mean(0)
        c = c + len(sampled) / N * torch.stack([fresh[i] - own[i] for i in sampled]).mean(0)
        for i in sampled:
            own[i] = fresh[i]
    return x, c


def every_third_is_late(version: int, number: int) -> bool:
    return (version + number) % 3 == 0


@pytest.mark.parametrize("late", [lambda v, i: False, every_third_is_late], ids=["all in time", "every third late"])
@pytest.mark.parametrize("steps", [1, 4])
def test_it_is_the_paper_s_algorithm(tmp_path: Path, steps: int, late: Callable[[int, int], bool]) -> None:
    run = Run(tmp_path, whole_run(steps, control_variates="scaffold"), late)
    for done in range(1, 6):
        run.round()
        x, c = by_the_paper(done, steps, late)
        assert torch.allclose(run.w, x, **EXACT)
        assert torch.allclose(run.sum / N, c, **EXACT)
        assert torch.allclose(run.sum, run.committed(), **EXACT), "c is the mean of the c_i, whoever was dropped"


@pytest.mark.parametrize("steps", [1, 5])
def test_it_finds_the_optimum_whatever_the_number_of_steps(tmp_path: Path, steps: int) -> None:
    """FedAvg converges to Σ a_i c_i / Σ a_i with a_i = 1 − (1 − η h_i)^K instead."""
    h, c = torch.tensor(CURVATURES, dtype=torch.float64)[:, None], torch.stack([centre(i) for i in range(N)])
    optimum, a = (h * c).sum(0) / h.sum(), 1 - (1 - LR * h) ** steps
    run = Run(tmp_path, whole_run(steps, control_variates="scaffold"))
    for _ in range(30):
        run.round()
    assert torch.allclose(run.w, optimum, rtol=1e-3)
    fedavg = (a * c).sum(0) / a.sum()
    assert (steps == 1) == torch.allclose(fedavg, optimum, rtol=1e-2)


def test_with_one_step_option_two_is_option_one(tmp_path: Path) -> None:
    runs = [
        Run(tmp_path / str(k), whole_run(1, control_variates={"kind": "scaffold", "option": k}), every_third_is_late)
        for k in (1, 2)
    ]
    for _ in range(6):
        for run in runs:
            run.round()
        assert torch.allclose(runs[0].w, runs[1].w, **EXACT) and torch.allclose(runs[0].sum, runs[1].sum, **EXACT)


def test_option_one_keeps_the_gradient_where_the_period_began(tmp_path: Path) -> None:
    run = Run(tmp_path, whole_run(4, control_variates={"option": 1}))
    for _ in range(4):
        x = run.w
        run.round()
        gradients = [h * (x - centre(i)) for i, h in enumerate(CURVATURES)]
        assert torch.allclose(run.sum, torch.stack(gradients).sum(0), **EXACT)


def test_of_agents_that_are_alike_it_is_fedavg_to_the_last_bit(tmp_path: Path) -> None:
    """c − c_i is 0 then."""
    same = {"task_options": {"curvatures": CURVATURES, "same": True}}
    plain = Run(tmp_path / "a", {**whole_run(3), **same})
    run = Run(tmp_path / "b", {**whole_run(3, control_variates="scaffold"), **same})
    run.children = run.children[:1]  # one of one: c is c_1 to the last bit
    run.children[0].parts = 1
    for _ in range(5):
        plain.w = plain.w + plain.children[0].period(plain.w).update_P
        answer = run.children[0].period(run.w, run.sum, run.verdicts[0])
        run.w, run.sum = run.w + answer.update_P, run.sum + answer.control_P
        run.verdicts[0] = {run.children[0].clock: True}
        assert torch.equal(run.w, plain.w)


@pytest.mark.parametrize("merged", [True, False])
def test_an_agent_that_starts_again_knows_its_variate_and_what_was_pending(tmp_path: Path, merged: bool) -> None:
    steady, shaken = (
        Run(tmp_path / name, whole_run(3, control_variates="scaffold"), lambda v, i: not merged and v == 2 and i == 1)
        for name in ("a", "b")
    )
    for version in range(6):
        if version == 3:
            shaken.children[1] = shaken.child(1)
            assert shaken.children[1].clock == 3
        for run in (steady, shaken):
            run.round()
        assert torch.equal(steady.w, shaken.w) and torch.equal(steady.sum, shaken.sum)


def test_an_agent_that_joins_late_has_a_variate_of_zero_and_c_stays_the_mean(tmp_path: Path) -> None:
    """The center holds the sum; N is the number of parts, which a newcomer makes larger."""
    late = Run(tmp_path, whole_run(2, control_variates="scaffold"), lambda v, i: v < 3 and i == 4)
    for _ in range(5):
        late.round()
        assert torch.allclose(late.sum, late.committed(), **EXACT)


# -- what is pending -------------------------------------------------------------------------------------------------------
def variates(*clocks: int) -> ControlVariates:
    """Return control variates with pending changes of these clocks; the gradient of clock c was 10^c."""
    made = ControlVariates(torch.zeros(2), along=True, overlap=True)
    for clock in clocks:
        made.begin(None, 1)
        made.gradients_P.fill_(10.0**clock)
        made.take(clock, 1)
    return made


@pytest.mark.parametrize(
    ("verdicts", "own", "pending"),
    [
        ({}, 0.0, [1, 2]),
        ({1: True}, 10.0, [2]),
        ({1: False}, 0.0, [2]),
        ({1: True, 2: True}, 100.0, []),
        ({1: True, 2: False}, 10.0, []),
        ({2: True}, 90.0, []),  # the first was never offered, or replaced
        ({7: True}, 0.0, []),
    ],
)
def test_only_what_was_merged_is_adopted(verdicts: dict[int, bool], own: float, pending: list[int]) -> None:
    made = variates(1, 2)
    made.resolve(verdicts)
    assert (made.own_P.tolist(), sorted(made.pending)) == ([own, own], pending)
    made.resolve(verdicts)
    assert made.own_P.tolist() == [own, own], "told twice, adopted once"


@pytest.mark.parametrize("dropped", [None, 3])
def test_where_periods_overlap_a_variate_settles_on_the_gradient(dropped: int | None) -> None:
    """Each verdict comes one period late, as in an asynchronous run. The next change makes up for a dropped one."""
    made = ControlVariates(torch.zeros(2), along=True, overlap=True)
    for clock in range(1, 9):
        made.resolve({clock - 2: clock - 2 != dropped} if clock > 2 else {})
        made.begin(None, 1)
        made.gradients_P.fill_(30.0)
        made.take(clock, 3)
    assert made.own_P.tolist() == [10.0, 10.0] and not any(change.any() for change in made.pending.values())


def test_a_period_without_a_step_changes_no_variate() -> None:
    made = variates(1)
    made.resolve({1: True})
    made.begin(None, 1)
    assert not made.take(2, 0).any()
