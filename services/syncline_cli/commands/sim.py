"""`syncline sim`: a run with its whole fleet in this process and in virtual time, to try a fleet before its deployment.

The simulator is `syncline_sim`. The same spec, seed and settings give the same result, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from syncline_cli.options import HELP_NAMES, Json, new_app

app = new_app()


@app.command(
    context_settings=HELP_NAMES,
    epilog="Example: syncline sim digits.yaml --agents 100, with `sim: {step_s: [0.01, 0.05]}` in the file",
)
def sim(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The run's settings, with a section `sim:`.")],
    agents: Annotated[
        int | None, typer.Option(metavar="N", help="Number of agents; overrides the section `sim:`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Simulate a run: the real services and the real model in one process, in virtual time.

    Training, delays and faults take the virtual seconds that the section `sim:` gives them.
    """
    from syncline_sim.settings import load

    settings = load(spec, agents)  # before torch is imported: mistakes are reported at once

    from syncline_cli.local_fleet.preload import keep_torch_out_of_the_temporary_directory

    keep_torch_out_of_the_temporary_directory()

    from syncline_cli.ui.sim_run import SimRun

    raise typer.Exit(SimRun(*settings, spec.resolve().parent, as_json).run())
