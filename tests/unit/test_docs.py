"""The documents are true: their settings parse, their code runs, their commands and links exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from syncline.data.partition import Part
from syncline.spec import Dirichlet, RunSpec, parse
from syncline.tasks.base import evaluate, load_task

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


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


def test_every_spec_in_the_documents_is_accepted() -> None:
    specs = [yaml.safe_load(block) for d in DOCUMENTS for block in blocks(d, "yaml")]
    assert specs
    for spec in specs:
        parse(RunSpec, spec)


def test_the_task_in_the_documents_trains(tmp_path: Path) -> None:
    first, second = blocks(ROOT / "docs" / "your-own-task.md", "python")
    (tmp_path / "my_task.py").write_text(f"{first}\n\n{second}")
    for name in ("Wave", "Normalised"):
        task = load_task(f"my_task.py:{name}", {}, ["my_task.py:*"], tmp_path)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = task.model()
        parts = [task.dataset(Part(i, 3, Dirichlet(kind="dirichlet"), 0)) for i in range(3)]
        assert sum(len(part) for part in parts) == 600
        assert evaluate(task, model, task.dataset(Part.test()), 32, "cpu")["loss"] > 0


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
