"""The section `sim:` of a spec: speeds, links and faults of a simulated fleet. `syncline run` ignores it.

All seconds are virtual.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from syncline.errors import ConfigError
from syncline.settings import Settings
from syncline.spec.run_spec import SIM_SECTION, RunSpec, load_spec, parse, stem_of
from syncline.spec.yaml_file import read_yaml
from syncline.wire.subjects import COORDINATOR
from syncline_sim.faults import (
    BrokerDown,
    Cut,
    Delay,
    Down,
    Fault,
    Faults,
    KillTrainer,
    LongStep,
    Lose,
    RollBack,
    Twin,
)

Seconds = Annotated[float, Field(ge=0, le=1e9)]


def _listed(value: Any) -> Any:
    if value in ([], ()):
        raise ValueError("the list is empty; leave the setting out")
    return value if isinstance(value, list | tuple) else [value]


class Link(Settings):
    """An agent's connection to the broker. Without a rate the link has no limit."""

    delay_s: Seconds = Field(0.0005, description="Delay of each message, in one direction.")
    up_mbit: float | None = Field(None, gt=0, description="Megabits a second, from the agent.")
    down_mbit: float | None = Field(None, gt=0, description="Megabits a second, to the agent.")


class _FaultSetting(Settings):
    after_s: Seconds = Field(description="When the fault begins, after the start of the fleet.")


class _LastingFault(_FaultSetting):
    for_s: Seconds = Field(description="How long the fault lasts.")


class _ServiceFault(_LastingFault):
    service: str = Field(description="The service: `a1`, `a2`, … or `coordinator`.")


class CrashSetting(_ServiceFault):
    """The service is killed, and started again after `for_s`."""

    kind: Literal["crash"]
    disk: bool = Field(True, description="The state directory is kept.")

    def fault(self) -> Fault:
        return Down(self.service, self.after_s, self.for_s, self.disk)


class CutSetting(_ServiceFault):
    """The service's connection is cut."""

    kind: Literal["cut"]

    def fault(self) -> Fault:
        return Cut(self.service, self.after_s, self.for_s)


class DelaySetting(_ServiceFault):
    """Messages from and to the service take longer."""

    kind: Literal["delay"]
    seconds: Seconds

    def fault(self) -> Fault:
        return Delay(self.service, self.seconds, self.after_s, self.for_s)


class LossSetting(_LastingFault):
    """A share of the core messages is lost: notifications, heartbeats, hellos."""

    kind: Literal["lose"]
    share: float = Field(gt=0, le=1)

    def fault(self) -> Fault:
        return Lose(self.share, self.after_s, self.for_s)


class BrokerSetting(_LastingFault):
    """The broker is stopped and started again with the content of its streams."""

    kind: Literal["broker"]

    def fault(self) -> Fault:
        return BrokerDown(self.after_s, self.for_s)


class RollBackSetting(_LastingFault):
    """A power failure: the broker comes back with its store of `lost_s` before."""

    kind: Literal["rollback"]
    lost_s: Seconds
    torn: bool = Field(False, description="Some streams come back complete.")

    def fault(self) -> Fault:
        return RollBack(self.after_s, self.for_s, self.lost_s, self.torn)


class LongStepSetting(_ServiceFault):
    """One step of the agent's training takes `for_s` longer; the agent still sends heartbeats."""

    kind: Literal["step"]

    def fault(self) -> Fault:
        return LongStep(self.service, self.after_s, self.for_s)


class KillTrainerSetting(_FaultSetting):
    """The training child of an agent is killed; the agent service goes on."""

    kind: Literal["trainer"]
    service: str

    def fault(self) -> Fault:
        return KillTrainer(self.service, self.after_s)


class TwinSetting(_FaultSetting):
    """A second process with the agent's name starts and takes over."""

    kind: Literal["twin"]
    service: str

    def fault(self) -> Fault:
        return Twin(self.service, self.after_s)


FaultSetting = Annotated[
    CrashSetting
    | CutSetting
    | DelaySetting
    | LossSetting
    | BrokerSetting
    | RollBackSetting
    | LongStepSetting
    | KillTrainerSetting
    | TwinSetting,
    Field(discriminator="kind"),
]


class SimSettings(Settings):
    """The settings of a simulated fleet. Lists are dealt out to the agents in turn: of two speeds, a1 and a3 have the first."""

    agents: int | None = Field(
        None, ge=1, le=10_000, description="Number of agents; default: agents.max, or else agents.min."
    )
    step_s: Annotated[tuple[Annotated[float, Field(gt=0, le=1e6)], ...], BeforeValidator(_listed)] = Field(
        (0.01,), description="Duration of a local step: one number for all agents, or a list."
    )
    spread: float = Field(
        0.0, ge=0, le=5, description="Differences between agents: σ of a log-normal factor, drawn once per agent."
    )
    jitter: float = Field(
        0.0, ge=0, le=5, description="Differences between periods: σ of a log-normal factor, drawn for each period."
    )
    link: Annotated[tuple[Link, ...], BeforeValidator(_listed)] = (Link(),)
    start_within_s: Seconds = Field(0.0, description="The agents are started evenly spread over this time.")
    faults: tuple[FaultSetting, ...] = ()
    longest_s: float = Field(1e8, gt=0, description="The simulation is given up after this time.")
    threads: int = Field(1, ge=1, le=1024, description="Threads of torch.")
    seed: int | None = Field(None, ge=0, description="Seed of speeds and links; default: the run's seed.")

    def names(self, spec: RunSpec) -> tuple[str, ...]:
        """Return the names of the agents: a1, a2, …"""
        return tuple(f"a{i}" for i in range(1, (self.agents or spec.agents.max or spec.agents.min) + 1))

    def check(self, spec: RunSpec) -> None:
        """Check the settings beside those of the run.

        Raises:
            ConfigError: too few agents, or a fault of a service that does not exist.
        """
        names = self.names(spec)
        if len(names) < spec.agents.min:
            problem = f"{len(names)} are fewer than the run starts with (agents.min = {spec.agents.min})"
            raise ConfigError("sim.agents", problem, "Raise it, or lower agents.min")
        for i, fault in enumerate(self.faults):
            whose = getattr(fault, "service", names[0])
            known = (
                names
                if isinstance(fault, LongStepSetting | KillTrainerSetting | TwinSetting)
                else (*names, COORDINATOR)
            )
            if whose not in known:
                also = " or coordinator" if COORDINATOR in known else ""
                hint = f"Use {names[0]} to {names[-1]}{also}"
                raise ConfigError(f"{SIM_SECTION}.faults.{i}.service", f"there is no {whose!r} here", hint)

    def schedule(self) -> Faults:
        return Faults(tuple(fault.fault() for fault in self.faults))


def load(path: Path, count: int | None = None) -> tuple[RunSpec, SimSettings]:
    """Return a spec and its section `sim:`. Unless the file sets agents.min, the run starts with the whole fleet.

    Args:
        path: the spec's file.
        count: number of agents, in place of `sim.agents`.

    Raises:
        ConfigError: the file cannot be read, or a setting is wrong.
    """
    given = read_yaml(path)
    section = given.get(SIM_SECTION) if isinstance(given, dict) else None
    section = {} if section is None else section
    if count is not None and isinstance(section, dict):
        section = {**section, "agents": count}
    settings = parse(SimSettings, section, SIM_SECTION)
    changes: dict[str, Any] = {}
    if isinstance(given, dict) and "name" not in given:
        changes["name"] = f"{stem_of(path)}-sim"
    agents = given.get("agents", {}) if isinstance(given, dict) else {}
    if settings.agents is not None and isinstance(agents, dict) and "min" not in agents:
        most = agents.get("max")
        changes["agents"] = {**agents, "min": min(settings.agents, most) if isinstance(most, int) else settings.agents}
    spec = load_spec(path, **changes)
    settings.check(spec)
    return spec, settings
