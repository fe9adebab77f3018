"""One local period as the session follows it, from the question to the training child to the offer of its update."""

from __future__ import annotations

from dataclasses import dataclass

from syncline.policy.states import check_transition
from syncline.runtime.child_messages import PeriodReport, TrainPeriod
from syncline_agent.states import LOCAL_PERIOD_TRANSITIONS, PeriodState


@dataclass(slots=True)
class LocalPeriod:
    """A period and its update, which stays in the outbox `question.outbox` until the period is over."""

    question: TrainPeriod
    base: int  # version of the center that the update deviates from; elastic averaging makes it from a newer one
    term: int  # under which that center was the newest
    epoch: int  # of the head that named the center
    report: PeriodReport | None = None  # None: the period is not over
    state: PeriodState = PeriodState.TRAINING

    def enter(self, state: PeriodState) -> None:
        """Change the state. Raises AssertionError for a transition that LOCAL_PERIOD_TRANSITIONS does not have."""
        check_transition(LOCAL_PERIOD_TRANSITIONS, self.state, state)
        self.state = state
