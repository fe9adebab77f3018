"""The coordinator as a process: from settings to a running service."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from syncline.bus.address import masked
from syncline.bus.base import Bus
from syncline.bus.connect import connect, connection_problem
from syncline.bus.server.accounts import Keyring, read_seed
from syncline.bus.tls import Tls
from syncline.errors import BusError, ConfigError
from syncline.runtime.child import Child
from syncline.runtime.nursery import Nursery
from syncline.runtime.service import DONE, FAILED, name_process, run_service, set_up_logging
from syncline.shm import SharedMemory
from syncline.wire import subjects
from syncline.wire.subjects import COORDINATOR
from syncline_coordinator.head import Deposed
from syncline_coordinator.options import CoordinatorOptions
from syncline_coordinator.service import Coordinator, CoordinatorSettings

log = logging.getLogger(__name__)

EVALUATOR = "syncline_coordinator.evaluator:main"
REDUCERS = 2  # threads
ANSWER_S = 1.0  # for another coordinator
LEAVING_S = 3.0
EVALUATION_S = 3600.0


def run(options: CoordinatorOptions) -> int:
    """Serves until a signal. Returns the exit code."""
    set_up_logging(options.log_file)
    name_process(COORDINATOR)
    seed = read_seed(Path(options.key)) if options.key else ""
    options = replace(
        options, task_dir=str(Path(options.task_dir).absolute())
    )  # the child works in its task's directory
    nursery = Nursery.start(("torch",))

    async def work() -> int:
        nursery.open()
        try:
            return await _serve(options, seed, nursery)
        finally:
            await nursery.close()

    return run_service(work)


async def _serve(options: CoordinatorOptions, seed: str, nursery: Nursery) -> int:
    try:
        tls = Tls(options.tls_ca, options.tls_cert, options.tls_key)
        bus = await connect(options.connect, COORDINATOR, seed, tls=tls, patience_s=options.patience_s)
    except BusError as error:
        raise connection_problem(error, options.connect) from None
    await _be_the_only_one(bus, options.connect)
    arguments = (options.threads, list(options.allow_task), options.task_dir)

    async def start_child(memory: SharedMemory) -> Child:
        return await Child.start(nursery, EVALUATOR, memory, *arguments)

    executor = ThreadPoolExecutor(REDUCERS, thread_name_prefix="reduce")
    settings = CoordinatorSettings(
        executor=executor,
        evaluation_s=EVALUATION_S,
        broker_log=Path(options.broker_log) if options.broker_log else None,
        key_names=dict(Keyring(Path(options.keys)).names) if options.keys else {},
    )
    try:
        await Coordinator(bus, start_child, settings).serve()
    except Deposed as error:
        log.error("%s; exiting", error)
        return FAILED
    except BusError as error:
        raise connection_problem(error, options.connect) from None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        await bus.close()
    return DONE


async def _be_the_only_one(bus: Bus, url: str) -> None:
    """Two would answer every agent, and take the run from each other. One that was asked to stop is given time to; one that
    hangs answers nothing, and is replaced. Raises ConfigError."""
    deadline = time.monotonic() + LEAVING_S
    while True:
        try:
            await bus.request(subjects.submit(), b"", ANSWER_S)  # no run at all: refused, and that is an answer
        except BusError:
            return
        if time.monotonic() > deadline:
            hint = "Leave it at that: one serves all runs. To replace it, stop it first"
            await bus.close()
            raise ConfigError("--connect", f"a coordinator is up on {masked(url)} already", hint)
        await asyncio.sleep(0.2)


def run_forked(options: dict[str, Any]) -> int:
    """The same, as a nursery calls it."""
    return run(CoordinatorOptions(**{**options, "allow_task": tuple(options.get("allow_task", ()))}))
