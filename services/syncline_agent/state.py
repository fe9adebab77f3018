"""What an agent keeps on disk of a run: W_i, its clock, its optimiser and schedule, and the tensors that never leave it, as one
file, replaced atomically.

A file is of one *submission* of a run, the id of head's manifest: it is another one where a run of the same name is submitted
again, and the same one wherever a run goes on. What is of another submission or another model, or is not as it was written, is
not used: the agent begins with the center.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from syncline.errors import SynclineError
from syncline.files import replacing
from syncline.wire.manifest import Manifest

log = logging.getLogger(__name__)

DIGEST = "digest"  # in a file's metadata: over all the rest of it
PAIRS = " as pairs"  # behind a name: a complex tensor, for which the format has not always a type
MOST_CLOCK = 1 << 48  # no agent gets there


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
    local: dict[str, Tensor] = field(default_factory=dict)  # what does not travel, by name

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
            "kind": type(optimizer).__qualname__,
            "state": {k: v for k, v in state.items() if isinstance(v, int | float)},
            "groups": [_numbers({k: v for k, v in group.items() if k != "params"}) for group in whole["param_groups"]],
            "schedule": {} if schedule is None else _numbers(vars(schedule)),
            "drawn": drawn,
        }
        return cls(clock, own_P.detach(), tensors, dict(pending or {}), numbers)

    def restore(self, optimizer: torch.optim.Optimizer, schedule: LRScheduler | None = None) -> None:
        """Gives the optimiser and its schedule back what they had, to the last bit. Raises ValueError for another's."""
        if self.numbers.get("kind") != type(optimizer).__qualname__:
            raise ValueError(f"it is of the optimiser {self.numbers.get('kind')}")
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


def save_state(path: Path, kept: Kept, layout: Manifest, submission: str) -> None:
    """Replaces the file: after a crash there is the old one or the new one, never half of one.

    Raises OSError and SafetensorError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = _apart(
        {
            "own": kept.own_P,
            **{f"optimizer.{k}": t for k, t in kept.optimizer.items()},
            **{f"pending.{clock}": t for clock, t in kept.pending.items()},
            **{f"variates.{name}": t for name, t in kept.variates.items()},
            **{f"local.{name}": t for name, t in kept.local.items()},
        }
    )
    metadata = {
        "clock": str(kept.clock),
        "layout": layout.layout_digest(),
        "submission": submission,
        "numbers": json.dumps(kept.numbers),
    }
    with replacing(path, f"{path.stem}.new") as fresh:
        save_file(tensors, fresh, {**metadata, DIGEST: _digest(tensors, metadata)})


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and, as the format wants it, no two in one storage. A copy is made only where one is needed."""
    made: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        there = tensor.detach().cpu().contiguous()
        if there.is_complex():
            name, there = f"{name}{PAIRS}", torch.view_as_real(there)
        place = there.untyped_storage().data_ptr()
        made[name] = there.clone() if place in storages else there
        storages.add(place)
    return made


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Over all that a file holds."""
    whole = xxhash.xxh3_128(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return str(whole.hexdigest())


class Unusable(SynclineError):
    """A file of which nothing is used, with the reason."""


def load_state(path: Path, layout: Manifest, submission: str) -> Kept | None:
    """What was kept, or None where nothing usable was: then the agent begins with the center."""
    try:
        return _read(path, layout, submission) if path.exists() else None
    except Unusable as why:
        log.warning("%s %s; beginning with the center", path, why)
    except Exception as error:  # whatever is wrong with a file, it is no reason not to train
        log.warning("%s is unreadable (%s: %s); beginning with the center", path, type(error).__name__, error)
    return None


def _read(path: Path, layout: Manifest, submission: str) -> Kept:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        if metadata.get("layout") != layout.layout_digest():
            raise Unusable("is of another model")
        if metadata.get("submission") != submission:
            raise Unusable("is of an earlier run of this name")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    if metadata.pop(DIGEST, "") != _digest(tensors, metadata):
        raise Unusable("is not as it was written")
    for name in [name for name in tensors if name.endswith(PAIRS)]:
        tensors[name.removesuffix(PAIRS)] = torch.view_as_complex(tensors.pop(name))
    clock = int(metadata["clock"])
    if not 0 <= clock < MOST_CLOCK:
        raise Unusable(f"has the clock {clock}")
    optimizer, variates, local = (_under(f"{what}.", tensors) for what in ("optimizer", "variates", "local"))
    pending = {int(at): t for at, t in _under("pending.", tensors).items()}
    for vector_P in (tensors["own"], *pending.values(), *variates.values()):
        if vector_P.shape != (layout.elements,):
            raise Unusable(f"holds a vector of {list(vector_P.shape)} elements, not {layout.elements}")
    return Kept(clock, tensors["own"], optimizer, pending, json.loads(metadata["numbers"]), variates, local)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
