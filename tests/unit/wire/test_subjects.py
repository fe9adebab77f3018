"""Names and subjects: one token per name, and the agent is the token that the broker let through."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncline.errors import ConfigError, PeerError
from syncline.wire import subjects
from syncline.wire.subjects import NAME, RESERVED, agent_of, checked_name, run_of

names = st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True)
RUN, AGENT, BLOB = "run-1", "a1", "0" * 32
OF_AGENTS = [subjects.offer(RUN, AGENT), subjects.heartbeat(RUN, AGENT), subjects.update_prefix(RUN, AGENT, BLOB)]
OF_RUNS = [
    subjects.model_prefix(RUN, BLOB),
    subjects.outer_prefix(RUN, BLOB),
    subjects.notify(RUN),
    subjects.metrics(RUN, AGENT, "train"),
    subjects.events(RUN, AGENT),
    subjects.log_record(RUN, 3, 1),
]


@given(names.filter(lambda name: name not in RESERVED))
def test_a_name_that_is_one_is_given_back(name: str) -> None:
    assert checked_name("name", name) == name


@pytest.mark.parametrize("name", ["", "A1", "a.b", "a b", "a_b", "ä", "a" * 64, "*", ">", "a\n", "a/b", "$sys"])
def test_what_is_no_token_of_a_subject_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked_name("agent", name)
    assert str(error.value) == f"agent: {name!r} is not a name. Use 1 to 63 of a-z, 0-9 and '-'"


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^name: '{name}' is reserved"):
        checked_name("name", name)


@pytest.mark.parametrize("subject", [*OF_AGENTS, *OF_RUNS, subjects.hello(AGENT), subjects.submit(), subjects.stop()])
def test_every_subject_is_under_the_prefix_and_of_whole_tokens(subject: str) -> None:
    assert subject.startswith("syncline.v1.")
    assert all(re.fullmatch(r"[a-z0-9-]+", token) for token in subject.split("."))


@pytest.mark.parametrize("subject", [*OF_AGENTS, *OF_RUNS])
def test_the_run_is_read_from_the_subject(subject: str) -> None:
    assert run_of(subject) == RUN


@pytest.mark.parametrize("subject", [*OF_AGENTS, subjects.hello(AGENT), f"{OF_AGENTS[2]}.7"])
def test_the_agent_is_read_from_the_subject(subject: str) -> None:
    assert agent_of(subject) == AGENT


@pytest.mark.parametrize(
    "subject", [*OF_RUNS, subjects.submit(), subjects.stop(), "", "agent.a1", "syncline.v1.run-1.agent.a1", "......"]
)
def test_a_subject_of_no_agent_is_the_peers_mistake(subject: str) -> None:
    with pytest.raises(PeerError, match="is not an agent's subject"):
        agent_of(subject)


@given(names, names)
def test_subjects_of_different_agents_never_meet(one: str, other: str) -> None:
    if one != other:
        assert not subjects.offer(RUN, one).startswith(f"{subjects.PREFIX}.{RUN}.agent.{other}.")
        assert subjects.update_prefix(RUN, one, BLOB) != subjects.update_prefix(RUN, other, BLOB)


def test_streams_and_keys_carry_the_name_of_their_run() -> None:
    made = [subjects.updates_stream, subjects.offers_stream, subjects.model_stream, subjects.log_stream]
    assert [stream(RUN) for stream in made] == [f"SYNCLINE_{s}_{RUN}" for s in ("UPDATES", "OFFERS", "MODEL", "LOG")]
    assert (subjects.spec_key(RUN), subjects.head_key(RUN)) == ("run-1.spec", "run-1.head")


def test_the_longest_name_is_still_a_name() -> None:
    assert NAME.fullmatch("a" * 63) and not NAME.fullmatch("a" * 64)
