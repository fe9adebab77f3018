"""The settings of `syncline demo`: its flags, checked, and the specs of its two runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncline.errors import ConfigError
from syncline.spec.run_spec import RunSpec, parse

TASK = "syncline.tasks.digits:Digits"
MAX_AGENTS = 64
MAX_ROUNDS = 1_000_000
LOCAL_STEPS = 20
PRELOAD = ("torch._dynamo", "sklearn.datasets", "sklearn.model_selection", "syncline.tasks.digits")


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The options of `syncline demo`, checked."""

    agents: int = 4
    rounds: int = 40
    alpha: float = 1.0
    seed: int = 1
    port: int = 0
    directory: Path | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        _within("--agents", self.agents, 1, MAX_AGENTS)
        _within("--rounds", self.rounds, 1, MAX_ROUNDS)
        _within("--seed", self.seed, 0, 2**31)
        _within("--port", self.port, 0, 65535)
        if not 0 <= self.alpha < 2:
            hint = "Use at least 0 and less than 2: 1 takes over the shared model, 0 leaves every agent alone"
            raise ConfigError("--alpha", f"{self.alpha:g} is out of range", hint)

    def spec(self, name: str, **changes: Any) -> RunSpec:
        """Return the spec of the run of all agents; `changes` replace top-level settings."""
        settings = {
            "name": name,
            "task": TASK,
            "agents": {"min": self.agents},
            "partition": {"kind": "dirichlet", "alpha": 0.5},
            "local": {"steps": LOCAL_STEPS, "batch_size": 32, "optimizer": {"kind": "sgd", "lr": 0.2}},
            "mix": {"alpha": self.alpha},
            "stop": {"versions": self.rounds},
            "seed": self.seed,
        }
        return parse(RunSpec, {**settings, **changes})

    def spec_alone(self, name: str, agents: int) -> RunSpec:
        """Return the spec of the run in which each agent trains alone, for as many steps: mixing weight 0."""
        together = self.spec(name)
        return self.spec(
            name,
            agents={"min": agents, "lost_after_s": 60.0},
            local={**together.local.model_dump(), "steps": self.rounds * LOCAL_STEPS},
            mix={"alpha": 0.0},
            evaluate={"agents": True, "center": False},
            stop={"versions": 1},
        )


def _within(setting: str, value: int, low: int, high: int) -> None:
    """Raise ConfigError for a value outside low … high, both included."""
    if not low <= value <= high:
        raise ConfigError(setting, f"{value} is out of range", f"Use {low} to {high:,}")
