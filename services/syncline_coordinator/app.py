"""The coordinator's process: connects to the broker, starts the nursery and serves until a signal.

Reductions run in threads of this process. The model and the evaluation live in a child process, which the nursery forks from
a process that has imported torch.
"""

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
ANSWER_S = 1.0  # a coordinator that is up answers within this time
LEAVING_S = 3.0  # given to a coordinator that was asked to stop
RETRY_S = 0.2
EVALUATION_S = 3600.0  # an evaluation that takes longer is given up


def run(options: CoordinatorOptions) -> int:
    """Serve until a signal asks the process to stop.

    Returns:
        The exit code: DONE after a signal, FAILED if another coordinator took over.

    Raises:
        ConfigError: an option is wrong, the broker cannot be used, or another coordinator is up.
    """
    set_up_logging(options.log_file)
    name_process(COORDINATOR)
    seed = read_seed(Path(options.key)) if options.key else ""
    # Absolute, since the child changes to its task's directory.
    options = replace(options, task_dir=str(Path(options.task_dir).absolute()))
    nursery = Nursery.start(("torch",))

    async def work() -> int:
        nursery.open()
        try:
            return await _serve(options, seed, nursery)
        finally:
            await nursery.close()

    return run_service(work)


async def _serve(options: CoordinatorOptions, seed: str, nursery: Nursery) -> int:
    """Connect and serve. Return the exit code.

    Args:
        seed: of the coordinator's key; '' connects without a key.
    """
    try:
        tls = Tls(options.tls_ca, options.tls_cert, options.tls_key)
        bus = await connect(options.connect, COORDINATOR, seed, tls=tls, patience_s=options.patience_s)
    except BusError as error:
        raise connection_problem(error, options.connect) from None
    await _require_only_coordinator(bus, options.connect)
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


async def _require_only_coordinator(bus: Bus, url: str) -> None:
    """Check that no other coordinator answers requests.

    Two coordinators would both answer every agent and take the run from each other. A coordinator that was asked to stop gets
    `LEAVING_S` to end. One that hangs does not answer, and is replaced.

    Raises:
        ConfigError: another coordinator is up.
    """
    deadline = time.monotonic() + LEAVING_S
    while True:
        try:
            await bus.request(subjects.submit(), b"", ANSWER_S)  # an empty submission is refused: that is an answer
        except BusError:
            return
        if time.monotonic() > deadline:
            hint = "One coordinator serves all runs. To replace it, stop it first"
            await bus.close()
            raise ConfigError("--connect", f"a coordinator is up on {masked(url)} already", hint)
        await asyncio.sleep(RETRY_S)


def run_forked(options: dict[str, Any]) -> int:
    """Serve as `run` does, in a process that a nursery has forked.

    Args:
        options: the fields of `CoordinatorOptions`, as JSON types.
    """
    return run(CoordinatorOptions(**{**options, "allow_task": tuple(options.get("allow_task", ()))}))
