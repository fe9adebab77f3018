"""Which device an agent owns. On a host with several GPUs, `auto` gives every agent one of its own.

A claim is a lock on a file in the temporary directory, held by the training child: the kernel lets go of it when the process
ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import torch

from syncline.errors import ConfigError

KINDS = "auto, cpu, cuda, cuda:N or mps"


class DeviceClaim:
    """The device, and whether other agents use it too."""

    def __init__(self, device: torch.device, lock_fd: int = -1, shared: bool = False) -> None:
        self.device, self.shared = device, shared
        self._lock_fd = lock_fd  # held as long as this object lives

    def describe(self) -> str:
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            return f"{self.device} {name}" + (" (shared: more agents than GPUs on this host)" if self.shared else "")
        return f"cpu ({torch.get_num_threads()} threads)" if self.device.type == "cpu" else str(self.device)

    def synchronize(self) -> None:
        """Waits until the device has done what it was told."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def claim_device(wanted: str, gpus: int | None = None, lock_dir: Path | None = None) -> DeviceClaim:
    """The device for `--device`. Raises ConfigError for one that is not there."""
    count = torch.cuda.device_count() if gpus is None else gpus
    if wanted == "auto":
        return _own_gpu(count, lock_dir) if count else DeviceClaim(torch.device("mps" if _has_mps() else "cpu"))
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError("--device", f"{wanted!r} is no device", f"Use {KINDS}") from None
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError("--device", f"{wanted!r}: this host has {count} CUDA devices", f"Use {KINDS}")
    if device.type == "mps" and not _has_mps():
        raise ConfigError("--device", "'mps': this host has no Apple GPU that torch can use", f"Use {KINDS}")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError("--device", f"{wanted!r} is not supported", f"Use {KINDS}")
    return DeviceClaim(device)


def _own_gpu(count: int, lock_dir: Path | None) -> DeviceClaim:
    """The first GPU that no other agent of this host holds; where all are held, one of them, chosen by process id."""
    for index in range(count):
        fd = _lock((lock_dir or Path(tempfile.gettempdir())) / f"syncline-{os.getuid()}-gpu-{index}.lock")
        if fd >= 0:
            return DeviceClaim(torch.device("cuda", index), fd)
    return DeviceClaim(torch.device("cuda", os.getpid() % count), shared=True)


def _lock(path: Path) -> int:
    """The lock's descriptor; −1 where somebody else holds it, or the file is no file of ours."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return -1
    return fd


def _has_mps() -> bool:
    return torch.backends.mps.is_available()
