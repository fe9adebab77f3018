"""One run of the simulator, from its arguments to its outcome: builds the world, lets it play, and has its end looked at.

It brings together what a `World` does not choose for itself: the order of tasks, the weather, who computes, and the
invariants that everything which happens is held against.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from syncline_sim.children import StubChildren, TaskChildren
from syncline_sim.conserved import lost_or_doubled
from syncline_sim.dice import Dice
from syncline_sim.faults import Faults, Weather
from syncline_sim.guard import guarded, quiet
from syncline_sim.invariants import Invariants
from syncline_sim.loop import VirtualLoop
from syncline_sim.scene import Outcome, Scene
from syncline_sim.world import Stage, World


def simulate(scene: Scene, faults: Faults | None = None, seed: int = 0, *, longest_s: float = 240.0) -> Outcome:
    """One run from submit to end. Deterministic: the same arguments give the same outcome, byte for byte."""
    order = Dice(f"{seed} order") if scene.shuffled else None
    loop = VirtualLoop(order, longest_s=longest_s)
    weather = Weather(Dice(f"{seed} network"), scene.longest_delay_s)
    books, faults = Invariants(scene.spec), faults or Faults()
    with tempfile.TemporaryDirectory() as disk, guarded(), quiet():
        stub = scene.children == "stub"
        children = StubChildren(scene) if stub else TaskChildren(scene, Path(disk), loop.time)
        try:
            outcome = World(scene, faults, seed, loop, Stage(children, weather, books)).play()
        finally:
            loop.close()
    if isinstance(children, StubChildren) and not outcome.problems:
        wrong = tuple(lost_or_doubled(scene, faults, children, books))
        outcome = replace(outcome, problems=wrong, timeline=(*outcome.timeline, *wrong))
    return outcome
