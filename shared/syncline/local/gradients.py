"""Changes to the gradients of a local period: clipping, the pull of FedProx, the control variates of SCAFFOLD.

They act between a task's backward pass and the optimiser's step, so that a task with a `train` of its own has them too. Each
of several optimisers changes the gradients of its own parameters as it steps. Knows no run, no agent and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from syncline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Site:
    """A parameter that is averaged, with its slice of the flat vector."""

    parameter: nn.Parameter
    where: slice

    def of(self, flat_P: Tensor) -> Tensor:
        """Return this parameter's slice of a flat vector, in the parameter's shape; shares the memory."""
        return flat_P[self.where].view(self.parameter.shape)


@dataclass(frozen=True, slots=True)
class Control:
    """Control variates of SCAFFOLD in one period. P: elements of the flat vector."""

    correction_P: Tensor  # c − c_i
    gradients_P: Tensor | None  # receives the sum of the loss's gradients, clipped, before the correction


class Gradients:
    """Changes gradients between backward pass and step, in this order, with g the loss's gradient:

    1. every element of g is clipped to ± `clip_value`; then g as a whole to the norm `clip_norm`;
    2. g += μ (w − x) with x the center received last (FedProx, arXiv:1812.06127);
    3. g += c − c_i (SCAFFOLD, arXiv:1910.06378).

    A setting that is left out costs nothing and changes no bit.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        center_P: Tensor,
        *,
        prox_mu: float = 0.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        """Keep the settings.

        Args:
            sites: the parameters that are averaged.
            center_P: the center received last; read at each step, so its owner keeps it up to date.
            prox_mu: μ of FedProx; 0 leaves it out.
            clip_norm: largest norm of an optimiser's whole gradient.
            clip_value: largest absolute value of a gradient's element.
        """
        self.control: Control | None = None
        self.steps = 0  # calls of `before_step` in this period
        self._sites = sites
        self._center_P = center_P
        self._mu = prox_mu
        self._clip_norm = clip_norm
        self._clip_value = clip_value

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Change the gradients of this optimiser's parameters. A pre-hook of `Optimizer.step`, with its arguments.

        Raises:
            ConfigError: the step is given a closure, which computes the gradients only afterwards.
        """
        self.steps += 1
        settings = {
            "clip_norm": self._clip_norm, "clip_value": self._clip_value, "prox_mu": self._mu,
            "control_variates": self.control,
        }  # fmt: skip
        used = [name for name, value in settings.items() if value]
        if not used:
            return
        if any(callable(x) for x in (*args[1:], *kwargs.values())):  # args[0] is the optimiser
            raise ConfigError(
                f"local.{used[0]}",
                f"{type(optimizer).__name__} computes gradients inside its own step (a closure), where "
                f"{' and '.join(used)} cannot reach them",
                "Call `optimizer.step()` without a closure, after the backward pass, or leave those settings out",
            )
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._clip(parameters)
        if self._mu or self.control is not None:
            own = {id(p) for p in parameters}
            for site in self._sites:
                if id(site.parameter) in own and site.parameter.requires_grad:  # the task may freeze it for a while
                    self._correct(site)

    def _clip(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        if self._clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self._clip_value)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._clip_norm)

    def _correct(self, site: Site) -> None:
        """Add SCAFFOLD's and FedProx's terms, in the center's dtype. A missing gradient counts as zeros."""
        w = site.parameter
        if w.grad is None:
            w.grad = torch.zeros_like(w)
        if self.control is not None:
            if self.control.gradients_P is not None:
                site.of(self.control.gradients_P).add_(w.grad)
            w.grad.add_(site.of(self.control.correction_P))
        if self._mu:
            w.grad.add_(w.to(self._center_P.dtype) - site.of(self._center_P), alpha=self._mu)
