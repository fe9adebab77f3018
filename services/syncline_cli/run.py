"""`syncline run`: submit a spec and follow the run to its end, on a broker that is there or on one of our own."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from syncline.errors import ConfigError
from syncline_cli.options import DEFAULT_URL, HELP_NAMES, Connect, Json, Key, new_app

if TYPE_CHECKING:
    from syncline.spec import RunSpec

app = new_app()

MAX_AGENTS = 64


@app.command(
    context_settings=HELP_NAMES,
    epilog="Example: syncline run digits.yaml --local 4, with `task: syncline.tasks.digits:Digits` in the file",
)
def run(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The run's settings; only `task` has no default.")],
    connect: Connect = DEFAULT_URL,
    key: Key = "",
    local: Annotated[
        int | None, typer.Option(metavar="N", help="Do it all on this machine: own broker, coordinator, N agents.")
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="The run's name; default: the spec's, else made from the file's.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Submit a run and follow it to its end.

    Ctrl-C ends the watching and not the run; with --local it ends both.
    """
    if local is not None and not 1 <= local <= MAX_AGENTS:
        raise ConfigError("--local", f"{local} is out of range", f"Use 1 to {MAX_AGENTS}")
    settings = read_spec(spec, name, local)
    raise typer.Exit(
        _remote(settings, connect, key, as_json) if local is None else _local(settings, local, spec, as_json)
    )


def read_spec(path: Path, name: str = "", local: int | None = None) -> RunSpec:
    """The spec with what the command line says, and with a name of its own where it has none. Raises ConfigError."""
    from syncline.spec import load_spec

    given = _peek(path)
    changes: dict[str, Any] = {}
    if name or "name" not in given:
        changes["name"] = name or name_of_file(path)
    agents = given.get("agents", {})
    if local is not None and isinstance(agents, dict) and "min" not in agents:
        most = agents.get("max")
        changes["agents"] = {**agents, "min": min(local, most) if isinstance(most, int) and most > 0 else local}
    spec = load_spec(path, **changes)
    if local is not None and spec.agents.min > local:
        problem = f"the run starts with {spec.agents.min} agents, --local starts {local}"
        raise ConfigError("agents.min", problem, f"Use --local {spec.agents.min}, or lower agents.min")
    return spec


def name_of_file(path: Path) -> str:
    """A name for a run: the file's, and something that no other run has."""
    stem = re.sub(r"[^a-z0-9-]+", "-", path.stem.lower()).strip("-")[:50] or "run"
    return f"{stem}-{secrets.token_hex(3)}"


def _peek(path: Path) -> dict[str, Any]:
    """The settings as they stand in the file. What is wrong with the file, `load_spec` says."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _remote(spec: RunSpec, connect: str, key: str, as_json: bool) -> int:
    from syncline.bus.accounts import read_seed
    from syncline_cli.process import Interrupted, run_interruptible
    from syncline_cli.run_follow import RunWatch, follow_remote

    watch = RunWatch(spec, as_json)
    seed = read_seed(Path(key)) if key else ""
    try:
        return run_interruptible(lambda: follow_remote(watch, connect, seed)) or watch.summary()
    except Interrupted:
        goes_on = f"; run {spec.name} goes on without this terminal" if watch.submitted else ""
        raise Interrupted(goes_on) from None
    finally:
        watch.report()


def _local(spec: RunSpec, agents: int, path: Path, as_json: bool) -> int:
    from syncline_cli.preload import start_nursery

    module = spec.task.rpartition(":")[0]
    own = [module] if _is_ready_made(module) else []
    nursery = start_nursery("torch._dynamo", *own)

    from syncline.tasks import DEFAULT_ALLOWED
    from syncline_cli.display import counted
    from syncline_cli.local import FleetSettings, agent_names
    from syncline_cli.run_follow import RunWatch, follow_local
    from syncline_cli.supervise import with_fleet

    watch = RunWatch(spec, as_json, f"starting a broker, a coordinator and {counted(agents, 'agent')}")
    fleet = FleetSettings(
        tuple(agent_names(agents)),
        allow_task=(*DEFAULT_ALLOWED, spec.task),
        task_dir=path.resolve().parent,
        threads=max(1, (os.cpu_count() or 1) // agents),
    )
    try:
        return with_fleet(fleet, nursery, lambda up: follow_local(watch, up), around=watch.screen) or watch.summary()
    finally:
        watch.report()


def _is_ready_made(module: str) -> bool:
    """Whether it is a module of ours, so that it can be imported before anybody asks."""
    import syncline.tasks

    package, _, name = module.rpartition(".")
    there = any(Path(place, f"{name}.py").is_file() for place in syncline.tasks.__path__)
    return package == "syncline.tasks" and name.isidentifier() and there
