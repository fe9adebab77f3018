"""`syncline export`: a run's shared model as a safetensors file that plain PyTorch loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from syncline.errors import ConfigError
from syncline_cli.options import HELP_NAMES, FindConnect, Json, Key, RunName, TlsCa, TlsCert, TlsKey, new_app

app = new_app()

SUFFIX = ".safetensors"
NAMED = 5  # tensors that did not travel, by name


@app.command(
    context_settings=HELP_NAMES,
    short_help="Take a run's model home, as a safetensors file.",
    epilog="Example: syncline export digits-3f2a1b digits.safetensors",
)
def export(
    run: RunName,
    file: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="Where to write it.")],
    version: Annotated[
        int | None, typer.Option(metavar="N", help="One of the versions that are kept; default: the newest.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    connect: FindConnect = "",
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    as_json: Json = False,
) -> None:
    """Write a run's shared model to a file, with the names that its state_dict has. Works while the run goes on, and after.

    What does not travel is not in it: frozen parameters, integer buffers, and what the task keeps at home.
    """
    check_file(file, force)

    from syncline.bus.tls import Tls
    from syncline.client.export import fetch, save
    from syncline_cli.connect import ask, place
    from syncline_cli.ui.display import counted, megabytes
    from syncline_cli.ui.results import print_json

    model = ask(place(connect, key, tls=Tls(tls_ca, tls_cert, tls_key)), lambda bus: fetch(bus, run, version))
    save(model, file)
    if as_json:
        print_json({**model.about, "file": str(file)})
        return
    about = model.about
    shape = f"{counted(about['tensors'], 'tensor')}, {counted(about['elements'], 'element')}"
    print(
        f"{file}: version {about['version']} of {run}, {shape}, {megabytes(about['bytes'])}, digest {about['digest']}"
    )
    if home := about["local"]:
        more = f" and {len(home) - NAMED} more" if len(home) > NAMED else ""
        print(f"not in it, for they do not travel: {', '.join(home[:NAMED])}{more}")
    print("load it with: safetensors.torch.load_model(model, " + repr(str(file)) + (", strict=False)" if home else ")"))


def check_file(file: Path, force: bool) -> None:
    """Before anything is fetched. Raises ConfigError."""
    if file.suffix != SUFFIX:
        raise ConfigError("FILE", f"{file} does not end with {SUFFIX}", f"Write {file.with_suffix(SUFFIX)}")
    if not file.parent.is_dir():
        raise ConfigError("FILE", f"{file.parent} is no directory", "Make it, or name another")
    if file.exists() and not force:
        raise ConfigError("FILE", f"{file} is there already", "Name another, or replace it with --force")
