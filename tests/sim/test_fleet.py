"""Fleets of a real task in one process: results, virtual time, and memory."""

from __future__ import annotations

import errno
import gc
import json
import math
import random
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from syncline.errors import ConfigError, RunFailed
from syncline.spec.run_spec import RunSpec, parse
from syncline.tasks import mnist5k
from syncline.tasks.seeding import generators_restored, seed_all
from syncline_agent.local_state import save_state
from syncline_agent.state_files import StateFiles
from syncline_sim.fleet import Fleet, FleetResult, run_fleet
from syncline_sim.settings import SimSettings
from syncline_sim.timed_children import TimedTrainer

REGRESSION = "syncline.tasks.quadratic:LinearRegression"
NEVER = {"kind": "crash", "service": "a1", "after_s": 1e6, "for_s": 1}  # with a fault in sight, agents keep a disk
COUNTING = """
from syncline.tasks.quadratic import LinearRegression

made, loaded = [], []

class Counting(LinearRegression):
    def __init__(self, **options):
        super().__init__(**options)
        made.append(1)

    def dataset(self, part):
        loaded.append((part.held_out, part.index, part.parts))
        return super().dataset(part)
"""
DRAWING = """
import random, numpy
from torch import nn
from syncline.tasks.quadratic import LinearRegression

class Drawing(LinearRegression):
    def loss(self, model, batch):
        inputs, targets = batch
        return super().loss(model, (inputs * random.random() + numpy.random.rand(), targets))

    def metrics(self, model, batch):
        return {"drawn": random.random() + numpy.random.rand()}
"""


def spec_of(count: int = 4, **changes: Any) -> RunSpec:
    base: dict[str, Any] = {
        "name": "r",
        "task": REGRESSION,
        "agents": {"min": count},
        "local": {"steps": 10, "batch_size": 4},
        "stop": {"versions": 5},
    }
    return parse(RunSpec, {**base, **changes})


def fleet_of(spec: RunSpec, task_dir: Path = Path(), **settings: Any) -> FleetResult:
    return run_fleet(spec, parse(SimSettings, settings, "sim"), task_dir=task_dir)


def test_the_same_spec_and_settings_give_the_same_result_bit_for_bit() -> None:
    settings: dict[str, Any] = {"step_s": [0.01, 0.03], "spread": 0.3, "jitter": 0.2, "link": {"delay_s": 0.01}}
    first, second = (fleet_of(spec_of(sync={"kind": "async", "buffer": 2}), **settings) for _ in range(2))
    assert first == second and first.phase == "done" and first.versions == 5
    assert fleet_of(spec_of(sync={"kind": "async", "buffer": 2}), **settings, seed=5) != first


def test_a_task_that_draws_from_any_generator_gives_the_same_result_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(DRAWING)
    spec, results, drawn = spec_of(task="own.py:Drawing"), set(), []
    with generators_restored():
        for seed in (1, 2):
            seed_all(seed)  # this process has drawn other numbers
            result = fleet_of(spec, tmp_path)
            results.add((result.digest, result.metrics["drawn"]))
            drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        seed_all(1)
        untouched = (random.random(), np.random.rand(), torch.rand(()).item())
    assert len(results) == 1
    assert drawn[0] == untouched != drawn[1], (
        "a simulation leaves the random numbers of the program that calls it alone"
    )


def test_speeds_change_no_bit_of_a_synchronous_run_and_decide_how_long_it_takes() -> None:
    even, uneven = fleet_of(spec_of(), step_s=0.01), fleet_of(spec_of(), step_s=[0.01, 0.01, 0.01, 0.05])
    assert even.digest == uneven.digest and len(even.digest) == 32
    assert even.seconds == pytest.approx(5 * 10 * 0.01, rel=0.2)
    assert uneven.seconds == pytest.approx(5 * 10 * 0.05, rel=0.1)
    assert [a.steps for a in uneven.agents] == [50] * 4
    assert [round(a.busy_s, 6) for a in uneven.agents] == [0.5, 0.5, 0.5, 2.5]
    assert uneven.updates == 20 and uneven.commits[-1].time_s <= uneven.ended_s


def test_nobody_waits_for_a_slow_agent_in_an_asynchronous_run() -> None:
    """Updates a second, over those of the synchronous run: (r (N − 1) + 1) / N, with one of N = 4 agents r = 5 times slower."""
    step_s = [0.02, 0.02, 0.02, 0.1]
    sync = fleet_of(spec_of(stop={"versions": 20}), step_s=step_s)
    sync_rate = sync.updates / sync.seconds
    result = fleet_of(spec_of(sync={"kind": "async", "buffer": 4}, stop={"versions": 80}), step_s=step_s)
    assert result.updates / result.seconds / sync_rate == pytest.approx(4.0, rel=0.05)
    slow = result.agents[3]
    assert slow.merged and slow.mean_lag > max(a.mean_lag for a in result.agents[:3])


def test_a_period_that_a_quorum_ended_is_stopped_and_what_it_did_is_not_more_than_there_was_time_for() -> None:
    spec = spec_of(sync={"quorum": 3, "grace_s": 0.0}, stop={"versions": 4})
    result = fleet_of(spec, step_s=[0.01, 0.01, 0.01, 0.5])
    slow = result.agents[3]
    assert result.phase == "done" and slow.merged == 0 and 0 < slow.steps < 4 * 10
    assert slow.busy_s == pytest.approx(slow.steps * 0.5)
    assert result.seconds < 4 * 10 * 0.01 + 4 * 0.5


def test_a_period_in_seconds_has_the_steps_that_fit_into_it() -> None:
    result = fleet_of(spec_of(local={"seconds": 0.2}, stop={"versions": 3}), step_s=[0.01, 0.05, 0.5])
    assert [a.steps for a in result.agents] == [60, 12, 3, 60]


def test_a_link_has_a_delay_and_a_rate() -> None:
    big: dict[str, Any] = {
        "task": "syncline.tasks.noop:Noop",
        "task_options": {"params": 250_000},
        "local": {"steps": 1},
    }
    spec = spec_of(**big, evaluate={"center": False}, stop={"versions": 4})
    free = fleet_of(spec, step_s=0.01)
    slow = fleet_of(spec, step_s=0.01, link=[{"up_mbit": 80, "down_mbit": 160}, {}])
    assert slow.digest == free.digest
    one_round_s = 8 * 1e6 / 80e6 + 8 * 1e6 / 160e6  # a million bytes up and down
    assert slow.seconds - free.seconds == pytest.approx(4 * one_round_s, rel=0.1)
    assert slow.agents[0].bytes_up == pytest.approx(4e6, rel=0.01) == slow.agents[0].bytes_down
    far = fleet_of(spec, step_s=0.01, link={"delay_s": 0.5})
    assert far.seconds > 4 * 4 * 0.5  # notify, get, put, offer


@pytest.mark.parametrize(("params", "mbit", "wire"), [(500_000, 0.1, {"chunk_bytes": 65536}), (250_000, 0.2, {})])
def test_over_a_thin_link_an_update_arrives_and_is_put_once(params: int, mbit: float, wire: dict[str, int]) -> None:
    """One takes longer than a blob may stand still; a chunk of the other, longer than a broker may take to answer."""
    big: dict[str, Any] = {
        "task": "syncline.tasks.noop:Noop",
        "task_options": {"params": params},
        "local": {"steps": 0},
    }
    spec = spec_of(2, **big, wire=wire, evaluate={"center": False}, stop={"versions": 2})
    result = fleet_of(spec, step_s=0.01, link=[{}, {"up_mbit": mbit}])
    assert (result.phase, result.warnings) == ("done", ())
    assert result.seconds == pytest.approx(2 * 4 * 8 * params / (mbit * 1e6), rel=0.05)
    assert result.agents[1].bytes_up == pytest.approx(2 * 4 * params, rel=0.05)


def test_what_was_finished_while_the_agent_was_offline_is_delivered_later() -> None:
    alone = {"kind": "async", "buffer": 1, "max_lag": 1000, "overlap": False}
    spec = spec_of(2, sync=alone, local={"steps": 20, "batch_size": 4}, stop={"versions": 60})
    cut = {"kind": "cut", "service": "a2", "after_s": 10, "for_s": 300}  # the first period ends after 20 s
    result = fleet_of(spec, step_s=[0.5, 1.0], faults=[cut])
    offline = result.agents[1]
    assert offline.max_lag > 25 and offline.merged == offline.periods - 1, "all but what it was at when the run ended"


def test_faults_are_settings_and_a_synchronous_run_survives_them_bit_for_bit() -> None:
    spec = spec_of(agents={"min": 4, "lost_after_s": 60}, stop={"versions": 8})
    faults = [
        {"kind": "crash", "service": "coordinator", "after_s": 0.8, "for_s": 0.5},
        {"kind": "crash", "service": "a2", "after_s": 1.0, "for_s": 0.3},
        {"kind": "cut", "service": "a3", "after_s": 0.9, "for_s": 5},
        {"kind": "trainer", "service": "a1", "after_s": 1.1},
        {"kind": "broker", "after_s": 1.2, "for_s": 0.5},
        {"kind": "lose", "share": 0.5, "after_s": 0.9, "for_s": 3},
        {"kind": "delay", "service": "a4", "seconds": 0.2, "after_s": 0.7, "for_s": 2},
    ]
    calm, troubled = fleet_of(spec, step_s=0.05), fleet_of(spec, step_s=0.05, faults=faults)
    assert troubled.digest == calm.digest and troubled.seconds > calm.seconds + 4


class Disk:
    """Of a whole fleet: the first `full_for` tries fail, of files with `only` in their path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full_for: float) -> None:
        self.tries, self.full_for, self.only, self.save = 0, full_for, "", save_state
        self.events: list[tuple[str, str]] = []
        monkeypatch.setattr("syncline_agent.state_saver.save_state", self.take)

    def take(self, path: Path, *what: Any) -> None:
        self.tries += 1
        if self.tries <= self.full_for and self.only in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        self.save(path, *what)

    def told(self, event: str) -> list[str]:
        return [text for kind, text in self.events if kind == event]

    def run(self, count: int, fault: dict[str, Any] = NEVER, **fields: Any) -> FleetResult:
        settings = parse(SimSettings, {"step_s": 1.0, "faults": [fault]}, "sim")
        return run_fleet(spec_of(count, stop={"versions": 8}, **fields), settings, follow=self._follow)

    def _follow(self, subject: str, data: bytes) -> None:
        if ".events." in subject:
            event = json.loads(data)
            self.events.append((event["event"], event["text"]))


def test_a_full_disk_is_told_once_and_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, math.inf)
    assert disk.run(2, mix={"alpha": 0.5}).phase == "done"
    assert len(told := disk.told("not-kept")) == 2 and all("goes on without: " in text for text in told)
    assert all("No space left on device" in text for text in told) and not disk.told("agent-lost")


@pytest.mark.parametrize("fault", [NEVER, {"kind": "trainer", "service": "a1", "after_s": 20}], ids=["", "child-dies"])
@pytest.mark.parametrize(
    "fields", [{"mix": {"kind": "elastic", "alpha": 0.4}}, {"local": {"steps": 5, "control_variates": "scaffold"}}]
)
def test_who_must_keep_what_it_gives_up_is_out_while_its_disk_is_full(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], fault: dict[str, Any]
) -> None:
    """Afterwards the agent offers its update, or makes it again if the child died meanwhile; no update is lost."""
    calm = Disk(monkeypatch, 0).run(1, **fields)
    disk = Disk(monkeypatch, 3)
    late = disk.run(1, fault, **fields)
    assert (late.phase, late.digest) == ("done", calm.digest) and 45 < late.seconds - calm.seconds < 120
    times = 1 if fault == NEVER else 2
    assert len(told := disk.told("not-kept")) == times and "takes no part until it is" in told[0]
    assert len(lost := disk.told("agent-lost")) == times and "No space left on device" in lost[0]
    assert len(disk.told("agent-joined")) == times + 1 and not disk.told("agent-failed")


def test_a_full_disk_of_one_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, math.inf)
    disk.only = "/a1."
    result = disk.run(2, mix={"kind": "elastic", "alpha": 0.4})
    assert (result.phase, result.versions) == ("done", 8) and len(disk.told("agent-lost")) == 1


def test_what_agents_keep_goes_when_the_run_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[tuple[bool, bool]] = []
    remove = StateFiles._remove

    def told(self: StateFiles, run: str) -> None:
        before = self.path(run).is_file()
        remove(self, run)
        removed.append((before, self.path(run).parent.exists()))

    monkeypatch.setattr(StateFiles, "_remove", told)
    result = fleet_of(spec_of(), step_s=0.2, faults=[NEVER])
    assert result.phase == "done" and removed == [(True, False)] * 4


def test_what_the_broker_lost_is_made_again_and_counted_once() -> None:
    spec = spec_of(agents={"min": 4, "lost_after_s": 60}, stop={"versions": 20}, evaluate={"center": True})
    power = {"kind": "rollback", "after_s": 5.0, "for_s": 1.0, "lost_s": 2.0}
    calm, troubled = fleet_of(spec, step_s=0.05), fleet_of(spec, step_s=0.05, faults=[power])
    assert troubled.digest == calm.digest and troubled.seconds > calm.seconds + 2
    assert [c.version for c in troubled.commits] == list(range(1, 21)) and troubled.updates == 80
    assert [p.version for p in troubled.timeline] == list(range(1, 21))
    assert any("has lost writes that it had acknowledged" in text for _, text in troubled.warnings)


def test_who_is_not_drawn_for_a_round_does_nothing() -> None:
    result = fleet_of(spec_of(20, sync={"sample": 0.1}, stop={"versions": 3}))
    assert sum(a.periods for a in result.agents) == result.updates == 6
    assert sum(a.bytes_up > 3000 for a in result.agents) <= 6


OWN_PART = """
from syncline.tasks.quadratic import LinearRegression

made = []

class OwnPart(LinearRegression):
    def __init__(self, **options):
        super().__init__(**options)
        self.seen, self.parts = [], []
        made.append(self)

    def dataset(self, part):
        self.rows, data = len(self.parts), super().dataset(part)
        self.parts.append((part.held_out, part.index, part.parts))
        return data

    def train(self, model, optimizer, batches, on_step):
        assert not self.parts[-1][0], "trains on the held-out rows"
        self.seen.append(self.parts[-1][1])
        return super().train(model, optimizer, batches, on_step)
"""


def module_of(file: Path) -> Any:
    return next(m for m in [*sys.modules.values()] if vars(m).get("__file__") == str(file))


def test_every_agent_has_a_task_of_its_own(tmp_path: Path) -> None:
    """Attributes of a task belong to one agent, as in a process of its own: the part that it was given, and lists."""
    (tmp_path / "own.py").write_text(OWN_PART)
    assert fleet_of(spec_of(6, task="own.py:OwnPart"), tmp_path).phase == "done"
    made = module_of(tmp_path / "own.py").made
    assert all(task.parts == [(True, 0, 1)] for task in made if not task.seen), "the coordinator's"
    seen = [task.seen for task in made if task.seen]
    assert sorted(seen) == [[i] * 5 for i in range(6)]


def test_a_child_that_starts_again_has_a_new_task(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_PART)
    fault = {"kind": "trainer", "service": "a1", "after_s": 3}
    assert fleet_of(spec_of(2, task="own.py:OwnPart"), tmp_path, step_s=0.2, faults=[fault]).phase == "done"
    assert sorted(task.seen[0] for task in module_of(tmp_path / "own.py").made if task.seen) == [0, 0, 1]


MAKES_TENSORS = """
import torch
from torch.utils.data import TensorDataset
from syncline.tasks.quadratic import LinearRegression

class Makes(LinearRegression):
    def dataset(self, part):
        data = super().dataset(part)
        if part.held_out:
            data = TensorDataset(*(t.clone() for t in data.tensors))
            if self.keeps:
                self.kept = data
        return data

class Shares(Makes):
    keeps = False

class Keeps(Makes):
    keeps = True

class KeepsInputs(Makes):
    keeps = False
    def dataset(self, part):
        data = super().dataset(part)
        if part.held_out:
            self.inputs = data.tensors[0]
        return data
"""


@pytest.mark.parametrize(("task", "sets"), [("Shares", 1), ("Keeps", 20), ("KeepsInputs", 20)])
def test_equal_held_out_sets_are_one_in_memory_unless_the_task_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, sets: int
) -> None:
    (tmp_path / "own.py").write_text(MAKES_TENSORS)
    places, held_out = set(), TimedTrainer._held_out

    def seen(trainer: TimedTrainer) -> Any:
        data = held_out(trainer)
        places.add(data.tensors[0].data_ptr())
        return data

    monkeypatch.setattr(TimedTrainer, "_held_out", seen)
    spec = spec_of(20, task=f"own.py:{task}", evaluate={"center": True, "agents": True}, stop={"versions": 2})
    assert fleet_of(spec, tmp_path).phase == "done"
    assert len(places) == sets


def test_a_hundred_agents_of_a_real_task_hold_its_data_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large data are read once, and no agent writes to its copy."""
    reads: list[Path] = []
    read = mnist5k._read

    def once(file: Path) -> Any:
        reads.append(file)
        return read(file)

    monkeypatch.setattr(mnist5k, "_read", once)
    mnist5k._read_split.cache_clear()  # type: ignore[attr-defined]
    local = {"steps": 1, "batch_size": 2}
    spec = spec_of(100, task="syncline.tasks.mnist5k:Mnist5k", local=local, stop={"versions": 1})
    before, most = private_bytes(), [0]
    fleet = Fleet(spec, parse(SimSettings, {}, "sim"), follow=lambda subject, data: most.append(private_bytes()))
    fleet.run()
    assert fleet.result().phase == "done" and len(reads) == 1
    assert max(most) - before < 150e6  # 100 copies of the rows would be 400 million bytes


def private_bytes() -> int:
    """Of this process alone: mapped memory that is not written to does not count."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))


def test_a_fleet_holds_no_more_the_longer_it_runs() -> None:
    """Every update has a million bytes, and no update stays in memory."""
    held: dict[int, int] = {}

    def look(subject: str, data: bytes) -> None:
        if subject.endswith("metrics.coordinator.round"):
            gc.collect()
            held[json.loads(data)["version"]] = tracemalloc.get_traced_memory()[0]

    noop = {"task": "syncline.tasks.noop:Noop", "task_options": {"params": 250_000}, "local": {"steps": 1}}
    spec = spec_of(10, **noop, evaluate={"center": False}, stop={"versions": 12})
    tracemalloc.start()
    try:
        run_fleet(spec, SimSettings(step_s=(0.2,)), follow=look)
    finally:
        tracemalloc.stop()
    assert max(held[v] for v in range(8, 12)) - max(held[v] for v in range(2, 6)) < 10e6


def test_the_center_is_evaluated_every_so_many_versions_and_at_the_end() -> None:
    result = fleet_of(spec_of(evaluate={"every": 3}, stop={"versions": 8}))
    assert [p.version for p in result.timeline] == [3, 6, 8]
    assert result.metrics == result.timeline[-1].metrics and set(result.metrics) == {"loss"}
    times = {c.version: c.time_s for c in result.commits}
    assert all(p.time_s == times[p.version] for p in result.timeline)


def test_a_target_ends_the_run_and_the_time_to_it_is_known() -> None:
    result = fleet_of(spec_of(stop={"versions": 200, "target": {"metric": "loss", "at_most": 0.05}}))
    assert result.phase == "done" and result.versions < 200 and result.metrics["loss"] is not None
    assert result.first("loss", at_least=0.0) == result.timeline[0].time_s - result.opened_s
    assert result.first("accuracy", at_least=0.9) is None


def test_what_is_wrong_is_told_and_nothing_stays_behind(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ConfigError, match="task"):
        fleet_of(spec_of(task="no.such.module:Task"))
    (tmp_path / "mine.py").write_text(COUNTING.replace("loaded.append", "raise RuntimeError") + "\n")
    with pytest.raises(ConfigError, match="RuntimeError"):
        fleet_of(spec_of(task="mine.py:Counting"), tmp_path)
    with pytest.raises(RunFailed, match=r"did not end within 0\.8 s"):
        fleet_of(spec_of(), longest_s=0.8)
    assert torch.get_num_threads() == threads


def test_whoever_follows_sees_every_metric() -> None:
    seen: set[str] = set()
    fleet = Fleet(spec_of(), SimSettings(), follow=lambda subject, data: seen.add(".".join(subject.split(".")[3:])))
    fleet.run()
    assert {"metrics.coordinator.eval", "metrics.coordinator.round", "metrics.a1.train", "events.coordinator"} <= seen


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit], ids=lambda error: error.__name__)
def test_what_whoever_follows_raises_comes_back_and_is_raised_once(error: type[BaseException]) -> None:
    raised: list[str] = []

    def broken(subject: str, data: bytes) -> None:
        raised.append(subject)
        raise error(subject)

    with pytest.raises(error):
        run_fleet(spec_of(), follow=broken)
    assert len(raised) == 1


def test_agents_that_start_later_take_part_later() -> None:
    result = fleet_of(spec_of(agents={"min": 1}, stop={"versions": 40}), agents=4, start_within_s=4.0, step_s=0.01)
    merged = [a.merged for a in result.agents]
    assert merged[0] == 40 and merged == sorted(merged, reverse=True) and 0 < merged[3] < merged[1] < 40


def test_what_is_doubted_of_the_settings_and_the_model_is_told_as_the_run_begins(tmp_path: Path) -> None:
    """The warnings in the answer to a submission: about the settings, and about a model with BatchNorm."""
    (tmp_path / "task.py").write_text(
        """
from torch import nn
from syncline.tasks.quadratic import LinearRegression

class Normed(LinearRegression):
    def model(self):
        return nn.Sequential(nn.BatchNorm1d(5, dtype=self.dtype), nn.Linear(5, 1, dtype=self.dtype))
"""
    )
    spec = spec_of(task="task.py:Normed", mix={"alpha": 1.1})
    told: list[str] = []
    fleet = Fleet(spec, parse(SimSettings, {"step_s": 0.01}, "sim"), tmp_path)
    fleet.on_warning = told.append
    fleet.run()
    assert [text.partition(":")[0] for text in told] == ["mix.alpha", "task"]
    assert [text for _, text in fleet.result().warnings[:2]] == told
