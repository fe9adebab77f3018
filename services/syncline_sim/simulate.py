"""One simulated run, from its arguments to its outcome.

Chooses everything that a `Cluster` takes from outside: the order of tasks, the network, the children and the invariants.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from syncline_sim.child_factories import StubChildFactory, TaskChildFactory
from syncline_sim.cluster import Cluster, Environment
from syncline_sim.determinism import deterministic, logging_disabled
from syncline_sim.faults import Faults
from syncline_sim.invariants import Invariants, elastic_conservation_problems
from syncline_sim.loop import VirtualLoop
from syncline_sim.network import Network
from syncline_sim.rng import Rng
from syncline_sim.scenario import Outcome, Scenario


def simulate(scenario: Scenario, faults: Faults | None = None, seed: int = 0, *, longest_s: float = 240.0) -> Outcome:
    """Run a scenario from submit to end. The same arguments give the same outcome, byte for byte.

    Args:
        scenario: the fleet, the network and the run.
        faults: the schedule of faults; None: no fault.
        seed: of delays, of the order of callbacks and of everything that services draw.
        longest_s: virtual seconds after which a run that has not ended is a problem of the outcome.
    """
    order = Rng(f"{seed} order") if scenario.shuffled else None
    loop = VirtualLoop(order, longest_s=longest_s)
    network = Network(Rng(f"{seed} network"), scenario.longest_delay_s)
    invariants = Invariants(scenario.spec)
    faults = faults or Faults()
    with tempfile.TemporaryDirectory() as disk, deterministic(), logging_disabled():
        stub = scenario.children == "stub"
        children = StubChildFactory(scenario) if stub else TaskChildFactory(scenario, Path(disk), loop.time)
        try:
            outcome = Cluster(scenario, faults, seed, loop, Environment(children, network, invariants)).run()
        finally:
            loop.close()
    if isinstance(children, StubChildFactory) and not outcome.problems:
        problems = tuple(elastic_conservation_problems(scenario, faults, children, invariants))
        outcome = replace(outcome, problems=problems, timeline=(*outcome.timeline, *problems))
    return outcome
