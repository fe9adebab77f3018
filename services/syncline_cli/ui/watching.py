"""`syncline watch` on a terminal, in plain lines, or as JSON lines.

The command subscribes to metrics and events. Its only question to the broker is the head of a selected run that is not heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from syncline.bus.base import Delivery
from syncline.bus.server.accounts import SUFFIX, WATCH, read_seed
from syncline.bus.tls import Tls
from syncline.client.keys import watch_key
from syncline.client.runs import head_of
from syncline.errors import BusError, ConfigError, RunFailed
from syncline.observe.feed import FeedMessage
from syncline.observe.fleet_state import FleetState, RunEvent
from syncline.observe.run_state import RunState
from syncline.runtime.service import DONE
from syncline.wire.messages import ENDED, Head
from syncline.wire.subjects import COORDINATOR, FLEET, NAME, PREFIX
from syncline_cli.connect import BrokerChoice, choose_broker, command_with_options, connection_error
from syncline_cli.process import Interrupted, run_interruptible, silence_logging
from syncline_cli.ui.display import STYLES, clean, megabytes, number
from syncline_cli.ui.watch_view import DEAF, clock, event_line, picture, waiting_for

FRAME_S = 0.2  # shortest time between pictures
STILL_S = 1.0  # longest time between pictures: ages grow without messages too
LINE_S = 2.0  # shortest time between plain lines of versions
HINT_S = 4.0  # without a message, after which a hint is printed
LAST_S = 1.0  # for messages that are on their way when a run has ended
MAX_PENDING = 16_384  # messages that wait to be parsed; beyond that the newest are dropped
MAX_LINES = 10_000  # JSON lines that wait for a slow reader; beyond that the oldest are dropped


class _Pipe(Console):
    """A console that raises BrokenPipeError; rich would end the process with an error."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@dataclass(slots=True)
class WatchSession:
    """The state of one `syncline watch`."""

    at: BrokerChoice
    fleet: FleetState
    plain: bool
    as_json: bool
    head_key: str | None = None  # a key file that may read heads; None: not known
    head: Head | None = None  # of a selected run that ended unheard
    console: Console = field(default_factory=lambda: _Pipe(highlight=False))
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    unprinted: deque[RunEvent] = field(default_factory=lambda: deque(maxlen=1000))  # events
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LINES))

    @classmethod
    def of(
        cls, run: str, connect: str, key: str, *, plain: bool, as_json: bool, tls: Tls | None = None
    ) -> WatchSession:
        """Return the state for the options of the command. Raises ConfigError for an invalid run name, key or broker."""
        if run and not NAME.fullmatch(run):
            raise ConfigError("RUN", f"{run!r} is not a run's name", "Use 1 to 63 of a-z, 0-9 and '-'")
        at, asking = choose_broker(connect, key, WATCH, tls), choose_broker(connect, key, tls=tls)
        may_ask = not asking.key or Path(asking.key).name == f"{COORDINATOR}{SUFFIX}"
        at = replace(at, key=watch_key(at.key))
        if key and at.key != key:
            print(f"watching with the key {at.key}, of the same set as {key}", file=sys.stderr)
        return cls(at, FleetState(run), plain, as_json, asking.key if may_ask else None)

    async def on_message(self, delivery: Delivery) -> None:
        """Take a message of the feeds."""
        message = self.fleet.handle(delivery.subject, delivery.data, time.monotonic())
        if message is None:
            return
        if message.event is not None:
            self.unprinted.append(RunEvent(message.run, message.event))
        if self.as_json and self.fleet.selected in ("", message.run) and (line := json_line(message, delivery.data)):
            self.lines.append(line)
        self.changed.set()

    @property
    def on_terminal(self) -> bool:
        """Whether a live picture is drawn."""
        console = self.console
        return console.is_terminal and not (console.is_dumb_terminal or self.plain or self.as_json)

    @property
    def state(self) -> RunState | None:
        """The run that is shown."""
        return self.fleet.shown(time.monotonic())

    @property
    def ended(self) -> bool:
        """Whether watching ends: the selected run has ended or does not exist, or the local fleet has ended."""
        state = self.state
        return (
            bool(self.fleet.selected and state is not None and state.phase in ENDED)
            or self.fleet.absent
            or (self.at.found and not Path(self.at.key).exists())
        )


def watch_run(watching: WatchSession) -> int:
    """Watch until the run has ended or the user leaves; return the exit code.

    Raises:
        ConfigError: the broker cannot be used, or the run does not exist.
        Interrupted: Ctrl-C.
        RunFailed: the run failed.
    """
    silence_logging()  # the connection heals itself, and the picture shows silence
    seed = read_seed(Path(watching.at.key)) if watching.at.key else ""
    try:
        return run_interruptible(lambda: _watch(watching, seed)) or _summary(watching)
    except BrokenPipeError:  # the reader of the lines has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Interrupted:
        state = watching.state
        goes_on = state is not None and state.phase not in ENDED
        raise Interrupted(f"; run {state.run} continues" if goes_on and state is not None else "") from None


async def _watch(watching: WatchSession, seed: str) -> int:
    at = watching.at
    try:
        bus = await at.connect(WATCH, seed)
    except BusError as error:
        raise connection_error(error, at) from None
    try:
        for feed in ("metrics.>", "events.*"):
            await bus.subscribe(f"{PREFIX}.*.{feed}", watching.on_message, limit=MAX_PENDING)
        show = _on_terminal if watching.on_terminal else _in_json if watching.as_json else _in_lines
        while True:
            await show(watching)
            if not watching.fleet.absent:
                return DONE
            watching.head = await _head_of_selected(watching)
            if watching.head is None or watching.head.phase in ENDED:
                return DONE
            watching.fleet.reset_absence()
    finally:
        await bus.close()


async def _head_of_selected(watching: WatchSession) -> Head | None:
    """Return the head of the selected run; None without a key or an answer. Raises ConfigError if the run does not exist."""
    if watching.head_key is None:
        return None
    seed = read_seed(Path(watching.head_key)) if watching.head_key else ""
    try:
        bus = await watching.at.connect("cli", seed)
    except BusError:
        return None
    try:
        return await head_of(bus, watching.fleet.selected)
    except BusError:
        return None
    finally:
        await bus.close()


# -- a terminal ---------------------------------------------------------------------------------------------------------


async def _on_terminal(watching: WatchSession) -> None:
    left = asyncio.Event()
    console, last_s = watching.console, 0.0
    with _keys(left), Live(console=console, screen=True, auto_refresh=False) as live:
        while not left.is_set() and not watching.ended:
            now_s = time.monotonic()
            if watching.changed.is_set() or now_s - last_s >= STILL_S:
                watching.changed.clear()
                last_s = now_s
                size = console.size
                text = picture(watching.fleet, size.width, size.height, now_s, time.time(), watching.at.shown)
                live.update(text, refresh=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FRAME_S):
                    await left.wait()
        if not left.is_set():
            await asyncio.sleep(LAST_S)


@contextlib.contextmanager
def _keys(left: asyncio.Event) -> Iterator[None]:
    """Set `left` when `q` is typed; suppress the echo of typed keys."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    stdin, loop = sys.stdin.fileno(), asyncio.get_running_loop()
    before = termios.tcgetattr(stdin)

    def typed() -> None:
        data = os.read(stdin, 64)
        if b"q" in data or not data:
            left.set()

    try:
        tty.setcbreak(stdin)
        loop.add_reader(stdin, typed)
        yield
    finally:
        loop.remove_reader(stdin)
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


# -- lines --------------------------------------------------------------------------------------------------------------


async def _in_lines(watching: WatchSession) -> None:
    """Print a line for every event, and at most every LINE_S one for the newest version."""
    began_s = time.monotonic()
    printed, printed_s = ("", -1), 0.0
    hinted = False
    while not watching.ended:
        await asyncio.sleep(FRAME_S)
        _print_events(watching)
        state, now_s = watching.state, time.monotonic()
        if state is None and not hinted and now_s - began_s > HINT_S:
            hinted = True
            for line in waiting_for(watching.fleet):
                _print(watching, Text(line, "dim"))
        if state is None or (state.status is None and not state.version):
            continue
        if state.deaf and not hinted:
            hinted = True
            _print(watching, Text(DEAF, STYLES["warning"]))
        if (state.run, state.version) != printed and now_s - printed_s >= LINE_S:
            printed, printed_s = (state.run, state.version), now_s
            _print(watching, Text(version_line(state, time.time())))
    await asyncio.sleep(LAST_S)
    _print_events(watching)
    if (state := watching.state) is not None and (state.run, state.version) != printed:
        _print(watching, Text(version_line(state, time.time())))


def _print_events(watching: WatchSession) -> None:
    state = watching.state
    shown = watching.fleet.selected or (state.run if state is not None else "")
    while watching.unprinted:
        event = watching.unprinted.popleft()
        if event.run in (shown, FLEET) or not watching.fleet.selected:
            _print(watching, event_line(event))


def _print(watching: WatchSession, line: Text) -> None:
    watching.console.print(line, soft_wrap=True)


def version_line(state: RunState, wall_s: float) -> str:
    """Return the state of a run as one line."""
    of = f" of {state.versions:,}" if state.versions else ""
    metrics = [f"{name} {number(name, state.metrics[name])}" for name in state.metric_names()[:3]]
    missing = [name for name, agent in state.agents.items() if agent.lost or agent.failed]
    agents = f"{len(state.agents) - len(missing)} of {len(state.agents)} agents"
    late = [f"late: {', '.join(state.round.late[:5])}"] if state.round is not None and state.round.late else []
    traffic = f"{megabytes(state.bytes_up)} up, {megabytes(state.bytes_down)} down"
    parts = [f"run {state.run}: version {state.version:,}{of}", *metrics, agents, *late, traffic]
    return f"{clock(wall_s)}  " + "  ".join(map(clean, parts))


# -- JSON ---------------------------------------------------------------------------------------------------------------


def json_line(message: FeedMessage, data: bytes) -> str:
    """Return the message with its run, sender and kind as a JSON object; '' for data that is not a JSON object."""
    source = {"run": message.run, "sender": message.sender, "kind": message.kind}
    try:
        fields = json.loads(data)
    except ValueError:
        return ""
    return json.dumps({**source, **fields, **source}) if isinstance(fields, dict) else ""


async def _in_json(watching: WatchSession) -> None:
    """Print JSON lines in a thread, so that a slow or stopped reader does not block the connection."""
    while True:
        ended = watching.ended
        batch = [watching.lines.popleft() for _ in range(len(watching.lines))]
        if batch:
            await asyncio.to_thread(_write, "".join(f"{line}\n" for line in batch))
        if ended:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FRAME_S):
                await watching.changed.wait()
        watching.changed.clear()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# -- the end ------------------------------------------------------------------------------------------------------------


def _summary(watching: WatchSession) -> int:
    """Print the last state of the run; return the exit code. Raises RunFailed and ConfigError as `watch_run` does."""
    if watching.fleet.absent:
        return _summary_of_head(watching)
    state = watching.state
    if state is not None and state.phase in ("failed", "refused"):
        raise RunFailed(state.ended)
    if watching.as_json:
        return DONE
    if state is None or state.phase not in ENDED:
        at, again = watching.at, f"syncline watch{' ' + state.run if state else ''}"
        again = again if at.found else command_with_options(again, at.url, at.key, at.tls)
        gone = at.found and not Path(at.key).exists()
        text = "the local fleet has ended" if gone else f"come back with: {again}"
        _print(watching, Text(text, STYLES["hint"]))
    elif watching.on_terminal:  # plain lines and JSON have it already
        _print(watching, Text(clean(state.ended)))
        _print(watching, Text(version_line(state, time.time())))
    return DONE


def _summary_of_head(watching: WatchSession) -> int:
    """Print the last state of a run that ended unheard."""
    head = watching.head
    if head is None:
        raise absent(
            watching.fleet, "" if watching.at.found else command_with_options("", watching.at.url, "", watching.at.tls)
        )
    text = f"run {head.run}: {head.reason}"
    if head.phase in ("failed", "refused"):
        raise RunFailed(text)
    if not watching.as_json:
        _print(watching, Text(clean(f"{text}; it ended at version {head.version:,}")))
    return DONE


def absent(fleet: FleetState, where: str) -> ConfigError:
    """Return the error for a run that the coordinator does not know.

    Args:
        where: options that lead to its broker, for the hint.
    """
    status = fleet.status
    running = [status.run] if status is not None and status.run else []
    queued = status.queued if status is not None else []
    busy = "; ".join(
        f"{phase}: {', '.join(names)}" for phase, names in (("running", running), ("queued", queued)) if names
    )
    problem = f"no run {fleet.selected} is running or queued; {busy or 'no other run is, either'}"
    close = difflib.get_close_matches(fleet.selected, [*running, *queued], n=1, cutoff=0.5)
    ended = f"With the coordinator's key, `syncline ls{where}` lists runs that have ended"
    return ConfigError("RUN", problem, f"Did you mean {close[0]}? {ended}" if close else ended)
