"""Training structures of widely used programs, each a small task, and the plain PyTorch loop that they are compared with.

To add one: write its task into a file of this directory, and add a line to STRUCTURES. `tests/unit/agent/test_structures.py`
trains each of them with one agent, without and with a kill after the first period, and compares the center with what the plain
loop has learned. `tests/sim/test_simulated_structures.py` does so in a simulation, and
`tests/system/test_structure_processes.py` in real processes, with a kill after the third period.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from syncline.data.partition import Part
from syncline.spec.sections import Iid
from syncline.tasks.base import Task, batches, load_task, make_model
from syncline.tasks.optimizers import Parameters
from syncline.tasks.seeding import seed_all, seed_of

HERE = Path(__file__).parent
SEED = 3
BATCH_SIZE = 20
SGD = {"kind": "sgd", "lr": 0.1}


@dataclass(frozen=True)
class Structure:
    """A task and the settings of its run.

    Attributes:
        task: `file.py:Class`, of a file in this directory.
        settings: of `local`, beside the steps and the batch size.
        refused: a part of the message, if the product refuses the structure.
        advised: a part of the advice, if the tensors equal those of the plain loop and the metrics do not.
    """

    task: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 6  # of a period
    refused: str = ""
    advised: str = ""

    @property
    def path(self) -> str:
        """Return the task's name, for a service that may be started anywhere."""
        return f"{HERE}/{self.task}"

    @property
    def spec(self) -> dict[str, Any]:
        """Return the settings of a run with one agent."""
        local = {"steps": self.steps, "batch_size": BATCH_SIZE, "optimizer": SGD, **self.settings}
        return {"task": self.path, "seed": SEED, "agents": {"min": 1}, "local": local}

    def load(self) -> Task:
        return load_task(self.path, {}, ["*"], Path("/"), seed=SEED)


def plain_loop(structure: Structure, periods: int) -> tuple[Task, nn.Module]:
    """Train as a script without Syncline does: one model, its optimisers, one loop that nothing interrupts.

    The random numbers and the order of the rows are those of the first agent.
    """
    task = structure.load()
    model = make_model(task, SEED)
    optimizer = _optimizer(structure, task, model)
    data = task.dataset(Part(0, 1, Iid(), SEED))
    batch_size = structure.spec["local"]["batch_size"]
    for period in range(periods):
        seed_all(seed_of(SEED, 0, period + 1))
        stream = batches(data, batch_size, SEED, 0, period * structure.steps)
        task.train(model, optimizer, _limited(stream, structure.steps), _counted(structure.steps))
    return task, model


def _optimizer(structure: Structure, task: Task, model: nn.Module) -> Any:
    own = task.optimizers(model) or task.optimizer(Parameters(model.named_parameters()))
    if own:
        return own
    kind, *arguments = structure.spec["local"]["optimizer"].items()
    makers: dict[str, Any] = {name.lower(): made for name, made in vars(torch.optim).items() if inspect.isclass(made)}
    return makers[kind[1]](model.parameters(), **dict(arguments))


def _counted(steps: int) -> Callable[[int], bool]:
    """Return an `on_step` that stops a period after `steps` calls."""
    told = count(1)
    return lambda rows: next(told) < steps


def _limited(stream: Iterator[Any], steps: int) -> Iterator[Any]:
    yield from islice(stream, steps)


STRUCTURES: dict[str, Structure] = {
    "plain": Structure("replaced.py:Classifier"),
    "SAM, which points the weights back (`p.data = old`)": Structure("replaced.py:Sam"),
    "EMA of a statistic, assigned (`self.mean = …`)": Structure("replaced.py:AssignedMean"),
    "VQ-VAE, a codebook assigned as a new parameter": Structure("replaced.py:Codebook"),
    "a parameter that is replaced while it is trained": Structure(
        "replaced.py:ReplacedInTraining", refused="another parameter in the place of the model's 0.weight"
    ),
    "load_state_dict(assign=True)": Structure("replaced.py:LoadedByAssigning", refused="which gets gradients"),
    "vector_to_parameters": Structure("replaced.py:FromVector"),
    "model.to(memory_format=…)": Structure("replaced.py:ChannelsLast"),
    "tied weights": Structure("replaced.py:Tied"),
    "tied weights that training unties": Structure("replaced.py:Untied", refused="2.weight became trainable"),
    "mean teacher (`shared`)": Structure("frozen.py:MeanTeacher"),
    "mean teacher, by .data (`shared`)": Structure("frozen.py:TeacherByData"),
    "mean teacher that no pattern names": Structure(
        "frozen.py:UnnamedTeacher", refused="the model's teacher.0.weight is frozen, and the task has changed it"
    ),
    "mean teacher of each agent (`local`)": Structure("frozen.py:LocalTeacher"),
    "layers that are unfrozen": Structure("frozen.py:Unfrozen", refused="the model's 0.weight became trainable"),
    "layers that are frozen first": Structure("frozen.py:FrozenFirst"),
    "truncated backpropagation through time": Structure("replaced.py:TruncatedBptt"),
    "GAN, two optimisers from `optimizers`": Structure("optimizers.py:Gan"),
    "GAN, the second optimiser on `self`": Structure("optimizers.py:GanOnSelf", refused="keeps to itself (Adam)"),
    "GAN, the second optimiser on `self` and in `state_dict`": Structure("optimizers.py:GanOnSelfKept"),
    "the same with `clip_norm`": Structure(
        "optimizers.py:GanOnSelfKept", {"clip_norm": 1.0}, refused="local.clip_norm: would miss discriminator"
    ),
    "one loss, matrices and other weights by two optimisers": Structure("optimizers.py:Muons"),
    "weight decay by parameter names": Structure("optimizers.py:DecayedByName"),
    "VAE": Structure("optimizers.py:Vae"),
    "LBFGS, a closure": Structure("optimizers.py:Lbfgs"),
    "LBFGS with `clip_norm`": Structure(
        "optimizers.py:Lbfgs",
        {"clip_norm": 1.0},
        refused="local.clip_norm: LBFGS computes gradients inside its own step",
    ),
    "Adam with a closure": Structure("optimizers.py:AdamWithClosure"),
    "SAM, an optimiser around another one": Structure("optimizers.py:SamAround", refused="keeps to itself (SGD)"),
    "SAM, both optimisers from `optimizers`": Structure("optimizers.py:SamAndBase"),
    "REINFORCE, its own episodes": Structure("optimizers.py:Reinforce", {"optimizer": {"kind": "sgd", "lr": 0.5}}),
    "GCN, the whole graph each step (`batch_size: all`)": Structure("optimizers.py:Gcn", {"batch_size": "all"}),
    "GradScaler, the first period skipped": Structure(
        "optimizers.py:Scaled", {"optimizer": {"kind": "sgd", "lr": 1e-4}}
    ),
    "gradient accumulation": Structure("optimizers.py:Accumulated"),
    "own sampler": Structure("optimizers.py:OwnSampler"),
    "own scheduler": Structure("optimizers.py:OwnScheduler"),
    "spectral norm": Structure("norms.py:SpectralNorm"),
    "spectral norm, by its older hook": Structure("norms.py:SpectralNormByHook"),
    "torch.compile": Structure("norms.py:Compiled"),
    "torch.compile of a layer": Structure("norms.py:CompiledLayer"),
    "state-dict hooks that rename keys": Structure("norms.py:RenamedKeys"),
    "quantisation-aware training": Structure(
        "norms.py:Quantised", advised="had no finite value in model() and stays with each agent"
    ),
    "quantisation-aware training by channel": Structure(
        "norms.py:QuantisedByChannel", refused="the model's weights.scale was a buffer of torch.float32 [1]"
    ),
    "quantisation-aware training by channel, after one batch": Structure("norms.py:QuantisedAfterABatch"),
}


def _result(structure: Structure) -> str:
    if structure.refused:
        return f"refused: “… {structure.refused} …”"
    return "as the plain loop, also when killed once" + (
        f"; advice: “… {structure.advised} …”" if structure.advised else ""
    )


def table() -> str:
    """Return the table in docs/local-training.md."""
    results = {name: _result(structure) for name, structure in STRUCTURES.items()}
    return "\n".join(["| training structure | result |", "|---|---|", *(f"| {n} | {r} |" for n, r in results.items())])
