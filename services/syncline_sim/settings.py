"""The section `sim:` of a spec: what a simulated fleet is like. `syncline run` leaves it alone.

Seconds are virtual: they pass in the simulation, and cost nothing.
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
        raise ValueError("an empty list says nothing; leave it out")
    return value if isinstance(value, list | tuple) else [value]


class Link(Settings):
    """An agent's connection to the broker. A rate that is left out is no limit."""

    delay_s: Seconds = Field(0.0005, description="One way, each message.")
    up_mbit: float | None = Field(None, gt=0, description="Megabits a second, from the agent.")
    down_mbit: float | None = Field(None, gt=0, description="Megabits a second, to the agent.")


class _Fault(Settings):
    after_s: Seconds = Field(description="When it begins, from the start of the fleet.")


class _Lasting(_Fault):
    for_s: Seconds = Field(description="How long it lasts.")


class _Whose(_Lasting):
    service: str = Field(description="`a1` … or `coordinator`.")


class Crashed(_Whose):
    """The service is killed, and started again afterwards."""

    kind: Literal["crash"]
    disk: bool = Field(True, description="It finds its state directory again.")

    def fault(self) -> Fault:
        return Down(self.service, self.after_s, self.for_s, self.disk)


class CutOff(_Whose):
    """The service has no connection."""

    kind: Literal["cut"]

    def fault(self) -> Fault:
        return Cut(self.service, self.after_s, self.for_s)


class Slow(_Whose):
    """Its messages take longer."""

    kind: Literal["delay"]
    seconds: Seconds

    def fault(self) -> Fault:
        return Delay(self.service, self.seconds, self.after_s, self.for_s)


class Lost(_Lasting):
    """A share of the core messages is lost: notifies, heartbeats, hellos."""

    kind: Literal["lose"]
    share: float = Field(gt=0, le=1)

    def fault(self) -> Fault:
        return Lose(self.share, self.after_s, self.for_s)


class BrokerStopped(_Lasting):
    """The broker is stopped, and started again with what its streams hold."""

    kind: Literal["broker"]

    def fault(self) -> Fault:
        return BrokerDown(self.after_s, self.for_s)


class SetBack(_Lasting):
    """A power failure: the broker comes back with its store as that was `lost_s` before."""

    kind: Literal["rollback"]
    lost_s: Seconds
    torn: bool = Field(False, description="Not of every stream.")

    def fault(self) -> Fault:
        return RollBack(self.after_s, self.for_s, self.lost_s, self.torn)


class StepHeld(_Whose):
    """A step of the agent's training takes so much longer; its heartbeats go on."""

    kind: Literal["step"]

    def fault(self) -> Fault:
        return LongStep(self.service, self.after_s, self.for_s)


class TrainerKilled(_Fault):
    """The training child of an agent is killed, and the agent is not."""

    kind: Literal["trainer"]
    service: str

    def fault(self) -> Fault:
        return KillTrainer(self.service, self.after_s)


class TwinStarted(_Fault):
    """A second process of an agent's name starts."""

    kind: Literal["twin"]
    service: str

    def fault(self) -> Fault:
        return Twin(self.service, self.after_s)


FaultSetting = Annotated[
    Crashed | CutOff | Slow | Lost | BrokerStopped | SetBack | StepHeld | TrainerKilled | TwinStarted,
    Field(discriminator="kind"),
]


class SimSettings(Settings):
    """Lists are dealt out to the agents in turn: with two speeds, a1 and a3 have the first."""

    agents: int | None = Field(None, ge=1, le=10_000, description="How many; default: agents.min, or agents.max.")
    step_s: Annotated[tuple[Annotated[float, Field(gt=0, le=1e6)], ...], BeforeValidator(_listed)] = Field(
        (0.01,), description="Seconds of a local step: one for all, or a list."
    )
    spread: float = Field(0.0, ge=0, le=5, description="Agents differ: σ of a log-normal factor, for good.")
    jitter: float = Field(0.0, ge=0, le=5, description="Periods differ: σ of a log-normal factor, each time.")
    link: Annotated[tuple[Link, ...], BeforeValidator(_listed)] = (Link(),)
    start_within_s: Seconds = Field(0.0, description="Agents are started evenly over so long.")
    faults: tuple[FaultSetting, ...] = ()
    longest_s: float = Field(1e8, gt=0, description="The simulation is given up then.")
    threads: int = Field(1, ge=1, le=1024, description="Threads of torch.")
    seed: int | None = Field(None, ge=0, description="Of speeds and links; default: the run's.")

    def names(self, spec: RunSpec) -> tuple[str, ...]:
        """The agents: a1, a2, …"""
        return tuple(f"a{i}" for i in range(1, (self.agents or spec.agents.max or spec.agents.min) + 1))

    def check(self, spec: RunSpec) -> None:
        """What only the whole spec shows. Raises ConfigError."""
        names = self.names(spec)
        if len(names) < spec.agents.min:
            problem = f"{len(names)} are fewer than the run starts with (agents.min = {spec.agents.min})"
            raise ConfigError("sim.agents", problem, "Raise it, or lower agents.min")
        for i, fault in enumerate(self.faults):
            whose = getattr(fault, "service", names[0])
            known = names if isinstance(fault, StepHeld | TrainerKilled | TwinStarted) else (*names, COORDINATOR)
            if whose not in known:
                also = " or coordinator" if COORDINATOR in known else ""
                hint = f"Use {names[0]} to {names[-1]}{also}"
                raise ConfigError(f"{SIM_SECTION}.faults.{i}.service", f"there is no {whose!r} here", hint)

    def schedule(self) -> Faults:
        return Faults(tuple(fault.fault() for fault in self.faults))


def load(path: Path, count: int | None = None) -> tuple[RunSpec, SimSettings]:
    """A spec and its section `sim:`; the run starts with the whole fleet, unless it says otherwise. Raises ConfigError.

    `count`: agents, whatever the section says.
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
