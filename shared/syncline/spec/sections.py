"""The sections of a run's settings. Each setting is checked by itself here; `guardrails` checks them beside each other.

Everything but `task` has a default. The module imports no bus and no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from syncline.averaging.merge import RULES, Mean, Rule
from syncline.averaging.outer import OUTERS, Outer, Sgd
from syncline.averaging.staleness import STALENESS, Polynomial, Staleness
from syncline.local.duration import steps_in_pass
from syncline.settings import Settings, one_of, untagged
from syncline.transform.codecs import CODECS, RAW, Codec

SPEC_VERSION = 1
MOST_STEPS = 1_000_000  # of a local period that is given in seconds

if TYPE_CHECKING:
    MergeRule = Rule
    OuterOptimizer = Outer
    StalenessWeight = Staleness
    UpdateCodec = Codec
else:
    MergeRule = one_of(RULES, Rule, "rule", "mean", "syncline.merge_rules")
    OuterOptimizer = one_of(OUTERS, Outer, "kind", "sgd", "syncline.outer_optimizers")
    StalenessWeight = one_of(STALENESS, Staleness, "kind", "polynomial", "syncline.staleness_weights")
    UpdateCodec = one_of(CODECS, Codec, "kind", "raw", "syncline.codecs")


class Agents(Settings):
    """Who takes part."""

    min: int = Field(1, ge=1, le=100_000, description="The run starts when this many agents have joined.")
    max: int | None = Field(None, ge=1, le=100_000, description="Agents beyond this many wait for another run.")
    lost_after_s: float = Field(
        10.0,
        ge=0.5,
        le=86_400,
        description="An agent without heartbeats for so long is lost; one that sends them and makes no progress is slow.",
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
    """Each label is dealt out by proportions from Dir(alpha): small alpha, few labels a part (arXiv:1905.12022)."""

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


SLOWEST = 5  # how many times slower than the others an agent may be before a default `max_lag` drops its updates


class Async(Settings):
    """Asynchronous averaging: nobody waits for anybody; every `buffer` updates make a version (FedBuff, arXiv:2106.06639)."""

    kind: Literal["async"]
    buffer: Literal["all"] | Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None,
        description="Updates a version (K); 1 is FedAsync, `all` one of every live agent. Default: half of agents.min, at "
        "least 2, at most 10.",
    )
    max_lag: int | None = Field(
        None, ge=0, le=1_000_000, description="An update more versions old than this is never merged. Default: room for "
        "an agent five times slower than the others, 16 at least.",
    )  # fmt: skip
    max_ahead: int | None = Field(
        None, ge=0, le=1_000_000, description="Periods that an agent may be ahead of the slowest one's last judged one "
        "(stale synchronous parallel); 0 is the synchronous run. Default: no such bound.",
    )  # fmt: skip
    overlap: bool = Field(
        True,
        description="An agent sends an update while it trains the next period; else it waits until that is judged.",
    )
    staleness: StalenessWeight | None = Field(
        None, description="What an update of lag τ counts; default: 1/√(1 + τ), and 1 for elastic differences."
    )
    quorum: int | None = Field(
        None, ge=1, description="Updates after which the grace period starts; default: a buffer closes early only when "
        "nobody may run.",
    )  # fmt: skip
    grace_s: float | None = Field(
        None, ge=0, le=86_400, description="Wait for the rest after the quorum; default: the median time of a version."
    )

    def buffer_size(self, agents: int) -> int | None:
        """K of a run that starts with so many agents; None: as many as are live."""
        if self.buffer == "all" or self.max_ahead == 0:
            return None
        return self.buffer or min(10, max(2, -(-agents // 2)))

    @property
    def staleness_or_default(self) -> Staleness:
        return self.staleness or Polynomial()

    def lag_bound(self, agents: int) -> int:
        """`max_lag`, or room for a slow agent: its lag is about r (N − 1) / K where it is r times slower."""
        if self.max_lag is not None:
            return self.max_lag
        return max(16, 2 * SLOWEST * (agents - 1) // (self.buffer_size(agents) or agents))


Sync = Annotated[Rounds | Async, Field(discriminator="kind"), untagged("kind", "rounds")]


class Optimizer(Settings):
    """The agents' optimiser: a name of torch.optim, in upper or lower case, and its keyword arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    kind: str = Field("sgd", min_length=1, max_length=100, description="sgd, adam, adamw, rmsprop, muon, …")
    lr: float | None = Field(None, ge=0, description="Default: 0.1 for sgd, torch's own for the others.")

    @property
    def arguments(self) -> dict[str, Any]:
        lr = 0.1 if self.lr is None and self.kind.lower() == "sgd" else self.lr
        return {**({} if lr is None else {"lr": lr}), **_arguments(self)}


class Schedule(Settings):
    """How the agents' learning rate goes on: a name of torch.optim.lr_scheduler, and its keyword arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    kind: str = Field(min_length=1, max_length=100, description="step, cosine, exponential, linear, onecycle, …")
    per: Literal["period", "step"] = Field(
        "period", description="What the schedule counts: the agent's own local periods, or its optimiser's steps."
    )
    warmup: int = Field(
        0,
        ge=0,
        le=100_000_000,
        description="Before the schedule begins, the rate rises linearly over so many of these.",
    )

    @property
    def arguments(self) -> dict[str, Any]:
        return _arguments(self)


def _arguments(setting: Settings) -> dict[str, Any]:
    """Keyword arguments for torch, which wants pairs as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in (setting.model_extra or {}).items()}


def _by_name(section: Any) -> Any:
    """`name` for `{kind: name}`."""
    return {"kind": section} if isinstance(section, str) else section


class Scaffold(Settings):
    """Control variates against the drift of agents whose data differ (arXiv:1910.06378, algorithm 1).

    Each step goes along g − c_i + c, with c_i the agent's own control variate and c the mean of all. Agents keep theirs on
    disk, and updates and centers are twice as large.
    """

    kind: Literal["scaffold"] = "scaffold"
    option: Literal[1, 2] = Field(
        2, description="What becomes c_i. 2: the mean gradient of the period's steps; 1: the gradient of the agent's whole "
        "part where the period began, for one more pass over it."
    )  # fmt: skip


class Local(Settings):
    """What an agent does between two syncs."""

    steps: int | None = Field(None, ge=0, le=100_000_000, description="Local steps a period; default 20.")
    epochs: int | None = Field(None, ge=1, le=100_000, description="Passes over the agent's own part instead of steps.")
    seconds: float | None = Field(
        None, gt=0, le=86_400, description="As many steps as fit into so long, instead of steps; one at least."
    )
    max_steps: int | None = Field(
        None, ge=1, le=100_000_000, description="The most steps of a period of `seconds`; default a million."
    )
    batch_size: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        32, description="Rows a step; `all`: the agent's whole part."
    )
    optimizer: Optimizer = Optimizer()
    optimizer_state: Literal["keep", "reset"] = Field(
        "keep",
        description="What an optimiser has gathered (momentum, curvature) is kept from period to period, or not.",
    )
    schedule: Schedule | None = Field(None, description="Of the learning rate; default: it stays as it is.")
    clip_norm: float | None = Field(None, gt=0, description="The loss's gradient is clipped to this norm.")
    clip_value: float | None = Field(None, gt=0, description="Every element of it is clipped to ± this.")
    prox_mu: float = Field(0.0, ge=0, description="FedProx: pulls W_i to the center that was received last.")
    control_variates: Annotated[Scaffold | None, BeforeValidator(_by_name)] = Field(
        None, description="`scaffold`, against the drift of agents whose data differ."
    )

    @model_validator(mode="after")
    def _one_measure(self) -> Local:
        given = [name for name in ("steps", "epochs", "seconds") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"both {' and '.join(given)} are given; leave one out")
        if self.max_steps is not None and self.seconds is None:
            raise ValueError("max_steps bounds a period of `seconds`, which is not given; use `steps`")
        return self

    @property
    def sections(self) -> int:
        """Vectors of the model's size in every update and center."""
        return 1 if self.control_variates is None else 2

    def steps_for(self, rows: int) -> int:
        """Local steps of one period over a part of `rows` rows; the most of them where it is given in seconds."""
        if self.seconds is not None:
            return self.max_steps or MOST_STEPS
        if self.epochs is None:
            return 20 if self.steps is None else self.steps
        batch = rows if self.batch_size == "all" else self.batch_size
        return self.epochs * steps_in_pass(rows, max(1, batch))


class Mix(Settings):
    """How agents and center come together.

    `interpolate`: W_i ← W_i + alpha (W − W_i), with the new center. `elastic`: the center moves too, by the very
    differences d_i = alpha (W_i − W) that the agents give up: W_i ← W_i − d_i, W ← W + Σ d_i (EASGD, arXiv:1412.6651).
    """

    kind: Literal["interpolate", "elastic"] = "interpolate"
    alpha: float = Field(1.0, ge=0, lt=2, description="1: take over the center; 0: every agent alone; stable below 2.")


class Wire(Settings):
    chunk_bytes: int | None = Field(
        None, ge=4096, le=64 << 20, description="Tensor bytes a message; default: what the broker's max_payload allows."
    )
    window: int = Field(8, ge=1, le=64, description="Chunks under way at once in each transfer.")
    codec: Annotated[UpdateCodec, BeforeValidator(_by_name)] = Field(
        RAW, description="How agents code their updates. raw: the elements as they are."
    )


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


class RunSettings(Settings):
    """All settings of a run, each valid by itself. Use `RunSpec`, which also checks them beside each other."""

    v: int = SPEC_VERSION
    name: str = "run"
    task: str = Field(
        description="`package.module:Class` or `path/to/my_task.py:Class`, loaded from each agent's disk."
    )
    task_options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the task's class.")
    agents: Agents = Agents()
    partition: Partition = Iid()
    sync: Sync = Rounds()
    local: Local = Local()
    merge: MergeRule = Mean()
    outer: OuterOptimizer = Sgd()
    mix: Mix = Mix()
    wire: Wire = Wire()
    evaluate: Evaluate = Evaluate()
    stop: Stop = Stop()
    keep_models: int = Field(2, ge=2, le=1000, description="Versions of the center that stay on the bus.")
    seed: int = Field(0, ge=0, lt=1 << 63)

    @property
    def state_vectors(self) -> int:
        """Flat vectors of the model's size that the coordinator keeps beside the center."""
        return self.merge.state_vectors + self.outer.state_vectors
