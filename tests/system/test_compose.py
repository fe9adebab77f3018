"""compose.yaml is what it says: by the Compose specification, and as real processes that make the first run together."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from system.command import until
from system.composition import PATIENCE_S, Composition, load
from system.dockerfile import ROOT, only

pytestmark = pytest.mark.timeout(300)

FILES = ("compose.yaml", "compose.gpu.yaml")


def services(*names: str) -> dict[str, Any]:
    found: dict[str, Any] = load(*names)["services"]
    return found


def ours() -> dict[str, Any]:
    return {name: service for name, service in services().items() if "build" in service}


# -- the file ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FILES)
def test_it_keeps_to_the_compose_specification(name: str) -> None:
    """The specification's own schema, as check-jsonschema brings it along."""
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(ROOT / name)]
    done = subprocess.run(checker, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_a_file_that_does_not_keep_to_it_is_found_out(tmp_path: Path) -> None:
    broken = tmp_path / "compose.yaml"
    broken.write_text("services: {nats: {image: nats, comand: [x]}}\n")
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(broken)]
    done = subprocess.run(checker, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "comand" in done.stdout


def test_signals_reach_every_process_and_it_has_time_to_drain() -> None:
    for name, service in services().items():
        assert isinstance(service["command"], list), f"{name}: a shell would swallow the signal"
        assert service["stop_grace_period"] == "30s"
        assert service.get("init") or service["image"].startswith("nats:")


def test_no_process_has_a_right_that_it_does_not_need() -> None:
    user = only("USER").text
    for service in services().values():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert service["read_only"] is True
        assert service.get("user", user) == user, "all of them share volumes"


def test_every_service_gets_its_own_keys_alone() -> None:
    mounts = {name: {v.split(":")[1] for v in s.get("volumes", [])} for name, s in services().items()}
    keys = {name: {m for m in there if m.startswith("/keys")} for name, there in mounts.items()}
    assert keys == {
        "keys": {"/keys/broker", "/keys/core", "/keys/agents", "/keys/watch"},
        "nats": set(),
        "coordinator": {"/keys/core"},
        "agent": {"/keys/agents"},
        "submit": {"/keys/core"},
        "watch": {"/keys/watch"},
    }
    for name, service in services().items():
        for volume in service.get("volumes", []):
            read_only = volume.endswith(":ro")
            assert read_only or name == "keys" or volume in ("data:/data", "state:/state"), f"{name} writes {volume}"


def test_the_key_that_a_variable_names_is_mounted() -> None:
    for name, service in ours().items():
        key = service.get("environment", {}).get("SYNCLINE_KEY", "")
        mounts = [v.split(":")[1] for v in service["volumes"]]
        assert not key or any(key == m or key.startswith(f"{m}/") for m in mounts), name


def test_volumes_are_declared_used_and_made_in_the_image_for_its_user() -> None:
    whole = load(*FILES)
    used = {v.split(":")[0] for s in whole["services"].values() for v in s.get("volumes", [])} - {"./examples"}
    assert used == set(whole["volumes"])
    made = (ROOT / "Dockerfile").read_text()
    (line,) = [line for line in made.splitlines() if "/keys/broker" in line]
    for service in ours().values():
        for volume in service.get("volumes", []):
            assert volume.split(":")[1] in [*line.split(), "/runs"], f"{volume} would belong to root"


def test_every_variable_is_documented() -> None:
    names = {name for file in FILES for name in re.findall(r"\$\{(\w+)", (ROOT / file).read_text())}
    documented = (ROOT / "docs" / "operations.md").read_text()
    assert names and not [name for name in sorted(names) if f"`{name}`" not in documented]


def test_on_gpus_every_agent_sees_all_and_claims_one() -> None:
    agent = services(*FILES)["agent"]
    (devices,) = agent["deploy"]["resources"]["reservations"]["devices"]
    assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert agent["environment"]["SYNCLINE_DEVICE"] == "auto"
    claims = agent["environment"]["TMPDIR"]
    assert f"claims:{claims}" in agent["volumes"], "locks in a place that they share"
    assert agent["deploy"]["replicas"] == services()["agent"]["deploy"]["replicas"], "the rest is as before"


def test_the_watcher_waits_to_be_asked() -> None:
    assert [name for name, service in services().items() if "profiles" in service] == ["watch"]


# -- the processes -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composition]:
    """`docker compose up --scale agent=3` with a watcher beside it, until the first run has ended."""
    with Composition(tmp_path_factory.mktemp("compose"), SYNCLINE_KEYS="4") as composition:
        composition.up("watch")
        composition.up(scale={"agent": 3})
        (submit,) = composition.running["submit"]
        assert submit.process.wait(150) == 0, submit.text + composition.running["coordinator"][0].text
        yield composition


def names(composition: Composition) -> list[str]:
    """Which agent each replica is."""
    found = []
    for replica in composition.running["agent"]:
        replica.says(" on cpu")
        found.append(re.findall(r"agent (a\d+) on cpu", replica.text)[-1])
    return found


def test_the_first_run_ends_well(up: Composition) -> None:
    (submit,) = up.running["submit"]
    last = submit.text.strip().splitlines()[-1]
    assert last.startswith("run first-run-") and "40 versions" in last
    accuracy = re.search(r"accuracy ([\d.]+)", last)
    assert accuracy is not None and float(accuracy[1]) > 0.9


def test_the_watcher_sees_it_with_its_own_key_alone(up: Composition) -> None:
    (watch,) = up.running["watch"]
    watch.says("version 40 of 40")
    assert re.search(r"run first-run-\w+: version 40 of 40  accuracy 0\.9\d+ .* 3 of 3 agents", watch.text), watch.text
    assert "a1 joined" in watch.text and "Traceback" not in watch.text


def test_equal_replicas_are_different_agents_and_keep_nothing_of_a_run_that_has_ended(up: Composition) -> None:
    assert sorted(names(up)) == ["a1", "a2", "a3"]
    kept = up.volume("state")
    until(lambda: not list(kept.glob("first-run-*")), 20.0, lambda: str(list(kept.rglob("*"))))


def test_keys_are_the_owners_alone(up: Composition) -> None:
    for volume in ("core", "agents", "watch"):
        found = list(up.volume(volume).glob("*.nk"))
        assert found and all(path.stat().st_mode & 0o077 == 0 for path in found)
    assert not list(up.volume("broker").glob("**/*.nk"))


def test_a_replica_that_is_killed_and_starts_again_is_the_same_agent(up: Composition) -> None:
    before = names(up)
    replicas = up.running["agent"]
    replicas[1].process.kill()
    replicas[1].process.wait()
    replicas[1] = up.start("agent")
    assert names(up) == before


def test_one_agent_more_than_keys_says_so_and_the_others_go_on(up: Composition) -> None:
    fourth, fifth = up.start("agent"), up.start("agent")
    until(
        lambda: "on cpu" in fourth.text + fifth.text and "in use" in fourth.text + fifth.text,
        PATIENCE_S,
        lambda: fourth.text + fifth.text,
    )
    one, too_many = (fourth, fifth) if "on cpu" in fourth.text else (fifth, fourth)
    assert "agent a4 on cpu" in one.text
    assert too_many.process.wait(30) == 2
    assert re.search(r"error: --key: all 4 keys in .* are in use on this machine.*keys add", too_many.text)
    assert "Traceback" not in too_many.text
    assert one.stop() == 0


def test_down_drains_everything_and_up_again_finds_it_all(up: Composition) -> None:
    keys = {
        p: p.read_text() for v in ("broker", "core", "agents", "watch") for p in up.volume(v).iterdir() if p.is_file()
    }
    codes = up.down()
    assert codes["agent"] == [0, 0, 0] and codes["coordinator"] == [0] and codes["keys"] == [0]
    left = [p.name for p in up.place.rglob("tmp-*/*")]
    assert not [name for name in left if not name.startswith("torchinductor")], "torch keeps a cache; we keep nothing"
    up.up("agent", "coordinator", scale={"agent": 3})
    assert {p: p.read_text() for p in keys} == keys
    assert sorted(names(up)) == ["a1", "a2", "a3"]
    again = up.start("submit")
    up.running["submit"] = [again]
    assert again.process.wait(150) == 0, again.text
    assert "40 versions" in again.text


def test_the_doctor_is_content_in_every_container(up: Composition) -> None:
    for name in ("coordinator", "agent"):
        up.services[f"doctor-{name}"] = {
            **up.services[name],
            "command": ["doctor", "--json", "--only=coordinator", "--only=rights"],
        }
        replica = up.start(f"doctor-{name}")
        code = replica.process.wait(60)
        assert code == 0 and json.loads(replica.text.splitlines()[-1])["ok"], replica.text
