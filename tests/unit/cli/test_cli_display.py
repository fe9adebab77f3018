"""What is drawn fits the terminal, and what is printed elsewhere is a line now and then."""

from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from syncline.observe.feed import FeedMessage
from syncline.observe.naming import natural_order
from syncline.observe.run_state import RunState
from syncline.observe.telemetry import CenterEval, Round, Train
from syncline_cli.ui import display
from syncline_cli.ui.display import Message, RunView, Screen, counted, megabytes, number


def state_of(agents: int, version: int = 13) -> RunState:
    state = RunState("r", versions=40, steps=20)
    for i in range(1, agents + 1):
        train = Train(
            state="training",
            version=version,
            clock=version,
            step=11,
            steps=20,
            loss=0.0203,
            samples_per_s=12345.0,
            part=i,
            rows=300,
            bytes_up=0,
            bytes_down=0,
        )
        state.handle(FeedMessage("r", f"a{i}", train.kind, train))
    for v in range(1, version + 1):
        result = CenterEval(version=v, metrics={"loss": 1 / v, "accuracy": 1 - 1 / (v + 1)}, seconds=0.1)
        state.handle(FeedMessage("r", "coordinator", result.kind, result))
    done = Round(
        version=version,
        closed_by="",
        merged=4,
        late=[],
        seconds=1,
        collect_s=1,
        merge_s=0,
        bytes_up=2_700_000,
        bytes_down=700_000,
    )
    state.handle(FeedMessage("r", "coordinator", done.kind, done))
    return state


def drawn(view: RunView | Message, width: int, height: int = 40) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, height=height, force_terminal=True, color_system=None).print(
        view.picture(width, height)
    )
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_a_picture_is_never_wider_than_the_terminal(width: int) -> None:
    for line in drawn(RunView("training together", state_of(4), about="handwritten digits, " * 5), width):
        assert len(line) <= width


def test_a_picture_shows_agents_rounds_and_metrics() -> None:
    lines = drawn(RunView("training together", state_of(2)), 80)
    text = "\n".join(lines)
    for shown in ("a1 ", "a2 ", "11/20", "loss 0.0203", "12,345 rows/s", "13 of 40", "accuracy", "0.929", "2.7 MB up"):
        assert shown in text


def test_more_agents_than_the_terminal_has_lines_are_counted() -> None:
    lines = drawn(RunView("training together", state_of(60)), 80, height=24)
    assert len(lines) <= 24
    assert any("more agents" in line for line in lines)


def test_a_line_before_the_first_round_says_nothing() -> None:
    assert RunView("t", RunState("r", versions=40)).line() == ""
    assert (
        RunView("t", state_of(1)).line().startswith("round 13/40  accuracy 0.929  loss 0.0769  2.7 MB up, 0.7 MB down")
    )


def test_a_line_says_of_which_round_its_metrics_are_where_it_is_another() -> None:
    state = state_of(1)
    assert state.round is not None
    state.round = state.round.model_copy(update={"version": 14})
    assert RunView("t", state).line().startswith("round 14/40  accuracy 0.929  loss 0.0769  after 13  2.7 MB up")


def test_agents_alone_make_progress_by_their_steps() -> None:
    view = RunView("each agent alone", state_of(4), summary="shared model: …")
    assert view.progress() == pytest.approx(11 / 20)
    assert "55%" in view.line()


async def test_off_a_terminal_a_line_comes_with_every_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "FRAME_S", 0.0)
    out = io.StringIO()
    state = RunState("r", versions=40)
    async with Screen(Console(file=out, width=80), RunView("t", state)) as screen:
        for version in range(1, 41):
            done = state_of(0, version)
            state.round, state.metrics = done.round, done.metrics
            for _ in range(3):
                await asyncio.sleep(0)
        screen.say("warning", "a2 lost")
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("round")] == [
        f"{v}/40" for v in (1, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40)
    ]
    assert lines[-1] == "a2 lost"


async def test_off_a_terminal_a_line_is_not_said_again_while_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "FRAME_S", 0.0)
    now_s = 0.0
    monkeypatch.setattr(display, "since_start_s", lambda: now_s)
    out = io.StringIO()
    state = state_of(0, 3)
    async with Screen(Console(file=out, width=80), RunView("t", state)):
        for now_s in (1.0, 20.0, 40.0):  # noqa: B007
            for _ in range(3):
                await asyncio.sleep(0)
    assert [line.rpartition("  ")[2] for line in out.getvalue().splitlines()] == ["1.0 s"]


def test_what_an_agent_says_does_not_command_the_terminal() -> None:
    out = io.StringIO()
    Screen(Console(file=out, force_terminal=True, color_system=None)).say("warning", "a2: \x1b[2J\x07 gone\nreally")
    assert out.getvalue() == "a2: �[2J� gone\nreally\n"


def test_figures_in_words() -> None:
    assert [number("accuracy", 0.98765), number("loss", 0.01234), number("loss", 123456.0)] == [
        "0.988",
        "0.0123",
        "1.235e+05",
    ]
    assert number("loss", None) == "—"
    assert [megabytes(0), megabytes(2_450_000), megabytes(3_200_000_000)] == ["0.0 MB", "2.5 MB", "3.20 GB"]
    assert [counted(1, "round"), counted(1200, "round")] == ["1 round", "1,200 rounds"]
    assert sorted(["a10", "a2", "b", "a1"], key=natural_order) == ["a1", "a2", "a10", "b"]
