"""Heartbeats of an agent in a run: signs of life and of progress. The coordinator answers with its plans for the agent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from syncline.bus.base import Bus
from syncline.chance import jitter
from syncline.errors import BusError, PeerError, SynclineError
from syncline.wire import subjects
from syncline.wire.messages import Heartbeat, Welcome, decode, encode
from syncline_agent.identity import AgentIdentity
from syncline_agent.run_view import RunView
from syncline_agent.session_status import SessionStatus
from syncline_agent.states import SessionState
from syncline_agent.training_child import Training

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
HEARTBEATS_TO_MISS = 5  # in a row, before this agent counts as lost
ANSWER_S = 5.0
GOODBYE_S = 1.0
HELLO_ANSWERED_S = 0.05  # from a hello to the next heartbeat


class Superseded(SynclineError):
    """Another process has claimed this agent's name: exit."""


class Heartbeats:
    """Sends heartbeats of one session.

    Attributes:
        interval_s: from one heartbeat to the next; the run's settings may shorten it.
    """

    def __init__(
        self, bus: Bus, run: str, identity: AgentIdentity, status: SessionStatus, view: RunView, training: Training
    ) -> None:
        self.interval_s = HEARTBEAT_S
        self._bus = bus
        self._run = run
        self._identity = identity
        self._status = status
        self._view = view
        self._training = training
        self._subject = subjects.heartbeat(run, identity.agent)

    async def beat(self, hello: Callable[[], Awaitable[str]]) -> None:
        """Send heartbeats until the coordinator has other plans for this agent.

        Args:
            hello: claims the session again and returns the run to take part in.

        Raises:
            Superseded: another process has claimed this agent's name.
        """
        while True:
            self._status.significant.clear()
            try:
                data = await self._bus.request(self._subject, encode(self._heartbeat()), ANSWER_S)
                answer = decode(Welcome, data)
                if answer.superseded:
                    raise Superseded(answer.reason)
                if not answer.run and not answer.unknown:
                    log.info("no place in run %s: %s", self._run, answer.reason)
                    return
                if answer.unknown:  # the coordinator was restarted, or has counted this agent as lost
                    if await hello() not in ("", self._run):
                        return
                    await asyncio.sleep(HELLO_ANSWERED_S)
                    continue
            except BusError as error:
                log.debug("heartbeat: %s", error)
            except PeerError as error:
                log.warning("heartbeat: %s", error)
            try:
                async with asyncio.timeout(jitter(self.interval_s, 0.8, 1.0)):
                    await self._status.significant.wait()
            except TimeoutError:
                pass

    async def say_goodbye(self) -> None:
        """Tell the coordinator that this agent leaves, so that no round waits for it."""
        self._status.enter(SessionState.LEFT)
        try:
            await self._bus.request(self._subject, encode(self._heartbeat()), GOODBYE_S)
        except BusError:
            pass  # the coordinator will miss the heartbeats

    def _heartbeat(self) -> Heartbeat:
        status = self._status
        term, version, round_ = self._view.highest
        return Heartbeat(
            session=self._identity.session,
            clock=status.clock,
            progress=self._training.progress().steps_ever,
            state=status.state.reported,
            reason=status.reason,
            seen_term=term,
            seen_version=version,
            seen_round=round_,
            seen_epoch=status.epoch,
            handed=status.acknowledged,
        )
