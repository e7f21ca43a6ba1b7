"""`timeline`: what every block of one call did when, as a picture and as shares of its time.

The CUDA kernels of the plans sm90 and sm90_add tell it themselves: a thread of each role writes when each of its steps
ended (csrc/include/tpo/trace.cuh), in builds made for that. The call that is drawn is the last of a row of equal ones,
so that the ranks are as close together as calls in a row are. It pays for the clocks it reads and the stores of the
trace.
"""

from __future__ import annotations

import pathlib
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tp_overlap_kernels.dispatch.defaults import SM90_PLANS
from tp_overlap_kernels.kernels.gemm_collectives import TRACE_ROLES, TRACE_STEPS

from . import report
from .cases import Case, Layer
from .inputs import LayerInputs
from .launch import World
from .provider import Session
from .providers import Ours, close
from .results import describe_run, write_json

CALLS = 10
INTERVALS = 512  # of a role of a block
BLOCKS_DRAWN = 6
COLOURS = {
    "multiply": "#1d3557",
    "await staging": "#e63946",
    "await partial": "#f4a261",
    "add": "#2a9d8f",
    "stage": "#8ecae6",
    "await tile": "#eeeeee",
    "await flag": "#f4a261",
    "send": "#6a4c93",
    "publish": "#b79ced",
    "await sum": "#fde8d0",
    "copy": "#74a57f",
    "await turn": "#c9c9c9",
}


@dataclass(frozen=True)
class TimelineOptions:
    """What the command line asks of `timeline`."""

    op: str
    layer: Layer
    M: int
    plan: str
    png: pathlib.Path
    json_path: pathlib.Path | None = None
    seed: int = 0
    command: str = ""
    commit: str | None = None


@dataclass(frozen=True)
class Interval:
    """What a thread of a block did: of which tile of whom; nanoseconds since the first of all intervals began."""

    block: int
    role: str
    step: str
    owner: int
    tile: int
    begin_ns: int
    end_ns: int


def intervals_of(trace: torch.Tensor) -> list[Interval]:
    """trace: int32 (blocks, roles, intervals, words), as ops.sm90.traced gives it. In the order of the memory."""
    words = trace.cpu().contiguous()
    times = words.view(torch.int64)[..., :2]
    written = times[..., 1] != 0
    if not written.any():
        return []
    origin = int(times[..., 0][written].min())
    found = []
    for place in written.nonzero().tolist():
        block, role, _ = place
        step, owner, tile = words[tuple(place)][4:7].tolist()
        begin, end = (int(time) - origin for time in times[tuple(place)])
        found.append(Interval(block, TRACE_ROLES[role], TRACE_STEPS[step], owner, tile, begin, end))
    return found


def shares(intervals: list[Interval]) -> dict[tuple[str, str], float]:
    """(role, step) -> its part of the time from the first to the last interval, a mean over the blocks that have the
    role. What is missing to 1 is before a role's first step and after its last."""
    whole = max(each.end_ns for each in intervals)
    blocks: dict[str, set[int]] = defaultdict(set)
    spent: dict[tuple[str, str], int] = defaultdict(int)
    for each in intervals:
        blocks[each.role].add(each.block)
        spent[each.role, each.step] += each.end_ns - each.begin_ns
    return {key: ns / (whole * len(blocks[key[0]])) for key, ns in spent.items()}


def record(world: World, options: TimelineOptions) -> int:
    """The call on one rank; rank 0 writes its own picture. Exit code 0 unless there was nothing to draw."""
    from tp_overlap_kernels.memory import arena as arenas
    from tp_overlap_kernels.ops import sm90

    case = Case(options.op, options.layer, options.M, "bfloat16", world.world_size)
    session = Session(world, options.M, options.layer.N, torch.bfloat16)
    provider = Ours(f"ours:{options.plan}", session, options.plan)
    inputs = LayerInputs(options.layer, options.M, torch.bfloat16, world, options.seed)
    call = provider.prepare(case, inputs.a[: options.M])
    with provider.active(), torch.inference_mode():
        call(inputs.weights[0])
        torch.cuda.synchronize()
        name = (provider.plan(case) or "").split(":")[0]
        name = name if name in SM90_PLANS else SM90_PLANS[0]  # of another plan nothing will be written
        with sm90.traced(arenas.get(world.group_name), name, options.op, INTERVALS) as trace:
            world.barrier()
            for number in range(CALLS):
                call(inputs.weights[number % len(inputs.weights)])
            torch.cuda.synchronize()
        provider.check()
    intervals = intervals_of(trace)
    if world.rank == 0 and intervals:
        meta = describe_run(world, None, "not measured", options.command, options.commit)
        sizes = f"M={case.M} N={case.N} K={case.K_local}"
        meta |= {"case": f"{case.op} {sizes}", "plan": provider.plan(case)}
        if options.json_path is not None:
            write_json(options.json_path, {"meta": meta, "rows": [list(asdict(each).values()) for each in intervals]})
        draw(meta, intervals, options.png)
        say(intervals)
    elif world.rank == 0:
        report.console().print(f"nothing was written: {options.plan} is no plan of the kernels that can be looked at")
    close(session)
    return 0 if intervals else 1


def say(intervals: list[Interval]) -> None:
    """Shares as a table."""
    from rich.table import Table

    table = Table("role", "step", "% of the call", title=f"{max(each.end_ns for each in intervals) / 1e3:.1f} us")
    of = shares(intervals)
    for role, step in sorted(of, key=lambda key: (TRACE_ROLES.index(key[0]), TRACE_STEPS.index(key[1]))):
        table.add_row(role, step, f"{100 * of[role, step]:.1f}")
    report.console().print(table)


def draw(meta: dict[str, Any], intervals: list[Interval], path: pathlib.Path) -> None:
    """Above, what share of the blocks multiplies, waits or adds at each time; below, the roles of a few blocks."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    whole = max(each.end_ns for each in intervals)
    _stack(above, [each for each in intervals if each.role == "consumer"], whole)
    _lanes(below, intervals)
    below.set_xlabel("us")
    below.set_xlim(0, whole / 1e3)
    steps = [step for step in TRACE_STEPS if any(each.step == step for each in intervals)]
    handles = [Patch(color=COLOURS[step], label=step) for step in steps]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.suptitle(f"{meta['case']}, {meta['plan']}   (rank 0 of {meta['world_size']} x {meta['gpu']})", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _stack(panel: Any, intervals: list[Interval], whole: int) -> None:
    import numpy as np

    blocks = len({each.block for each in intervals})
    edges = np.linspace(0, whole, 401)
    steps = [step for step in TRACE_STEPS if any(each.step == step for each in intervals)]
    rows = []
    for step in steps:
        busy = np.zeros(400)
        for each in intervals:
            if each.step == step:
                busy += np.clip(np.minimum(each.end_ns, edges[1:]) - np.maximum(each.begin_ns, edges[:-1]), 0, None)
        rows.append(busy / (edges[1] * blocks))
    middle = (edges[1:] + edges[:-1]) / 2e3
    panel.stackplot(middle, rows, colors=[COLOURS[step] for step in steps], linewidth=0)
    panel.set_ylim(0, 1)
    panel.set_ylabel("share of the blocks")


def _lanes(panel: Any, intervals: list[Interval]) -> None:
    """A block has a lane a role; those of a role begin where its first step does."""
    blocks = sorted({each.block for each in intervals})
    drawn = blocks[:: max(1, len(blocks) // BLOCKS_DRAWN)][:BLOCKS_DRAWN]
    roles = [role for role in TRACE_ROLES if any(each.role == role for each in intervals)]
    lanes = {(block, role): i for i, (block, role) in enumerate((b, r) for b in drawn for r in roles)}
    for (block, role), lane in lanes.items():
        some = [each for each in intervals if (each.block, each.role) == (block, role)]
        bars = [(each.begin_ns / 1e3, (each.end_ns - each.begin_ns) / 1e3) for each in some]
        panel.broken_barh(bars, (lane - 0.4, 0.8), facecolors=[COLOURS[each.step] for each in some])
    panel.set_yticks(list(lanes.values()), [f"block {block} {role}" for block, role in lanes], fontsize=8)
    panel.invert_yaxis()
