"""The checks of `syncline doctor` on this machine: Python, torch with its GPUs, disks. Only a child process imports torch."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from syncline_cli.doctor.findings import Finding, broken, in_thread, ok, warning

TORCH_S = 120.0  # a cold disk, a slow machine, a first CUDA context
DISK_S = 10.0
LITTLE_BYTES = 1 << 30  # free space below which a disk is a warning
TOO_LITTLE_BYTES = 64 << 20  # free space below which a disk is broken
_DEVICE = re.compile(r"auto|cpu|mps|cuda(?::(\d+))?")
_FIXED = {
    (3, 12): 9,
    (3, 13): 2,
}  # Python version → first patch release with write back-pressure in asyncio (CVE-2024-12254)

# Prints the devices that torch sees, as JSON on the last line. Each GPU adds 1 and 1: only that reveals a build without its
# kernels.
_TORCH = """
import json, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    there = torch.cuda.is_available()
gpus = []
for i in range(torch.cuda.device_count() if there else 0):
    gpu = {"name": torch.cuda.get_device_name(i), "error": ""}
    try:
        assert (torch.ones(1, device=f"cuda:{i}") + 1).item() == 2
        gpu["free_bytes"], gpu["total_bytes"] = torch.cuda.mem_get_info(i)
    except Exception as error:
        gpu["error"] = str(error).strip().splitlines()[0][:200]
    gpus.append(gpu)
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda or torch.version.hip or "", "gpus": gpus,
    "mps": torch.backends.mps.is_available(), "threads": torch.get_num_threads(),
    "said": [str(w.message).strip().splitlines()[0][:300] for w in said if "CUDA" in str(w.message)],
}))
"""


# -- Python ------------------------------------------------------------------------------------------------------------
async def python() -> Finding:
    """Check the interpreter and its event loop."""
    try:
        version = metadata.version("uvloop")
    except metadata.PackageNotFoundError:
        version = ""
    return python_finding(sys.version_info[:3], version)


def python_finding(version: tuple[int, int, int], uvloop: str) -> Finding:
    """Judge a Python version; `uvloop`: its version, or '' if it is not installed."""
    name = ".".join(map(str, version))
    fixed = _FIXED.get(version[:2])
    if uvloop:
        return ok("python", f"{name}, with uvloop {uvloop}")
    if fixed is not None and version[2] < fixed:
        text = f"{name}: its asyncio does not wait for slow connections, so that memory grows without bound (CVE-2024-12254)"
        return broken(
            "python", text, f"Run: pip install uvloop, or use Python {version[0]}.{version[1]}.{fixed} or newer"
        )
    return ok("python", f"{name}, without uvloop")


# -- torch and GPUs ----------------------------------------------------------------------------------------------------
async def torch(device: str) -> Finding:
    """Check that torch can be imported, and can use the device that `--device` names."""
    seen, error = await _ask_torch()
    return broken("torch", error, "Run: pip install torch") if error else torch_finding(seen, has_driver(), device)


async def _ask_torch() -> tuple[dict[str, Any], str]:
    """Return the devices that torch sees in a child process, and the error if torch cannot be imported."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", _TORCH, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(TORCH_S):
            out, err = await child.communicate()
    except TimeoutError:
        return {}, f"no answer from torch within {TORCH_S:g} s: a GPU or its driver hangs"
    finally:
        if child.returncode is None:
            await _kill(child)
    lines = (out if child.returncode == 0 else err).decode(errors="replace").strip().splitlines()
    if child.returncode != 0:
        return {}, f"torch cannot be imported: {lines[-1][:300] if lines else f'exit code {child.returncode}'}"
    seen: dict[str, Any] = json.loads(lines[-1])
    return seen, ""


async def _kill(child: asyncio.subprocess.Process) -> None:
    child.kill()
    try:
        async with asyncio.timeout(5.0):
            await child.communicate()
    except TimeoutError:
        pass  # the child hangs in the kernel, and no signal reaches it


def has_driver() -> bool:
    """Tell whether this host has an NVIDIA driver."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def torch_finding(seen: dict[str, Any], driver: bool, device: str) -> Finding:
    """Judge the devices that torch sees.

    Args:
        seen: the child's JSON object.
        driver: this host has an NVIDIA driver.
        device: the value of `--device`.
    """
    version, gpus = seen["version"], seen["gpus"]
    wanted = _DEVICE.fullmatch(device)
    if wanted is None:
        return broken("torch", f"{device!r} is not a device", "Use auto, cpu, cuda, cuda:N or mps for --device")
    if device.startswith("cuda") and int(wanted[1] or 0) >= len(gpus):
        return broken(
            "torch", f"torch {version} has no {device}: {_why_no_gpu(seen, driver)[0]}", _why_no_gpu(seen, driver)[1]
        )
    if device == "mps" and not seen["mps"]:
        return broken("torch", f"torch {version} has no mps: this host has no Apple GPU for it", "Use --device auto")
    if failing := [f"cuda:{i} {gpu['name']}: {gpu['error']}" for i, gpu in enumerate(gpus) if gpu["error"]]:
        hint = "Install a build of torch for this GPU and driver; `nvidia-smi` shows both, and who uses the GPU"
        return broken("torch", f"torch {version} cannot use {'; '.join(failing)}", hint)
    if gpus and device != "cpu":
        return ok("torch", f"{version}: " + ", ".join(_described(i, gpu) for i, gpu in enumerate(gpus)))
    if driver and device != "cpu":
        why, hint = _why_no_gpu(seen, driver)
        return warning("torch", f"torch {version} trains on the CPU: {why}", hint)
    place = "mps" if seen["mps"] and device != "cpu" else f"the CPU, {seen['threads']} threads"
    return ok("torch", f"{version} on {place}")


def _why_no_gpu(seen: dict[str, Any], driver: bool) -> tuple[str, str]:
    """Return the reason why torch sees no usable GPU, and a hint."""
    if not driver:
        hint = "Install the NVIDIA driver; for a container, the NVIDIA container toolkit, and reserve a GPU for it"
        return "this host has no NVIDIA driver", hint
    if not seen["cuda"]:
        return (
            "this host has a driver, but this build of torch has no CUDA",
            "Install one with CUDA: pip install --upgrade torch",
        )
    if seen["gpus"]:
        return f"torch sees {len(seen['gpus'])}, from cuda:0 on", "Use one of them, or --device auto"
    reason = seen["said"][0] if seen["said"] else f"CUDA {seen['cuda']} of torch finds no GPU"
    return f"this host has a driver, but {reason}", "Update the driver, or install a build of torch for this driver"


def _described(i: int, gpu: dict[str, Any]) -> str:
    return f"cuda:{i} {gpu['name']}, {gpu['free_bytes'] / 2**30:.0f} of {gpu['total_bytes'] / 2**30:.0f} GiB free"


# -- disks -------------------------------------------------------------------------------------------------------------
async def disk(name: str, directory: Path) -> Finding:
    """Check that a directory takes files and has free space."""
    try:
        free_bytes = await in_thread(lambda: _write_and_measure(directory), DISK_S)
    except TimeoutError:
        return broken(name, f"{directory}: no answer within {DISK_S:g} s", "Check the disk, or the file server")
    except OSError as error:
        text = f"{error.filename or directory}: {error.strerror or error}"
        return broken(name, text, "Use a directory on a disk that you may write to")
    return disk_finding(name, directory, free_bytes)


def disk_finding(name: str, directory: Path, free_bytes: int) -> Finding:
    """Judge the free space of a directory."""
    text = f"{directory} has {free_bytes / 2**30:.1f} GiB free"
    if free_bytes < TOO_LITTLE_BYTES:
        return broken(name, text, "Make room, or use another disk")
    if free_bytes < LITTLE_BYTES:
        return warning(name, text, "Make room, or use another disk: a run keeps models there")
    return ok(name, text)


def _write_and_measure(directory: Path) -> int:
    """Write a small file through to the disk and remove it; return the free bytes.

    If the directory does not exist, its nearest existing parent is tested.
    """
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    if not existing.is_dir():
        raise NotADirectoryError(20, "Not a directory", str(existing))
    probe = existing / f".syncline-doctor-{secrets.token_hex(4)}"
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, b"x" * 4096)
            os.fsync(fd)
        finally:
            os.close(fd)
    finally:
        probe.unlink(missing_ok=True)
    return shutil.disk_usage(existing).free
