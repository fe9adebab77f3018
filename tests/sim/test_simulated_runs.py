"""Whole runs of the real services on the memory bus: their results, and that a run can be repeated exactly."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from syncline.runtime.child import ChildDied
from syncline.runtime.child_messages import Question, TrainPeriod
from syncline.spec.run_spec import RunSpec
from syncline.wire.chunks import LEAST_PAYLOAD_BYTES
from syncline_agent.child_supervisor import CRASHES_IN_A_ROW
from syncline_sim.faults import Faults
from syncline_sim.inline_children import InlineChild
from syncline_sim.scenario import Outcome, Scenario, small_spec
from syncline_sim.seeds import faults_of, scenario_of
from syncline_sim.simulate import simulate

FAULTY = Faults().crash("coordinator", at_op=100).cut("a2", after_s=0.7, for_s=3).kill_trainer("a1", after_s=0.9)
SCENARIOS = {
    "undisturbed": (Scenario(small_spec()), Faults()),
    "faulty": (Scenario(small_spec()), FAULTY),
    "shuffled": (replace(Scenario(small_spec()), shuffled=True), FAULTY),
}
PRINT = """
from syncline_sim.seeds import run_seed
for seed in (3, 5, 8):
    outcome = run_seed(seed)
    print(outcome.trace)
    print(*outcome.timeline, sep="\\n")
"""


def regression(**changes: Any) -> RunSpec:
    base = {"task": "syncline.tasks.quadratic:LinearRegression", "local": {"steps": 3, "batch_size": 8}}
    return small_spec(**{**base, **changes})


def fine(outcome: Outcome) -> Outcome:
    assert not outcome.problems, "\n".join([*outcome.problems, *outcome.timeline])
    return outcome


def test_an_undisturbed_run_merges_everybody_in_every_version() -> None:
    outcome = fine(simulate(Scenario(small_spec())))
    assert outcome.merged == (("a1", "a2", "a3", "a4"),) * 6
    assert outcome.head is not None and outcome.head.term == 1 and outcome.seconds < 5


def test_a_run_over_a_broker_of_the_least_payload_cuts_its_records_to_fit() -> None:
    names = tuple(f"a{i:03}-{'x' * 55}" for i in range(150))
    spec = small_spec(agents={"min": 150, "lost_after_s": 60.0}, stop={"versions": 2}, task_options={"elements": 2500})
    outcome = fine(simulate(Scenario(spec, names, max_payload=LEAST_PAYLOAD_BYTES)))
    assert outcome.merged == (names,) * 2
    assert outcome.head is not None and outcome.head.roster is not None
    assert outcome.head.roster.size > LEAST_PAYLOAD_BYTES / 2 and outcome.head.roster.chunks > 1


def test_a_broker_whose_messages_are_too_small_is_named_at_submit() -> None:
    outcome = simulate(Scenario(small_spec(), max_payload=LEAST_PAYLOAD_BYTES - 1))
    assert "max_payload" in outcome.problems[0] and f"a run needs {LEAST_PAYLOAD_BYTES}" in outcome.problems[0]


def test_an_agent_that_is_one_too_many_asks_every_few_seconds_and_not_after_every_version() -> None:
    spec = small_spec(agents={"min": 4, "max": 4}, stop={"versions": 100})
    outcome = fine(simulate(Scenario(spec, agents=("a1", "a2", "a3", "a4", "a5"))))
    spare = min(count for service, count in outcome.operations.items() if service != "coordinator")
    assert 3 <= spare <= 5 + outcome.seconds, "a subscription, and a question each three seconds"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_same_arguments_give_the_same_timeline_byte_for_byte(scenario: str) -> None:
    first, second = (simulate(*SCENARIOS[scenario], seed=7) for _ in range(2))
    assert first == second
    other = simulate(*SCENARIOS[scenario], seed=8)
    assert other.trace != first.trace


def test_another_process_with_other_hashes_gives_the_same_timelines() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-c", PRINT], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] and len(told[0]) > 1000


def test_a_seed_is_a_scene_and_its_faults() -> None:
    assert scenario_of(5) == scenario_of(5) and faults_of(5, scenario_of(5)) == faults_of(5, scenario_of(5))
    assert len({str(scenario_of(seed)) for seed in range(50)}) == 50


def test_the_order_of_ready_callbacks_and_the_delays_change_no_bit_of_a_synchronous_run() -> None:
    scenario = Scenario(small_spec(), longest_delay_s=0.02, shuffled=True)
    digests = {fine(simulate(scenario, seed=seed)).head.digest for seed in range(10)}  # type: ignore[union-attr]
    assert len(digests) == 1


def test_the_real_trainer_gives_one_digest_however_the_run_is_disturbed() -> None:
    scenario = Scenario(regression(evaluate={"center": True}), children="real")
    calm = fine(simulate(scenario)).head
    for seed in range(3):
        disturbed = fine(simulate(scenario, Faults().crash("coordinator", at_op=90 + 10 * seed), seed=seed)).head
        assert calm is not None and disturbed is not None and disturbed.digest == calm.digest and disturbed.term == 2


@pytest.mark.parametrize("seed", range(3))
def test_max_ahead_zero_gives_the_digest_of_synchronous_rounds_however_the_run_is_disturbed(seed: int) -> None:
    rounds = fine(simulate(Scenario(regression(), children="real"))).head
    bounded = Scenario(regression(sync={"kind": "async", "max_ahead": 0}), children="real")
    found = fine(simulate(bounded, Faults().crash("coordinator", at_op=80 + 20 * seed), seed=seed)).head
    assert rounds is not None and found is not None and found.digest == rounds.digest and found.term == 2


def test_a_float32_model_and_alpha_below_one_run_too() -> None:
    spec = regression(task_options={"dtype": "float32"}, mix={"alpha": 0.5}, merge={"weights": "samples"})
    assert fine(simulate(Scenario(spec, children="real"))).merged == (("a1", "a2", "a3", "a4"),) * 6


def test_a_child_that_crashes_in_every_period_is_given_up_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    real, died = InlineChild._pass_time, []

    async def spend(self: InlineChild, question: Question[Any]) -> bool:
        if isinstance(question, TrainPeriod) and question.part == 3:
            died.append(question.clock)
            raise ChildDied("process was killed by SIGSEGV")
        return await real(self, question)

    monkeypatch.setattr(InlineChild, "_pass_time", spend)
    outcome = fine(simulate(Scenario(small_spec(agents={"min": 3, "lost_after_s": 2.0}))))
    sizes = [len(agents) for agents in outcome.merged]
    assert sizes[0] in (2, 3) and set(sizes[1:]) == {3}, "the round begins with three agents, of which this may be one"
    assert len(died) == CRASHES_IN_A_ROW


def test_a_child_that_is_killed_from_outside_again_and_again_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real = InlineChild._pass_time
    killed: list[Any] = []

    async def spend(self: InlineChild, question: Question[Any]) -> bool:
        if isinstance(question, TrainPeriod) and question.part == 3 and len(killed) < 6:
            killed.append(asyncio.get_running_loop().time())
            raise ChildDied("process was killed by SIGKILL", from_outside=True)
        return await real(self, question)

    monkeypatch.setattr(InlineChild, "_pass_time", spend)
    outcome = fine(simulate(Scenario(small_spec(agents={"min": 3, "lost_after_s": 2.0}, stop={"versions": 300}))))
    pauses = [b - a for a, b in itertools.pairwise(killed)]
    assert len(killed) == 6 and pauses[0] < 0.5 and pauses[-1] > 5.0 > 2 * pauses[1], "they grow"
    sizes = [len(agents) for agents in outcome.merged]
    assert 3 in sizes and sizes[-1] == 4, "the others go on meanwhile, and it takes part again"


def test_a_run_that_cannot_start_is_told_as_such() -> None:
    outcome = simulate(Scenario(small_spec(agents={"min": 3}), agents=("a1", "a2")), longest_s=60.0)
    assert "did not end" in outcome.problems[0]
    assert any("WRONG" in line for line in outcome.timeline)
