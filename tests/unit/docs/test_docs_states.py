"""docs/states.md shows the tables of transitions as they are in the code."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from state_diagrams import page, read, tables

PAGE = Path(__file__).parents[3] / "docs" / "states.md"


class Light(Enum):
    RED = 1
    GREEN = 2


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "docs/states.md differs from the code: run `make docs`"


def test_every_table_has_a_title_of_its_own_and_states_that_can_be_reached() -> None:
    found = tables()
    assert {"POLICY_TRANSITIONS", "PHASE_TRANSITIONS"} <= {table.name for table in found}
    assert len({table.title for table in found}) == len(found)
    for table in found:
        assert set(table.states[1:]) <= {following for _, _, following in table.edges}, (
            f"{table.name}: a state without a way to it"
        )


def test_all_three_shapes_of_tables_are_read() -> None:
    expected = [("red", "go", "green"), ("green", "stop", "red")]
    assert read({Light.RED: {"go": Light.GREEN}, Light.GREEN: {"stop": Light.RED}})[0] == expected
    assert read({("red", "go"): "green", ("green", "stop"): "red"})[0] == expected
    assert read({"red": frozenset({"green"}), "green": frozenset({"red"}), "broken": frozenset()}) == (
        [("red", "", "green"), ("green", "", "red")],
        ["red", "green", "broken"],
    )
