"""`syncline demo`: a broker, a coordinator and some agents on this machine train a real model together, then each alone."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from syncline.errors import ConfigError
from syncline_cli.options import HELP_NAMES, Json, new_app

if TYPE_CHECKING:
    from syncline.spec.run_spec import RunSpec

app = new_app()

TASK = "syncline.tasks.digits:Digits"
MAX_AGENTS = 64
MAX_ROUNDS = 1_000_000
LOCAL_STEPS = 20
PRELOAD = ("torch._dynamo", "sklearn.datasets", "sklearn.model_selection", "syncline.tasks.digits")


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The flags of `syncline demo`, checked."""

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
            hint = "Use 0 up to but not including 2: 1 takes over the shared model, 0 leaves every agent alone"
            raise ConfigError("--alpha", f"{self.alpha:g} is out of range", hint)

    def spec(self, name: str, **changes: Any) -> RunSpec:
        from syncline.spec.run_spec import RunSpec, parse

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
        """Every agent on its own part, for as many steps: that is what alpha 0 means."""
        together = self.spec(name)
        return self.spec(
            name,
            agents={"min": agents, "lost_after_s": 60.0},
            local={**together.local.model_dump(), "steps": self.rounds * LOCAL_STEPS},
            mix={"alpha": 0.0},
            evaluate={"agents": True, "center": False},
            stop={"versions": 1},
        )


def _within(setting: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ConfigError(setting, f"{value} is out of range", f"Use {least} to {most:,}")


@app.command(
    context_settings=HELP_NAMES,
    short_help="Train a real model with four agents on this machine.",
    epilog="Example: syncline demo --agents 8 --alpha 0.5",
)
def demo(
    agents: Annotated[int, typer.Option(metavar="N", help="Agents, each with a part of the data.")] = 4,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds; 20 local steps each.")] = 40,
    alpha: Annotated[
        float,
        typer.Option(metavar="A", help="How far agents move to the shared model, 0 to 1."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of weights, data split and batches.")] = 1,
    port: Annotated[int, typer.Option(metavar="PORT", help="Of the broker; 0: any free one.")] = 0,
    directory: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new directory that keeps broker, keys and logs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a real model on this machine, offline, and see what the agents gain together.

    Starts a broker, a coordinator and agents, each a process; splits 1,797 handwritten digits unevenly among the agents;
    trains one shared model in synchronous rounds, then every agent alone for as many steps, and compares.
    """
    settings = DemoSettings(agents, rounds, alpha, seed, port, directory, as_json)
    _check_port(port)
    _check_directory(directory)

    from syncline_cli.local_fleet.preload import start_nursery

    nursery = start_nursery(*PRELOAD)  # as early as can be: everything waits for torch

    from syncline_cli.local_fleet.demo_run import Demo
    from syncline_cli.local_fleet.fleet import FleetSettings, agent_names
    from syncline_cli.local_fleet.supervise import with_fleet

    show = Demo(settings)
    fleet = FleetSettings(tuple(agent_names(agents)), directory=directory, port=port, device="cpu")
    raise typer.Exit(with_fleet(fleet, nursery, show.run, around=show.screen) or show.report())


def _check_port(port: int) -> None:
    """At once, and not only when everything else is on its way."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            hint = "Stop what listens there, or use 0 for any that is free"
            raise ConfigError("--port", f"{port}: {error.strerror}", hint) from None


def _check_directory(directory: Path | None) -> None:
    """A directory with an older broker's store in it would bring older runs along."""
    try:
        if directory is not None and directory.exists() and any(directory.iterdir()):
            raise ConfigError("--directory", f"{directory} is not empty", "Name a new one")
    except OSError as error:
        raise ConfigError("--directory", f"{directory}: {error.strerror}", "Name a new one") from None
