"""What a run is: the frozen settings that a user writes as YAML. Knows no bus, no torch and no file but the one it reads.

Everything but `task` has a default. A setting that does not exist, is out of range or has no meaning beside another is
refused here, before anything starts, with the setting, its value and the mend.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from syncline.errors import ConfigError
from syncline.wire.subjects import checked_name

SPEC_VERSION = 1
SIM_SECTION = "sim"  # of a spec's file: what a simulation of the run needs, and nobody else


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


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
    weights: Literal["uniform", "samples"] = Field(
        "uniform", description="uniform: W = (1/N) Σ W_i; samples: weighted by the rows of each agent's part."
    )


class Outer(Settings):
    """What the coordinator does with the merged update D: W ← W + lr · D."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(1.0, gt=0, le=100)


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
    every: int = Field(1, ge=1, description="… at every so many versions, and at the last one.")
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
    outer: Outer = Outer()
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
        return self

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


def parse(model: type[S], data: Any, section: str = "") -> S:
    """Validated settings, or one ConfigError that lists everything wrong. `section`: where in the spec they stand."""
    if not isinstance(data, dict):
        mend = f"Write settings under `{section}:`" if section else "Start with a line like `task: …`"
        raise ConfigError(section or "spec", f"is a {type(data).__name__}, not a mapping", mend)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(model, item, section) for item in error.errors()]
        first = problems[0]
        rest = "".join(f"\n{p}" for p in problems[1:])
        raise ConfigError(first.setting, first.problem, first.mend + rest) from None


def load_spec(path: Path, **overrides: Any) -> RunSpec:
    """The spec in a YAML file, without what it says of a simulation; `overrides` replace top-level settings."""
    data = read_yaml(path)
    if isinstance(data, dict):
        data = {**{name: value for name, value in data.items() if name != SIM_SECTION}, **overrides}
    return parse(RunSpec, data)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises ConfigError."""
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError("spec", f"{path}: {error.strerror}", "Name a YAML file that you can read") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("spec", f"{path} is not YAML: {error}", "Mend the line it names") from None


def _explain(model: type[BaseModel], item: Any, section: str = "") -> ConfigError:
    """Pydantic's finding in the words of the user: setting, value, mend."""
    kind, value, loc = item["type"], item.get("input"), [str(p) for p in item["loc"]]
    own = len(loc) - (kind == "extra_forbidden")  # the last name is the user's then, and may read like a tag
    tags = _UNION_TAGS | _kinds_in(model)
    path = [p for i, p in enumerate(loc) if i >= own or p not in tags]
    setting = ".".join([section, *path] if section else path) or "spec"
    if kind == "extra_forbidden":
        known = _settings_at(model, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        mend = f"Did you mean `{near[0]}`?" if near else f"Known here: {', '.join(known)}"
        return ConfigError(setting, "there is no such setting", mend)
    if kind == "missing":
        return ConfigError(setting, "is missing", "Add it")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        problem = "is missing" if kind == "union_tag_not_found" else f"{value.get('kind')!r} is not accepted"
        return ConfigError(f"{setting}.kind", problem, f"Use one of {', '.join(_kinds_at(model, path))}")
    if kind == "value_error":
        return ConfigError(setting, str(item["ctx"]["error"]), "")
    message = item["msg"][:1].lower() + item["msg"][1:]
    return ConfigError(setting, f"{value!r} is not accepted", message[:1].upper() + message[1:])


_UNION_TAGS = frozenset({"function-after", "literal['all']", "constrained-int"})


def _settings_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The names of the settings of a section, for «did you mean»."""
    beside = [SIM_SECTION] if model is RunSpec and not path else []
    return sorted({name for section in _sections_at(model, path) for name in section.model_fields} | {*beside})


def _kinds_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The values of `kind` that a section can have."""
    return [kind for section in _sections_at(model, path) for kind in get_args(section.model_fields["kind"].annotation)]


def _sections_at(model: type[BaseModel], path: list[str]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = [model]
    for name in (p for p in path if not p.isdigit()):
        found = [m for section in found if (f := section.model_fields.get(name)) for m in _models_in(f.annotation)]
    return found


def _kinds_in(model: type[BaseModel]) -> set[str]:
    """Every value of a `kind` below, which pydantic puts into the place of an error."""
    below = [m for field in model.model_fields.values() for m in _models_in(field.annotation)]
    here = [kind for m in below if (f := m.model_fields.get("kind")) for kind in get_args(f.annotation)]
    return {*here, *(kind for m in below for kind in _kinds_in(m))}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]
