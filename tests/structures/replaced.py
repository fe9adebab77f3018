"""Tasks that replace their tensors, or point them at other memory, as they train."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import TensorDataset

from syncline.data.partition import Part
from syncline.tasks.base import Task


class Classifier(Task):
    """Three classes of points in six dimensions."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def dataset(self, part: Part) -> TensorDataset:
        x = torch.randn(300, 6, generator=torch.Generator().manual_seed(3))
        y = x[:, :3].argmax(dim=1)
        if part.held_out:
            return TensorDataset(x[200:], y[200:])
        rows = part.rows(200, label=y[:200])
        return TensorDataset(x[rows], y[rows])

    def loss(self, model: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Sam(Classifier):
    """Sharpness-aware minimisation (arXiv:2010.01412), as widely used: the weights are kept by reference and put back."""

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> None:
        for batch in batches:
            optimizer.zero_grad()
            self.loss(model, batch).backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            old = {p: p.data.clone() for p in model.parameters()}
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(p.grad, alpha=0.05 / float(norm))
            optimizer.zero_grad()
            self.loss(model, batch).backward()
            for p in model.parameters():
                p.data = old[p]
            optimizer.step()
            if not on_step(len(batch[0])):
                break


class MeanOfInputs(nn.Module):
    """Centers its inputs with a mean that each batch moves."""

    mean: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(dim=0)
            self.batches = self.batches + 1
        return x - self.mean


class AssignedMean(Classifier):
    def model(self) -> nn.Module:
        return nn.Sequential(MeanOfInputs(), nn.Linear(6, 3))


class Quantizer(nn.Module):
    """A codebook that follows the means of the vectors assigned to its codes (arXiv:1711.00937, appendix A.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(8, 6), requires_grad=True)

    def forward(self, z: Tensor) -> Tensor:
        nearest = torch.cdist(z, self.codes).argmin(dim=1)
        if self.training:
            with torch.no_grad():
                chosen = nn.functional.one_hot(nearest, 8).to(z.dtype)
                means = chosen.T @ z / chosen.sum(dim=0).clamp_min(1)[:, None]
                moved = torch.where(chosen.any(dim=0)[:, None], 0.8 * self.codes + 0.2 * means, self.codes)
            self.codes = nn.Parameter(moved)
        found = self.codes[nearest].detach()
        return z + (found - z).detach()


class Codebook(Classifier):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), Quantizer(), nn.Linear(6, 3))


class ReplacedInTraining(Classifier):
    """After some steps the first layer gets a weight of its own: the optimiser keeps the one before."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        if model.training and not hasattr(self, "done"):
            self.done = True
            model[0].weight = nn.Parameter(model[0].weight.detach() * 0.5)
        return super().loss(model, batch)


class LoadedByAssigning(Classifier):
    """Each period begins with a copy of all tensors, as after loading a checkpoint."""

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> float | None:
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        return super().train(model, optimizer, batches, on_step)


class FromVector(Classifier):
    """Each period shrinks all weights together, by way of one vector."""

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> float | None:
        with torch.no_grad():
            vector_to_parameters(parameters_to_vector(model.parameters()) * 0.9, model.parameters())
        return super().train(model, optimizer, batches, on_step)


class ChannelsLast(Classifier):
    """Images, and weights that lie channel by channel from the first period on."""

    def model(self) -> nn.Module:
        layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1)
        return nn.Sequential(*layers, nn.Flatten())

    def dataset(self, part: Part) -> TensorDataset:
        x = torch.randn(60, 3, 6, 6, generator=torch.Generator().manual_seed(3))
        y = x.mean(dim=(2, 3)).argmax(dim=1)
        rows = slice(40, None) if part.held_out else part.rows(40)
        return TensorDataset(x[rows], y[rows])

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> float | None:
        model.to(memory_format=torch.channels_last)
        return super().train(model, optimizer, batches, on_step)


class Tied(Classifier):
    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        return model


class Untied(Tied):
    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> float | None:
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())
        return super().train(model, optimizer, batches, on_step)


class Echo(nn.Module):
    """Returns for each step the input of two steps before."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, state: Any) -> Any:
        states, state = self.rnn(x, state)
        return self.head(states), state


class TruncatedBptt(Task):
    """The state goes on from batch to batch, and gradients stop between them."""

    def __init__(self) -> None:
        self.state: tuple[Tensor, ...] | None = None

    def model(self) -> nn.Module:
        return Echo()

    def dataset(self, part: Part) -> TensorDataset:
        x = torch.randn(80, 7, 4, generator=torch.Generator().manual_seed(3))
        rows = slice(60, None) if part.held_out else part.rows(60)
        return TensorDataset(x[rows], x[rows].roll(2, dims=1))

    def loss(self, model: Any, batch: Any) -> Tensor:
        state = self.state if model.training else None
        out, state = model(batch[0], state)
        if model.training:
            self.state = tuple(s.detach() for s in state)
        return nn.functional.mse_loss(out, batch[1])

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["state"]
