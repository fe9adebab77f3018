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
MAX_STEPS = 1_000_000  # default bound of the steps of a local period that is given in seconds

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
    """The number of agents in the run, and the time after which a silent agent is lost."""

    min: int = Field(1, ge=1, le=100_000, description="Number of agents with which the run starts.")
    max: int | None = Field(
        None, ge=1, le=100_000, description="Largest number of agents; further ones wait for another run."
    )
    lost_after_s: float = Field(
        10.0,
        ge=0.5,
        le=86_400,
        description="An agent without heartbeats for this time is lost; one that sends heartbeats but makes no progress is "
        "slow.",
    )


class _Partition(Settings):
    column: str = Field("label", description="Column of the data set by which rows are assigned; `iid` ignores it.")
    seed: int | None = Field(None, ge=0, description="Seed of the split; default: the run's seed.")
    parts: int | None = Field(
        None, ge=1, le=100_000, description="Number of parts; default: one for each agent of the roster."
    )


class Iid(_Partition):
    """Every part is a random sample of all rows."""

    kind: Literal["iid"] = "iid"


class Dirichlet(_Partition):
    """The rows of each label are divided in proportions drawn from Dir(alpha) (arXiv:1905.12022).

    With a small alpha every part has few labels.
    """

    kind: Literal["dirichlet"]
    alpha: float = Field(0.5, gt=0, le=1e6)


class Shards(_Partition):
    """Rows sorted by label are cut into shards; every part gets `per_agent` of them (McMahan et al., arXiv:1602.05629)."""

    kind: Literal["shards"]
    per_agent: int = Field(2, ge=1, le=10_000)


class Natural(_Partition):
    """Rows with the same value of the column stay in one part, for example those of a speaker or a device."""

    kind: Literal["natural"]


Partition = Annotated[Iid | Dirichlet | Shards | Natural, Field(discriminator="kind")]


class Rounds(Settings):
    """Synchronous rounds: all participants train from the same version, and their updates are merged together."""

    kind: Literal["rounds"] = "rounds"
    quorum: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        "all",
        description="Number of updates after which the grace period starts; `all`: wait for every live participant.",
    )
    grace_s: float | None = Field(
        None,
        ge=0,
        le=86_400,
        description="Time to wait for further updates after the quorum; default: the median duration of a round.",
    )
    sample: float | None = Field(
        None, gt=0, le=1, description="Share of the live agents that is drawn for each round; default: all."
    )


SLOWEST = 5  # the default `max_lag` accepts the updates of an agent up to this many times slower than the others


class Async(Settings):
    """Asynchronous averaging: agents do not wait for each other; every `buffer` updates make a version (arXiv:2106.06639)."""

    kind: Literal["async"]
    buffer: Literal["all"] | Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None,
        description="K, the number of updates per version; 1 is FedAsync, `all` means one update of every live agent. "
        "Default: half of agents.min, at least 2, at most 10.",
    )
    max_lag: int | None = Field(
        None, ge=0, le=1_000_000, description="Largest lag of a merged update, in versions; older updates are dropped. "
        "Default: enough for an agent five times slower than the others, at least 16.",
    )  # fmt: skip
    max_ahead: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="Number of periods that an agent may be ahead of the slowest agent's last judged period (stale synchronous "
        "parallel); 0 gives a synchronous run. Default: no bound.",
    )
    overlap: bool = Field(
        True,
        description="An agent trains its next period while an update is sent and judged; if false, it waits for the verdict.",
    )
    staleness: StalenessWeight | None = Field(
        None, description="Weight of an update of lag τ; default: 1/√(1 + τ), and 1 for elastic differences."
    )
    quorum: int | None = Field(
        None, ge=1, description="Number of updates after which the grace period starts; default: a buffer closes early only if "
        "no agent may train.",
    )  # fmt: skip
    grace_s: float | None = Field(
        None,
        ge=0,
        le=86_400,
        description="Time to wait for further updates after the quorum; default: the median time of a version.",
    )

    def buffer_size(self, agents: int) -> int | None:
        """Return K of a run that starts with so many agents; None: one update of every live agent."""
        if self.buffer == "all" or self.max_ahead == 0:
            return None
        return self.buffer or min(10, max(2, -(-agents // 2)))

    @property
    def staleness_or_default(self) -> Staleness:
        """The staleness weight, with its default."""
        return self.staleness or Polynomial()

    def lag_bound(self, agents: int) -> int:
        """Return `max_lag`, or its default: an agent r times slower than the others has a lag of about r (N − 1) / K."""
        if self.max_lag is not None:
            return self.max_lag
        return max(16, 2 * SLOWEST * (agents - 1) // (self.buffer_size(agents) or agents))


Sync = Annotated[Rounds | Async, Field(discriminator="kind"), untagged("kind", "rounds")]


class Optimizer(Settings):
    """The agents' optimiser: the name of a class in torch.optim, in any case, and its keyword arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    kind: str = Field("sgd", min_length=1, max_length=100, description="sgd, adam, adamw, rmsprop, muon, …")
    lr: float | None = Field(
        None, ge=0, description="Learning rate; default: 0.1 for sgd, torch's default for the others."
    )

    @property
    def arguments(self) -> dict[str, Any]:
        lr = 0.1 if self.lr is None and self.kind.lower() == "sgd" else self.lr
        return {**({} if lr is None else {"lr": lr}), **_arguments(self)}


class Schedule(Settings):
    """The schedule of the agents' learning rate: the name of a class in torch.optim.lr_scheduler, and its arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    kind: str = Field(min_length=1, max_length=100, description="step, cosine, exponential, linear, onecycle, …")
    per: Literal["period", "step"] = Field(
        "period", description="Unit of the schedule: the agent's own local periods, or its optimiser's steps."
    )
    warmup: int = Field(
        0,
        ge=0,
        le=100_000_000,
        description="Number of these units over which the rate rises linearly before the schedule begins.",
    )

    @property
    def arguments(self) -> dict[str, Any]:
        return _arguments(self)


def _arguments(setting: Settings) -> dict[str, Any]:
    """Return the keyword arguments for torch, with lists as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in (setting.model_extra or {}).items()}


def _by_name(section: Any) -> Any:
    """Read a text `name` as `{kind: name}`."""
    return {"kind": section} if isinstance(section, str) else section


class Scaffold(Settings):
    """Control variates against the drift of agents with different data (arXiv:1910.06378, algorithm 1).

    Each step follows g − c_i + c, with the agent's own control variate c_i and the mean c of all. Agents keep c_i on disk;
    updates and centers are twice as large.
    """

    kind: Literal["scaffold"] = "scaffold"
    option: Literal[1, 2] = Field(
        2, description="The new c_i. 2: the mean gradient of the period's steps; 1: the gradient over the agent's whole part "
        "at the start of the period, which costs one more pass over the part."
    )  # fmt: skip


class Local(Settings):
    """Local training: the work of an agent between two updates."""

    steps: int | None = Field(None, ge=0, le=100_000_000, description="Steps of a local period; default: 20.")
    epochs: int | None = Field(
        None, ge=1, le=100_000, description="Passes over the agent's own part, instead of steps."
    )
    seconds: float | None = Field(
        None, gt=0, le=86_400, description="Duration of a local period, instead of steps; at least one step is made."
    )
    max_steps: int | None = Field(
        None, ge=1, le=100_000_000, description="Largest number of steps in a period of `seconds`; default: a million."
    )
    batch_size: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        32, description="Rows of a step; `all`: the agent's whole part."
    )
    optimizer: Optimizer = Optimizer()
    optimizer_state: Literal["keep", "reset"] = Field(
        "keep",
        description="Keep an optimiser's state (momentum, second moments) from one period to the next, or reset it.",
    )
    schedule: Schedule | None = Field(None, description="Schedule of the learning rate; default: a constant rate.")
    clip_norm: float | None = Field(None, gt=0, description="Norm to which the gradient of the loss is clipped.")
    clip_value: float | None = Field(
        None, gt=0, description="Bound ± to which every element of the gradient is clipped."
    )
    prox_mu: float = Field(0.0, ge=0, description="μ of FedProx: pulls W_i towards the center that was received last.")
    control_variates: Annotated[Scaffold | None, BeforeValidator(_by_name)] = Field(
        None, description="`scaffold`: corrects the drift of agents with different data."
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
        """Number of vectors of the model's size in every update and center."""
        return 1 if self.control_variates is None else 2

    def steps_for(self, rows: int) -> int:
        """Return the steps of one period over a part of `rows` rows; their bound if the period is given in seconds."""
        if self.seconds is not None:
            return self.max_steps or MAX_STEPS
        if self.epochs is None:
            return 20 if self.steps is None else self.steps
        batch = rows if self.batch_size == "all" else self.batch_size
        return self.epochs * steps_in_pass(rows, max(1, batch))


class Mix(Settings):
    """The step between the agents' models W_i and the center W.

    `interpolate`: W_i ← W_i + alpha (W − W_i) with the new center. `elastic`: agent and center move by the same difference
    d_i = alpha (W_i − W): W_i ← W_i − d_i, W ← W + Σ d_i (EASGD, arXiv:1412.6651).
    """

    kind: Literal["interpolate", "elastic"] = "interpolate"
    alpha: float = Field(
        1.0, ge=0, lt=2, description="1: agents take over the center; 0: agents train alone; stable below 2."
    )


class Wire(Settings):
    """The transfer of tensors over the bus."""

    chunk_bytes: int | None = Field(
        None,
        ge=4096,
        le=64 << 20,
        description="Tensor bytes per message; default: the largest number that the broker's max_payload allows.",
    )
    window: int = Field(8, ge=1, le=64, description="Number of chunks in flight in each transfer.")
    codec: Annotated[UpdateCodec, BeforeValidator(_by_name)] = Field(
        RAW, description="Encoding of the agents' updates; `raw`: the unchanged elements."
    )


class Evaluate(Settings):
    """Held-out evaluation. Merging never waits for it: versions committed during an evaluation are skipped."""

    center: bool = Field(True, description="The coordinator evaluates the center.")
    every: int = Field(
        1, ge=1, description="Interval of these evaluations, in versions; the last version is always evaluated."
    )
    agents: bool = Field(False, description="Every agent evaluates its own W_i after each period.")


class Target(Settings):
    """The value of a metric of the center at which the run ends."""

    metric: str = Field("accuracy", description="Name of the metric.")
    at_least: float | None = Field(None, description="The run ends when the metric is at least this.")
    at_most: float | None = Field(None, description="The run ends when the metric is at most this.")

    @model_validator(mode="after")
    def _one_side(self) -> Target:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give either at_least or at_most")
        return self

    def reached(self, value: float) -> bool:
        """Return whether a value of the metric ends the run."""
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


class Stop(Settings):
    """The end of the run."""

    versions: int = Field(100, ge=1, le=1_000_000_000, description="Number of versions after which the run is done.")
    target: Target | None = None


class RunSettings(Settings):
    """All settings of a run, each valid by itself. Use `RunSpec`, which also checks them beside each other."""

    v: int = Field(SPEC_VERSION, description="Version of the spec's format.")
    name: str = Field("run", description="Name of the run: lower-case letters, digits and hyphens.")
    task: str = Field(
        description="Class of the task, `package.module:Class` or `path/to/my_task.py:Class`, loaded from each agent's disk."
    )
    task_options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the class.")
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
    keep_models: int = Field(
        2, ge=2, le=1000, description="Number of the newest versions of the center that are kept on the bus."
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="Seed of the initial model, of the split and of local training.")

    @property
    def state_vectors(self) -> int:
        """Number of vectors of the model's size that the coordinator keeps beside the center."""
        return self.merge.state_vectors + self.outer.state_vectors
