"""Training structures in whole simulated runs: what is averaged, what is refused, and who is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from structures.registry import STRUCTURES, plain_loop
from syncline.data.partition import Part
from syncline.spec import RunSpec, parse
from syncline.tasks.base import evaluate
from syncline_sim.fleet import FleetResult, run_fleet
from syncline_sim.settings import SimSettings

VERSIONS = 3
COUNTED = """
import torch
from pathlib import Path
from syncline.tasks.quadratic import LinearRegression

MADE = Path(__file__).with_name("made")  # a byte for each model

class Based(LinearRegression):
    def model(self):
        with MADE.open("ab") as made:
            made.write(b".")
        head, base = super().model(), 1.5 if MADE.stat().st_size < 5 else 1.25
        head.register_parameter("base", torch.nn.Parameter(torch.full((5,), base).double(), requires_grad=False))
        return head
"""


def run(spec: dict[str, Any], agents: int = 1) -> FleetResult:
    settings = parse(SimSettings, {"agents": agents, "longest_s": 300.0}, "sim")
    return run_fleet(parse(RunSpec, {"name": "r", "stop": {"versions": VERSIONS}, **spec}), settings)


@pytest.mark.parametrize("name", [n for n, s in STRUCTURES.items() if not s.refused and not s.advised])
def test_a_fleet_of_one_learns_what_a_plain_loop_learns(name: str) -> None:
    structure = STRUCTURES[name]
    result = run(structure.spec)
    task, model = plain_loop(structure, VERSIONS)
    wanted = evaluate(structure.load(), model, task.dataset(Part.test(structure.spec["seed"])), 512, "cpu")
    assert result.phase == "done" and result.metrics["loss"] == pytest.approx(wanted["loss"], abs=1e-5)


@pytest.mark.parametrize("name", [n for n, s in STRUCTURES.items() if s.refused])
def test_a_refusal_ends_the_run_and_is_told(name: str) -> None:
    structure = STRUCTURES[name]
    result = run(structure.spec)
    assert result.phase == "failed" and structure.refused in result.reason


def test_an_agent_with_another_frozen_base_is_named_and_takes_no_part(tmp_path: Path) -> None:
    """The coordinator makes the model twice, then each of three agents: the base of the last one differs."""
    (tmp_path / "task.py").write_text(COUNTED)
    spec = {"task": f"{tmp_path}/task.py:Based", "agents": {"min": 2}, "local": {"steps": 5}}
    result = run(spec, agents=3)
    merged = {agent.agent: agent.merged for agent in result.agents}
    (odd,) = [agent for agent, count in merged.items() if not count]
    assert result.phase == "done" and sorted(merged.values()) == [0, VERSIONS, VERSIONS]
    (refused,) = [text for _, text in result.warnings if "cannot train" in text]
    problem = f"{odd} cannot train: task: the model's base does not travel and differs from the coordinator's"
    assert refused.startswith(problem) and "`shared`" in refused
