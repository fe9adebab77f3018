"""What an agent keeps on disk of a run: W_i, its clock and its optimiser, as one safetensors file, replaced atomically."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from syncline.wire.manifest import Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """W_i after the period `clock`, and the optimiser's tensors by `<parameter index>.<name>`."""

    clock: int
    own_P: Tensor
    optimizer: dict[str, Tensor]
    pending: dict[int, Tensor] = field(default_factory=dict)  # by clock: offered, and not known to be judged

    @classmethod
    def of(
        cls, clock: int, own_P: Tensor, optimizer: torch.optim.Optimizer, pending: Mapping[int, Tensor] | None = None
    ) -> Kept:
        state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
        tensors = {
            f"{i}.{name}": torch.as_tensor(v)
            for i, kept in state.items()
            for name, v in kept.items()
            if isinstance(v, Tensor | int | float)
        }
        return cls(clock, own_P.detach(), {k: t.detach() for k, t in tensors.items()}, dict(pending or {}))

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives the optimiser its tensors back."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in self.optimizer.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def save_state(path: Path, kept: Kept, layout: Manifest) -> None:
    """Replaces the file: after a crash there is the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "own": kept.own_P,
        **{f"optimizer.{k}": t for k, t in kept.optimizer.items()},
        **{f"pending.{clock}": t for clock, t in kept.pending.items()},
    }
    fresh = path.with_suffix(".new")
    save_file(
        {k: t.cpu().contiguous().clone() for k, t in tensors.items()},
        fresh,
        metadata={"clock": str(kept.clock), "layout": layout.layout_digest()},
    )
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    fresh.replace(path)


def load_state(path: Path, layout: Manifest) -> Kept | None:
    """What was kept, or None where nothing usable was: then the agent begins with the center."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("layout") != layout.layout_digest():
                log.warning("%s is of another model; beginning with the center", path)
                return None
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        pending = {int(clock): t for clock, t in _under("pending.", tensors).items()}
        return Kept(int(metadata["clock"]), tensors["own"], _under("optimizer.", tensors), pending)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        log.warning("%s is unreadable (%s); beginning with the center", path, error)
        return None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
