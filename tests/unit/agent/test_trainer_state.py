"""The state that a training child saves, and unusable files and disks."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from syncline.runtime.child_messages import RetrySave, SaveReport
from syncline_agent.local_state import DIGEST, _digest
from syncline_agent.state_saver import SAVE_EVERY_S
from syncline_agent.training_child import SAVE_AGAIN_S, STOP_EARLY
from unit.trainers import Child, Ticking, Trained

OWN_TASKS = '''
from collections import OrderedDict
import torch
from torch import nn
from syncline.tasks.quadratic import LinearRegression

class AtHome(LinearRegression):
    """A head and statistics of its own, a count, and a frozen base."""
    hidden = 4
    local = ("head.*", "*.running_*")
    def model(self):
        return nn.Sequential(OrderedDict(
            base=nn.Linear(self.features, self.features, dtype=self.dtype).requires_grad_(False),
            body=nn.Linear(self.features, self.hidden, dtype=self.dtype),
            norm=nn.BatchNorm1d(self.hidden, dtype=self.dtype),
            head=nn.Linear(self.hidden, 1, dtype=self.dtype),
        ))

class Odd(LinearRegression):
    """Buffers of other kinds, one of them sparse and one made only as it trains."""
    local = ("sparse",)
    def model(self):
        model = nn.Linear(self.features, 1, dtype=self.dtype)
        model.register_buffer("phases", torch.ones(3, dtype=torch.complex128))
        model.register_buffer("mask", torch.zeros(0, dtype=torch.bool))
        model.register_buffer("brain", torch.full((), float("-inf"), dtype=torch.bfloat16))
        model.register_buffer("sparse", torch.eye(3, dtype=self.dtype).to_sparse())
        model.register_buffer("later", None)
        return model
    def loss(self, model, batch):
        with torch.no_grad():
            model.phases = model.phases * 1j
            model.later = torch.ones(2)
        return super().loss(model, batch)

class Forgetful(LinearRegression):
    forgets = False
    def state_dict(self):
        if self.forgets:
            raise KeyError("forgotten")
        return {"count": 1}
    def load_state_dict(self, state):
        pass
'''


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "a1.safetensors"


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN_TASKS)
    return f"{tmp_path / 'own.py'}:"


AT_HOME = {"head.weight", "head.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def test_what_never_leaves_the_agent_is_kept_too(path: Path, own: str) -> None:
    """A head of its own, running statistics and counts; frozen parameters do not change, and a file need not hold them."""
    spec = {"task": own + "AtHome", "local": {"steps": 3, "optimizer": {"kind": "adam"}}, "mix": {"alpha": 0.5}}
    steady = Child(path, spec)
    for _ in range(2):
        steady.period(steady.initial_P)
    with safe_open(path, framework="pt") as file:
        assert {k.removeprefix("local.") for k in file.keys() if k.startswith("local.")} == AT_HOME  # noqa: SIM118
    restarted = Child(path, spec)
    expected, found = (c.trainer._local.flat.model.state_dict() for c in (steady, restarted))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for _ in range(2):
        assert torch.equal(*(c.period(steady.initial_P).update_P for c in (steady, restarted)))


def test_buffers_of_any_kind_are_kept(path: Path, own: str) -> None:
    child = Child(path, {"task": own + "Odd", "local": {"steps": 3}})
    child.period(child.initial_P)
    restarted = Child(path, {"task": own + "Odd", "local": {"steps": 3}})
    expected: Any = child.trainer._local.flat.model
    found = restarted.trainer._local.flat.model
    assert restarted.clock == 1 and expected.phases.imag.any()
    for name in ("phases", "mask", "brain"):
        assert torch.equal(found.get_buffer(name), expected.get_buffer(name))


MOMENTUM = {"steps": 3, "optimizer": {"kind": "sgd", "lr": 0.5, "momentum": 0.9}}


def test_a_run_that_is_submitted_again_under_its_name_begins_anew(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The new submission may have other settings, and its center contains no earlier update."""
    Child(path, {"local": MOMENTUM}).period(Child(path, {"local": MOMENTUM}).initial_P)
    spec = {"local": {"steps": 3, "optimizer": {"kind": "sgd", "lr": 0.001}}, "mix": {"alpha": 0.5}}
    again, other = Child(path, spec, submission="second"), Child(path.with_name("b"), spec, submission="second")
    assert again.clock == 0
    assert torch.equal(*(c.period(c.initial_P).update_P for c in (again, other)))
    assert "is of an earlier run of this name; beginning with the center" in caplog.text
    assert Child(path, spec, submission="second").clock == 1


def test_control_variates_are_of_one_submission(path: Path) -> None:
    spec = {"local": {"steps": 3, "control_variates": "scaffold"}}
    child = Child(path, spec)
    for verdicts in ({}, {1: True}):
        child.period(child.initial_P, torch.zeros_like(child.initial_P), verdicts)
    again = Child(path, spec, submission="second")
    assert again.trainer._local.variates is not None
    assert not again.trainer._local.variates.own_P.any() and not again.trainer._local.variates.pending


# -- what the limit holds back -----------------------------------------------------------------------------------------
HELD_BACK = {"local": {"steps": 3, "optimizer": {"kind": "adam"}}, "mix": {"alpha": 0.5}}


def soon(child: Child) -> Trained:
    """Train one period a tenth of a second after the one before: too soon for a save."""
    return child.period(child.initial_P, pause_s=0.1)


def wait(child: Child, clock: Ticking, seconds: float) -> None:
    """Let time pass without a question, then save if a save is due."""
    clock.now_s += seconds
    due_in_s = child.trainer.save_due_in_s()
    if due_in_s is not None and due_in_s <= 0:
        child.trainer.save_held_back()


def test_what_the_limit_holds_back_is_saved_while_no_question_waits(path: Path) -> None:
    """Without waiting, a child that is killed repeats the periods that the limit has held back."""
    clock = Ticking()
    child = Child(path, HELD_BACK, clock=clock)
    child.period(child.initial_P)
    assert child.trainer.save_due_in_s() is None, "it is saved"
    for _ in range(2):
        soon(child)
    assert Child(path, HELD_BACK).clock == 1
    assert child.trainer.save_due_in_s() == pytest.approx(SAVE_EVERY_S - 0.2)
    wait(child, clock, SAVE_EVERY_S / 2)
    assert Child(path, HELD_BACK).clock == 1
    wait(child, clock, SAVE_EVERY_S / 2)
    assert child.trainer.save_due_in_s() is None
    restarted = Child(path, HELD_BACK)
    assert restarted.clock == 3
    assert torch.equal(*(c.period(c.initial_P).update_P for c in (child, restarted)))


def test_saving_while_no_question_waits_counts_for_the_limit_too(path: Path) -> None:
    clock = Ticking()
    child = Child(path, HELD_BACK, clock=clock)
    child.period(child.initial_P)
    soon(child)
    wait(child, clock, SAVE_EVERY_S)
    soon(child)
    assert Child(path, HELD_BACK).clock == 2
    assert child.trainer.save_due_in_s() == pytest.approx(SAVE_EVERY_S - 0.1)


def test_the_state_of_a_period_that_was_stopped_is_not_saved(path: Path) -> None:
    child = Child(path, HELD_BACK)
    child.period(child.initial_P)
    soon(child)
    child.memory.view()[STOP_EARLY] = 1
    assert soon(child).report.stopped and child.trainer.save_due_in_s() is None


def test_a_state_that_cannot_be_saved_while_no_question_waits_is_told_after_the_next_period(
    path: Path, own: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = {"task": own + "Forgetful", "local": {"steps": 2}}
    clock = Ticking()
    child = Child(path, spec, clock=clock)
    child.period(child.initial_P)
    cast(Any, child.trainer._local.task).forgets = True
    soon(child)
    wait(child, clock, SAVE_EVERY_S)
    assert "the state of clock 2 is not saved" in caplog.text and child.trainer.save_due_in_s() is None
    with pytest.raises(KeyError, match="forgotten"):
        child.period(child.initial_P)
    assert Child(path, spec).clock == 1


# -- files that cannot be used -----------------------------------------------------------------------------------------
Tensors = dict[str, Tensor]
Metadata = dict[str, str]
ADAM = {"local": {"steps": 3, "optimizer": {"kind": "adam"}}}


def changed(path: Path, change: Callable[[Tensors, Metadata], Any], *, sealed: bool) -> None:
    """Change a saved file. `sealed`: with a matching digest, as another version of Syncline would write it."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {k: file.get_tensor(k).clone() for k in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(tensors, metadata)
    if sealed:
        del metadata[DIGEST]
        metadata[DIGEST] = _digest(tensors, metadata)
    save_file(tensors, path, metadata)


CHANGES: dict[str, Callable[[Tensors, Metadata], Any]] = {
    "own of another length": lambda t, m: t.update(own=t["own"][:-1].clone()),
    "own of one element": lambda t, m: t.update(own=t["own"][:1].clone()),
    "no own": lambda t, m: t.pop("own"),
    "inner: null": lambda t, m: m.update(inner="null"),
    "inner: a list": lambda t, m: m.update(inner="[]"),
    "inner: nested": lambda t, m: m.update(inner="[" * 100_000),
    "inner: of no kind": lambda t, m: m.update(inner='{"set": []}'),
    "inner: a dict of no pairs": lambda t, m: m.update(inner='{"dict": [1]}'),
    "inner: odd groups": lambda t, m: m.update(inner=m["inner"].replace('"param_groups"', '"groups"')),
    "inner: odd optimisers": lambda t, m: m.update(inner='{"dict": [["optimizers", 3]]}'),
    "no inner": lambda t, m: m.pop("inner"),
    "an optimiser's tensor is missing": lambda t, m: t.pop("inner.optimizers..state.0.exp_avg_sq"),
    "an optimiser's tensor of no parameter": lambda t, m: m.update(inner=m["inner"].replace("[0, {", "[7, {")),
    "the tensors of another optimiser": lambda t, m: m.update(inner=m["inner"].replace("Adam", "SGD")),
    "a pending difference of another length": lambda t, m: t.update({"pending.1": torch.zeros(2)}),
    "a pending difference of no clock": lambda t, m: t.update({"pending.x": t["own"].clone()}),
    "clock -5": lambda t, m: m.update(clock="-5"),
    "clock 1e23": lambda t, m: m.update(clock="9" * 23),
    "no submission": lambda t, m: m.pop("submission"),
}
TORN: dict[str, Callable[[Tensors, Metadata], Any]] = {
    "an optimiser's tensor of another shape": lambda t, m: t.update(
        {"inner.optimizers..state.0.exp_avg": torch.zeros(3)}
    ),
    "a bit of it": lambda t, m: t["own"].view(torch.uint8)[5].bitwise_xor_(1),
    "a clock that could be": lambda t, m: m.update(clock="2"),
}


@pytest.mark.parametrize(
    ("what", "sealed"), [*((what, sealed) for what in CHANGES for sealed in (True, False)), *((w, False) for w in TORN)]
)
def test_a_file_that_cannot_be_used_is_no_obstacle(
    path: Path, what: str, sealed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = Child(path, ADAM)
    first = fresh.period(fresh.initial_P).update_P
    changed(path, (CHANGES | TORN)[what], sealed=sealed)
    child = Child(path, ADAM)
    assert child.clock == 0 and "beginning with the center" in caplog.text
    assert torch.equal(child.period(child.initial_P).update_P, first)
    assert Child(path, ADAM).clock == 1


def test_a_task_whose_own_tensors_have_changed_begins_with_the_center(path: Path, own: str) -> None:
    """The half restored model is made anew."""
    spec = {"task": own + "AtHome", "local": {"steps": 3}}
    child = Child(path, spec)
    child.period(child.initial_P)
    changed(path, lambda t, m: t.update({"local.head.bias": torch.zeros(2)}), sealed=True)
    restarted, fresh = Child(path, spec), Child(path.with_name("b"), spec)
    assert restarted.clock == 0
    assert torch.equal(*(c.period(c.initial_P).update_P for c in (restarted, fresh)))


# -- disks that take nothing -------------------------------------------------------------------------------------------
FULL = "No space left on device"


class Disk:
    """A disk that, when full, takes half of a file."""

    full = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.tries, self.error = 0, error
        monkeypatch.setattr("syncline_agent.local_state.save_file", self.save)

    def save(self, tensors: Tensors, path: Path, metadata: Metadata) -> None:
        self.tries += 1
        if self.full:
            path.write_text("half")
            raise self.error
        save_file(tensors, path, metadata)


@pytest.fixture(params=[SafetensorError(f"Error while serializing: I/O error: {FULL}"), OSError(errno.ENOSPC, FULL)])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch, request.param)


def test_a_full_disk_does_not_keep_an_agent_from_training(path: Path, disk: Disk) -> None:
    """The old file stays, and the save is tried again, though not after every period."""
    child = Child(path, {"local": {"steps": 2}})
    assert child.period(child.initial_P).update.save.problem == ""
    disk.full = True
    assert FULL in child.period(child.initial_P).update.save.problem and [*path.parent.iterdir()] == [path]
    assert Child(path, {"local": {"steps": 2}}).clock == 1
    disk.full = False
    assert child.period(child.initial_P).update.save.problem == ""
    assert Child(path, {"local": {"steps": 2}}).clock == 3


def test_a_full_disk_is_not_written_to_all_the_time(path: Path, disk: Disk) -> None:
    clock, tries = Ticking(0.1), []
    child = Child(path, {"local": {"steps": 2}}, clock=clock)
    disk.full = True
    for seconds in (60.0, 10.0, 10.0, 20.0):  # from one period to the next
        clock.now_s -= 60.0 - seconds
        child.period(child.initial_P)
        tries.append(disk.tries)
    assert tries == [1, 1, 1, 2]


def test_a_disk_that_takes_nothing_while_no_question_waits_is_told_with_the_next_period(path: Path, disk: Disk) -> None:
    """The save is tried again half a minute later, and no sooner."""
    clock = Ticking()
    child = Child(path, {"local": {"steps": 2}}, clock=clock)
    child.period(child.initial_P)
    soon(child)
    disk.full = True
    wait(child, clock, SAVE_EVERY_S)
    assert child.trainer.save_due_in_s() == pytest.approx(SAVE_AGAIN_S)
    assert FULL in soon(child).update.save.problem and disk.tries == 2
    disk.full = False
    wait(child, clock, SAVE_AGAIN_S)
    assert soon(child).update.save.problem == "" and Child(path, {"local": {"steps": 2}}).clock == 3


def test_a_state_directory_that_cannot_be_made_is_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    child = Child(tmp_path / "file" / "run" / "a1.safetensors", {"local": {"steps": 2}})
    assert "Not a directory" in child.period(child.initial_P).update.save.problem


@pytest.mark.parametrize(
    "spec", [{"local": {"steps": 2, "control_variates": "scaffold"}}, {"mix": {"kind": "elastic", "alpha": 0.4}}]
)
def test_what_is_given_up_and_cannot_be_kept_is_not_offered(path: Path, disk: Disk, spec: dict[str, Any]) -> None:
    child = Child(path, spec)
    disk.full = True
    trained = child.period(child.initial_P, torch.zeros_like(child.initial_P) if "local" in spec else None)
    save = (child.make_elastic_update() if "mix" in spec else trained.update).save
    assert save.blocks_offer and FULL in save.problem and not [*path.parent.iterdir()]
    assert child.trainer.retry_save(RetrySave(clock=1)) == save
    disk.full = False
    assert child.trainer.retry_save(RetrySave(clock=1)) == SaveReport()
    assert Child(path, spec).clock == 1
