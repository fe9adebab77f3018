"""`syncline run`: submit a run and follow it to its end, on a given broker or on a local fleet.

On a given broker the command needs the coordinator's key to submit, and the watchers' key of the same set to hear the
agents. With `--local N` it starts a fleet of its own, which needs the extra `local`. Head decides when the run has
ended; metrics and events are only shown. The exit code is 0 for a run that is done, 1 for one that failed, 2 for a
refused one.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from syncline.errors import ConfigError
from syncline_cli.options import HELP_NAMES, FindConnect, Json, Key, TlsCa, TlsCert, TlsKey, new_app

if TYPE_CHECKING:
    from syncline.spec.run_spec import RunSpec

app = new_app()

MAX_AGENTS = 64


@app.command(
    context_settings=HELP_NAMES,
    epilog="Example: syncline run digits.yaml --local 4, with `task: syncline.tasks.digits:Digits` in the file",
)
def run(
    ctx: typer.Context,
    spec: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The run's settings; only `task` has no default.")],
    connect: FindConnect = "",
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    local: Annotated[
        int | None, typer.Option(metavar="N", help="Start a broker, a coordinator and N agents on this machine.")
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="The run's name; default: the spec's, else made from the file's.")
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Submit the run, print its name, and return.")] = False,
    stay: Annotated[bool, typer.Option("--stay", help="With --local: keep the fleet up after the run.")] = False,
    as_json: Json = False,
) -> None:
    """Submit a run and follow it to its end.

    Ctrl-C leaves the run going: `syncline watch NAME` follows it again. With --local, Ctrl-C ends the run too.
    """
    if local is not None and detach:
        raise ConfigError("--detach", "a local fleet ends with this command", "Remove --detach or --local")
    for option in ("connect", "key"):  # variables may be meant for other commands
        source = ctx.get_parameter_source(option)
        if local is not None and source is not None and source.name == "COMMANDLINE":
            given = f"--{option} {ctx.params[option]}"
            problem = f"--local {local} starts a broker with its own keys, and {given} names another"
            raise ConfigError("--local", problem, f"Remove --local or --{option}")
    if local is None and stay:
        raise ConfigError("--stay", "only a local fleet can stay up", "Remove --stay, or add --local N")
    if local is not None and not 1 <= local <= MAX_AGENTS:
        raise ConfigError("--local", f"{local} is out of range", f"Use 1 to {MAX_AGENTS}")
    settings = read_spec(spec, name, local)
    raise typer.Exit(
        _remote(settings, spec, connect, key, (tls_ca, tls_cert, tls_key), as_json, detach)
        if local is None
        else _local(settings, local, spec, as_json, stay)
    )


def read_spec(path: Path, name: str = "", local: int | None = None) -> RunSpec:
    """Read a spec file.

    Args:
        path: the YAML file.
        name: the run's name, which overrides the file's; without either a new name is made from the file's name.
        local: agents of a local fleet, the default of `agents.min`.

    Raises:
        ConfigError: the file or a setting is invalid, or the run needs more agents than `local`.
    """
    from syncline.spec.run_spec import SIM_SECTION, load_spec, parse, stem_of
    from syncline.spec.yaml_file import read_yaml

    data = read_yaml(path)
    given = data if isinstance(data, dict) else {}  # `load_spec` refuses anything but a mapping
    changes: dict[str, Any] = {}
    if name or "name" not in given:
        changes["name"] = name or f"{stem_of(path)}-{secrets.token_hex(3)}"
    agents = given.get("agents", {})
    if local is not None and isinstance(agents, dict) and "min" not in agents:
        most = agents.get("max")
        changes["agents"] = {**agents, "min": min(local, most) if isinstance(most, int) and most > 0 else local}
    spec = load_spec(path, **changes)
    if given.get(SIM_SECTION) is not None:  # unused here, but checked
        from syncline_sim.settings import SimSettings

        parse(SimSettings, given[SIM_SECTION], SIM_SECTION)
    if local is not None and spec.agents.min > local:
        problem = f"the run starts with {spec.agents.min} agents, --local starts {local}"
        raise ConfigError("agents.min", problem, f"Use --local {spec.agents.min}, or lower agents.min")
    return spec


def _remote(
    spec: RunSpec,
    path: Path,
    connect: str,
    key: str,
    certificates: tuple[str, str, str],
    as_json: bool,
    detach: bool,
) -> int:
    from syncline.bus.server.accounts import read_seed
    from syncline.bus.tls import Tls
    from syncline.client.keys import watch_key
    from syncline_cli.connect import check_task_dir, choose_broker, command_with_options
    from syncline_cli.process import Interrupted, run_interruptible
    from syncline_cli.ui.run_follow import RunWatch, follow_remote, submit_alone

    at = choose_broker(connect, key, tls=Tls(*certificates))
    check_task_dir(at, spec.task, path)
    watch = RunWatch(spec, as_json, key=at.key)
    seeds = [read_seed(Path(file)) if file else "" for file in (at.key, watch_key(at.key))]
    try:
        if detach:
            return run_interruptible(lambda: submit_alone(watch, at, seeds[0]))
        return run_interruptible(lambda: follow_remote(watch, at, *seeds)) or watch.summary()
    except Interrupted:
        again = f"syncline watch {spec.name}"
        ls = "syncline ls"
        if not at.found:
            again = command_with_options(again, at.url, watch_key(at.key), at.tls)
            ls = command_with_options(ls, at.url, at.key, at.tls)
        if watch.submitted:
            raise Interrupted(f"; run {spec.name} continues without this terminal. Come back with: {again}") from None
        raise Interrupted(f"; run {spec.name} may have been submitted. See: {ls}" if watch.asked else "") from None
    finally:
        watch.report()


def allowed_tasks(task: str, *, stay: bool) -> tuple[str, ...]:
    """Return the allow-list of a local fleet.

    The list holds the run's task. If the fleet stays for further runs, it also holds the other classes of the same module or
    file, and every task file in the directory of the settings and below.
    """
    from syncline.tasks import DEFAULT_ALLOWED

    more = (task.rpartition(":")[0], "*.py:*") if stay else ()
    return (*DEFAULT_ALLOWED, task, *more)


def _local(spec: RunSpec, agents: int, path: Path, as_json: bool, stay: bool) -> int:
    from syncline_cli.local_fleet.preload import start_nursery
    from syncline_cli.local_fleet.requirements import check_broker
    from syncline_cli.process import silence_logging

    check_broker("--local")
    module = spec.task.rpartition(":")[0]
    preload = [module] if _is_ready_made(module) else []
    silence_logging()
    nursery = start_nursery("torch._dynamo", *preload)

    from syncline_cli.local_fleet.fleet import FleetSettings, agent_names
    from syncline_cli.local_fleet.supervise import run_with_fleet
    from syncline_cli.process import Interrupted
    from syncline_cli.ui.display import counted
    from syncline_cli.ui.run_follow import RunWatch, follow_and_stay, follow_local

    watch = RunWatch(spec, as_json, f"starting a broker, a coordinator and {counted(agents, 'agent')}")
    fleet = FleetSettings(
        tuple(agent_names(agents)),
        allow_task=allowed_tasks(spec.task, stay=stay),
        task_dir=path.resolve().parent,
        threads=max(1, (os.cpu_count() or 1) // agents),
    )
    follow = follow_and_stay if stay else follow_local
    try:
        return run_with_fleet(fleet, nursery, lambda up: follow(watch, up), around=watch.screen) or watch.summary()
    except Interrupted:
        if watch.stayed is None:
            raise
        return watch.stayed
    finally:
        watch.report()


def _is_ready_made(module: str) -> bool:
    """Tell whether a module is one of `syncline.tasks`, which is safe to import before the run is submitted."""
    import syncline.tasks

    package, _, name = module.rpartition(".")
    exists = any(Path(place, f"{name}.py").is_file() for place in syncline.tasks.__path__)
    return package == "syncline.tasks" and name.isidentifier() and exists
