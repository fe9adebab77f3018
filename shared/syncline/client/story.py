"""The story of an agent in a run that goes on: the coordinator's recent decisions that concern the agent."""

from __future__ import annotations

from syncline.bus.base import Bus
from syncline.client.runs import head_of
from syncline.errors import ConfigError
from syncline.wire import subjects
from syncline.wire.messages import ENDED, Story, StoryTold, decode, encode

ANSWER_S = 10.0


async def story(bus: Bus, run: str, agent: str) -> list[str]:
    """Return the recent facts and decisions that concern an agent, one on each line, the oldest first.

    A coordinator remembers its last decisions only, and begins anew when it is started again.

    Args:
        bus: a connection with a coordinator's key.

    Raises:
        ConfigError: no such run, the coordinator does not drive it now, or it made no decision about this agent.
        NoResponders: no coordinator is up.
    """
    head = await head_of(bus, run)
    if head.phase in ENDED:
        hint = f"Its commits are explained by `syncline why {run} VERSION`"
        raise ConfigError(
            "--agent", f"run {run} has ended, and the story of an agent is kept while its run goes on", hint
        )
    question = encode(Story(run=run, agent=subjects.checked_name("--agent", agent)))
    answer = decode(StoryTold, await bus.request(subjects.story(), question, ANSWER_S))
    if not answer.known:
        raise ConfigError("--agent", f"the coordinator does not drive run {run} now", "See `syncline ls`")
    if not answer.lines:
        hint = f"Names of agents are shown by `syncline watch {run}`"
        raise ConfigError("--agent", f"the coordinator of run {run} made no recent decision about {agent!r}", hint)
    return answer.lines
