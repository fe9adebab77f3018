"""Random runs: a seed determines the settings, the fleet, the network and the faults of a run. A failing one is reduced."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from syncline.averaging.merge import CentredClip, Krum, Median, MultiKrum, NormClip, TrimmedMean
from syncline.averaging.outer import Adagrad, Adam, DelayedNesterov, Momentum, Nesterov, Yogi
from syncline.spec.run_spec import RunSpec, parse
from syncline.spec.sections import Async
from syncline.wire.chunks import LEAST_PAYLOAD_BYTES
from syncline.wire.subjects import COORDINATOR
from syncline_sim.faults import Faults, shrunk
from syncline_sim.rng import Rng
from syncline_sim.scenario import Outcome, Scenario, small_spec
from syncline_sim.simulate import simulate

OUTER_OPTIMIZERS = (
    Momentum(lr=0.5),
    Nesterov(),
    DelayedNesterov(every=2),
    Adam(lr=0.5),
    Yogi(lr=0.5),
    Adagrad(lr=0.5),
)
MERGE_RULES = (  # without the geometric median, whose reference formula converges to fewer digits than are compared
    NormClip(max_norm=2.0),
    CentredClip(tau=1.0),
    Median(),
    TrimmedMean(trim=1),
    Krum(f=1),
    MultiKrum(f=0, m=3),
)


@dataclass(frozen=True, slots=True)
class Failure:
    """A failing run, reduced to the faults that it needs."""

    seed: int
    scenario: Scenario
    faults: Faults
    outcome: Outcome

    def __str__(self) -> str:
        spec = self.scenario.spec
        faults = "\n".join(f"  {fault}" for fault in self.faults.items) or "  none"
        return (
            f"seed {self.seed}: {self.outcome.problems[0]}\n"
            f"sync: {spec.sync.model_dump(exclude_defaults=True)}, mix: {spec.mix.kind} {spec.mix.alpha}, "
            f"agents: {spec.agents}, outer: {spec.outer!r}, merge: {spec.merge!r}, "
            f"periods: {self.scenario.period_s} s, starts: {self.scenario.starts_s} s, "
            f"delays up to {self.scenario.longest_delay_s} s, shuffled: {self.scenario.shuffled}, "
            f"max_payload: {self.scenario.max_payload}\n"
            f"faults:\n{faults}\n" + "\n".join(self.outcome.timeline)
        )


def scenario_of(seed: int) -> Scenario:
    """Return the run, the fleet and the network of a seed."""
    rng = Rng(f"{seed} scene")
    count = rng.choice((1, 2, 3, 4, 4, 5))
    agents = tuple(f"a{i}" for i in range(1, count + 1))
    least = count if rng.random() < 0.7 else rng.between(1, count)
    sync: dict[str, Any] = {"kind": "rounds"}
    if rng.random() < 0.4:
        sync["quorum"] = rng.between(1, least)
        sync["grace_s"] = rng.choice((None, 0.0, 0.05, 0.5))
    if rng.random() < 0.2:
        sync["sample"] = rng.choice((0.3, 0.5, 0.8))
    spec = small_spec(
        agents={"min": least, "lost_after_s": rng.choice((0.6, 2.0, 10.0))},
        sync=sync,
        mix={"alpha": rng.choice((1.0, 1.0, 0.5, 0.0))},
        merge={"weights": rng.choice(("uniform", "samples"))},
        stop={"versions": rng.between(2, 5)},
        task_options={"elements": rng.choice((4, 4, 4, 2500))},
        evaluate={"center": rng.random() < 0.2},
        keep_models=rng.choice((2, 2, 3)),
        seed=seed,
    )
    more = Rng(f"{seed} outer")
    if more.random() < 0.3:
        spec = spec.model_copy(update={"outer": more.choice(OUTER_OPTIMIZERS)})
    rules = [rule for rule in MERGE_RULES if rule.min_updates() <= min(least, sync.get("quorum", least))]
    if more.random() < 0.3:
        spec = spec.model_copy(update={"merge": more.choice(rules)})
    spec = _asynchronous_or_elastic(seed, spec)
    if Rng(f"{seed} pieces").random() < 0.1:  # a model of several chunks
        wire = spec.wire.model_copy(update={"chunk_bytes": 4096})
        spec = spec.model_copy(update={"wire": wire, "task_options": {"elements": 2500}})
    if Rng(f"{seed} diverges").random() < 0.15:
        spec = spec.model_copy(update={"task_options": {**spec.task_options, "diverges": True}})
    period_s = tuple(round(0.01 * 100 ** rng.random(), 3) for _ in agents)
    starts_s = tuple(0.0 if rng.random() < 0.7 else round(rng.uniform(0.0, 3.0), 3) for _ in agents)
    scenario = Scenario(spec, agents, period_s, starts_s, rng.choice((0.0, 0.002, 0.05)), rng.random() < 0.5)
    if Rng(f"{seed} payload").random() < 0.15:
        scenario = replace(scenario, max_payload=LEAST_PAYLOAD_BYTES)
    return scenario


def _asynchronous_or_elastic(seed: int, spec: RunSpec) -> RunSpec:
    """Make the spec asynchronous, elastic or both, for half of the seeds; return that of the others unchanged."""
    rng = Rng(f"{seed} kind")
    if rng.random() < 0.5:
        return spec
    is_async, elastic = rng.choice(((True, False), (True, False), (True, True), (False, True)))
    changes: dict[str, Any] = {"mix": {"alpha": 1.0}, "stop": {"versions": rng.between(2, 12)}}
    if rng.random() < 0.15:  # sending takes long beside a period
        changes |= {"wire": {"window": 1, "chunk_bytes": 4096}, "task_options": {"elements": 2500}}
    if is_async:
        changes["sync"] = _async(rng, spec.agents.min)
        sync = parse(Async, changes["sync"])
        sizes = (sync.buffer_size(spec.agents.min), sync.quorum)
        held_up = sync.max_ahead is not None and sizes[0] is not None and spec.merge.min_updates() > 1
        if held_up or any(size is not None and size < spec.merge.min_updates() for size in sizes):
            changes["merge"] = {"weights": "uniform"}
    if is_async and not elastic:
        changes["sync"]["staleness"] = rng.choice((None, {"kind": "constant"}, {"kind": "hinge", "a": 2.0, "b": 1}))
    if elastic or spec.outer.kind == "nesterov":
        changes["outer"] = {"kind": "sgd"}
    if elastic:
        changes["mix"] = {"kind": "elastic", "alpha": rng.choice((0.05, 0.2, 0.3))}
        changes["merge"] = {"weights": "uniform"}
    return parse(RunSpec, {**spec.model_dump(mode="json"), **changes})


def _async(rng: Rng, agents: int) -> dict[str, Any]:
    buffer, max_ahead = rng.choice((None, 1, 2, 3, 6, "all")), rng.choice((None, None, 0, 1, 3))
    sync: dict[str, Any] = {
        "kind": "async",
        "buffer": None if max_ahead == 0 else buffer,
        "max_ahead": max_ahead,
        "max_lag": rng.choice((None, 0, 1, 3)),
        "overlap": rng.random() < 0.7,
    }
    if rng.random() < 0.3:
        most = min(agents, parse(Async, sync).buffer_size(agents) or agents)
        sync |= {"quorum": rng.between(1, most), "grace_s": rng.choice((None, 0.0, 0.05, 0.5))}
    return sync


def faults_of(seed: int, scenario: Scenario) -> Faults:
    """Return the schedule of faults of a seed."""
    faults = Faults.random(Rng(f"{seed} faults"), (COORDINATOR, *scenario.agents))
    step = Rng(f"{seed} step")
    if step.random() < 0.2:
        at_s, for_s = round(step.uniform(0.6, 3.0), 3), _duration_s(step, 20.0)
        faults = faults.long_step(step.choice(scenario.agents), after_s=at_s, for_s=for_s)
    power = Rng(f"{seed} power")
    if power.random() < 0.15:
        at_s = round(power.uniform(0.4, 4.0), 3)
        lost_s, for_s = _duration_s(power, 3.0), _duration_s(power)
        faults = faults.roll_back(after_s=at_s, lost_s=lost_s, for_s=for_s, torn=power.random() < 0.3)
        rng = Rng(f"{seed} meanwhile")
        if rng.random() < 0.33:
            faults = _with_service_failures(rng, scenario, faults, at_s)
            if rng.random() < 0.5:
                again_s = round(at_s + for_s + rng.uniform(0.05, 2.0), 3)
                torn = rng.random() < 0.2
                faults = faults.roll_back(after_s=again_s, lost_s=_duration_s(rng), for_s=_duration_s(rng), torn=torn)
    return faults


def _with_service_failures(rng: Rng, scenario: Scenario, faults: Faults, at_s: float) -> Faults:
    """Return the schedule with failures of services at about the time of a power failure."""

    def near_s() -> float:
        return round(max(0.3, at_s + rng.uniform(-0.3, 0.3)), 3)

    if rng.random() < 0.5:
        faults = faults.down(COORDINATOR, after_s=near_s(), for_s=_duration_s(rng))
    if rng.random() < 0.4:
        faults = faults.cut(rng.choice((COORDINATOR, *scenario.agents)), after_s=near_s(), for_s=_duration_s(rng))
    if rng.random() < 0.3:
        faults = faults.zombie(after_s=near_s(), for_s=_duration_s(rng), awake_s=rng.choice((0.2, 1.0, 5.0)))
    if rng.random() < 0.3:
        agent, disk = rng.choice(scenario.agents), rng.random() < 0.7
        faults = faults.down(agent, after_s=near_s(), for_s=_duration_s(rng), disk=disk)
    return faults


def _duration_s(rng: Rng, most_s: float = 2.0) -> float:
    """Return a log-uniform duration between 20 ms and `most_s`."""
    return round(0.02 * math.pow(most_s / 0.02, rng.random()), 3)


def run_seed(seed: int) -> Outcome:
    """Simulate the run of a seed."""
    scenario = scenario_of(seed)
    return simulate(scenario, faults_of(seed, scenario), seed)


def explain(seed: int) -> Failure | None:
    """Return the failure of a seed, with as few faults as it needs; None if the run does not fail."""
    scenario = scenario_of(seed)
    faults = faults_of(seed, scenario)
    first = _kind(simulate(scenario, faults, seed))
    if not first:
        return None
    if scenario.shuffled and _kind(simulate(replace(scenario, shuffled=False), faults, seed)) == first:
        scenario = replace(scenario, shuffled=False)
    smallest = shrunk(faults, lambda fewer: _kind(simulate(scenario, fewer, seed)) == first)
    return Failure(seed, scenario, smallest, simulate(scenario, smallest, seed))


def _kind(outcome: Outcome) -> str:
    """Return the first problem without names and numbers: a reduced schedule must fail with the same one."""
    return re.sub(r"[0-9].*|^[a-z0-9]+'s ", "", outcome.problems[0]) if outcome.failed else ""


def failing(seeds: Iterable[int]) -> list[tuple[int, str]]:
    """Return the failing seeds, each with its first problem."""
    outcomes = ((seed, run_seed(seed)) for seed in seeds)
    return [(seed, outcome.problems[0]) for seed, outcome in outcomes if outcome.failed]
