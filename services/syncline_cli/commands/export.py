"""`syncline export`: write a run's shared model to a safetensors file that plain PyTorch loads.

The command reads head and the model's chunks with the coordinator's key, and checks the digest that the run's records
name. It imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from syncline.errors import ConfigError
from syncline_cli.options import HELP_NAMES, FindConnect, Json, Key, RunName, TlsCa, TlsCert, TlsKey, new_app

app = new_app()

SUFFIX = ".safetensors"
MAX_NAMED = 5  # local tensors that are listed by name


@app.command(
    context_settings=HELP_NAMES,
    short_help="Write a run's model to a safetensors file.",
    epilog="Example: syncline export digits-3f2a1b digits.safetensors",
)
def export(
    run: RunName,
    file: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="The file to write.")],
    version: Annotated[
        int | None, typer.Option(metavar="N", help="One of the kept versions; default: the newest.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    connect: FindConnect = "",
    key: Key = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    as_json: Json = False,
) -> None:
    """Write a run's shared model to a file, under the names of its state_dict, during or after the run.

    The file does not contain local tensors: frozen parameters, integer buffers, and those that the task keeps local.
    """
    check_file(file, force)

    from syncline.bus.tls import Tls
    from syncline.client.export import fetch, save
    from syncline_cli.connect import ask, choose_broker
    from syncline_cli.ui.display import counted, megabytes
    from syncline_cli.ui.results import print_json

    model = ask(choose_broker(connect, key, tls=Tls(tls_ca, tls_cert, tls_key)), lambda bus: fetch(bus, run, version))
    save(model, file)
    if as_json:
        print_json({**model.about, "file": str(file)})
        return
    about = model.about
    shape = f"{counted(about['tensors'], 'tensor')}, {counted(about['elements'], 'element')}"
    print(
        f"{file}: version {about['version']} of {run}, {shape}, {megabytes(about['bytes'])}, digest {about['digest']}"
    )
    if local := about["local"]:
        more = f" and {len(local) - MAX_NAMED} more" if len(local) > MAX_NAMED else ""
        print(f"local tensors, not in the file: {', '.join(local[:MAX_NAMED])}{more}")
    print(
        "load it with: safetensors.torch.load_model(model, " + repr(str(file)) + (", strict=False)" if local else ")")
    )


def check_file(file: Path, force: bool) -> None:
    """Raise ConfigError if the file cannot be written as asked; called before anything is fetched."""
    if file.suffix != SUFFIX:
        raise ConfigError("FILE", f"{file} does not end with {SUFFIX}", f"Write {file.with_suffix(SUFFIX)}")
    if not file.parent.is_dir():
        raise ConfigError("FILE", f"{file.parent} is not a directory", "Make it, or name another")
    if file.exists() and not force:
        raise ConfigError("FILE", f"{file} exists", "Name another file, or replace it with --force")
