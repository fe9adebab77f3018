"""Every training structure learns in a simulation the same as a plain PyTorch loop, also after a kill of its process."""

from __future__ import annotations

import json
import re

import pytest

from structures.registry import SEED, STRUCTURES, Structure, plain_loop
from syncline.data.partition import Part
from syncline.spec.run_spec import RunSpec, parse
from syncline.tasks.base import evaluate
from syncline_sim.fleet import FleetResult, run_fleet
from syncline_sim.settings import SimSettings

PERIODS = 3
KILLED_S = 8.0  # in the second period: a step takes a second
TRAINED = [name for name, structure in STRUCTURES.items() if not structure.refused]
REFUSED = [name for name, structure in STRUCTURES.items() if structure.refused]


def simulate(structure: Structure, *, killed: bool = False) -> tuple[FleetResult, list[str]]:
    """Return the result of a run of one agent, and its events."""
    faults = [{"kind": "trainer", "service": "a1", "after_s": KILLED_S}]
    settings = parse(SimSettings, {"step_s": 1.0, "faults": faults if killed else []}, "sim")
    spec = parse(RunSpec, {**structure.spec, "stop": {"versions": PERIODS}})
    events: list[str] = []

    def follow(subject: str, data: bytes) -> None:
        if ".events." in subject:
            events.append(json.loads(data)["text"])

    return run_fleet(spec, settings, follow=follow), events


@pytest.mark.parametrize("name", TRAINED)
def test_it_learns_what_a_plain_loop_learns_also_when_it_is_killed(name: str) -> None:
    structure = STRUCTURES[name]
    task, model = plain_loop(structure, PERIODS)
    expected = evaluate(task, model, task.dataset(Part.test(SEED)), 512, "cpu")["loss"]
    (steady, told), (killed, events) = simulate(structure), simulate(structure, killed=True)
    if structure.advised:
        assert any(structure.advised in text for text in told)
    else:
        assert steady.metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert killed.digest == steady.digest
    assert any("the training process died" in text for text in events)


def test_an_agent_that_is_killed_while_the_coordinator_is_away_has_saved_its_last_period() -> None:
    """Periods of 60 ms: all of them but the first one are too soon to be saved at their end."""
    spec = parse(RunSpec, {**STRUCTURES["own scheduler"].spec, "stop": {"versions": 40}})
    away = {"kind": "crash", "service": "coordinator", "after_s": 1.0, "for_s": 5.0}
    killed = {"kind": "trainer", "service": "a1", "after_s": 4.0}
    results = []
    for faults in ([away], [away, killed]):
        events: list[str] = []
        settings = parse(SimSettings, {"step_s": 0.01, "faults": faults}, "sim")

        def follow(subject: str, data: bytes, told: list[str] = events) -> None:
            told.append(f"{subject} {data!r}")

        result = run_fleet(spec, settings, follow=follow)
        results.append(result)
        assert any("the training process died" in text for text in events) == (killed in faults)
    assert results[0].digest == results[1].digest
    early = [commit for commit in results[0].commits if commit.time_s < 1.0]
    assert 1 < len(early) < 40, "the coordinator goes in the middle"


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name: str) -> None:
    structure = STRUCTURES[name]
    result, events = simulate(structure)
    assert result.phase == "failed" or not result.versions
    assert any(re.search(re.escape(structure.refused), text) for text in events)
