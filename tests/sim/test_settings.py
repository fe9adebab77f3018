"""The section `sim:` of a spec: accepted and refused settings, and that a real run ignores the section."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from syncline.errors import ConfigError
from syncline.spec.run_spec import load_spec
from syncline_sim.faults import BrokerDown, Cut, Down, RollBack
from syncline_sim.settings import FaultSetting, Link, SimSettings, load

TASK = "syncline.tasks.quadratic:LinearRegression"


def file(place: Path, sim: Any, **spec: Any) -> Path:
    path = place / "spec.yaml"
    path.write_text(yaml.safe_dump({"task": TASK, **spec, "sim": sim}))
    return path


def test_a_spec_without_the_section_has_the_fleet_that_it_starts_with(tmp_path: Path) -> None:
    spec, settings = load(file(tmp_path, None, agents={"min": 3}))
    assert settings == SimSettings() and settings.names(spec) == ("a1", "a2", "a3")


def test_a_run_starts_with_the_whole_fleet_unless_it_says_otherwise(tmp_path: Path) -> None:
    spec, settings = load(file(tmp_path, {"agents": 7}))
    assert spec.agents.min == 7 and len(settings.names(spec)) == 7
    spec, settings = load(file(tmp_path, {"agents": 7}, agents={"min": 2}), 5)
    assert spec.agents.min == 2 and len(settings.names(spec)) == 5


def test_one_value_is_a_list_of_one_and_lists_are_lists(tmp_path: Path) -> None:
    _, one = load(file(tmp_path, {"step_s": 0.5, "link": {"up_mbit": 10}}))
    assert one.step_s == (0.5,) and one.link == (Link(up_mbit=10),)
    _, more = load(file(tmp_path, {"step_s": [0.5, 1], "link": [{}, {"delay_s": 1}]}))
    assert more.step_s == (0.5, 1.0) and more.link == (Link(), Link(delay_s=1))


def test_faults_become_a_schedule(tmp_path: Path) -> None:
    faults = [
        {"kind": "crash", "service": "a1", "after_s": 1, "for_s": 2, "disk": False},
        {"kind": "cut", "service": "coordinator", "after_s": 3, "for_s": 4},
        {"kind": "broker", "after_s": 5, "for_s": 6},
        {"kind": "rollback", "after_s": 7, "for_s": 8, "lost_s": 9},
    ]
    _, settings = load(file(tmp_path, {"faults": faults}))
    assert settings.schedule().items == (
        Down("a1", 1, 2, disk=False), Cut("coordinator", 3, 4), BrokerDown(5, 6), RollBack(7, 8, 9),
    )  # fmt: skip


def test_a_real_run_leaves_the_section_alone_whatever_it_holds(tmp_path: Path) -> None:
    assert load_spec(file(tmp_path, {"nonsense": [1, {}]}, agents={"min": 2})).agents.min == 2


def test_a_run_has_the_name_of_its_file(tmp_path: Path) -> None:
    assert load(file(tmp_path, {}))[0].name == "spec-sim"


def test_the_document_tells_of_every_setting() -> None:
    told = (Path(__file__).parents[2] / "docs" / "simulation.md").read_text()
    faults = get_args(get_args(FaultSetting)[0])
    fields = {name for model in (SimSettings, Link, *faults) for name in model.model_fields}
    kinds = {get_args(fault.model_fields["kind"].annotation)[0] for fault in faults}
    assert {name for name in fields | kinds if not re.search(rf"`{name}\b", told)} == set()


@pytest.mark.parametrize(
    ("sim", "words"),
    [
        ({"stp_s": 1}, "sim.stp_s: there is no such setting. Did you mean `step_s`?"),
        ({"step_s": 0}, "sim.step_s.0: 0 is not accepted. Input should be greater than 0"),
        ({"step_s": []}, "sim.step_s: the list is empty; leave the setting out"),
        ({"step_s": "fast"}, "sim.step_s.0: 'fast' is not accepted."),
        ({"jitter": -1}, "sim.jitter: -1 is not accepted. Input should be greater than or equal to 0"),
        ({"link": {"up_mbt": 1}}, "sim.link.0.up_mbt: there is no such setting. Did you mean `up_mbit`?"),
        ({"link": [{}, {"down_mbit": 0}]}, "sim.link.1.down_mbit: 0 is not accepted. Input should be greater than 0"),
        ([1], "sim: is a list, not a mapping. Write settings under `sim:`"),
        (
            {"agents": 1},
            "sim.agents: 1 are fewer than the run starts with (agents.min = 2). Raise it, or lower agents.min",
        ),
        (
            {"faults": [{"kind": "crsh", "after_s": 1}]},
            "sim.faults.0.kind: 'crsh' is not accepted. Use one of crash, cut, delay, lose, broker, rollback, step, trainer, "
            "twin",
        ),
        (
            {"faults": [{"kind": "cut", "service": "a1", "after_s": 1, "for": 3, "for_s": 1}]},
            "sim.faults.0.for: there is no such setting. Did you mean `for_s`?",
        ),
        ({"faults": [{"kind": "cut", "service": "a1", "after_s": 1}]}, "sim.faults.0.for_s: is missing. Add it"),
        (
            {"faults": [{"kind": "cut", "service": "a9", "after_s": 1, "for_s": 1}]},
            "sim.faults.0.service: there is no 'a9' here. Use a1 to a2 or coordinator",
        ),
        (
            {"faults": [{"kind": "twin", "service": "coordinator", "after_s": 1}]},
            "sim.faults.0.service: there is no 'coordinator' here. Use a1 to a2",
        ),
    ],
)
def test_a_mistake_is_told_with_setting_value_and_mend(tmp_path: Path, sim: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(file(tmp_path, sim, agents={"min": 2}))
    assert str(error.value).startswith(words)


def test_the_section_itself_misspelt_is_told_too(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"task: {TASK}\nsimm: {{step_s: 1}}\n")
    with pytest.raises(ConfigError, match=r"simm: there is no such setting. Did you mean `sim`\?"):
        load(path)
