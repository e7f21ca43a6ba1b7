"""The command line: run, tune, plot, timeline, explain; one-batch and serving are in models/cli.py."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from . import cases, machine
from .launch import Topology, prints_here, run_ranks
from .models.cli import one_batch, serving
from .options import (
    Budget,
    Commit,
    Device,
    Dtype,
    Ranks,
    RanksPerDevice,
    Seed,
    Store,
    Tp,
    check_dtype,
    check_store,
    command_line,
    refuse,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Checks and times GEMM + collective ops, and models that use them, beside the ways without this library.",
)

Op = Annotated[list[str] | None, typer.Option("--op", help=f"Repeatable: {', '.join(cases.OPS)}.")]
Preset = Annotated[
    list[str] | None, typer.Option("--preset", help=f"Layers of a model, repeatable: {', '.join(cases.presets())}.")
]
ExtraLayer = Annotated[
    list[str] | None, typer.Option("--layer", help="A layer of your own: N,K_local or name=N,K_local. Repeatable.")
]
Grid = Annotated[str | None, typer.Option("--m", "--M", help="Values of M, such as 1,16,4096.")]


def chosen_layers(presets: list[str] | None, extra: list[str] | None, default: str, tp: int) -> tuple[cases.Layer, ...]:
    names = presets or ([] if extra else [default])
    layers = [layer for name in names for layer in cases.preset_layers(name, tp)]
    layers += [cases.parse_layer(text) for text in extra or []]
    return tuple(dict.fromkeys(layers))


def chosen_ops(ops: list[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    for op in ops or ():
        if op not in cases.OPS:
            raise ValueError(f"no op is called {op!r}; there are {', '.join(cases.OPS)}")
    return tuple(ops or default)


def chosen_modes(mode: str | None, topology: Topology, default: str) -> tuple[str, ...]:
    modes = ("graph", "eager") if mode == "both" else (mode or default,)
    for each in modes:
        if each not in ("graph", "eager"):
            raise ValueError(f"--mode is graph, eager or both, got {each!r}")
        if each == "graph" and topology.device_type == "cpu":
            raise ValueError("--mode graph needs a GPU; CPU ranks run eager")
    return modes


app.command("one-batch")(one_batch)
app.command("serving")(serving)


@app.command()
def run(
    op: Op = None,
    preset: Preset = None,
    layer: ExtraLayer = None,
    m: Grid = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider", help="Repeatable: ours, ours:<plan>, matmul, matmul+nccl, ..., name=module:function."
        ),
    ] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="graph, eager or both.")] = None,
    dtype: Dtype = "bfloat16",
    tp: Tp = None,
    ranks: Ranks = None,
    ranks_per_device: RanksPerDevice = 1,
    device: Device = "auto",
    store: Store = "auto",
    json: Annotated[pathlib.Path | None, typer.Option("--json", help="Write results here, after every case.")] = None,
    budget_s: Budget = None,
    target_ms: Annotated[float, typer.Option("--target-ms", help="Time to spend on samples of one provider.")] = 60.0,
    load_ms: Annotated[
        float,
        typer.Option("--load-ms", min=0, help="Sample each provider behind so much of its own load; 0: by turns."),
    ] = 0.0,
    seed: Seed = 0,
    commit: Commit = None,
) -> None:
    """Check every provider against float64, then time it. Without options: what this machine can do."""
    from .runner import RunOptions
    from .runner import run as run_rank
    from .timing import Effort

    try:
        known = machine.defaults(device, ranks, ranks_per_device)
        least, most = (10, 50) if known.topology.device_type == "cuda" else (3, 20)
        options = RunOptions(
            ops=chosen_ops(op, known.ops),
            layers=chosen_layers(preset, layer, known.preset, tp or known.topology.world_size),
            grid=tuple(cases.parse_grid(m)) if m else known.grid,
            modes=chosen_modes(mode, known.topology, known.mode),
            dtype=check_dtype(dtype),
            providers=tuple(dict.fromkeys(provider or ())),
            store=check_store(store),
            json_path=json,
            budget_s=budget_s,
            seed=seed,
            effort=Effort(target_ms, least, most, load_ms),
            command=command_line(),
            commit=commit,
        )
    except ValueError as reason:
        raise refuse(reason) from None
    if prints_here():
        typer.echo(known.say)
    raise typer.Exit(run_ranks(run_rank, options, known.topology))


@app.command()
def tune(
    op: Op = None,
    preset: Preset = None,
    layer: ExtraLayer = None,
    m: Grid = None,
    spec: Annotated[
        list[str] | None, typer.Option("--plan", help="Try these plan specs instead of the list of candidates.")
    ] = None,
    out: Annotated[
        pathlib.Path | None, typer.Option("--out", help="The table; by default named after device and ranks, here.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Keep an existing table's entries; measure what it lacks.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="With --merge: measure what it has, too.")] = False,
    mode: Annotated[str | None, typer.Option("--mode", help="graph or eager.")] = None,
    dtype: Dtype = "bfloat16",
    tp: Tp = None,
    ranks: Ranks = None,
    ranks_per_device: RanksPerDevice = 1,
    device: Device = "auto",
    budget_s: Budget = None,
    seed: Seed = 0,
    commit: Commit = None,
) -> None:
    """Measure every candidate plan, drop wrong ones, and write the dispatch table. TP_OVERLAP_TABLE makes it used."""
    from tp_overlap_kernels.dispatch.table import file_name

    from .tune import TuneOptions
    from .tune import tune as tune_rank

    try:
        known = machine.defaults(device, ranks, ranks_per_device)
        options = TuneOptions(
            ops=chosen_ops(op, known.ops),
            layers=chosen_layers(preset, layer, known.preset, tp or known.topology.world_size),
            grid=tuple(cases.parse_grid(m)) if m else known.grid,
            table_path=out or pathlib.Path(file_name(machine.device_name(known.topology), known.topology.world_size)),
            mode=chosen_modes(mode, known.topology, known.mode)[0],
            dtype=check_dtype(dtype),
            merge=merge,
            again=again,
            budget_s=budget_s,
            seed=seed,
            specs=tuple(spec or ()),
            command=command_line(),
            commit=commit,
        )
    except ValueError as reason:
        raise refuse(reason) from None
    raise typer.Exit(run_ranks(tune_rank, options, known.topology))


@app.command()
def plot(
    results: Annotated[
        pathlib.Path,
        typer.Argument(help="Of `run --json` or `one-batch --result-file`.", exists=True, dir_okay=False),
    ],
    out: Annotated[pathlib.Path | None, typer.Option("--out", help="The PNG; by default beside the results.")] = None,
) -> None:
    """Draw time against M, one panel a layer, with the floor; or, of a .jsonl file, the latency of models."""
    from .models.plot import plot as draw_models
    from .plot import plot as draw_layers

    draw = draw_models if results.suffix == ".jsonl" else draw_layers
    try:
        for path in draw(results, out):
            typer.echo(str(path))
    except ValueError as reason:
        raise refuse(reason) from None


@app.command()
def timeline(
    op: Annotated[str, typer.Option("--op", help="gemm_all_reduce or gemm_reduce_scatter.")] = cases.GEMM_ALL_REDUCE,
    layer: Annotated[str, typer.Option("--layer", help="N,K_local or name=N,K_local.")] = "8192,1024",
    m: Annotated[int, typer.Option("--m", "--M", min=1)] = 1024,
    plan: Annotated[str, typer.Option("--plan", help="Such as sm90:block_n=128,lead=33.")] = "sm90",
    ranks: Ranks = None,
    out: Annotated[pathlib.Path, typer.Option("--out", help="The PNG.")] = pathlib.Path("timeline.png"),
    json: Annotated[pathlib.Path | None, typer.Option("--json", help="Write the intervals here.")] = None,
    seed: Seed = 0,
    commit: Commit = None,
) -> None:
    """Draw what the blocks of one call did when, as rank 0 saw it. For the plans sm90 and sm90_add, bf16."""
    from .timeline import TimelineOptions, record

    try:
        known = machine.defaults("cuda", ranks, 1)
        if chosen_ops([op], ())[0] == cases.ALL_REDUCE:
            raise ValueError("--op is gemm_all_reduce or gemm_reduce_scatter: nothing else has tiles to draw")
        options = TimelineOptions(
            op=op,
            layer=cases.parse_layer(layer),
            M=m,
            plan=plan,
            png=out,
            json_path=json,
            seed=seed,
            command=command_line(),
            commit=commit,
        )
    except ValueError as reason:
        raise refuse(reason) from None
    raise typer.Exit(run_ranks(record, options, known.topology))


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help=", ".join(cases.OPS))],
    M: Annotated[int, typer.Argument(min=0)],
    N: Annotated[int, typer.Argument(min=1)],
    K: Annotated[int, typer.Argument(min=0, help="K of one rank; 0 for all_reduce.")],
    dtype: Dtype = "bfloat16",
    world_size: Annotated[int, typer.Option("--world-size", min=1, max=8)] = 2,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Name of a device, such as 'NVIDIA H200'; this machine's otherwise."),
    ] = None,
) -> None:
    """Say which plan the library would choose for a call, and why."""
    import torch

    import tp_overlap_kernels as tpo
    from tp_overlap_kernels.errors import TpOverlapError

    try:
        torch_dtype = getattr(torch, check_dtype(dtype))
        here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        print(tpo.explain(op, M, N, K, dtype=torch_dtype, world_size=world_size, device=device or here))
    except (ValueError, TpOverlapError) as reason:
        raise refuse(reason) from None
