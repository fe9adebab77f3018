"""Outer optimisers: compute the next center from W and the merged update D, slice by slice on the flat vector.

D is the descent direction, the mean movement of the agents; torch's optimisers take the gradient, which is −D.

To add an optimiser: write a class with its settings and `step`, and add a line to `OUTERS`. The module imports no torch,
because agents and commands read specs without torch; an optimiser calls methods of the tensors that it is given.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from syncline.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = Sequence[Tensor]


class Outer(Settings):
    """Base class of outer optimisers. Its fields are the settings of the spec's section `outer`."""

    kind: str
    lr: float = Field(1.0, gt=0, le=100)
    state_vectors: ClassVar[int] = 0  # vectors of the model's size kept beside the center; zeros at version 0

    @abstractmethod
    def step(self, center_E: Tensor, merged_E: Tensor, old: Tensors, out_E: Tensor, new: Tensors, version: int) -> None:
        """Write the next W of one slice to `out_E` and the next state to `new`; modify no other tensor.

        An element of the result may depend only on the same element of the arguments: slices have any size and are stepped
        in any order.

        Args:
            center_E: the slice of W, E elements of any float dtype; so are all others.
            merged_E: the slice of D.
            old: the state vectors.
            out_E: receives the next W; may share memory with `center_E`.
            new: receives the next state vectors; may share memory with `old`.
            version: the version of W, which is the number of steps made before.
        """


class Sgd(Outer):
    """Plain averaging, W ← W + lr D. With lr 1 and uniform weights this is W = (1/N) Σ W_i."""

    kind: Literal["sgd"] = "sgd"

    def step(self, center_E: Tensor, merged_E: Tensor, old: Tensors, out_E: Tensor, new: Tensors, version: int) -> None:
        out_E.copy_(center_E).add_(merged_E, alpha=self.lr)


class Momentum(Outer):
    """FedAvgM (arXiv:1909.06335): m ← β m + D, W ← W + lr m. Equal to torch.optim.SGD with momentum to the last bit."""

    kind: Literal["momentum"] = "momentum"
    momentum: float = Field(0.9, ge=0, lt=1, description="β, the share of m that is kept.")
    state_vectors: ClassVar[int] = 1

    def step(self, center_E: Tensor, merged_E: Tensor, old: Tensors, out_E: Tensor, new: Tensors, version: int) -> None:
        m_E = new[0].copy_(old[0]).mul_(self.momentum).add_(merged_E)
        out_E.copy_(center_E).add_(m_E, alpha=self.lr)


class Nesterov(Outer):
    """Nesterov momentum, as in DiLoCo (arXiv:2311.08105, algorithm 1): m ← β m + D, W ← W + lr (D + β m).

    Equal to torch.optim.SGD with nesterov=True to the last bit.
    """

    kind: Literal["nesterov"] = "nesterov"
    lr: float = Field(0.7, gt=0, le=100)
    momentum: float = Field(0.9, gt=0, lt=1, description="β, the share of m that is kept.")
    state_vectors: ClassVar[int] = 1

    def step(self, center_E: Tensor, merged_E: Tensor, old: Tensors, out_E: Tensor, new: Tensors, version: int) -> None:
        m_E = new[0].copy_(old[0]).mul_(self.momentum).add_(merged_E)
        ahead_E = merged_E.add(m_E, alpha=self.momentum)
        out_E.copy_(center_E).add_(ahead_E, alpha=self.lr)


class DelayedNesterov(Outer):
    """Nesterov momentum for asynchronous runs (arXiv:2401.09135): every N-th merge applies the momentum.

    Every merge: b ← b + D, W ← W + lr D/N. Every N-th merge in addition: m ← β m + b/N, W ← W + lr β m, b ← 0. N merges of
    fixed updates equal one Nesterov step on their mean; N = 1 is Nesterov.
    """

    kind: Literal["delayed_nesterov"] = "delayed_nesterov"
    lr: float = Field(0.7, gt=0, le=100)
    momentum: float = Field(0.9, gt=0, lt=1, description="β, the share of m that is kept.")
    every: int = Field(
        ge=1,
        le=1_000_000,
        description="N, merges between two steps of the momentum: the agents divided by sync.buffer.",
    )
    state_vectors: ClassVar[int] = 2  # m, b

    def step(self, center_E: Tensor, merged_E: Tensor, old: Tensors, out_E: Tensor, new: Tensors, version: int) -> None:
        m_E, gathered_E = (next_E.copy_(old_E) for next_E, old_E in zip(new, old, strict=True))
        gathered_E.add_(merged_E)
        out_E.copy_(center_E).add_(merged_E, alpha=self.lr / self.every)
        if (version + 1) % self.every == 0:
            m_E.mul_(self.momentum).add_(gathered_E, alpha=1 / self.every)
            out_E.add_(m_E, alpha=self.lr * self.momentum)
            gathered_E.zero_()


class _Adaptive(Outer):
    """Base class of FedOpt (arXiv:2003.00295, algorithm 2): m ← β₁ m + (1 − β₁) D, W ← W + lr m / (√v + τ).

    Each subclass has its own rule for v. As in the paper, m starts at 0 and v at τ², without bias correction.
    """

    lr: float = Field(0.01, gt=0, le=100)
    beta1: float = Field(0.9, ge=0, lt=1, description="Share of m that is kept.")
    tau: float = Field(
        1e-3,
        gt=0,
        le=1,
        description="Degree of adaptivity: with a smaller value the steps of all coordinates are more alike.",
    )
    state_vectors: ClassVar[int] = 2  # m, v

    def step(self, center_E: Tensor, merged_E: Tensor, old: Tensors, out_E: Tensor, new: Tensors, version: int) -> None:
        m_E, v_E = (next_E.copy_(old_E) for next_E, old_E in zip(new, old, strict=True))
        if version == 0:
            v_E.fill_(self.tau**2)
        m_E.mul_(self.beta1).add_(merged_E, alpha=1 - self.beta1)
        self._second_moment_(v_E, merged_E.square())
        out_E.copy_(center_E).addcdiv_(m_E, v_E.sqrt().add_(self.tau), value=self.lr)

    @abstractmethod
    def _second_moment_(self, v_E: Tensor, squared_E: Tensor) -> None:
        """Update v in place from D²."""


class Adam(_Adaptive):
    """FedAdam: v ← β₂ v + (1 − β₂) D²."""

    kind: Literal["adam"] = "adam"
    beta2: float = Field(0.99, ge=0, lt=1, description="Share of v that is kept.")

    def _second_moment_(self, v_E: Tensor, squared_E: Tensor) -> None:
        v_E.mul_(self.beta2).add_(squared_E, alpha=1 - self.beta2)


class Yogi(_Adaptive):
    """FedYogi: v ← v − (1 − β₂) D² sign(v − D²)."""

    kind: Literal["yogi"] = "yogi"
    beta2: float = Field(0.99, ge=0, lt=1, description="The nearer to 1, the slower v changes.")

    def _second_moment_(self, v_E: Tensor, squared_E: Tensor) -> None:
        v_E.addcmul_(squared_E, v_E.sub(squared_E).sign_(), value=self.beta2 - 1)


class Adagrad(_Adaptive):
    """FedAdagrad: v ← v + D². β₁ is 0 by default, as in the paper's experiments."""

    kind: Literal["adagrad"] = "adagrad"
    lr: float = Field(0.1, gt=0, le=100)
    beta1: float = Field(0.0, ge=0, lt=1, description="Share of m that is kept.")

    def _second_moment_(self, v_E: Tensor, squared_E: Tensor) -> None:
        v_E.add_(squared_E)


OUTERS: dict[str, type[Outer]] = {
    "sgd": Sgd,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "delayed_nesterov": DelayedNesterov,
    "adam": Adam,
    "yogi": Yogi,
    "adagrad": Adagrad,
}
