"""Print a digest over the final model of every example: `python tools/example_digests.py [NAME ...]`.

A refactoring that changes no behaviour prints the same lines before and after. The digest is SHA-256 over the tensors of
the exported model, sorted by name: name, dtype, shape, bytes. Every example starts with as many agents as its round needs,
so that the result does not depend on the order in which they join.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from safetensors.numpy import load_file

EXAMPLES = Path(__file__).parent.parent / "examples"
SYNCLINE = [sys.executable, "-m", "syncline_cli"]
STOPPING_S = 60


def model_digest(model: Path) -> str:
    """Return the SHA-256 digest of a safetensors file's tensors, whatever the order in the file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(model).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def train(example: Path, model: Path) -> None:
    """Train an example with `syncline run --local` and write its final model to `model`."""
    agents = yaml.safe_load(example.read_text())["agents"]["min"]
    alone = {**os.environ, "TMPDIR": str(model.parent)}  # `export` finds the fleet of this directory, and no other
    fleet = subprocess.Popen(
        [*SYNCLINE, "run", str(example), "--local", str(agents), "--stay", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=alone,
    )  # fmt: skip
    try:
        assert fleet.stdout
        result = json.loads(fleet.stdout.readline())
        export = [*SYNCLINE, "export", result["run"], str(model)]
        subprocess.run(export, check=True, timeout=STOPPING_S, stdout=subprocess.DEVNULL, env=alone)
    finally:
        fleet.send_signal(signal.SIGINT)
        fleet.wait(STOPPING_S)


def main() -> None:
    """Train the named examples, or all, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="examples without .yaml; default: all")
    names = parser.parse_args().names or sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            model = Path(directory, "model.safetensors")
            train(EXAMPLES / f"{name}.yaml", model)
            print(f"{name} {model_digest(model)}", flush=True)


if __name__ == "__main__":
    main()
