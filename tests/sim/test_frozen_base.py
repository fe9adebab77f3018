"""An agent with different frozen tensors is named, and the others train without that agent."""

from __future__ import annotations

from pathlib import Path

from syncline.spec.run_spec import RunSpec, parse
from syncline_sim.fleet import run_fleet
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


def test_an_agent_with_another_frozen_base_is_named_and_takes_no_part(tmp_path: Path) -> None:
    """The coordinator makes the model twice, then each of three agents: the base of the last one differs."""
    (tmp_path / "task.py").write_text(COUNTED)
    spec = {
        "task": f"{tmp_path}/task.py:Based",
        "agents": {"min": 2},
        "local": {"steps": 5},
        "stop": {"versions": VERSIONS},
    }
    result = run_fleet(parse(RunSpec, spec), parse(SimSettings, {"agents": 3, "longest_s": 300.0}, "sim"))
    merged = {agent.agent: agent.merged for agent in result.agents}
    (odd,) = [agent for agent, count in merged.items() if not count]
    assert result.phase == "done" and sorted(merged.values()) == [0, VERSIONS, VERSIONS]
    (refused,) = [text for _, text in result.warnings if "cannot train" in text]
    problem = f"{odd} cannot train: task: the model's base does not travel and differs from the coordinator's"
    assert refused.startswith(problem) and "`shared`" in refused
