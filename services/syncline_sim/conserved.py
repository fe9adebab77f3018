"""Elastic averaging: what an agent gave up, the center has taken up, and nothing else. Looked at when a run is over."""

from __future__ import annotations

import numpy as np

from syncline_sim.children import StubChildren
from syncline_sim.faults import Crash, Down, Faults, RollBack, Twin
from syncline_sim.inline import StubState
from syncline_sim.invariants import Invariants
from syncline_sim.scene import Scene

CLOSE = 1e-9


def lost_or_doubled(scene: Scene, faults: Faults, children: StubChildren, books: Invariants) -> list[str]:
    """What is wrong with an agent's W_i: it began somewhere, training moved it, and it gave up what was merged.

    Of agents that lost their disk, or that two processes were at once, nothing of the kind can be said; nor where the broker
    lost what was merged.
    """
    if scene.spec.mix.kind != "elastic" or any(isinstance(f, RollBack) for f in faults.items):
        return []
    unclear = {f.service for f in faults.items if isinstance(f, Twin) or (isinstance(f, Crash | Down) and not f.disk)}
    kept = {agent: children.kept(scene.spec.name, agent) for agent in scene.agents if agent not in unclear}
    return [p for agent, state in kept.items() if state is not None for p in _wrong(agent, state, books)]


def _wrong(agent: str, state: StubState, books: Invariants) -> list[str]:
    given = np.frombuffer(state.trained) - np.frombuffer(state.own)
    taken = sum(map(np.frombuffer, state.pending.values()), np.zeros_like(given))
    for (who, clock), update in books.taken.items():
        if who == agent and clock <= state.clock and clock not in state.pending:
            taken = taken + update
    apart = float(np.abs(given - taken).max(initial=0.0))
    return [f"{agent} gave up {apart:.3g} more or less than was merged of it"] if apart > CLOSE else []
