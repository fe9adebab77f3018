"""The host of one run: opens the run, drives it to its end, and keeps this coordinator's objects of the run.

A host keeps no state that must survive. The spec and head are in the key-value bucket, and head names everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from syncline.bus.base import Bus
from syncline.bus.blobs import BlobGone
from syncline.bus.records import record_of
from syncline.errors import ConfigError, PeerError, StoreDown, Unavailable
from syncline.observe.telemetry import Telemetry
from syncline.runtime.child import Asked, ChildDied
from syncline.runtime.child_messages import WriteInitialModel
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec
from syncline.spec.submission import submitted_spec
from syncline.wire import subjects
from syncline.wire.messages import ENDED, Stop, Submit, decode, encode
from syncline_coordinator.evaluation import Evaluation
from syncline_coordinator.head import Deposed, HeadKeeper, RolledBack
from syncline_coordinator.merge.center import Center
from syncline_coordinator.merge.reducer import Reducer
from syncline_coordinator.model_loader import ModelLoader
from syncline_coordinator.offers import OfferReader
from syncline_coordinator.recovery import MAX_UNCONFIRMED_REPORTS, LossReports, head_under_new_term
from syncline_coordinator.reporting import StorageAlarm
from syncline_coordinator.reservation import (
    Reservation,
    ensure_streams,
    most_agents,
    release,
    require_model_stream,
    reserve,
)
from syncline_coordinator.run import Parts, Run
from syncline_coordinator.run_queue import commit_initial, give_up, gone, stop_reason

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shared:
    """The objects that the hosts of all runs share."""

    bus: Bus
    loader: ModelLoader
    loss_reports: LossReports
    storage_alarm: StorageAlarm
    executor: Executor | None  # runs the reducer's arithmetic; None: the event loop does
    evaluation_s: float | None  # the longest time of an evaluation; None: no limit
    public_key: Callable[[str], str]  # returns an agent's key, or '' for one without
    hold: Callable[[int], None]  # takes the number of bytes that are reserved on the bus for the hosted run


class RunHost:
    """Opens a run and drives it to its end.

    Attributes:
        run: the open run; None before.
    """

    def __init__(self, shared: Shared, keeper: HeadKeeper, opened: Callable[[RunHost], None]) -> None:
        """
        Args:
            opened: called when the run is open, before its policy is fed.
        """
        self.name = keeper.head.run
        self.run: Run | None = None
        self._shared = shared
        self._keeper = keeper
        self._opened = opened
        self._memory = SharedMemory()
        self._telemetry = Telemetry(shared.bus, self.name, subjects.COORDINATOR)
        self._stop_asked: Stop | None = None  # while the run was opened

    @property
    def has_ended(self) -> bool:
        """Whether head says that the run has ended."""
        return self._keeper.head.phase in ENDED

    async def stop(self, stop: Stop) -> None:
        """End the run at once, or with the commit of a merge that has begun. A run that is not open yet ends when it is."""
        if self.run is None:
            self._stop_asked = stop
        else:
            await self.run.stop(stop_reason(stop))

    async def drive(self) -> None:
        """Open the run and drive it to its end.

        Returns early if the run must be opened again: the broker has lost writes, or another coordinator has changed head.

        Raises:
            StreamFull, StoreDown: the broker does not store any more; opening the run again may succeed.
            ChildDied: the child was killed from outside, perhaps for lack of memory; opening the run again may succeed.
            Deposed: another coordinator drives the run.
            BusError: the bus is out of reach.
        """
        try:
            self.run = await self._open()
            self._opened(self)
            if self._stop_asked is not None:
                await self.run.stop(stop_reason(self._stop_asked))
            await self.run.keeper.notify()
            await self.run.pump()
        except RolledBack as error:
            await self._report_loss(error)
        except BlobGone as error:
            await give_up(self._keeper, gone(self.name, error), self._telemetry)
        except StoreDown:  # the run goes on when the broker stores again
            raise
        except (ConfigError, Unavailable, PeerError) as error:
            await give_up(self._keeper, str(error), self._telemetry)
            if self.run is not None and self.has_ended:  # else the streams may belong to another coordinator's run
                await release(self._shared.bus, self.name, ended=True)
        except ChildDied as error:
            if error.from_outside:
                raise
            await give_up(self._keeper, f"the process that makes the model died: {error}", self._telemetry)
        except Deposed as error:
            log.warning("run %s: %s", self.name, error)
            if await self._keeper.is_taken():  # else both would take the run from each other without end
                raise
        else:
            await release(self._shared.bus, self.name, ended=True)
        finally:
            if self.has_ended:  # else it is opened again, and holds its streams meanwhile
                self._shared.hold(0)

    async def close(self) -> None:
        """End the evaluating child and free the center's memory."""
        if self.run is not None and self.run.parts.evaluation is not None:
            await self.run.parts.evaluation.close()
        self._memory.close()

    async def _report_loss(self, error: RolledBack) -> None:
        """Publish a loss, and the agent that is not trusted any more if this was one report too many."""
        text = (
            f"run {self.name}: {error}. The run continues from the head that the broker has; updates that are not merged "
            "in it are trained again"
        )
        await self._telemetry.event("broker-rolled-back", text, level="error")
        if agent := self._shared.loss_reports.record(self.name, error):
            text = (
                f"{agent} has reported {MAX_UNCONFIRMED_REPORTS} losses that no other agent reported: its reports are "
                "ignored until the connection to the broker is lost again"
            )
            await self._telemetry.event("not-believed", text, level="warning", agent=agent)

    # -- opening -------------------------------------------------------------------------------------------------------
    async def _open(self) -> Run:
        """Open the run as its spec and head say.

        Raises:
            Deposed: the run has ended, or another coordinator has changed head.
            RolledBack: the model of version 0 is lost; it can be made again.
            BlobGone: another blob that head names is lost.
        """
        entry = await self._shared.bus.kv_get(subjects.RUNS_BUCKET, subjects.spec_key(self.name))
        if entry is None or self.has_ended:
            raise Deposed("the run ended before it was opened here")
        spec = submitted_spec(decode(Submit, entry.value))
        try:
            return await self._opened_run(spec)
        except BlobGone:  # lost by the broker, or purged by another coordinator that has moved head
            if not await self._keeper.is_newest():
                raise Deposed("another coordinator changed head while the run was opened") from None
            if self._keeper.head.version == 0:  # that version can be made again
                raise RolledBack("the first version is not on the bus", self._keeper.head.term) from None
            raise

    async def _opened_run(self, spec: RunSpec) -> Run:
        """Load the model, reserve or check the space, make the center, and take over head.

        The center of a new run is made by the child, and committed as version 0; that of any other run is read from the bus.
        """
        shared = self._shared
        keeper = self._keeper
        bus = shared.bus
        lost_term = shared.loss_reports.highest_term(self.name)
        anew = keeper.head.model is None or (lost_term is not None and keeper.head.version == 0)
        if not anew:
            await require_model_stream(bus, self.name)
        layout = None if anew else keeper.head.manifest
        known = b"" if layout is None else await record_of(bus, self.name, layout)
        child, manifest = await shared.loader.load(spec, self._memory, known, check=False)
        try:
            await (reserve if anew else ensure_streams)(bus, spec, manifest)
            shared.hold(Reservation.of(spec, manifest, most_agents(spec)).total)
            center = Center(manifest, self._memory, spec.state_vectors)
            reducer = Reducer(bus, spec, manifest, center, shared.executor)
            if anew or keeper.head.model is None:
                await child.ask(WriteInitialModel())
                await commit_initial(bus, keeper, reducer, manifest, lost_term)
            else:
                await reducer.get_center(keeper.head.model, keeper.head.version)
                head = await head_under_new_term(bus, keeper.head, lost_term)
                await keeper.check()  # a broker that lost writes gives revisions again
                await keeper.write(head)
            shared.loss_reports.recovered(self.name)
            offers = OfferReader(bus, self.name, manifest, spec.wire.codec, shared.public_key)
            parts = Parts(
                bus,
                spec,
                manifest,
                center,
                reducer,
                self._telemetry,
                offers,
                None,
                most_agents(spec),
                shared.storage_alarm,
            )
            is_trusted = partial(shared.loss_reports.is_trusted, self.name)
            run = Run(parts, keeper, is_trusted=is_trusted, rolled_back=lost_term is not None)
            if spec.evaluate.center:
                start = partial(self._fresh_evaluator, spec, encode(manifest))
                parts.evaluation = Evaluation(child, start, self._telemetry, run.evaluated, shared.evaluation_s)
            else:
                await child.close()
            await run.resume()
        except BaseException:
            await child.close()
            raise
        return run

    async def _fresh_evaluator(self, spec: RunSpec, manifest: bytes) -> Asked:
        child, _ = await self._shared.loader.load(spec, self._memory, manifest)
        return child
