"""Between a model and its flat vector: makes the manifest of a model, and lets the model live in the vector."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from syncline.engine.gradients import Site
from syncline.errors import ConfigError, PeerError
from syncline.wire.manifest import ALIGN_ELEMENTS, Entry, Manifest

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def manifest_of(model: nn.Module, chunk_bytes: int, local: Sequence[str] = (), sections: int = 1) -> Manifest:
    """The layout of a model's averaged tensors, in the model's own order.

    `local`: name patterns of tensors that stay with the agent. Raises ConfigError for a model with nothing to average, or
    with tensors that a flat vector would change.
    """
    _check(model, local)
    travelling = list(_averaged(model, local))
    if not any(isinstance(t, nn.Parameter) for _, t in travelling):
        raise ConfigError(
            "task", "the model has no trainable floating-point parameter to average", "Return a model with parameters"
        )
    dtype = "fp64" if any(t.dtype == torch.float64 for _, t in travelling) else "fp32"
    itemsize = DTYPES[dtype].itemsize
    tensors, offset = [], 0
    for name, tensor in travelling:
        buffer = not isinstance(tensor, nn.Parameter)
        shape = list(tensor.shape)
        tensors.append(Entry(name=name, shape=shape, offset=offset, elements=tensor.numel(), buffer=buffer))
        offset += tensor.numel()
    names = {name for name, _ in travelling}
    return Manifest(
        dtype=dtype,
        elements=offset,
        chunk_elements=max(ALIGN_ELEMENTS, chunk_bytes // itemsize // ALIGN_ELEMENTS * ALIGN_ELEMENTS),
        tensors=tensors,
        sections=sections,
        at_home=[n for n, _ in (*model.named_parameters(), *model.named_buffers()) if n not in names],
    )


class FlatModel:
    """A model whose averaged tensors are views of one flat vector, so that averaging is one operation on `flat_P`.

    P: elements. Tensors of the vector's own dtype share its memory. Others, half-precision weights under an fp32 center, are
    copied by `load`, and `store` adds what they have changed by since: the vector keeps the digits that they cannot hold, as
    the fp32 master weights of mixed-precision training do (arXiv:1710.03740), and steps too small for them add up there.
    """

    def __init__(self, model: nn.Module, manifest: Manifest, local: Sequence[str] = ()) -> None:
        self.model = model
        tensors = dict(_averaged(model, local))
        found = [(n, list(t.shape), _kind(not isinstance(t, nn.Parameter))) for n, t in tensors.items()]
        expected = [(t.name, t.shape, _kind(t.buffer)) for t in manifest.tensors]
        if found != expected:
            odd = next(
                (f"{a} here, {b} in the run" for a, b in zip(found, expected, strict=False) if a != b), "another count"
            )
            raise PeerError(f"the task's model differs from the run's: {odd}. Is the task's code the same everywhere?")
        self._travelling = frozenset(tensors)
        device = next(iter(tensors.values())).device
        self.flat_P = torch.empty(manifest.elements, dtype=DTYPES[manifest.dtype], device=device)
        self.sites: list[Site] = []  # the trainable ones, and where they lie
        self._apart: list[tuple[Tensor, Tensor, Tensor]] = []  # its place, and what it was when it was last copied
        for entry in manifest.tensors:
            tensor = tensors[entry.name]
            where = slice(entry.offset, entry.offset + entry.elements)
            view = self.flat_P[where].view(entry.shape)
            view.copy_(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                self.sites.append(Site(tensor, where))
            if tensor.dtype == self.flat_P.dtype:
                tensor.data = view
            else:
                self._apart.append((tensor, view, tensor.detach().clone()))

    def store(self) -> None:
        """Model → flat vector, for tensors that do not share its memory."""
        for tensor, view, before in self._apart:
            view.add_(tensor.detach().to(view.dtype).sub_(before))
            before.copy_(tensor.detach())

    def load(self) -> None:
        """Flat vector → model, for tensors that do not share its memory."""
        with torch.no_grad():
            for tensor, view, before in self._apart:
                before.copy_(tensor.copy_(view))

    def at_home(self) -> dict[str, Tensor]:
        """What changes as this agent trains and does not travel, by name. Looked for each time: a model may put another tensor
        in a buffer's place. Sparse ones are left out: they are built, and not trained."""
        changing = ((n, t) for n, t in _changing(self.model) if t.layout is torch.strided)
        return {name: tensor for name, tensor in changing if name not in self._travelling}

    def restore_at_home(self, kept: Mapping[str, Tensor]) -> None:
        """What `at_home` was. A buffer that the model makes only as it trains is made anew. Raises ValueError."""
        own = self.at_home()
        with torch.no_grad():
            for name in own.keys() & kept.keys():
                found, there = kept[name], own[name]
                if (found.shape, found.dtype) != (there.shape, there.dtype):
                    raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, and the model's is another")
                there.copy_(found)


def _kind(buffer: bool) -> str:
    return "buffer" if buffer else "parameter"


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters, then buffers that are saved; each shared tensor once."""
    saved = model.state_dict(keep_vars=True)
    yield from ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    yield from ((n, b) for n, b in model.named_buffers() if n in saved)


def _averaged(model: nn.Module, local: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Of those, what is a floating-point number and not `local`.

    A buffer that holds an infinity, as an attention mask does, is no statistic: its mean with others has no meaning.
    """
    for name, tensor in _changing(model):
        if not tensor.is_floating_point() or _stays(name, local):
            continue
        if isinstance(tensor, nn.Parameter) or bool(torch.isfinite(tensor).all()):
            yield name, tensor


def _stays(name: str, local: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in local)


def _check(model: nn.Module, local: Sequence[str]) -> None:
    """Raises ConfigError for what cannot live in a flat vector, or would become another model there."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if is_lazy(tensor):
            problem = f"the model's {name} has no shape before the first batch"
            raise ConfigError("task", problem, "Send one batch through the model in model(), and return it then")
        if (
            isinstance(tensor, nn.Parameter)
            and tensor.is_complex()
            and tensor.requires_grad
            and not _stays(name, local)
        ):
            mend = "Hold its real and imaginary parts as two parameters, or name it in the task's `local`"
            raise ConfigError("task", f"the model's {name} is {tensor.dtype}, and cannot be averaged", mend)
    ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in tensors if t.is_contiguous() and t.nbytes]
    travelling = {name for name, _ in _averaged(model, local)}
    for (_, end, first), (begin, _, second) in pairwise(sorted(ranges)):
        if begin < end and travelling & {first, second}:
            problem = (
                f"the model's {first} and {second} lie in the same memory and are two tensors, which would part here"
            )
            raise ConfigError("task", problem, "Make them one parameter (`b.weight = a.weight`), or copy one of them")
