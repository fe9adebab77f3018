"""`syncline demo`: agents on this machine train a real model together, then each alone, and compare.

All checks come first: the options, the port, the directory, and the extra `local`. The nursery starts next, because
every service waits for its import of torch; the rest of the command is imported meanwhile.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from syncline.errors import ConfigError
from syncline_cli.options import HELP_NAMES, Json, new_app

app = new_app()


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
        typer.Option(metavar="A", help="Mixing weight: how far agents move to the shared model."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of weights, data split and batches.")] = 1,
    port: Annotated[int, typer.Option(metavar="PORT", help="Port of the broker; 0: any free one.")] = 0,
    directory: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new directory for the broker's data, keys and logs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a real model on this machine, offline, and compare training together with training alone.

    Starts a broker, a coordinator and agents, each a process; splits 1,797 handwritten digits unevenly among the agents;
    trains one shared model in synchronous rounds, then each agent alone for as many steps.
    """
    from syncline.extras import require_modules
    from syncline_cli.local_fleet.demo_settings import PRELOAD, DemoSettings
    from syncline_cli.local_fleet.requirements import check_broker

    settings = DemoSettings(agents, rounds, alpha, seed, port, directory, as_json)
    _check_port(port)
    _check_directory(directory)
    check_broker("syncline demo")
    require_modules("syncline demo", "local", "sklearn")

    from syncline_cli.local_fleet.preload import start_nursery
    from syncline_cli.process import silence_logging

    silence_logging()
    nursery = start_nursery(*PRELOAD)  # early: every service waits for torch

    from syncline_cli.local_fleet.fleet import FleetSettings, agent_names
    from syncline_cli.local_fleet.supervise import run_with_fleet
    from syncline_cli.ui.demo_run import Demo

    show = Demo(settings)
    fleet = FleetSettings(tuple(agent_names(agents)), directory=directory, port=port, device="cpu")
    raise typer.Exit(run_with_fleet(fleet, nursery, show.run, around=show.screen) or show.report())


def _check_port(port: int) -> None:
    """Raise ConfigError if the port is taken, before anything is started."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            hint = "Stop the program that listens on it, or use 0 for any free port"
            raise ConfigError("--port", f"{port}: {error.strerror}", hint) from None


def _check_directory(directory: Path | None) -> None:
    """Raise ConfigError for a directory with files: an older broker's store in it would bring older runs."""
    try:
        if directory is not None and directory.exists() and any(directory.iterdir()):
            raise ConfigError("--directory", f"{directory} is not empty", "Name a new one")
    except OSError as error:
        raise ConfigError("--directory", f"{directory}: {error.strerror}", "Name a new one") from None
