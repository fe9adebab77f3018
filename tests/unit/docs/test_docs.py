"""The documents are true: their settings parse, their code runs, their commands and links exist."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Sized
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import save_model

from structures.registry import table
from syncline.data.partition import Part
from syncline.spec.run_spec import load_spec
from syncline.tasks.base import batches, evaluate, load_task
from syncline.tasks.optimizers import inner_of
from syncline_sim.settings import load

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted(
    [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *ROOT.glob("docs/**/*.md")]
)


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


def console_lines() -> list[str]:
    lines = [line for d in DOCUMENTS for block in blocks(d, "console") for line in block.splitlines()]
    return sorted({line.removeprefix("$ ") for line in lines if line.startswith("$ ")})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


def test_the_table_of_training_structures_is_that_of_the_tests() -> None:
    assert table() in (ROOT / "docs" / "local-training.md").read_text(), f"put this there:\n{table()}"


def test_every_spec_in_the_documents_is_accepted(tmp_path: Path) -> None:
    specs = [block for d in DOCUMENTS for block in blocks(d, "yaml")]
    assert specs
    for spec in specs:
        (tmp_path / "spec.yaml").write_text(spec)
        load(tmp_path / "spec.yaml")


@pytest.fixture
def own_task(tmp_path: Path) -> Path:
    """A directory with the files that docs/your-own-task.md has a newcomer write."""
    document = ROOT / "docs" / "your-own-task.md"
    first, check, *more = blocks(document, "python")
    (tmp_path / "my_task.py").write_text("\n\n".join([first, *more]))
    (tmp_path / "check.py").write_text(check)
    (tmp_path / "mine.yaml").write_text(blocks(document, "yaml")[0])
    return tmp_path


@pytest.mark.parametrize(
    "name", ["MyTask", "LitPixels", "WorstDigit", "Normalised", "MeanTeacher", "Decayed", "Scheduled", "Half"]
)
def test_the_tasks_in_the_documents_train(name: str, own_task: Path) -> None:
    spec = load_spec(own_task / "mine.yaml")
    assert spec.task == "my_task.py:MyTask"
    task = load_task(f"my_task.py:{name}", spec.task_options, ["my_task.py:*"], own_task)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = task.model()
    parts = [task.dataset(Part(i, 3, spec.partition, 0)) for i in range(3)]
    assert sum(len(cast(Sized, part)) for part in parts) == 4000
    given, _, _ = inner_of(task, model, spec.local)
    task.train(model, given, itertools.islice(batches(parts[0], 32, 0, 0, 0, task), 40), lambda rows: True)
    assert evaluate(task, model, task.dataset(Part.test()), 500, "cpu")["accuracy"] > 0.3


def test_a_model_in_a_file_has_the_accuracy_of_the_run_also_without_syncline(own_task: Path) -> None:
    task = load_task("my_task.py:MyTask", {"width": 100}, ["my_task.py:*"], own_task)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = task.model()
    save_model(model, str(own_task / "mine.safetensors"))
    printed = subprocess.run(
        [sys.executable, "check.py"], cwd=own_task, capture_output=True, text=True, timeout=60, check=True
    )
    accuracy = evaluate(task, model, task.dataset(Part.test()), 512, "cpu")["accuracy"]
    assert float(printed.stdout) == pytest.approx(accuracy, rel=1e-12)


def test_every_example_is_accepted_and_mentions_how_it_is_run() -> None:
    examples = sorted((ROOT / "examples").glob("*.yaml"))
    assert examples
    for example in examples:
        spec = load_spec(example)
        said = re.search(rf"syncline run examples/{re.escape(example.name)} --local (\d+)\n", example.read_text())
        assert said is not None and int(said[1]) >= spec.agents.min


@pytest.mark.parametrize("line", [line for line in console_lines() if line.startswith("syncline ")])
def test_every_command_in_the_documents_exists_with_its_options(line: str) -> None:
    words = line.split()
    command = words[1:3] if words[1] in ("bench", "keys") else words[1:2]
    shown = subprocess.run(
        [sys.executable, "-m", "syncline_cli", *command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for option in (w for w in words if w.startswith("--")):
        assert option in shown.stdout, f"{option} is not an option of syncline {' '.join(command)}"


@pytest.mark.parametrize("line", [line for line in console_lines() if line.startswith("make ")])
def test_every_make_target_in_the_documents_exists(line: str) -> None:
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_message_that_operations_explains_is_one_that_is_said() -> None:
    _, table = (ROOT / "docs" / "operations.md").read_text().split("## When something breaks")
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(messages) >= 8
    sources = [path.read_text() for place in ("shared", "services") for path in (ROOT / place).rglob("*.py")]
    for part in (part.strip() for message in messages for part in message.split("…")):
        words = (
            part.replace(" N ", " {").split("{")[-1].rstrip(":")
        )  # behind a figure; the setting is put before a colon
        assert any(words in source for source in sources), f"nobody says {part!r}"
