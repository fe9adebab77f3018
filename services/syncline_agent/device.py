"""The device of an agent. On a host with several GPUs, `auto` gives every agent a GPU of its own.

A claim is a lock on a file in the temporary directory, held by the training child: the kernel releases the lock when the
process ends, however that happens.
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
    """A device that this process may use.

    Attributes:
        shared: other agents of this host use the device too.
    """

    def __init__(self, device: torch.device, lock_fd: int = -1, shared: bool = False) -> None:
        self.device = device
        self.shared = shared
        self._lock_fd = lock_fd  # the lock is held as long as the descriptor is open

    def describe(self) -> str:
        """Return the device for people, with the name of a GPU or the number of threads."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            return f"{self.device} {name}" + (" (shared: more agents than GPUs on this host)" if self.shared else "")
        return f"cpu ({torch.get_num_threads()} threads)" if self.device.type == "cpu" else str(self.device)

    def synchronize(self) -> None:
        """Wait until the device has finished the work that is queued on it."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def claim_device(wanted: str, gpus: int | None = None, lock_dir: Path | None = None) -> DeviceClaim:
    """Claim the device that `--device` names.

    Args:
        wanted: auto, cpu, cuda, cuda:N or mps.
        gpus: number of CUDA devices; None: ask torch.
        lock_dir: holds the lock files; None: the temporary directory.

    Raises:
        ConfigError: this host has no such device.
    """
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
    """Claim the first GPU without a claim; if every GPU is claimed, share the one that the process id selects."""
    for index in range(count):
        fd = _lock((lock_dir or Path(tempfile.gettempdir())) / f"syncline-{os.getuid()}-gpu-{index}.lock")
        if fd >= 0:
            return DeviceClaim(torch.device("cuda", index), fd)
    return DeviceClaim(torch.device("cuda", os.getpid() % count), shared=True)


def _lock(path: Path) -> int:
    """Return the descriptor of the lock; −1: another process holds it, or the file belongs to another user."""
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
