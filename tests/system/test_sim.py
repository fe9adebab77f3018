"""`syncline sim` computes what real processes compute on a real broker, and is a command like the others."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from structures.registry import STRUCTURES
from system.command import Command
from system.harness import Fleet

pytestmark = pytest.mark.timeout(240)

DIGITS: dict[str, Any] = {"task": "syncline.tasks.digits:Digits", "agents": {"min": 4}, "stop": {"versions": 6}}
SKEWED: dict[str, Any] = {
    **DIGITS,
    "partition": {"kind": "dirichlet", "alpha": 0.5},
    "local": {"steps": 7, "batch_size": 16, "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9}},
    "merge": {"weights": "samples"},
    "mix": {"alpha": 0.6},
    "outer": {"kind": "nesterov", "lr": 0.7, "momentum": 0.9},
    "seed": 11,
}
GAN: dict[str, Any] = {
    **STRUCTURES["GAN, two optimisers from `optimizers`"].spec,
    "agents": {"min": 4},
    "stop": {"versions": 6},
}
SLOW_AND_FAR = {"step_s": [0.01, 0.2], "jitter": 0.3, "link": [{}, {"delay_s": 0.2, "up_mbit": 1}]}


def simulated(place: Path, spec: dict[str, Any], *args: str) -> Command:
    (place / "spec.yaml").write_text(yaml.safe_dump(spec))
    return Command(place, ("sim", "spec.yaml", *args))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("spec", [DIGITS, SKEWED, GAN], ids=["plain", "skewed", "gan"])
async def test_a_synchronous_run_has_the_digest_of_real_processes(
    fleet: Fleet, tmp_path: Path, spec: dict[str, Any]
) -> None:
    head = await fleet.run(**spec)
    command = simulated(tmp_path, {**spec, "sim": SLOW_AND_FAR}, "--json")
    try:
        assert await asyncio.to_thread(command.ended) == 0, command.err
        result = json.loads(command.out.splitlines()[-1])
    finally:
        command.stop()
    assert head.digest and result["digest"] == head.digest
    assert result["versions"] == head.version == 6 and result["updates"] == 24


def test_what_is_printed_for_people_and_for_programs(tmp_path: Path) -> None:
    spec = {**DIGITS, "mix": {"alpha": 1.1}, "sim": {"agents": 6, "step_s": [0.01, 0.05]}}
    shown = simulated(tmp_path, spec)
    told = simulated(tmp_path, spec, "--json")
    try:
        assert shown.ended() == 0 and told.ended() == 0, shown.err + told.err
        result = json.loads(told.out.splitlines()[-1])
        for command in (shown, told):
            command.leaves_nothing(5.0)
    finally:
        shown.stop()
        told.stop()
    assert result["digest"] in shown.out and "accuracy" in shown.out and "a6" in shown.out
    doubt = "mix.alpha: 1.1 over-relaxes: agents jump past the center. Up to 1 is monotone"
    assert doubt in " ".join(shown.out.split()) and doubt in " ".join(told.err.split())
    assert [warning["text"] for warning in result["warnings"]] == [doubt]
    assert [point["version"] for point in result["timeline"]] == [1, 2, 3, 4, 5, 6]
    assert result["accuracy"] == result["timeline"][-1]["metrics"]["accuracy"] > 0.5
    assert [agent["agent"] for agent in result["agents"]] == [f"a{i}" for i in range(1, 7)]
    assert result["seconds"] >= 6 * 20 * 0.05 and result["real_s"] > 0


def test_an_interrupted_simulation_says_how_far_it_came(tmp_path: Path) -> None:
    command = simulated(tmp_path, {**DIGITS, "stop": {"versions": 1_000_000}})
    try:
        command.says("round 2")
        command.process.send_signal(signal.SIGINT)
        assert command.ended(20.0) == 130
        assert "interrupted" in command.err and "digest" in command.out and "Traceback" not in command.err
        command.leaves_nothing(5.0)
    finally:
        command.stop()


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"sim": {"stp_s": 1}}, 2, "sim.stp_s: there is no such setting. Did you mean `step_s`?"),
        ({"task": "syncline.tasks.digit:Digits"}, 2, "Did you mean `syncline.tasks.digits`?"),
        ({"sim": {"agents": 2}}, 2, "sim.agents: 2 are fewer than the run starts with"),
        ({"task": "syncline.tasks.digits:Digits", "task_options": {"hiden": 3}}, 2, "task_options.hiden"),
        ({"partition": {"kind": "shards", "per_agent": 1000}}, 1, "partition.per_agent"),
    ],
)
def test_what_is_wrong_is_told_as_everywhere(tmp_path: Path, changes: dict[str, Any], code: int, words: str) -> None:
    command = simulated(tmp_path, {**DIGITS, **changes})
    try:
        assert command.ended() == code, command.out + command.err
        assert words in command.err and "Traceback" not in command.err
        command.leaves_nothing(5.0)
    finally:
        command.stop()
