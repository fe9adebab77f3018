"""The figures of tools/prose.py about docstrings and comments."""

from __future__ import annotations

from pathlib import Path

import pytest
from prose import Docstring, figures, name_parts

SOURCE = '''"""Say what the module is for.

Nobody knows it.
"""
# a comment
# fmt: off
x = 1  # a remark beside code


class Round:
    """The round."""

    def close(self) -> None:
        """Close the round and return."""
'''


def test_vague_words_prose_lines_and_repeated_names_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    counted = figures(path)
    assert counted.lines == 14
    assert counted.prose_lines == 4 + 1 + 1 + 1
    assert [d.vague() for d in counted.docstrings] == [["what", "nobody", "it"], [], []]
    assert [(d.name, d.line, d.repeats_name()) for d in counted.docstrings] == [
        ("module", 1, False),
        ("Round", 11, True),
        ("Round.close", 14, False),
    ]


@pytest.mark.parametrize(
    ("name", "text", "repeats"),
    [
        ("Run.close_round", "Closes the round.", True),
        ("Run.close_round", "Close the round of the run.", True),
        ("Run.close_round", "Close the round after its quorum.", False),
        ("View.progress", "0 … 1.", False),
    ],
)
def test_a_docstring_repeats_a_name_if_it_has_no_word_beyond_it(name: str, text: str, repeats: bool) -> None:
    assert Docstring(Path(), 1, name, text).repeats_name() is repeats


def test_names_are_split_at_underscores_dots_and_capitals() -> None:
    assert name_parts("RunHost.close_round") == ["run", "host", "close", "round"]
    assert name_parts("CPUUsage") == ["cpu", "usage"]
