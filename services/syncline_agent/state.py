"""What an agent keeps on disk of a run: W_i, its clock, its optimiser and schedule, as one file, replaced atomically."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from syncline.files import replacing
from syncline.wire.manifest import Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """W_i after the period `clock`, and all that the next period depends on.

    `optimizer`: the optimiser's tensors by `<parameter index>.<name>`. `numbers`: its numbers by the same names under
    `state`, its settings as they stand (a schedule changes them) under `groups`, the schedule's place under `schedule`, and
    the batches drawn so far under `drawn`.
    """

    clock: int
    own_P: Tensor
    optimizer: dict[str, Tensor]
    pending: dict[int, Tensor] = field(default_factory=dict)  # by clock: offered, and not known to be judged
    numbers: dict[str, Any] = field(default_factory=dict)
    variates: dict[str, Tensor] = field(default_factory=dict)  # of SCAFFOLD

    @classmethod
    def of(
        cls,
        clock: int,
        own_P: Tensor,
        optimizer: torch.optim.Optimizer,
        pending: Mapping[int, Tensor] | None = None,
        schedule: LRScheduler | None = None,
        drawn: int = 0,
    ) -> Kept:
        whole = optimizer.state_dict()
        state = {f"{i}.{name}": v for i, kept in whole["state"].items() for name, v in kept.items()}
        tensors = {k: t.detach() for k, t in state.items() if isinstance(t, Tensor)}
        numbers = {
            "state": {k: v for k, v in state.items() if isinstance(v, int | float)},
            "groups": [_numbers({k: v for k, v in group.items() if k != "params"}) for group in whole["param_groups"]],
            "schedule": {} if schedule is None else _numbers(vars(schedule)),
            "drawn": drawn,
        }
        return cls(clock, own_P.detach(), tensors, dict(pending or {}), numbers)

    def restore(self, optimizer: torch.optim.Optimizer, schedule: LRScheduler | None = None) -> None:
        """Gives the optimiser and its schedule back what they had, to the last bit."""
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**self.optimizer, **self.numbers.get("state", {})}.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, kept in state.items():  # torch has cast them to the dtype of the parameter
            own = optimizer.state[parameters[index]]
            own |= {n: v.to(own[n].device, copy=True) for n, v in kept.items() if isinstance(v, Tensor)}
        for group, numbers in zip(optimizer.param_groups, self.numbers.get("groups", ()), strict=False):
            group |= {k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()}
        if schedule is not None:
            vars(schedule).update(self.numbers.get("schedule", {}))


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are numbers, or lists of them."""
    return {k: v for k, v in values.items() if isinstance(v, int | float) or _is_list_of_numbers(v)}


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(x, int | float) for x in value)


def save_state(path: Path, kept: Kept, layout: Manifest) -> None:
    """Replaces the file: after a crash there is the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "own": kept.own_P,
        **{f"optimizer.{k}": t for k, t in kept.optimizer.items()},
        **{f"pending.{clock}": t for clock, t in kept.pending.items()},
        **{f"variates.{name}": t for name, t in kept.variates.items()},
    }
    metadata = {"clock": str(kept.clock), "layout": layout.layout_digest(), "numbers": json.dumps(kept.numbers)}
    with replacing(path, f"{path.stem}.new") as fresh:
        save_file(_apart(tensors), fresh, metadata)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and, as the format wants it, no two in one storage. A copy is made only where one is needed."""
    made: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        there = tensor.detach().cpu().contiguous()
        place = there.untyped_storage().data_ptr()
        made[name] = there.clone() if place in storages else there
        storages.add(place)
    return made


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
        numbers = json.loads(metadata.get("numbers", "{}"))
        optimizer, variates = _under("optimizer.", tensors), _under("variates.", tensors)
        return Kept(int(metadata["clock"]), tensors["own"], optimizer, pending, numbers, variates)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        log.warning("%s is unreadable (%s); beginning with the center", path, error)
        return None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
