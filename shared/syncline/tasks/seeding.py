"""Seeding of the generators that tasks draw from: torch, `random` and `numpy.random`.

A task's code runs when it is loaded, in `model`, in `dataset`, in a local period, and in an evaluation. The generators are
seeded from the run before each of these five, so the numbers depend neither on earlier draws nor on the service that asks.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """Return one seed of 56 bits for several numbers: the run's seed and the position in the run."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed every process-wide generator that a task may draw from.

    Args:
        seed: 0 … 2**63 − 1.
        device: seed torch's generators of this kind of device only; None: of all devices.
    """
    if device is not None and device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for other devices, which takes milliseconds
    else:
        torch.manual_seed(seed)
    random.setstate(random.Random(seed).getstate())  # a simulation refuses `random.seed`: it may come without a seed
    np.random.seed(seed if seed < 1 << 32 else [seed & 0xFFFFFFFF, seed >> 32])


@contextmanager
def generators_restored() -> Iterator[None]:
    """Restore the process-wide generators on exit, for a program in whose process tasks run."""
    of_random, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_random)
        np.random.set_state(of_numpy)
