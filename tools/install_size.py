"""Print the size of installations: `python tools/install_size.py`.

Installs the base package and the extras into fresh virtual environments, with the versions of constraints.txt, and adds up the
files in their site-packages. Needs a package index and some minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTALLATIONS = {"base": ".", "with [local]": ".[local]", "with [dev]": ".[dev]"}
TORCH = ("torch", "torchgen", "functorch", "triton", "nvidia")  # top-level directories of torch and its CUDA libraries


def main() -> None:
    print(f"{'installation':<14} {'MB':>7} {'without torch':>14}")
    for name, requirement in INSTALLATIONS.items():
        with tempfile.TemporaryDirectory() as directory:
            packages = install(Path(directory), requirement)
            total = size_bytes(packages)
            torch = sum(size_bytes(packages / part) for part in TORCH)
        print(f"{name:<14} {total / 1e6:>7,.0f} {(total - torch) / 1e6:>14,.0f}")


def install(directory: Path, requirement: str) -> Path:
    """Install into a new virtual environment; return its site-packages."""
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--constraint", "constraints.txt", requirement], cwd=ROOT, check=True)
    return next((directory / "lib").glob("python*/site-packages"))


def size_bytes(place: Path) -> int:
    """Return the size of all files below a directory; 0 if it does not exist."""
    return sum(file.lstat().st_size for file in place.rglob("*") if file.is_file() and not file.is_symlink())


if __name__ == "__main__":
    main()
