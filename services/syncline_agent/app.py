"""The process of an agent: from the options to a running service."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from syncline.bus.base import Bus
from syncline.bus.connect import connect, connection_problem
from syncline.bus.server.accounts import read_seed
from syncline.bus.tls import Tls
from syncline.errors import BusError, ConfigError, Denied
from syncline.runtime.child import Child
from syncline.runtime.nursery import Nursery
from syncline.runtime.service import FAILED, name_process, run_service, set_up_logging
from syncline.shm import SharedMemory
from syncline.wire import subjects
from syncline.wire.allow_list import check_patterns
from syncline.wire.signing import Signer
from syncline_agent.heartbeat import Superseded
from syncline_agent.identity import claim
from syncline_agent.options import AgentOptions
from syncline_agent.service import Agent, AgentSettings
from syncline_agent.training_child import ChildTraining

log = logging.getLogger(__name__)

TRAINER = "syncline_agent.trainer:main"


def run(options: AgentOptions) -> int:
    """Serve until a signal comes or another process claims the name. Returns the exit code.

    Raises:
        ConfigError: an option cannot be used.
    """
    set_up_logging(options.log_file)
    check_patterns(options.allow_task)
    claimed = claim(options.name, options.key, Path(options.state_dir))  # holds a lock as long as this process lives
    options = replace(
        options,
        name=claimed.name,
        key=claimed.key,
        state_dir=str(Path(options.state_dir).absolute()),  # the child's working directory is that of its task
        task_dir=str(Path(options.task_dir).absolute()),
    )
    name_process(options.name)
    seed = read_seed(Path(options.key)) if options.key else ""
    nursery = Nursery.start(("torch",))
    serving: list[Agent] = []

    async def work() -> int:
        nursery.open()
        try:
            return await _serve(options, seed, nursery, serving)
        finally:
            await nursery.close()

    async def drain() -> None:
        for agent in serving:
            await agent.leave()

    return run_service(work, drain=drain)


async def _serve(options: AgentOptions, seed: str, nursery: Nursery, serving: list[Agent]) -> int:
    try:
        tls = Tls(options.tls_ca, options.tls_cert, options.tls_key)
        bus = await connect(options.connect, options.name, seed, tls=tls, patience_s=options.patience_s)
    except BusError as error:
        raise connection_problem(error, options.connect) from None
    try:
        await _check_key(bus, options)
    except BaseException:
        await bus.close()
        raise
    arguments = (options.device, options.threads, list(options.allow_task), options.task_dir)

    async def start_child(memory: SharedMemory) -> Child:
        return await Child.start(nursery, TRAINER, memory, *arguments)

    training = ChildTraining(start_child)
    settings = AgentSettings(options.name, Path(options.state_dir), options.allow_task, Signer(seed) if seed else None)
    agent = Agent(bus, settings, training)
    serving.append(agent)
    try:
        await agent.serve()
    except Superseded as error:
        log.error("%s; exiting", error)
        return FAILED
    finally:
        await bus.close()
    return 0


async def _check_key(bus: Bus, options: AgentOptions) -> None:
    """Raise ConfigError for the key of another agent: the broker would refuse each of this agent's messages."""
    try:
        await bus.kv_get(subjects.RUNS_BUCKET, subjects.head_key(options.name))
    except Denied as error:
        problem = f"{options.key} is not the key of {options.name!r}: {error}"
        raise ConfigError(
            "--key", problem, "Name the agent's own key file, or with --name the agent that has it"
        ) from None
    except BusError:
        pass  # no coordinator has made the bucket yet, or the connection is lost; both may come


def run_forked(options: dict[str, Any]) -> int:
    """Call `run` in a process that a nursery has forked; `options` are the fields of AgentOptions as JSON values."""
    return run(AgentOptions(**{**options, "allow_task": tuple(options.get("allow_task", ()))}))
