"""`python -m tests.proof PART --json FILE`: one part of the proof; exit code 1 if it found a violation."""

from __future__ import annotations

import enum
import pathlib
import shlex
import sys
from typing import Annotated

import typer

from tests.proof import parts, report
from tests.proof.ranks import Machine

Name = enum.Enum("Name", {name: name for name in parts.PARTS})
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Parts: " + "; ".join(f"{name}, {part.what}" for name, part in parts.PARTS.items()) + ".")
def main(
    part: Annotated[Name, typer.Argument(help="What to run.")],
    json: Annotated[pathlib.Path | None, typer.Option("--json", help="File for the result.")] = None,
    world_size: Annotated[int, typer.Option("--world-size", min=2, max=4, help="Ranks; they may share GPUs.")] = 2,
    device: Annotated[str, typer.Option("--device", help="auto, cuda or cpu.")] = "auto",
    count: Annotated[int | None, typer.Option("--count", min=1, help="How much; see the list of parts.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 1,
    limit_s: Annotated[float | None, typer.Option("--limit-s", help="Time limit in seconds.")] = None,
    commit: Annotated[str | None, typer.Option("--commit", help="What to write down as the commit.")] = None,
) -> None:
    """Run, print, write."""
    machine = Machine.found(world_size, device)
    found = parts.run(part.value, machine, count, seed, limit_s)
    found.counts.setdefault("seed", seed)
    command = shlex.join(["python", "-m", "tests.proof", *sys.argv[1:]])
    raise typer.Exit(report.finish(part.value, found, report.describe(machine, command, commit), json))


if __name__ == "__main__":
    app()
