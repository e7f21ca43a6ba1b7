"""What a part leaves behind: a table on the screen, a JSON file, an exit code."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.launch import Topology, World
from bench.results import describe_run, write_json
from tests.proof.ranks import Machine, take_device


@dataclasses.dataclass
class Found:
    """What one rank, or the part as a whole, has found.

    counts: sums over the ranks' calls, or numbers that are the same on all. rows: a table. failures: violations.
    """

    counts: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)


def merged(found: list[Found], *summed: str) -> Found:
    """Rank 0's counts and rows, with the failures of all; `summed` counts are added up."""
    whole = Found(dict(found[0].counts), found[0].rows, [text for one in found for text in one.failures])
    for name in summed:
        whole.counts[name] = sum(one.counts[name] for one in found)
    return whole


def describe(machine: Machine, command: str, commit: str | None) -> dict[str, Any]:
    """The meta part of the file."""
    shared = -(-machine.world_size // torch.cuda.device_count()) if machine.kind == "cuda" else 1
    world = World(0, Topology(machine.world_size, machine.kind, shared), take_device(0, machine), "", None)
    meta = describe_run(world, None, "", command, commit)
    return {name: value for name, value in meta.items() if name not in ("link_gbps", "link", "floor")}


def finish(part: str, found: Found, meta: dict[str, Any], path: pathlib.Path | None) -> int:
    """Print, write, and say with which code to exit."""
    console = Console()
    if found.rows:
        table = Table(*found.rows[0])
        for row in found.rows:
            table.add_row(*(str(value) for value in row.values()))
        console.print(table)
    for text in found.failures:
        console.print(f"VIOLATION {text}", style="red", markup=False, highlight=False)
    counts = ", ".join(f"{name} {value}" for name, value in found.counts.items())
    console.print(f"{part}: {counts}, violations {len(found.failures)}", markup=False, highlight=False)
    if path is not None:
        content = {"meta": meta | {"part": part}, "counts": found.counts}
        write_json(path, content | {"failures": found.failures, "rows": found.rows})
    return 1 if found.failures else 0
