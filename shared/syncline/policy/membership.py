"""Sessions of a fleet with their heartbeats and progress, and the numbers of a run's agents. Pure: time is an argument.

An agent is *lost* when its heartbeats stop for `agents.lost_after_s`. An agent is *slow* when its heartbeats arrive and its
training makes no progress for the longest of: `agents.lost_after_s`, three median periods of the run, three times its own last
long pause. The next progress makes it *present* again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PATIENCE = 3  # median periods, or own pauses, without progress after which a training agent is slow
FIRST_STEP_S = 600.0  # the same before its first step ever: data are loaded then, and a device is woken


@dataclass(slots=True)
class Life:
    """One live session of an agent."""

    session: str
    heard_at_s: float
    progress: int = 0
    moved_at_s: float = 0.0  # when progress last changed, or work last began
    training: bool = False
    pause_s: float = 0.0  # between two signs of progress, the last long one; halved by each shorter one
    slow: bool = False


@dataclass(slots=True)
class Membership:
    """Sessions of a fleet: one live session per agent id, the one that said hello last."""

    lost_after_s: float
    lives: dict[str, Life] = field(default_factory=dict)
    latest: dict[str, str] = field(default_factory=dict)  # agent → the session that claimed it last, lost or not
    superseded: dict[str, str] = field(default_factory=dict)  # old session → the one that took over

    def claim(self, agent: str, session: str, now_s: float) -> str:
        """Handle a hello; return the session that it replaces, or ''. A superseded session cannot claim again."""
        if session in self.superseded:
            return ""
        known = self.lives.get(agent)
        if known is not None and known.session == session:
            known.heard_at_s = known.moved_at_s = now_s
            known.slow = False
            return ""
        before = self.latest.get(agent, session)
        if before != session:
            self._supersede(before, session)
        self.latest[agent] = session
        old = known.session if known is not None else ""
        self.lives[agent] = Life(session, now_s, moved_at_s=now_s)
        return old

    def expect(self, agent: str, now_s: float, slow: bool = False) -> None:
        """Give an agent of a run that is taken over `lost_after_s` to be heard.

        Args:
            slow: the run knows that the agent is slow. `slowed` reports an agent again that became slow before the run was
                opened.
        """
        life = self.lives.setdefault(agent, Life("", now_s, moved_at_s=now_s))
        life.slow = life.slow and slow

    def holds(self, agent: str, session: str) -> bool:
        """Return whether this is the live session of the agent."""
        life = self.lives.get(agent)
        return life is not None and life.session == session

    def heard(self, agent: str, session: str, progress: int, training: bool, now_s: float) -> bool:
        """Handle a heartbeat; return False if the session is not the live one."""
        if not self.holds(agent, session):
            return False
        life = self.lives[agent]
        life.heard_at_s = now_s
        if progress != life.progress or training != life.training or not training:
            if life.training:
                life.pause_s = max(now_s - life.moved_at_s, life.pause_s / 2)
            life.progress, life.training, life.moved_at_s, life.slow = progress, training, now_s, False
        return True

    def is_slow(self, agent: str) -> bool:
        """Return whether the agent is heard of and makes no progress."""
        life = self.lives.get(agent)
        return life is not None and life.slow

    def stood_still(self, now_s: float) -> None:
        """Count every agent as heard and progressing now: this process was stopped for a while, and heard nothing."""
        for life in self.lives.values():
            life.heard_at_s = life.moved_at_s = now_s

    def expired(self, now_s: float) -> list[tuple[str, str]]:
        """Return the agents that are lost, with the reason, and forget them."""
        lost = [
            (agent, f"not heard of for {now_s - life.heard_at_s:.1f} s")
            for agent, life in sorted(self.lives.items())
            if now_s - life.heard_at_s > self.lost_after_s
        ]
        for agent, _ in lost:
            del self.lives[agent]
        return lost

    def slowed(self, now_s: float, period_s: float) -> list[tuple[str, str]]:
        """Return the agents that have become slow since the last call, with the reason. `period_s`: the median period."""
        slow = []
        for agent, life in sorted(self.lives.items()):
            patience_s = self._patience_s(life, period_s)
            if life.training and not life.slow and now_s - life.moved_at_s > patience_s:
                life.slow = True
                slow.append((agent, self._why_slow(life, now_s - life.moved_at_s, patience_s)))
        return slow

    def next_expiry_s(self, period_s: float) -> float | None:
        """Return the first time at which an agent can be lost or slow, as known now; None without agents."""
        lost = (life.heard_at_s + self.lost_after_s for life in self.lives.values())
        slow = (
            life.moved_at_s + self._patience_s(life, period_s)
            for life in self.lives.values()
            if life.training and not life.slow
        )
        return min((*lost, *slow), default=None)

    def _patience_s(self, life: Life, period_s: float) -> float:
        """Seconds without progress after which the agent is slow."""
        patience_s = max(self.lost_after_s, PATIENCE * period_s, PATIENCE * life.pause_s)
        return patience_s if life.progress else max(patience_s, FIRST_STEP_S)

    def _why_slow(self, life: Life, still_s: float, patience_s: float) -> str:
        rule = "agents.lost_after_s"
        if patience_s > self.lost_after_s:
            rule = "three of its usual pauses or of the run's periods" if life.progress else "a first step may take"
        return f"no progress for {still_s:.1f} s, more than {patience_s:g} s ({rule})"

    def _supersede(self, old: str, new: str) -> None:
        self.superseded[old] = new
        while len(self.superseded) > 10_000:  # bounded: the oldest claims are forgotten first
            del self.superseded[next(iter(self.superseded))]


@dataclass(slots=True)
class Numbering:
    """The agents of a run, numbered for good; number i trains on part i of `parts`."""

    names: list[str] = field(default_factory=list)
    fixed_parts: int | None = None  # a setting; else one part per agent
    max_agents: int | None = None

    @property
    def parts(self) -> int:
        """Return the number of parts of the data."""
        return self.fixed_parts or max(1, len(self.names))

    def admit(self, agents: list[str]) -> list[tuple[str, str]]:
        """Number new agents in the order of their names; return those that are refused, with the reason."""
        refused = []
        for agent in sorted(set(agents) - set(self.names)):
            if why_not := self.why_no_room(len(self.names)):
                refused.append((agent, why_not))
            else:
                self.names.append(agent)
        return refused

    def why_no_room(self, agents: int) -> str:
        """Return why one more agent beside so many is refused, or ''."""
        if self.max_agents is not None and agents >= self.max_agents:
            return f"the run has its agents.max = {self.max_agents} agents"
        if self.fixed_parts is not None and agents >= self.fixed_parts:
            return f"all partition.parts = {self.fixed_parts} parts have an agent"
        return ""
