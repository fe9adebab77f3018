"""Reads the Dockerfile: enough of its language for ours, and for nothing else."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Step:
    """One instruction. `stage`: the name after AS, or "" for the last stage."""

    stage: str
    instruction: str
    text: str

    @property
    def words(self) -> list[str]:
        """Of an instruction in exec form the JSON list, else the words; options are left out."""
        text = re.sub(r"^(?:--\S+\s+)+", "", self.text)
        if text.startswith("["):
            found: list[str] = json.loads(text)
            return found
        return shlex.split(text)

    @property
    def options(self) -> dict[str, str]:
        return dict(re.findall(r"--([a-z-]+)=(\S+)", self.text))


def steps(path: Path = ROOT / "Dockerfile") -> list[Step]:
    """Every instruction in order, after comments are left out and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    found, stage = [], ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            instruction, _, text = line.partition(" ")
            if instruction == "FROM":
                _, _, stage = text.partition(" AS ")
            found.append(Step(stage, instruction, text.strip()))
    return found


def only(instruction: str, stage: str = "") -> Step:
    (step,) = [step for step in steps() if (step.instruction, step.stage) == (instruction, stage)]
    return step


def environment() -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in only("ENV").words)


def copied(stage: str) -> list[str]:
    """What is taken from the context."""
    taken = [s for s in steps() if s.instruction == "COPY" and s.stage == stage and "from" not in s.options]
    return [source.removeprefix("./") for step in taken for source in step.words[:-1]]


def exec_form(step: Step) -> Any:
    """The words of ENTRYPOINT, CMD or HEALTHCHECK CMD. Fails for a shell form, which would keep signals from the process."""
    text = step.text.rpartition("CMD ")[2] if step.instruction == "HEALTHCHECK" else step.text
    assert text.startswith("["), f"{step.instruction} is no list"
    return json.loads(text)
