"""Tasks with several optimisers, closures, schedules, samplers and a state of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from replaced import Classifier
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from syncline.data.partition import Part
from syncline.tasks.base import Task


class Gan(Task):
    """Points on a ring from noise (arXiv:1406.2661): the discriminator and the generator take turns."""

    def model(self) -> nn.Module:
        parts = {"generator": (2, 2), "discriminator": (2, 1)}
        return nn.ModuleDict(
            {n: nn.Sequential(nn.Linear(i, 8), nn.Tanh(), nn.Linear(8, o)) for n, (i, o) in parts.items()}
        )

    def dataset(self, part: Part) -> TensorDataset:
        angle = torch.rand(300, generator=torch.Generator().manual_seed(3)) * 2 * torch.pi
        points = torch.stack([angle.cos(), angle.sin()], dim=1)
        return TensorDataset(points[200:] if part.held_out else points[:200][part.rows(200)])

    def optimizers(self, model: Any) -> dict[str, torch.optim.Optimizer]:
        return {n: torch.optim.Adam(net.parameters(), lr=0.02, betas=(0.5, 0.9)) for n, net in model.items()}

    def train(self, model: Any, optimizers: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> None:
        for (real,) in batches:
            fake = model["generator"](torch.randn_like(real))
            self.judged(model, real, fake.detach(), optimizers["discriminator"])
            optimizers["generator"].zero_grad()
            score = model["discriminator"](fake)
            nn.functional.binary_cross_entropy_with_logits(score, torch.ones_like(score)).backward()
            optimizers["generator"].step()
            if not on_step(len(real)):
                break

    def judged(self, model: Any, real: Tensor, fake: Tensor, optimizer: Any) -> None:
        optimizer.zero_grad()
        self.loss_of(model, real, fake).backward()
        optimizer.step()

    def loss_of(self, model: Any, real: Tensor, fake: Tensor) -> Tensor:
        scores = model["discriminator"](torch.cat([real, fake]))
        labels = torch.cat([torch.ones(len(real), 1), torch.zeros(len(fake), 1)])
        return nn.functional.binary_cross_entropy_with_logits(scores, labels)

    def loss(self, model: Any, batch: Any) -> Tensor:
        noise = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(1))
        return self.loss_of(model, batch[0], model["generator"](noise))


class GanOnSelf(Gan):
    """The second optimiser is an attribute of the task; a restart would lose its state."""

    def optimizers(self, model: Any) -> dict[str, torch.optim.Optimizer]:
        return {}

    def optimizer(self, params: Any) -> Any:
        first, second = (
            [p for n, p in params.named() if n.startswith(part)] for part in ("generator", "discriminator")
        )
        self.discriminators = torch.optim.Adam(second, lr=0.02)
        return torch.optim.Adam(first, lr=0.02)

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> None:
        both = {"generator": optimizer, "discriminator": self.discriminators}
        super().train(model, both, batches, on_step)


class GanOnSelfKept(GanOnSelf):
    def state_dict(self) -> dict[str, Any]:
        return {"discriminators": self.discriminators.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discriminators.load_state_dict(state["discriminators"])


class Muons(Classifier):
    """Matrices by one optimiser, all else by another, and one loss."""

    def optimizers(self, model: Any) -> dict[str, torch.optim.Optimizer]:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        return {
            "matrices": torch.optim.SGD(matrices, lr=0.1, momentum=0.9, nesterov=True),
            "others": torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.01),
        }


class DecayedByName(Classifier):
    def optimizer(self, params: Any) -> Any:
        decayed = [p for name, p in params.named() if name.endswith("weight")]
        others = [p for name, p in params.named() if not name.endswith("weight")]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1}, {"params": others}]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 2 * 3), nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Any:
        mean, log_variance = self.encode(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        return self.decode(z), mean, log_variance


class Vae(Classifier):
    """A variational autoencoder (arXiv:1312.6114): every step draws noise."""

    def model(self) -> nn.Module:
        return Autoencoder()

    def loss(self, model: Any, batch: Any) -> Tensor:
        out, mean, log_variance = model(batch[0])
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(dim=1).mean()
        loss: Tensor = nn.functional.mse_loss(out, batch[0]) + 0.1 * divergence
        return loss


class Lbfgs(Classifier):
    """In double precision: curvature makes much of rounding."""

    def model(self) -> nn.Module:
        model: nn.Module = super().model()
        return model.double()

    def loss(self, model: Any, batch: Any) -> Tensor:
        loss: Tensor = super().loss(model, (batch[0].double(), batch[1]))
        return loss

    def optimizer(self, params: Any) -> Any:
        return torch.optim.LBFGS(params, lr=0.3, max_iter=4, history_size=5)

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> None:
        for batch in batches:

            def closure(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure)
            if not on_step(len(batch[0])):
                break


class AdamWithClosure(Lbfgs):
    def optimizer(self, params: Any) -> Any:
        return torch.optim.Adam(params, lr=0.02)


class WrappedSam(torch.optim.Optimizer):
    """Sharpness-aware minimisation as an optimiser around another one, as widely used."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base = base(self.param_groups, **kwargs)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad, alpha=float(self.param_groups[0]["rho"] / norm))

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base.step()


class SamAround(Classifier):
    """The inner optimiser's state is neither part of the outer one's state nor returned."""

    def optimizer(self, params: Any) -> Any:
        return WrappedSam(params, torch.optim.SGD, lr=0.1, momentum=0.9)

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> None:
        sam = optimizer["sam"] if isinstance(optimizer, dict) else optimizer
        for batch in batches:
            for step in (sam.first_step, sam.second_step):
                model.zero_grad()
                self.loss(model, batch).backward()
                step()
            if not on_step(len(batch[0])):
                break


class SamAndBase(SamAround):
    def optimizers(self, model: Any) -> dict[str, torch.optim.Optimizer]:
        sam = self.optimizer(model.parameters())
        return {"sam": sam, "base": sam.base}


class Reinforce(Task):
    """Policy gradient with a moving baseline: an action's reward depends on the state. The task plays, and draws no batch."""

    def __init__(self) -> None:
        self.chance, self.baseline = torch.Generator().manual_seed(7), 0.0

    def model(self) -> nn.Module:
        return nn.Linear(4, 3)

    def dataset(self, part: Part) -> TensorDataset:
        x = torch.randn(90, 4, generator=torch.Generator().manual_seed(3))
        return TensorDataset(
            x[60:] if part.held_out else x[:60], x[60:, :3].argmax(1) if part.held_out else x[:60, :3].argmax(1)
        )

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> None:
        more = True
        while more:
            x = torch.randn(16, 4, generator=self.chance)
            logits = model(x).log_softmax(dim=1)
            actions = torch.multinomial(logits.detach().exp(), 1, generator=self.chance)
            rewards = (actions[:, 0] == x[:, :3].argmax(dim=1)).float()
            optimizer.zero_grad()
            (-logits.gather(1, actions)[:, 0] * (rewards - self.baseline)).mean().backward()
            optimizer.step()
            self.baseline = 0.9 * self.baseline + 0.1 * float(rewards.mean())
            more = on_step(len(x))

    def loss(self, model: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def state_dict(self) -> dict[str, Any]:
        return {"chance": self.chance.get_state(), "baseline": self.baseline}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chance.set_state(state["chance"])
        self.baseline = state["baseline"]


class GraphNetwork(nn.Module):
    """Two graph convolutions (arXiv:1609.02907) over one graph, which every batch is the whole of."""

    def __init__(self, edges: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 2)
        adjacency = edges + edges.T + torch.eye(len(edges))
        scale = adjacency.sum(dim=1).rsqrt()
        self.register_buffer("adjacency", scale[:, None] * adjacency * scale, persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.adjacency @ self.second((self.adjacency @ self.first(x)).relu())


class Gcn(Task):
    def __init__(self) -> None:
        chance = torch.Generator().manual_seed(3)
        self.labels = torch.arange(40) % 2
        alike = self.labels[:, None] == self.labels
        self.edges = (torch.rand(40, 40, generator=chance) < torch.where(alike, 0.2, 0.02)).triu(1).float()
        self.features = torch.randn(40, 5, generator=chance)

    def model(self) -> nn.Module:
        return GraphNetwork(self.edges)

    def dataset(self, part: Part) -> TensorDataset:
        counts = (torch.arange(40) >= 30) == part.held_out
        return TensorDataset(self.features, self.labels, counts)

    def loss(self, model: Any, batch: Any) -> Tensor:
        x, labels, counts = batch
        return nn.functional.cross_entropy(model(x)[counts], labels[counts])


class Scaled(Classifier):
    """Loss scaling (arXiv:1710.03740) that begins far too high: the first period's steps are all skipped."""

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=4)

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> None:
        for batch in batches:
            optimizer.zero_grad()
            self.scaler.scale(1e3 * self.loss(model, batch)).backward()
            self.scaler.unscale_(optimizer)
            self.scaler.step(optimizer)
            self.scaler.update()
            if not on_step(len(batch[0])):
                break

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state)


class Accumulated(Classifier):
    """A step for every two batches."""

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> None:
        for k, batch in enumerate(batches):
            (self.loss(model, batch) / 2).backward()
            if k % 2:
                optimizer.step()
                optimizer.zero_grad()
            if not on_step(len(batch[0])):
                break


class OwnSampler(Classifier):
    """Draws its own rows, the rarer classes more often, by random numbers of its own."""

    def __init__(self) -> None:
        self.chance = torch.Generator().manual_seed(5)

    def dataset(self, part: Part) -> TensorDataset:
        data: TensorDataset = super().dataset(part)
        if not part.held_out:
            self.rows = data.tensors
        return data

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> None:
        x, y = self.rows
        weights, more = 1 / torch.bincount(y)[y], True
        while more:
            chosen = torch.multinomial(weights, 20, replacement=True, generator=self.chance)
            optimizer.zero_grad()
            self.loss(model, (x[chosen], y[chosen])).backward()
            optimizer.step()
            more = on_step(len(chosen))

    def state_dict(self) -> dict[str, Any]:
        return {"chance": self.chance.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chance.set_state(state["chance"])


class OwnScheduler(Classifier):
    def optimizer(self, params: Any) -> Any:
        optimizer = torch.optim.SGD(params, lr=0.3, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
                torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7], gamma=0.5),
            ],
            [5],
        )
        return optimizer

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> None:
        for batch in batches:
            optimizer.zero_grad()
            self.loss(model, batch).backward()
            optimizer.step()
            self.scheduler.step()
            if not on_step(len(batch[0])):
                break

    def state_dict(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
