"""The flat vector of a model: makes the manifest of a model, and lets the model's tensors live in the vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from syncline.errors import ConfigError, PeerError
from syncline.local.gradients import Site
from syncline.model.frozen import digests_of
from syncline.model.manifest import ALIGN_ELEMENTS, Entry, Manifest, NamedDigest
from syncline.model.tensors import (
    Slot,
    averaged_of,
    changing_of,
    is_trained,
    matches,
    overlapping,
    slots_of,
    tensors_of,
    unit_vectors,
)
from syncline.transform.torch_dtypes import TORCH_DTYPES

UNIT_TOLERANCE = 1e-5  # above float32's rounding of a vector's length


def manifest_of(
    model: nn.Module,
    chunk_bytes: int,
    local: Sequence[str] = (),
    sections: int = 1,
    shared: Sequence[str] = (),
    code: Mapping[str, str] | None = None,
) -> Manifest:
    """Return the layout of a model's averaged tensors, in the model's own order.

    Args:
        local: name patterns of tensors that stay with the agent.
        shared: name patterns of frozen tensors that are averaged, because the task updates them itself.
        code: digests of the files of the task's code, by name.

    Raises:
        ConfigError: the model has nothing to average, or tensors that a flat vector would change.
    """
    _check(model, local, shared)
    travelling = list(averaged_of(model, local, shared))
    if not any(is_trained(t) for _, t in travelling):
        raise ConfigError(
            "task", "the model has no trainable floating-point parameter to average", "Return a model with parameters"
        )
    dtype = "fp64" if any(t.dtype == torch.float64 for _, t in travelling) else "fp32"
    itemsize = TORCH_DTYPES[dtype].itemsize
    units = set(unit_vectors(model))
    tensors, offset = [], 0
    for name, tensor in travelling:
        entry = Entry(
            name=name,
            shape=list(tensor.shape),
            offset=offset,
            elements=tensor.numel(),
            buffer=not is_trained(tensor),
            unit=name in units,
        )
        tensors.append(entry)
        offset += tensor.numel()
    names = {name for name, _ in travelling}
    return Manifest(
        dtype=dtype,
        elements=offset,
        chunk_elements=max(ALIGN_ELEMENTS, chunk_bytes // itemsize // ALIGN_ELEMENTS * ALIGN_ELEMENTS),
        tensors=tensors,
        sections=sections,
        local=[name for name, _ in tensors_of(model) if name not in names],
        frozen=digests_of(model, local, shared),
        code=[NamedDigest(name=name, digest=digest) for name, digest in (code or {}).items()],
    )


@dataclass(slots=True)
class _Place:
    """A tensor of the model and its place in the flat vector.

    Attributes:
        tensor: the object that the model held under this name at the last binding.
        view: the tensor's elements in the flat vector, in its shape.
        copied: value at the last copy, for a tensor of another dtype than the vector; None: the tensor shares memory.
    """

    entry: Entry
    tensor: Tensor
    view: Tensor
    dtype: torch.dtype
    trained: bool
    copied: Tensor | None = None

    def holds(self, found: Tensor) -> bool:
        """Return whether this tensor of the model is the bound one, and still has the memory that was assigned."""
        if found is not self.tensor or found.shape != self.view.shape or found.dtype != self.dtype:
            return False
        in_place = found.data_ptr() == self.view.data_ptr() and found.stride() == self.view.stride()
        return in_place or self.copied is not None or not found.numel()

    def bind(self, tensor: Tensor) -> None:
        """Make the tensor share the vector's memory, if its dtype allows that."""
        self.tensor = tensor
        if self.copied is None and tensor.numel():  # an empty view would share its address with the next tensor
            tensor.data = self.view

    @property
    def where(self) -> slice:
        """Return the tensor's elements in the flat vector."""
        return slice(self.entry.offset, self.entry.offset + self.entry.elements)


class FlatModel:
    """A model whose averaged tensors are views of one flat vector, so that averaging is one operation on `flat_P`.

    P: elements. Tensors of the vector's own dtype share its memory. Others, half-precision weights under an fp32 center, are
    copied by `load`, and `store` adds what they have changed by since: the vector keeps the digits that they cannot hold, as
    the fp32 master weights of mixed-precision training do (arXiv:1710.03740), and steps too small for them add up there.

    Training may replace a tensor (`self.mean = .9 * self.mean + …`) or point it at other memory (`p.data = old`). `store`
    finds tensors by name, copies such a tensor in, and binds it again.

    Attributes:
        sites: the trained parameters and their places. The list is changed in place, so that its readers see new objects.
        replaced: by name, parameters that training replaced by another object: the first one and the one of today.
    """

    def __init__(
        self, model: nn.Module, manifest: Manifest, local: Sequence[str] = (), shared: Sequence[str] = ()
    ) -> None:
        self.model = model
        tensors = dict(averaged_of(model, local, shared))
        found = [(n, list(t.shape), _kind(not is_trained(t))) for n, t in tensors.items()]
        expected = [(t.name, t.shape, _kind(t.buffer)) for t in manifest.tensors]
        if found != expected:
            odd = next(
                (f"{a} here, {b} in the run" for a, b in zip(found, expected, strict=False) if a != b), "another count"
            )
            raise PeerError(f"the task's model differs from the run's: {odd}. Is the task's code the same everywhere?")
        self._travelling = frozenset(tensors)
        ids = {id(tensor) for tensor in tensors.values()}
        self._trainable = {n for n, slot in slots_of(model) if is_trained(slot.tensor) and id(slot.tensor) not in ids}
        self._local = tuple(local)
        device = next(iter(tensors.values())).device
        self.flat_P = torch.empty(manifest.elements, dtype=TORCH_DTYPES[manifest.dtype], device=device)
        self.sites: list[Site] = []
        self.replaced: dict[str, tuple[Tensor, Tensor]] = {}
        self._places = [self._place(entry, tensors[entry.name]) for entry in manifest.tensors]
        self._note_sites()

    def _place(self, entry: Entry, tensor: Tensor) -> _Place:
        view = self.flat_P[entry.offset : entry.offset + entry.elements].view(entry.shape)
        view.copy_(tensor.detach())
        copied = None if tensor.dtype == self.flat_P.dtype else tensor.detach().clone()
        place = _Place(entry, tensor, view, tensor.dtype, is_trained(tensor), copied)
        place.bind(tensor)
        return place

    def _note_sites(self) -> None:
        self.sites[:] = [
            Site(p.tensor, p.where) for p in self._places if p.trained and isinstance(p.tensor, nn.Parameter)
        ]

    def store(self) -> None:
        """Copy the model into the flat vector: tensors that were replaced or pointed elsewhere, and those of another
        dtype.

        Raises:
            ConfigError: a tensor cannot be taken in, or another one became trainable. Names the tensor.
        """
        self.take_in()
        for place in self._places:
            if place.copied is not None:
                place.view.add_(place.tensor.detach().to(place.view.dtype).sub_(place.copied))
                place.copied.copy_(place.tensor.detach())

    def load(self) -> None:
        """Copy the flat vector into the tensors that do not share its memory. Vectors of length 1 get that length back."""
        with torch.no_grad():
            for place in self._places:
                if place.entry.unit:
                    to_unit_(place.view)
                if place.copied is not None:
                    place.copied.copy_(place.tensor.copy_(place.view))

    @torch.no_grad()
    def take_in(self) -> None:
        """Copy tensors that training replaced, or pointed at other memory, into the flat vector, and bind them again.

        Raises:
            ConfigError: such a tensor does not fit, or another one became trainable. Names the tensor.
        """
        slots = dict(slots_of(self.model))
        self._refuse_newly_trainable(slots)
        moved = [(place, self._slot_of(place, slots)) for place in self._places]
        moved = [(place, slot) for place, slot in moved if not place.holds(slot.tensor)]
        if not moved:
            return
        now = [(p.entry.name, slots[p.entry.name].tensor) for p in self._places if p.entry.elements]
        for first, second in overlapping(now):
            problem = f"the model's {first} and {second} lie in the same memory since training, and are two tensors"
            raise ConfigError("task", problem, "Tie them in model() (`b.weight = a.weight`), or copy one of them")
        values = [slot.tensor.detach().clone() for _, slot in moved]  # they may lie in each other's places
        for (place, slot), value in zip(moved, values, strict=True):
            if place.copied is None:
                place.view.copy_(value)
            if isinstance(slot.tensor, nn.Parameter):
                if slot.tensor is not place.tensor:
                    original, _ = self.replaced.get(place.entry.name, (place.tensor, None))
                    self.replaced[place.entry.name] = (original, slot.tensor)
                place.bind(slot.tensor)
            else:  # the new tensor may belong to a graph: the old one goes on, with its value
                if place.copied is not None:
                    place.tensor.copy_(value)
                slot.owner._buffers[slot.attribute] = place.tensor
                place.bind(place.tensor)
        self._note_sites()

    def _slot_of(self, place: _Place, slots: Mapping[str, Slot]) -> Slot:
        """Return the slot that holds the tensor now. Raises ConfigError if the model has none that fits."""
        name, slot = place.entry.name, slots.get(place.entry.name)
        hint = "Make the model in its final form in model(), after one batch if its tensors grow with the first one"
        if slot is None:
            raise ConfigError("task", f"the model's {name} is averaged, and training has removed it", hint)
        before = (list(place.view.shape), place.dtype, isinstance(place.tensor, nn.Parameter))
        after = (list(slot.tensor.shape), slot.tensor.dtype, isinstance(slot.tensor, nn.Parameter))
        if before != after or slot.tensor.layout is not torch.strided:
            kinds = [f"a {'parameter' if p else 'buffer'} of {d} {s}" for s, d, p in (before, after)]
            raise ConfigError("task", f"the model's {name} was {kinds[0]}, and training has made it {kinds[1]}", hint)
        return slot

    def _refuse_newly_trainable(self, slots: Mapping[str, Slot]) -> None:
        known = {id(slot.tensor) for name, slot in slots.items() if name in self._travelling}
        for name, slot in slots.items():
            if not is_trained(slot.tensor) or name in self._travelling or name in self._trainable:
                continue
            if id(slot.tensor) not in known:  # else it is tied to one that travels
                raise ConfigError(
                    "task",
                    f"the model's {name} became trainable during training. It was frozen, tied or absent when model() "
                    "returned, so it is neither trained nor averaged",
                    "Return it trainable from model(), and freeze it in `train` or `loss` until its time has come",
                )

    def local(self) -> dict[str, Tensor]:
        """Return the tensors that change in training and do not travel, by name.

        Tensors are looked up each time, because a model may put another tensor in a buffer's place. Sparse tensors are
        left out: they are built, and not trained.
        """
        own = [(n, t) for n, t in tensors_of(self.model) if isinstance(t, nn.Parameter) and matches(n, self._local)]
        changing = {**dict(changing_of(self.model)), **dict(own)}
        return {n: t for n, t in changing.items() if t.layout is torch.strided and n not in self._travelling}

    def restore_at_home(self, kept: Mapping[str, Tensor]) -> None:
        """Write back the tensors of `local`. The model makes again those buffers that it makes only in training.

        Raises:
            ValueError: a tensor has another shape or dtype. A tensor that was empty takes the shape that it grew to.
        """
        own = self.local()
        with torch.no_grad():
            for name in own.keys() & kept.keys():
                found, there = kept[name], own[name]
                if not there.numel() and found.dtype == there.dtype:
                    there.resize_(found.shape)
                if (found.shape, found.dtype) != (there.shape, there.dtype):
                    raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, and the model's is another")
                there.copy_(found)


def _kind(buffer: bool) -> str:
    return "buffer" if buffer else "parameter"


def to_unit_(vector: Tensor) -> Tensor:
    """Scale the vector back to length 1, in place. A vector that has this length, up to rounding, keeps its bits."""
    length = float(torch.linalg.vector_norm(vector))
    if length > 0 and abs(length - 1) > UNIT_TOLERANCE:
        vector.div_(length)
    return vector


def _check(model: nn.Module, local: Sequence[str], shared: Sequence[str]) -> None:
    """Raise ConfigError for a model that cannot live in a flat vector, or would become another model in one."""
    tensors = list(tensors_of(model))
    for name, tensor in tensors:
        if is_lazy(tensor):
            problem = f"the model's {name} has no shape before the first batch"
            raise ConfigError("task", problem, "Send one batch through the model in model(), and return it then")
        if tensor.is_complex() and is_trained(tensor) and not matches(name, local):
            hint = "Hold its real and imaginary parts as two parameters, or name it in the task's `local`"
            raise ConfigError("task", f"the model's {name} is {tensor.dtype}, and cannot be averaged", hint)
    _check_patterns(tensors, local, shared)
    travelling = {name for name, _ in averaged_of(model, local, shared)}
    for first, second in overlapping(tensors):
        if travelling & {first, second}:
            problem = (
                f"the model's {first} and {second} lie in the same memory and are two tensors, which would part here"
            )
            raise ConfigError("task", problem, "Make them one parameter (`b.weight = a.weight`), or copy one of them")


def _check_patterns(tensors: Sequence[tuple[str, Tensor]], local: Sequence[str], shared: Sequence[str]) -> None:
    for setting, patterns in (("local", local), ("shared", shared)):
        if isinstance(patterns, str):
            raise ConfigError("task", f"`{setting}` is the text {patterns!r}", f"Write a tuple: `({patterns!r},)`")
    for pattern in shared:
        names = [name for name, t in tensors if t.is_floating_point() and matches(name, [pattern])]
        if not names:
            problem = f"`shared` names {pattern!r}, which no floating-point tensor of the model matches"
            raise ConfigError("task", problem, "Write the names as `model().named_parameters()` gives them")
        if (both := next((name for name in names if matches(name, local)), None)) is not None:
            raise ConfigError("task", f"`local` and `shared` both name {both}", "Leave it out of one of them")
