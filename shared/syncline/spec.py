"""What a run is: the frozen settings that a user writes as YAML. Knows no bus, no torch and no file but the one it reads.

Everything but `task` has a default. A setting that does not exist, is out of range or has no meaning beside another is
refused here, before anything starts, with the setting, its value and the mend.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, ValidationError, model_validator

from syncline.engine.outer import OUTERS, Outer, Sgd
from syncline.errors import ConfigError
from syncline.explain import explain
from syncline.settings import Settings, one_of
from syncline.wire.subjects import checked_name

SPEC_VERSION = 1

if TYPE_CHECKING:
    OuterOptimizer = Outer
else:
    OuterOptimizer = one_of(OUTERS, "kind", "sgd")


class Agents(Settings):
    """Who takes part."""

    min: int = Field(1, ge=1, le=100_000, description="The run starts when this many agents have joined.")
    max: int | None = Field(None, ge=1, le=100_000, description="Agents beyond this many wait for another run.")
    lost_after_s: float = Field(
        10.0, ge=0.5, le=86_400, description="An agent not heard of, or without a training step, for so long is lost."
    )


class _Partition(Settings):
    column: str = Field("label", description="The column of the data set that decides; `iid` ignores it.")
    seed: int | None = Field(None, ge=0, description="Seed of the split; default: the run's seed.")
    parts: int | None = Field(
        None, ge=1, le=100_000, description="Number of parts; default: one per agent of the roster."
    )


class Iid(_Partition):
    """Every part is a random sample of the whole."""

    kind: Literal["iid"] = "iid"


class Dirichlet(_Partition):
    """Each label is dealt out by proportions from Dir(alpha): small alpha, few labels a part (arXiv:1909.06335)."""

    kind: Literal["dirichlet"]
    alpha: float = Field(0.5, gt=0, le=1e6)


class Shards(_Partition):
    """Rows sorted by label are cut in shards, `per_agent` for each part (McMahan et al., arXiv:1602.05629)."""

    kind: Literal["shards"]
    per_agent: int = Field(2, ge=1, le=10_000)


class Natural(_Partition):
    """Rows with the same value of the column stay together: a speaker, a device, a role."""

    kind: Literal["natural"]


Partition = Annotated[Iid | Dirichlet | Shards | Natural, Field(discriminator="kind")]


class Rounds(Settings):
    """Synchronous rounds: every participant trains from the same version, then all are merged."""

    kind: Literal["rounds"] = "rounds"
    quorum: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        "all", description="Updates after which the grace period starts; `all`: wait for every live participant."
    )
    grace_s: float | None = Field(
        None, ge=0, le=86_400, description="Wait for the rest after the quorum; default: the median round."
    )
    sample: float | None = Field(None, gt=0, le=1, description="Share of the live agents drawn for each round.")


class Optimizer(Settings):
    """The agents' optimiser: a name of torch.optim and its keyword arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    kind: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"] = "sgd"
    lr: float = Field(0.1, ge=0)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"lr": self.lr, **(self.model_extra or {})}


class Local(Settings):
    """What an agent does between two syncs."""

    steps: int | None = Field(None, ge=0, le=100_000_000, description="Local steps a period; default 20.")
    epochs: int | None = Field(None, ge=1, le=100_000, description="Passes over the agent's own part instead of steps.")
    batch_size: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        32, description="Rows a step; `all`: the agent's whole part."
    )
    optimizer: Optimizer = Optimizer()

    @model_validator(mode="after")
    def _one_measure(self) -> Local:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("both steps and epochs are given; leave one out")
        return self

    def steps_for(self, rows: int) -> int:
        """Local steps of one period over a part of `rows` rows."""
        if self.epochs is None:
            return 20 if self.steps is None else self.steps
        batch = rows if self.batch_size == "all" else self.batch_size
        return self.epochs * -(-rows // max(1, batch))


class Merge(Settings):
    """Many updates become one."""

    rule: Literal["mean"] = "mean"
    weights: Literal["uniform", "samples", "steps"] = Field(
        "uniform",
        description="uniform: W = (1/N) Σ W_i; samples: weighted by the rows of each agent's part; steps: by its local steps.",
    )
    normalize: Literal["fednova"] | None = Field(
        None, description="fednova: each update counts as if all agents had made the same number of local steps."
    )


class Mix(Settings):
    """What an agent does with the new center: W_i ← W_i + alpha (W − W_i)."""

    alpha: float = Field(1.0, ge=0, lt=2, description="1: take over the center; 0: every agent alone; stable below 2.")


class Wire(Settings):
    chunk_bytes: int | None = Field(
        None, ge=4096, le=64 << 20, description="Tensor bytes a message; default: what the broker's max_payload allows."
    )
    window: int = Field(8, ge=1, le=64, description="Chunks under way at once in each transfer.")


class Evaluate(Settings):
    """Held-out evaluation. It never holds up merging: a version that comes while one is evaluated is skipped."""

    center: bool = Field(True, description="The coordinator evaluates the center.")
    agents: bool = Field(False, description="Every agent evaluates its own W_i after each period.")


class Target(Settings):
    metric: str = "accuracy"
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Target:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give either at_least or at_most")
        return self

    def reached(self, value: float) -> bool:
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


class Stop(Settings):
    versions: int = Field(100, ge=1, le=1_000_000_000, description="Commits after which the run is done.")
    target: Target | None = None


class RunSpec(Settings):
    """One training job. The same spec, seed and agents give the same model, bit for bit, in synchronous runs."""

    v: int = SPEC_VERSION
    name: str = "run"
    task: str = Field(
        description="`package.module:Class` or `path/to/my_task.py:Class`, loaded from each agent's disk."
    )
    task_options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the task's class.")
    agents: Agents = Agents()
    partition: Partition = Iid()
    sync: Rounds = Rounds()
    local: Local = Local()
    merge: Merge = Merge()
    outer: OuterOptimizer = Sgd()
    mix: Mix = Mix()
    wire: Wire = Wire()
    evaluate: Evaluate = Evaluate()
    stop: Stop = Stop()
    keep_models: int = Field(2, ge=2, le=1000, description="Versions of the center that stay on the bus.")
    seed: int = Field(0, ge=0, lt=1 << 63)

    @model_validator(mode="before")
    @classmethod
    def _known_version(cls, data: Any) -> Any:
        version = data.get("v", SPEC_VERSION) if isinstance(data, dict) else SPEC_VERSION
        if not isinstance(version, int) or version < 1:
            raise ConfigError("v", f"{version!r} is not a spec version", f"Use {SPEC_VERSION}")
        if version > SPEC_VERSION:
            raise ConfigError(
                "v",
                f"the spec has version {version}, this Syncline reads up to {SPEC_VERSION}",
                "Upgrade Syncline here, or write the spec for the older version",
            )
        return data

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        checked_name("name", self.name)
        module, _, attribute = self.task.rpartition(":")
        if not module or not attribute.isidentifier():
            raise ConfigError(
                "task", f"{self.task!r} names no class", "Write `package.module:Class` or `file.py:Class`"
            )
        if self.agents.max is not None and self.agents.max < self.agents.min:
            raise ConfigError(
                "agents.max", f"{self.agents.max} is below agents.min = {self.agents.min}", "Raise it or leave it out"
            )
        if isinstance(self.sync.quorum, int) and self.sync.quorum > self.agents.min:
            raise ConfigError(
                "sync.quorum",
                f"{self.sync.quorum} is above the number of agents the run starts with (agents.min = {self.agents.min})",
                f"Use at most {self.agents.min}, or `all`, or raise agents.min",
            )
        if self.partition.parts is not None and self.partition.parts < self.agents.min:
            raise ConfigError(
                "partition.parts",
                f"{self.partition.parts} parts are too few for agents.min = {self.agents.min}",
                "Every agent needs a part of its own: raise it or leave it out",
            )
        if self.merge.normalize is not None and self.mix.alpha != 1:
            raise ConfigError(
                "merge.normalize",
                f"fednova divides what a period has changed by its steps, and with mix.alpha = {self.mix.alpha} an update "
                "holds more than that",
                "Leave mix.alpha at 1, or leave merge.normalize out",
            )
        return self

    @property
    def states(self) -> int:
        """Flat vectors of the model's size that the coordinator keeps beside the center."""
        return self.outer.states

    @property
    def warnings(self) -> list[str]:
        """Settings that are allowed and rarely meant, in plain words with the mend."""
        found = []
        if self.mix.alpha > 1:
            found.append(f"mix.alpha: {self.mix.alpha} over-relaxes: agents jump past the center. Up to 1 is monotone")
        if self.mix.alpha == 0 and self.agents.min > 1:
            found.append("mix.alpha: 0 trains every agent alone; the center is only watched. Use more than 0 to share")
        return found


S = TypeVar("S", bound=Settings)


def parse(model: type[S], data: Any) -> S:
    """Validated settings, or one ConfigError that lists everything wrong."""
    if not isinstance(data, dict):
        raise ConfigError("spec", f"is a {type(data).__name__}, not a mapping", "Start with a line like `task: …`")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [explain(model, item) for item in error.errors()]
        first = problems[0]
        rest = "".join(f"\n{p}" for p in problems[1:])
        raise ConfigError(first.setting, first.problem, first.mend + rest) from None


def load_spec(path: Path, **overrides: Any) -> RunSpec:
    """The spec in a YAML file; `overrides` replace top-level settings."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError("spec", f"{path}: {error.strerror}", "Name a YAML file that you can read") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("spec", f"{path} is not YAML: {error}", "Mend the line it names") from None
    if isinstance(data, dict):
        data = {**data, **overrides}
    return parse(RunSpec, data)
