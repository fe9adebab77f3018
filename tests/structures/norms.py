"""Tasks whose layers keep more than weights: spectral norm, quantisation-aware training, compiled models, renamed keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

from syncline.data.partition import Part
from syncline.tasks.base import Task


class Points(Task):
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


class SpectralNorm(Points):
    """Weights over their largest singular value, which a power iteration follows (arXiv:1802.05957)."""

    def model(self) -> nn.Module:
        net: Any = super().model()
        parametrizations.spectral_norm(net[0])
        parametrizations.spectral_norm(net[2])
        return net


class SpectralNormByHook(Points):
    def model(self) -> nn.Module:
        net: Any = super().model()
        nn.utils.spectral_norm(net[0])
        return net


class Compiled(Points):
    def model(self) -> nn.Module:
        compiled: Any = torch.compile(super().model(), backend="eager")
        return compiled


class CompiledLayer(Points):
    def model(self) -> nn.Module:
        net: Any = super().model()
        net[0] = torch.compile(net[0], backend="eager")
        return net


class RenamedKeys(Points):
    """Its state dict calls the layers by older names."""

    def model(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

        def older(module: Any, state: Any, prefix: str, metadata: Any) -> None:
            for name in list(state):
                if name.startswith("1."):
                    state[f"bn.{name[2:]}"] = state.pop(name)

        def newer(module: Any, state: Any, prefix: str, *rest: Any) -> None:
            for name in list(state):
                if name.startswith("bn."):
                    state[f"1.{name[3:]}"] = state.pop(name)

        net.register_state_dict_post_hook(older)
        net.register_load_state_dict_pre_hook(newer)
        return net


class Quantised(Points):
    """Weights and activations as they will be rounded; observers follow their ranges."""

    def observer(self) -> nn.Module:
        return FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)

    def weights(self) -> nn.Module:
        return FakeQuantize(
            observer=MovingAverageMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_tensor_symmetric,
        )

    def model(self) -> nn.Module:
        return QuantisedNet(self.observer(), self.weights())


class QuantisedNet(nn.Module):
    def __init__(self, activations: nn.Module, weights: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.activations, self.weights = activations, weights

    def forward(self, x: Tensor) -> Any:
        x = nn.functional.linear(self.activations(x), self.weights(self.first.weight), self.first.bias)
        return self.last(x.relu())


class QuantisedByChannel(Quantised):
    """Its observers are empty before the first batch, and its scales have one element."""

    def weights(self) -> nn.Module:
        return FakeQuantize(
            observer=MovingAveragePerChannelMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )


class QuantisedAfterABatch(QuantisedByChannel):
    def model(self) -> nn.Module:
        net: Any = super().model()
        net(torch.zeros(2, 6))
        return net
