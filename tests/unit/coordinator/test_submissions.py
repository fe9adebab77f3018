"""A run whose check takes long: its submitter waits as long as the coordinator lives, and is told what it does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, cast

import pytest

from syncline import __version__
from syncline.bus.base import Bus, Delivery
from syncline.client import submit as client
from syncline.client.submit import ANSWER_S, SILENT_S
from syncline.errors import BusError, ConfigError, NoResponders, Unavailable, Unreachable
from syncline.spec.run_spec import RunSpec, parse
from syncline.spec.submission import submission
from syncline.wire.messages import Submit, Submitted, decode, encode
from syncline_coordinator.submissions import ABANDONED_S, MAX_CHECKS, Submissions

Simulated = Callable[[Any], tuple[Any, float]]


def spec_of(name: str) -> RunSpec:
    return parse(RunSpec, {"name": name, "task": "syncline.tasks.noop:Noop"})


class Coordinator:
    """Checks runs for as long as `seconds` says, and is asked over a bus that loses what `down` says."""

    def __init__(self, seconds: dict[str, float], doing: str = "makes the model", **raises: Exception) -> None:
        self.seconds, self.doing, self.raises = seconds, doing, raises
        self.begun: list[str] = []
        self.given_up: list[str] = []
        self.down: list[BusError] = []
        self._asked = 0
        self.start()

    def start(self) -> None:
        self.submissions = Submissions(self._accept, lambda run: self.doing, self._answer)
        self._replies: dict[str, asyncio.Future[bytes]] = {}

    async def _accept(self, spec: RunSpec, record: Submit) -> list[str]:
        self.begun.append(spec.name)
        try:
            await asyncio.sleep(self.seconds.get(spec.name, 0.0))
        except asyncio.CancelledError:
            self.given_up.append(spec.name)
            raise
        if spec.name in self.raises:
            raise self.raises[spec.name]
        return [f"{spec.name} is doubtful"]

    async def _answer(self, question: Delivery, said: Submitted) -> None:
        reply = self._replies.pop(question.reply, None)
        if reply is not None and not reply.done():
            reply.set_result(encode(said))

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        if self.down:
            await asyncio.sleep(1.0)
            raise self.down.pop()
        self._asked += 1
        number = str(self._asked)
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        await self.submissions.on_submit(Delivery(subject, data, number))
        try:
            async with asyncio.timeout(timeout_s):
                return await reply
        except TimeoutError:
            raise Unreachable(f"no answer within {timeout_s:g} s") from None


async def submit(coordinator: Coordinator, spec: RunSpec, **how: Any) -> Submitted:
    """Submit over the coordinator's own bus, which has only `request`."""
    return await client.submit(cast(Bus, coordinator), spec, **how)


def test_the_submitter_waits_and_is_told_more_and_more_seldom(simulated: Simulated) -> None:
    async def work() -> list[str]:
        coordinator, said = Coordinator({"r": 135.0}), []
        answer = await submit(coordinator, spec_of("r"), say=lambda level, text: said.append(text))
        assert answer.run == "r" and answer.warnings == ["r is doubtful"] and coordinator.begun == ["r"]
        return said

    said, seconds = simulated(work())
    assert seconds == 135.0
    assert said == [f"waiting for the coordinator: it makes the model, for {at} s" for at in (10, 20, 40, 80)]


def test_a_change_of_what_is_done_is_told_at_once(simulated: Simulated) -> None:
    async def work() -> list[str]:
        coordinator, said = Coordinator({"r": 60.0}), []

        async def later() -> None:
            await asyncio.sleep(41.0)
            coordinator.doing = "loads the held-out data"

        changing = asyncio.create_task(later())
        await submit(coordinator, spec_of("r"), say=lambda level, text: said.append(text))
        await changing
        return said

    said, _ = simulated(work())
    assert said[-2:] == [
        "waiting for the coordinator: it makes the model, for 40 s",
        "waiting for the coordinator: it loads the held-out data, for 5 s",
    ]


def test_a_second_run_is_checked_after_the_first_and_its_submitter_knows_why(simulated: Simulated) -> None:
    async def work() -> list[str]:
        coordinator, said = Coordinator({"first": 30.0, "second": 1.0}), []
        first = asyncio.create_task(submit(coordinator, spec_of("first")))
        await asyncio.sleep(1.0)
        await submit(coordinator, spec_of("second"), say=lambda level, text: said.append(text))
        assert (await first).run == "first" and coordinator.begun == ["first", "second"]
        return said

    said, seconds = simulated(work())
    assert seconds == 31.0 and said[0] == "waiting for the coordinator: it checks run first first, for 10 s"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("task", "is no task", "Derive it"), "task: is no task. Derive it"),
        (Unavailable("the store is full"), "spec: the store is full"),
        (KeyError("a bug"), "spec: the coordinator failed to check the run: KeyError: 'a bug'"),
    ],
)
def test_a_refusal_comes_however_long_the_check_took(error: Exception, said: str, simulated: Simulated) -> None:
    async def work() -> str:
        with pytest.raises(ConfigError) as refused:
            await submit(Coordinator({"r": 200.0}, r=error), spec_of("r"))
        return str(refused.value)

    assert simulated(work()) == (said, 200.0)


def test_a_check_is_given_up_when_its_submitter_asks_no_more(simulated: Simulated) -> None:
    async def work() -> None:
        coordinator = Coordinator({"hangs": 1e6})
        gone = asyncio.create_task(submit(coordinator, spec_of("hangs")))
        await asyncio.sleep(100.0)
        assert coordinator.given_up == []
        gone.cancel()
        await asyncio.sleep(ABANDONED_S + ANSWER_S)
        assert coordinator.given_up == ["hangs"]
        assert (await submit(coordinator, spec_of("next"))).run == "next"

    simulated(work())


def test_a_verdict_between_two_questions_waits_for_the_next_one(simulated: Simulated) -> None:
    async def work() -> None:
        coordinator, data = Coordinator({"r": 5.5}), encode(submission(spec_of("r")))
        first = decode(Submitted, await coordinator.request("submit", data, ANSWER_S))
        assert first.doing == "makes the model" and not first.run
        await asyncio.sleep(10.0)
        assert decode(Submitted, await coordinator.request("submit", data, ANSWER_S)).run == "r"
        assert coordinator.begun == ["r"], "it was not checked a second time"
        await asyncio.sleep(1.0)
        await coordinator.request("submit", data, ANSWER_S)
        assert coordinator.begun == ["r", "r"], "the verdict was told, and is kept no longer"
        await asyncio.sleep(ABANDONED_S)

    simulated(work())


def test_what_is_no_submission_and_one_too_many_are_answered_at_once(simulated: Simulated) -> None:
    async def work() -> None:
        coordinator = Coordinator({"r0": 1e6})
        assert "submit" in decode(Submitted, await coordinator.request("submit", b"", 1.0)).problem
        waiting = [asyncio.create_task(submit(coordinator, spec_of(f"r{i}"))) for i in range(MAX_CHECKS)]
        await asyncio.sleep(1.0)
        with pytest.raises(ConfigError, match=f"{MAX_CHECKS} submitted runs are being checked"):
            await submit(coordinator, spec_of("more"))
        for task in waiting:
            task.cancel()
        await coordinator.submissions.close()
        assert coordinator.given_up == ["r0"]

    _, seconds = simulated(work())
    assert seconds == 1.0


def test_a_refusal_of_settings_names_the_version_that_refuses_them(simulated: Simulated) -> None:
    async def work() -> None:
        record = encode(Submit(spec={"task": "a.b:C", "local": {"warmth": 0.5}}))
        answer = decode(Submitted, await Coordinator({}).request("submit", record, 1.0))
        assert (answer.setting, answer.problem) == ("local.warmth", "there is no such setting")
        assert answer.hint.startswith("Known here: batch_size, ")
        assert f"The coordinator is Syncline {__version__}: upgrade it" in answer.hint

    simulated(work())


def test_the_submitter_outlasts_a_coordinator_that_is_started_again_and_no_silence(simulated: Simulated) -> None:
    async def work() -> None:
        coordinator = Coordinator({"r": 30.0})
        asking = asyncio.create_task(submit(coordinator, spec_of("r"), patience_s=5.0))
        await asyncio.sleep(12.0)
        await coordinator.submissions.close()
        coordinator.start()
        coordinator.down = [NoResponders("the subject has no subscriber")] * 40
        assert (await asking).run == "r" and coordinator.begun == ["r", "r"]
        coordinator.down = [Unreachable("no answer")] * 1000
        began_s = asyncio.get_running_loop().time()
        with contextlib.suppress(Unreachable):
            await submit(coordinator, spec_of("other"))
        assert SILENT_S < asyncio.get_running_loop().time() - began_s < SILENT_S + 3

    simulated(work())


def test_a_question_that_arrives_during_an_answer_does_not_hold_up_the_event_loop(simulated: Simulated) -> None:
    data, said = encode(submission(spec_of("x"))), []

    async def accept(spec: RunSpec, record: Submit) -> list[str]:
        await asyncio.sleep(8.0)
        return []

    async def main() -> None:
        async def answer(question: Delivery, verdict: Submitted) -> None:
            said.append((question.reply, verdict.doing))
            if question.reply == "1":
                await submissions.on_submit(Delivery("", data, "2"))

        submissions = Submissions(accept, lambda run: "loads the task", answer)
        await submissions.on_submit(Delivery("", data, "1"))
        await asyncio.sleep(ABANDONED_S / 2)  # the verdict is known before the next question
        await submissions.on_submit(Delivery("", data, "3"))
        await asyncio.sleep(1.0)
        await submissions.close()

    simulated(main())
    assert said == [("1", "loads the task"), ("2", "loads the task"), ("3", "")]
