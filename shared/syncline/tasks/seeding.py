"""Seeds of the random numbers that a task draws: of torch, of `random` and of `numpy.random`.

A task's code runs at five places: when it is loaded, in `model`, in `dataset`, in a local period, and in an evaluation. Each is
seeded from the run right before it, so what it draws depends neither on what was drawn before nor on the service that asks.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """Return one seed of 56 bits for several numbers: the run's seed, and where in the run it is."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed every process-wide generator that a task may draw from.

    Args:
        seed: 0 … 2**63 − 1.
        device: seed torch's generators of this kind of device only; None: of every kind.
    """
    if device is not None and device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for other devices, which takes milliseconds
    else:
        torch.manual_seed(seed)
    random.setstate(random.Random(seed).getstate())  # a simulation refuses `random.seed`: it may come without a seed
    np.random.seed(seed if seed < 1 << 32 else [seed & 0xFFFFFFFF, seed >> 32])


@contextmanager
def generators_restored() -> Iterator[None]:
    """Give a program its process-wide generators back as they were before tasks ran in its own process."""
    of_random, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_random)
        np.random.set_state(of_numpy)
