"""A run's settings are read by services of another minor version: unknown settings, and defaults that have changed."""

from __future__ import annotations

from typing import Literal

import pytest

from syncline.errors import ConfigError
from syncline.settings import Settings, parse
from syncline.spec.run_spec import RunSpec
from syncline.spec.sections import Iid, Local
from syncline.spec.submission import submission, submitted_spec
from syncline.wire.messages import Submit, decode, encode
from syncline_agent.session import spec_in


class NewerLocal(Local):
    warmth: float = 0.5


class NewerSection(Settings):
    depth: int = 1


class Newer(RunSpec):
    """Today's settings and some more; one of today's has another default."""

    local: NewerLocal = NewerLocal()
    sight: NewerSection = NewerSection()
    keep_models: int = 5


class ChangedDefault(RunSpec):
    keep_models: int = 5


def sent(record: Submit) -> Submit:
    return decode(Submit, encode(record))


def newer(**settings: object) -> Submit:
    return sent(submission(parse(Newer, {"task": "a.b:C", **settings})))


def test_a_reader_of_the_same_version_gets_the_same_spec() -> None:
    settings = {
        "task": "a.b:C",
        "task_options": {"rate": float("inf"), "sizes": [1, 2]},
        "local": {"steps": 5, "optimizer": {"kind": "adam", "betas": [0.8, 0.9]}, "control_variates": "scaffold"},
        "sync": {"buffer": 3, "kind": "async"},
    }
    spec = parse(RunSpec, settings)
    record = sent(submission(spec))
    assert submitted_spec(record) == spec
    assert "local.steps" not in record.defaults and "local.optimizer.betas" not in record.defaults
    assert {"local.batch_size", "local.optimizer.lr", "sync.max_lag", "seed"} <= set(record.defaults)


def test_an_older_reader_ignores_settings_that_nobody_wrote() -> None:
    spec = submitted_spec(newer(local={"steps": 3}))
    assert spec.local.steps == 3 and type(spec) is RunSpec
    assert spec == parse(RunSpec, {"task": "a.b:C", "local": {"steps": 3}, "keep_models": 5})


@pytest.mark.parametrize(
    ("written", "setting"),
    [
        ({"local": {"warmth": 0.5}}, "local.warmth"),
        ({"sight": {"depth": 1}}, "sight"),
    ],
)
def test_an_older_reader_refuses_a_setting_that_was_written(written: dict[str, object], setting: str) -> None:
    with pytest.raises(ConfigError) as error:
        submitted_spec(newer(**written))
    assert error.value.setting == setting and error.value.problem == "there is no such setting"


def test_an_agent_says_that_it_is_too_old_for_a_setting() -> None:
    with pytest.raises(
        ConfigError, match=r"^local\.warmth: there is no such setting\. .* upgrade Syncline on this agent"
    ):
        spec_in(encode(newer(local={"warmth": 0.5})))
    assert spec_in(encode(newer())).name == "run"


def test_a_newer_reader_takes_its_own_default_for_a_setting_that_the_older_did_not_know() -> None:
    record = sent(submission(parse(RunSpec, {"task": "a.b:C", "local": {"steps": 3}})))
    read = submitted_spec(record, Newer)
    assert isinstance(read, Newer) and read.local.warmth == 0.5 and read.sight.depth == 1 and read.local.steps == 3


def test_a_default_that_changes_between_versions_changes_no_run() -> None:
    old = sent(submission(parse(RunSpec, {"task": "a.b:C"})))
    assert submitted_spec(old, ChangedDefault).keep_models == 2, "the run was submitted with two"
    new = sent(submission(parse(ChangedDefault, {"task": "a.b:C"})))
    assert submitted_spec(new).keep_models == 5


def test_a_record_that_is_stored_again_remembers_what_was_not_written() -> None:
    from_older = sent(submission(parse(RunSpec, {"task": "a.b:C", "local": {"steps": 3}})))
    stored = sent(submission(submitted_spec(from_older, Newer), from_older))
    assert {"local.warmth", "sight", "seed"} <= set(stored.defaults) and "local.steps" not in stored.defaults
    assert submitted_spec(stored).local.steps == 3


def test_an_older_coordinator_keeps_what_it_ignores_for_newer_agents() -> None:
    submitted = newer(local={"steps": 3})
    stored = sent(submission(submitted_spec(submitted), submitted))
    assert stored.spec == submitted.spec and {"local.warmth", "sight"} <= set(stored.defaults)

    class YetNewerLocal(Local):
        warmth: float = 0.7

    class YetNewer(Newer):
        local: YetNewerLocal = YetNewerLocal()  # type: ignore[assignment]

    read = submitted_spec(stored, YetNewer)
    assert isinstance(read, YetNewer) and read.local.warmth == 0.5, "the default of the version that submitted the run"
    assert submitted_spec(stored).local.steps == 3


def test_names_of_defaults_that_lead_nowhere_change_nothing() -> None:
    spec = {"task": "a.b:C", "seed": 3}
    record = Submit(spec=spec, defaults=["seed.x", "nothing.at.all", "", ".", "local.steps.y", "local"])
    assert submission(submitted_spec(record), record).spec == submission(parse(RunSpec, spec)).spec


def test_settings_as_a_person_writes_them_are_all_written() -> None:
    raw = Submit(spec={"task": "a.b:C", "nonsense": 1})
    with pytest.raises(ConfigError, match="nonsense: there is no such setting"):
        submitted_spec(raw)


def test_a_setting_of_a_chosen_kind_is_ignored_too() -> None:
    class NewerIid(Iid):
        kind: Literal["iid"] = "iid"
        salt: int = 0

    class WithPartition(RunSpec):
        partition: NewerIid = NewerIid()

    record = sent(submission(parse(WithPartition, {"task": "a.b:C", "partition": {"kind": "iid"}})))
    assert "partition.salt" in record.defaults and submitted_spec(record).partition == Iid()


def test_settings_that_are_larger_than_a_record_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the settings take 3[0-9]* bytes, and a record holds 262144"):
        submission(parse(RunSpec, {"task": "a.b:C", "task_options": {"text": "x" * 300_000}}))
