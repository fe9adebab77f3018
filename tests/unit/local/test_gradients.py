"""Changes to the gradients of a local period, compared with a few lines of reference code in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncline.errors import ConfigError
from syncline.local.gradients import Control, Gradients
from syncline.model.flat import FlatModel, manifest_of

LR = 0.1
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}


class Agent:
    """A small net in a flat vector, with a center, an optimiser, and batches that follow from a seed."""

    def __init__(self, *, dtype: torch.dtype = torch.float64, momentum: float = 0.0, **settings: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)).to(dtype)
            self.rows = torch.randn(64, 4).to(dtype)
        self.flat = FlatModel(self.model, manifest_of(self.model, 4096))
        self.center_P = self.flat.flat_P.clone()
        self.gradients = Gradients(self.flat.sites, self.center_P, **settings)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=momentum)
        self.optimizer.register_step_pre_hook(self.gradients.before_step)

    def gradient(self, k: int) -> Tensor:
        """Return the gradient of the loss on batch k at the model, and leave it in `.grad` too."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self.rows[8 * k : 8 * k + 8]).square().sum().backward()
        return torch.cat([p.grad.reshape(-1) for p in self.model.parameters() if p.grad is not None])

    def train(self, steps: int) -> None:
        for k in range(steps):
            self.gradient(k)
            self.optimizer.step()


def by_hand(steps: int, corrected: Callable[[Tensor, Tensor, Tensor], Tensor], **settings: Any) -> Tensor:
    """Return W_i after some steps of w ← w − η corrected(g, w, x)."""
    agent = Agent(**settings)
    for k in range(steps):
        g = agent.gradient(k)
        agent.flat.flat_P -= LR * corrected(g, agent.flat.flat_P, agent.center_P)
    return agent.flat.flat_P


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_fedprox_pulls_every_step_to_the_center(steps: int) -> None:
    agent, mu = Agent(prox_mu=0.3), 0.3
    agent.center_P.add_(0.5)  # W_i began elsewhere, as with alpha below 1
    agent.train(steps)
    expected = by_hand(steps, lambda g, w, x: g + mu * (w - (x + 0.5)))
    assert torch.allclose(agent.flat.flat_P, expected, **EXACT)
    assert not torch.allclose(agent.flat.flat_P, by_hand(steps, lambda g, w, x: g), rtol=1e-3)


def test_fedprox_with_momentum_puts_the_pull_into_the_momentum() -> None:
    agent, w = Agent(prox_mu=0.3, momentum=0.9), Agent()
    agent.train(5)
    v = torch.zeros_like(w.center_P)
    for k in range(5):
        v = 0.9 * v + w.gradient(k) + 0.3 * (w.flat.flat_P - w.center_P)
        w.flat.flat_P -= LR * v
    assert torch.allclose(agent.flat.flat_P, w.flat.flat_P, **EXACT)


def test_what_is_not_set_changes_no_bit() -> None:
    agent, plain = Agent(prox_mu=0.0, clip_norm=None, clip_value=None), Agent()
    agent.train(5)
    for k in range(5):
        plain.gradient(k)
        with torch.no_grad():
            for p in plain.model.parameters():
                assert p.grad is not None
                p.add_(p.grad, alpha=-LR)
    assert torch.equal(agent.flat.flat_P, plain.flat.flat_P)


def test_a_gradient_is_clipped_to_its_norm_as_a_whole() -> None:
    agent = Agent(clip_norm=0.05)
    agent.train(4)
    expected = by_hand(4, lambda g, w, x: g * min(1.0, 0.05 / (float(g.norm()) + 1e-6)))  # torch adds the 1e-6
    assert torch.allclose(agent.flat.flat_P, expected, **EXACT)
    assert float((agent.flat.flat_P - agent.center_P).norm()) < 4 * LR * 0.05


def test_a_gradient_within_the_norm_stays_as_it_is() -> None:
    agent, plain = Agent(clip_norm=1e6, clip_value=1e6), Agent()
    for each in (agent, plain):
        each.train(4)
    assert torch.equal(agent.flat.flat_P, plain.flat.flat_P)


def test_every_element_is_clipped_to_the_value_and_the_norm_comes_after() -> None:
    agent = Agent(clip_value=0.02, clip_norm=0.05)
    agent.train(4)

    def clipped(g: Tensor, w: Tensor, x: Tensor) -> Tensor:
        g = g.clamp(-0.02, 0.02)
        return g * min(1.0, 0.05 / (float(g.norm()) + 1e-6))

    assert torch.allclose(agent.flat.flat_P, by_hand(4, clipped), **EXACT)


def test_the_pull_of_the_center_is_not_clipped() -> None:
    agent = Agent(clip_norm=1e-9, prox_mu=1.0)
    agent.center_P.add_(1.0)
    agent.train(1)
    assert torch.allclose(agent.flat.flat_P, agent.center_P - 1 + LR, rtol=1e-8)


def test_control_variates_correct_each_step_and_gather_the_loss_s_own_gradients() -> None:
    agent, plain = Agent(clip_norm=0.5), Agent()
    correction = torch.linspace(-1, 1, len(agent.center_P), dtype=torch.float64)
    agent.gradients.control = Control(correction, torch.zeros_like(correction))
    agent.train(3)
    total = torch.zeros_like(correction)
    for k in range(3):
        g = plain.gradient(k)
        g = g * min(1.0, 0.5 / (float(g.norm()) + 1e-6))
        total += g
        plain.flat.flat_P -= LR * (g + correction)
    assert torch.allclose(agent.flat.flat_P, plain.flat.flat_P, **EXACT)
    gradients_P = agent.gradients.control.gradients_P
    assert gradients_P is not None and torch.allclose(gradients_P, total, **EXACT)
    assert agent.gradients.steps == 3


def test_a_parameter_that_the_loss_did_not_touch_is_pulled_all_the_same() -> None:
    agent = Agent(prox_mu=0.5)
    agent.center_P.add_(1.0)
    agent.optimizer.zero_grad(set_to_none=True)
    agent.model[0](agent.rows).square().mean().backward()  # the last layer has no gradient
    before = agent.flat.flat_P.clone()
    agent.optimizer.step()
    last = agent.flat.sites[-1].where
    assert torch.allclose(agent.flat.flat_P[last], before[last] + LR * 0.5, **EXACT)


def test_half_precision_weights_are_corrected_in_the_precision_of_the_center() -> None:
    agent = Agent(dtype=torch.bfloat16, prox_mu=0.5)
    assert agent.center_P.dtype == torch.float32
    agent.center_P.add_(1 / 1024)  # far less than a bfloat16 near 1 can tell
    agent.optimizer.zero_grad(set_to_none=True)
    for p in agent.model.parameters():
        p.grad = torch.zeros_like(p)
    agent.optimizer.step()
    for p in agent.model.parameters():
        assert p.grad is not None and p.grad.dtype == torch.bfloat16
        assert torch.allclose(p.grad.float(), torch.full(p.shape, -0.5 / 1024), rtol=0.01)


def test_sparse_gradients_are_made_dense() -> None:
    model = nn.Embedding(5, 2, sparse=True, dtype=torch.float64)
    flat = FlatModel(model, manifest_of(model, 4096))
    gradients = Gradients(flat.sites, flat.flat_P.clone(), prox_mu=0.5, clip_norm=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer.register_step_pre_hook(gradients.before_step)
    before = flat.flat_P.clone()
    model(torch.tensor([1, 1])).sum().backward()
    optimizer.step()
    moved = (before - flat.flat_P).view(5, 2)
    assert torch.allclose(moved[1], torch.full((2,), LR / 2**0.5, dtype=torch.float64), rtol=1e-5)
    assert not moved[[0, 2, 3, 4]].any()


def test_local_and_frozen_parameters_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    flat = FlatModel(model, manifest_of(model, 4096, ["1.weight"]), ["1.weight"])
    assert [site.parameter for site in flat.sites] == [model[0].weight]


def test_an_optimizer_that_computes_gradients_inside_its_step_is_refused() -> None:
    agent = Agent(prox_mu=0.1)
    optimizer = torch.optim.LBFGS(agent.model.parameters())
    optimizer.register_step_pre_hook(agent.gradients.before_step)
    with pytest.raises(ConfigError, match="LBFGS computes gradients inside its own step"):
        optimizer.step(lambda: torch.zeros(()))
