"""The outer optimiser: (W, D) → the next W, on the flat center, slice by slice. D, the merged update, points where the agents
went: it is the descent direction, where torch's optimisers take the gradient −D.

To add one: a class with its settings and `step`, and a line in `OUTERS`. It reads no torch by itself, so that a spec can be
read without it: everything it does are methods of the tensors it is given.
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
    """Base of all: what a spec's section `outer` may set, and what is done with it."""

    kind: str
    lr: float = Field(1.0, gt=0, le=100)
    states: ClassVar[int] = 0  # flat vectors of the model's size that it keeps; zeros at version 0

    @abstractmethod
    def step(self, center_E: Tensor, merged_E: Tensor, old: Tensors, out_E: Tensor, new: Tensors, version: int) -> None:
        """Writes the next W to `out_E` and the next state to `new`, and leaves all else as it is. `old`: the state so far.
        Results may lie where the arguments do: `out_E` at `center_E`, `new` at `old`.

        E: elements of the slice, the same in all of them, any float dtype. An element depends on nothing but the same
        element of the others: slices are stepped in any order, of any size. `version`: of the center that is left, so the
        number of steps made before; 0 is the first.
        """


class Sgd(Outer):
    """W ← W + lr D. With lr 1 and uniform weights this is W = (1/N) Σ W_i."""

    kind: Literal["sgd"] = "sgd"

    def step(self, center_E: Tensor, merged_E: Tensor, old: Tensors, out_E: Tensor, new: Tensors, version: int) -> None:
        out_E.copy_(center_E).add_(merged_E, alpha=self.lr)


class Momentum(Outer):
    """m ← β m + D, W ← W + lr m: FedAvgM (arXiv:1909.06335), and torch.optim.SGD's momentum to the last bit."""

    kind: Literal["momentum"] = "momentum"
    momentum: float = Field(0.9, ge=0, lt=1, description="β, the share of m that is kept.")
    states: ClassVar[int] = 1

    def step(self, center_E: Tensor, merged_E: Tensor, old: Tensors, out_E: Tensor, new: Tensors, version: int) -> None:
        m_E = new[0].copy_(old[0]).mul_(self.momentum).add_(merged_E)
        out_E.copy_(center_E).add_(m_E, alpha=self.lr)


class Nesterov(Outer):
    """m ← β m + D, W ← W + lr (D + β m): DiLoCo (arXiv:2311.08105, algorithm 1), and torch.optim.SGD's to the last bit."""

    kind: Literal["nesterov"] = "nesterov"
    lr: float = Field(0.7, gt=0, le=100)
    momentum: float = Field(0.9, gt=0, lt=1, description="β, the share of m that is kept.")
    states: ClassVar[int] = 1

    def step(self, center_E: Tensor, merged_E: Tensor, old: Tensors, out_E: Tensor, new: Tensors, version: int) -> None:
        m_E = new[0].copy_(old[0]).mul_(self.momentum).add_(merged_E)
        ahead_E = merged_E.add(m_E, alpha=self.momentum)
        out_E.copy_(center_E).add_(ahead_E, alpha=self.lr)


class DelayedNesterov(Outer):
    """Nesterov for asynchronous runs (arXiv:2401.09135): every merge moves W by lr D / N, each N-th one lets momentum in.

    b ← b + D; at the N-th merge m ← β m + b/N, W ← W + lr (D/N + β m), b ← 0; at the others W ← W + lr D/N. N merges of fixed
    updates are one Nesterov step on their mean; N = 1 is Nesterov.
    """

    kind: Literal["delayed_nesterov"] = "delayed_nesterov"
    lr: float = Field(0.7, gt=0, le=100)
    momentum: float = Field(0.9, gt=0, lt=1, description="β, the share of m that is kept.")
    every: int = Field(
        ge=1,
        le=1_000_000,
        description="N, merges between two steps of the momentum: the agents divided by sync.buffer.",
    )
    states: ClassVar[int] = 2  # m, b

    def step(self, center_E: Tensor, merged_E: Tensor, old: Tensors, out_E: Tensor, new: Tensors, version: int) -> None:
        m_E, gathered_E = (next_E.copy_(old_E) for next_E, old_E in zip(new, old, strict=True))
        gathered_E.add_(merged_E)
        out_E.copy_(center_E).add_(merged_E, alpha=self.lr / self.every)
        if (version + 1) % self.every == 0:
            m_E.mul_(self.momentum).add_(gathered_E, alpha=1 / self.every)
            out_E.add_(m_E, alpha=self.lr * self.momentum)
            gathered_E.zero_()


class _Adaptive(Outer):
    """FedOpt (arXiv:2003.00295, algorithm 2): m ← β₁ m + (1 − β₁) D, v by each one's own rule, W ← W + lr m / (√v + τ).

    As in the paper there is no bias correction; m begins at 0, and v at τ².
    """

    lr: float = Field(0.01, gt=0, le=100)
    beta1: float = Field(0.9, ge=0, lt=1, description="Share of m that is kept.")
    tau: float = Field(1e-3, gt=0, le=1, description="Degree of adaptivity: the smaller, the more alike all steps are.")
    states: ClassVar[int] = 2  # m, v

    def step(self, center_E: Tensor, merged_E: Tensor, old: Tensors, out_E: Tensor, new: Tensors, version: int) -> None:
        m_E, v_E = (next_E.copy_(old_E) for next_E, old_E in zip(new, old, strict=True))
        if version == 0:
            v_E.fill_(self.tau**2)
        m_E.mul_(self.beta1).add_(merged_E, alpha=1 - self.beta1)
        self._second_moment_(v_E, merged_E.square())
        out_E.copy_(center_E).addcdiv_(m_E, v_E.sqrt().add_(self.tau), value=self.lr)

    @abstractmethod
    def _second_moment_(self, v_E: Tensor, squared_E: Tensor) -> None:
        """v and D² → the next v, in place."""


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
    """FedAdagrad: v ← v + D². Without momentum, as the paper runs it: β₁ is 0 unless it is set."""

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
