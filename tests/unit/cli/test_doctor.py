"""What the doctor makes of what it sees: each trouble is named, with its hint."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from syncline_cli import main as cli
from syncline_cli.doctor.checks_broker import clock_finding, space_finding
from syncline_cli.doctor.checks_here import disk, disk_finding, python_finding, torch, torch_finding
from syncline_cli.doctor.findings import Finding, as_json, as_lines, in_thread, sound

GIB = 1 << 30


# -- Python ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("version", "uvloop", "verdict"),
    [
        ((3, 11, 7), "", "ok"),
        ((3, 12, 0), "", "broken"),
        ((3, 12, 8), "", "broken"),
        ((3, 12, 8), "0.21.0", "ok"),
        ((3, 12, 9), "", "ok"),
        ((3, 13, 0), "", "broken"),
        ((3, 13, 1), "", "broken"),
        ((3, 13, 2), "", "ok"),
        ((3, 14, 0), "", "ok"),
    ],
)
def test_an_asyncio_without_back_pressure_is_named_unless_uvloop_mends_it(
    version: tuple[int, int, int], uvloop: str, verdict: str
) -> None:
    found = python_finding(version, uvloop)
    assert found.verdict == verdict
    assert ("CVE-2024-12254" in found.text) == (verdict == "broken")
    assert ("pip install uvloop" in found.hint) == (verdict == "broken")


# -- torch -------------------------------------------------------------------------------------------------------------
def seen(gpus: int = 0, cuda: str = "", error: str = "", **changes: Any) -> dict[str, Any]:
    gpu = {"name": "H100", "error": error, "free_bytes": 70 * GIB, "total_bytes": 80 * GIB}
    return {
        "version": "2.13.0",
        "cuda": cuda,
        "gpus": [gpu] * gpus,
        "mps": False,
        "threads": 8,
        "said": [],
        **changes,
    }


@pytest.mark.parametrize(
    ("what", "driver", "device", "verdict", "text", "hint"),
    [
        (seen(), False, "auto", "ok", "the CPU, 8 threads", ""),
        (seen(), False, "cpu", "ok", "the CPU", ""),
        (seen(cuda="12.8"), False, "auto", "ok", "the CPU", ""),
        (seen(2, "12.8"), True, "auto", "ok", "cuda:1 H100, 70 of 80 GiB free", ""),
        (seen(2, "12.8"), True, "cuda:1", "ok", "cuda:0 H100", ""),
        (seen(2, "12.8"), True, "cpu", "ok", "the CPU", ""),
        (seen(mps=True), False, "auto", "ok", "on mps", ""),
        (seen(), True, "auto", "warning", "this build of torch has no CUDA", "with CUDA"),
        (seen(), True, "cpu", "ok", "the CPU", ""),
        (seen(), True, "cuda", "broken", "this build of torch has no CUDA", "with CUDA"),
        (
            seen(cuda="13.0", said=["driver is too old"]),
            True,
            "auto",
            "warning",
            "driver is too old",
            "Update the driver",
        ),
        (seen(cuda="13.0"), True, "auto", "warning", "CUDA 13.0 of torch finds no GPU", "Update the driver"),
        (seen(cuda="13.0"), False, "cuda", "broken", "no NVIDIA driver", "container toolkit"),
        (seen(2, "12.8"), True, "cuda:2", "broken", "torch sees 2, from cuda:0 on", "--device auto"),
        (seen(1, "12.8", "no kernel image"), True, "auto", "broken", "cuda:0 H100: no kernel image", "Install a build"),
        (seen(), False, "mps", "broken", "no Apple GPU", "--device auto"),
        (seen(), False, "gpu", "broken", "'gpu' is not a device", "cuda:N"),
    ],
)
def test_what_torch_sees(what: dict[str, Any], driver: bool, device: str, verdict: str, text: str, hint: str) -> None:
    found = torch_finding(what, driver, device)
    assert found.verdict == verdict
    assert text in found.text and hint in found.hint
    assert bool(found.hint) == (verdict != "ok")


async def test_torch_is_asked_in_a_process_of_its_own() -> None:
    found = await torch("cpu")
    assert found.verdict == "ok" and "on the CPU" in found.text


async def test_a_torch_that_hangs_or_breaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncline_cli.doctor.checks_here._TORCH", "raise ImportError('libcudart.so.13 is missing')")
    found = await torch("auto")
    assert found.verdict == "broken" and "libcudart.so.13 is missing" in found.text
    monkeypatch.setattr("syncline_cli.doctor.checks_here._TORCH", "import time; time.sleep(60)")
    monkeypatch.setattr("syncline_cli.doctor.checks_here.TORCH_S", 0.2)
    began = time.monotonic()
    found = await torch("auto")
    assert found.verdict == "broken" and "no answer from torch" in found.text
    assert time.monotonic() - began < 10


# -- disks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("free_bytes", "verdict"), [(50 * GIB, "ok"), (GIB, "ok"), (GIB - 1, "warning"), (10 << 20, "broken")]
)
def test_how_much_room_is_little(free_bytes: int, verdict: str) -> None:
    assert disk_finding("disk", Path("/state"), free_bytes).verdict == verdict


def test_a_disk_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    found = asyncio.run(disk("disk", tmp_path / "not" / "yet"))
    assert found.check == "disk" and found.verdict in ("ok", "warning")
    assert list(tmp_path.iterdir()) == []


async def test_a_place_that_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = await disk("disk", tmp_path / "file" / "state")
    assert found.verdict == "broken" and "Not a directory" in found.text


async def test_a_disk_that_hangs_does_not_hang_us(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stuck = threading.Event()
    monkeypatch.setattr("syncline_cli.doctor.checks_here._write_and_measure", lambda _: stuck.wait(60))
    monkeypatch.setattr("syncline_cli.doctor.checks_here.DISK_S", 0.05)
    found = await disk("disk", tmp_path)
    stuck.set()
    assert found.verdict == "broken" and "no answer within 0.05 s" in found.text


async def test_a_call_in_a_thread_gives_its_result_or_its_error() -> None:
    assert await in_thread(lambda: 7, 5.0) == 7
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0, 5.0)
    with pytest.raises(TimeoutError):
        await in_thread(lambda: threading.Event().wait(0.5), 0.01)
    await asyncio.to_thread(time.sleep, 0)  # the loop is still in order


# -- the broker's figures ----------------------------------------------------------------------------------------------
def test_room_in_the_store() -> None:
    assert space_finding(10 * GIB, 2 * GIB, GIB) == Finding(
        "space", "ok", "8.0 of 10.0 GiB (max_file_store) are free, 1.00 used"
    )
    full = space_finding(10 * GIB, 10 * GIB, GIB)
    assert full.verdict == "warning" and "max_file_store" in full.hint


@pytest.mark.parametrize(
    ("skew_s", "error_s", "verdict", "text"),
    [
        (0.5, 0.01, "ok", "within 510.0 ms"),
        (1.9, 0.5, "ok", "within 2400.0 ms"),
        (-2.4, 0.5, "ok", "within 2900.0 ms"),
        (30.0, 0.1, "warning", "30.0 s behind the broker's"),
        (-30.0, 0.1, "warning", "30.0 s ahead of the broker's"),
    ],
)
def test_a_clock_that_is_off(skew_s: float, error_s: float, verdict: str, text: str) -> None:
    found = clock_finding(skew_s, error_s)
    assert found.verdict == verdict
    assert text in found.text


# -- the whole ---------------------------------------------------------------------------------------------------------
def test_findings_are_lines_for_people_and_an_object_for_programs() -> None:
    found = [Finding("python", "ok", "3.11.7"), Finding("key", "broken", "no", "Make one")]
    assert as_lines(found) == [
        "ok       python  3.11.7",
        "broken   key     no",
        "                 → Make one",
    ]
    assert not sound(found) and sound(found[:1])
    assert json.loads(json.dumps(as_json(found)))["checks"][1] == {
        "check": "key",
        "verdict": "broken",
        "text": "no",
        "hint": "Make one",
    }


def test_the_exit_code_says_whether_anything_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # fleets that are up on this machine are not looked at
    assert cli.main(["doctor", "--only", "disk", "--state-dir", str(tmp_path)]) == 0
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert cli.main(["doctor", "--only", "disk", "--state-dir", str(tmp_path / "file"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and [check["check"] for check in found["checks"]] == ["disk"]


@pytest.mark.parametrize(("check", "hint"), [("pyhton", "Did you mean 'python'?"), ("zzz", "Use python, torch")])
def test_a_check_that_does_not_exist_is_wrong_input(check: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--only", check]) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("url", ["hub:8222", "http://", "http://hub:82x2", "ftp://hub", "http://[::1", "nats://hub"])
def test_an_address_of_pages_that_is_none_is_wrong_input(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--monitor", url, "--only", "disk"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --monitor: {url!r} is not the address") and "http://host:8222" in said
