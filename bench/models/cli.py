"""The verbs that time whole models, as the command line has them: options in, a rank's function started."""

from __future__ import annotations

import math
import pathlib
from typing import Annotated

import typer

from .. import machine
from ..launch import prints_here, run_ranks
from ..options import Budget, Commit, Device, Dtype, Ranks, Seed, check_dtype, command_line, refuse
from .batching import Workload
from .configs import MODELS, ModelSizes, sizes_of
from .grid import CPU_CASES, DEFAULT_CASES, in_order, parse_case, product
from .serving_report import read_rows

Model = Annotated[
    str | None, typer.Option("--model", help=f"{', '.join(MODELS)}; by default llama-3-8b, on CPU ranks tiny.")
]
Layers = Annotated[int | None, typer.Option("--layers", min=1, help="Only so many of the model's layers.")]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=1, help="Rows of the arena of our op; larger calls run in row chunks.")
]
RunName = Annotated[str, typer.Option("--run-name", help="`run_name` of the results; by default the model's.")]


def chosen_model(model: str | None, layers: int | None, known: machine.Defaults) -> ModelSizes:
    on_cpu = known.topology.device_type == "cpu"
    sizes = sizes_of(model or ("tiny" if on_cpu else "llama-3-8b"), layers)
    sizes.check_divides(known.topology.world_size)
    return sizes


def need_transformers() -> None:
    """Errors: ValueError that says what to install."""
    try:
        import transformers  # noqa: F401
    except ImportError as missing:
        raise ValueError(f"{missing}. Run: pip install 'tp-overlap-kernels[bench,transformers]'") from None


def one_batch(
    model: Model = None,
    layers: Layers = None,
    batch_size: Annotated[str | None, typer.Option("--batch-size", help="Such as 1,16.")] = None,
    input_len: Annotated[str | None, typer.Option("--input-len", help="Tokens of a prompt, such as 256,512.")] = None,
    output_len: Annotated[str | None, typer.Option("--output-len", help="Tokens to make, such as 32,256.")] = None,
    case: Annotated[
        list[str] | None, typer.Option("--case", help="BATCHxINPUTxOUTPUT, such as 16x512x32. Repeatable.")
    ] = None,
    max_tokens: MaxTokens = 8192,
    dtype: Dtype = "bfloat16",
    ranks: Ranks = None,
    device: Device = "auto",
    result_file: Annotated[
        pathlib.Path | None, typer.Option("--result-file", "--result-filename", help="Add JSON lines to this file.")
    ] = None,
    run_name: RunName = "",
    budget_s: Budget = None,
    seed: Seed = 0,
    commit: Commit = None,
) -> None:
    """Time prefill and decode of a whole model with NCCL, with this library, and without any all-reduce."""
    try:
        known = machine.defaults(device, ranks, 1)
        sizes = chosen_model(model, layers, known)
        cases = (*product(batch_size, input_len, output_len), *map(parse_case, case or ()))
        cases = cases or (CPU_CASES if known.topology.device_type == "cpu" else DEFAULT_CASES)
        cases = in_order(cases, sizes.positions)
        dtype = check_dtype(dtype)
        need_transformers()
    except ValueError as reason:
        raise refuse(reason) from None
    from .one_batch import OneBatchOptions, run
    from .session import ModelOptions

    of_model = ModelOptions(sizes, dtype, max_tokens, run_name, budget_s, seed, command_line(), commit)
    if prints_here():
        typer.echo(f"{sizes.name}, {sizes.layers} layers, random weights. {known.say}")
    raise typer.Exit(run_ranks(run, OneBatchOptions(of_model, cases, result_file), known.topology))


def serving(
    model: Model = None,
    layers: Layers = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1)] = 100,
    max_concurrency: Annotated[int, typer.Option("--max-concurrency", min=1, help="Slots of the batch.")] = 20,
    random_input_len: Annotated[
        int | None, typer.Option("--random-input-len", min=1, help="Longest prompt; by default 1024, on CPU ranks 24.")
    ] = None,
    random_output_len: Annotated[
        int | None, typer.Option("--random-output-len", min=1, help="Most tokens to make; by default 128 or 8.")
    ] = None,
    random_range_ratio: Annotated[
        float, typer.Option("--random-range-ratio", help="Lengths are uniform from this part of the longest.")
    ] = 0.5,
    request_rate: Annotated[
        float, typer.Option("--request-rate", help="Requests a second, at exponential intervals; inf: all at once.")
    ] = math.inf,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of all arms in turn; the median is kept.")] = 1,
    max_tokens: MaxTokens = 8192,
    dtype: Dtype = "bfloat16",
    ranks: Ranks = None,
    device: Device = "auto",
    json: Annotated[
        pathlib.Path | None, typer.Option("--json", "--output-file", help="Write here; other models' rows stay.")
    ] = None,
    run_name: RunName = "",
    budget_s: Budget = None,
    seed: Seed = 0,
    commit: Commit = None,
) -> None:
    """Serve requests by continuous batching with NCCL, with this library, and without any all-reduce."""
    try:
        known = machine.defaults(device, ranks, 1)
        sizes = chosen_model(model, layers, known)
        longest = (24, 8) if known.topology.device_type == "cpu" else (1024, 128)
        lengths = (random_input_len or longest[0], random_output_len or longest[1])
        workload = Workload(num_prompts, max_concurrency, *lengths, random_range_ratio, request_rate)
        workload.check_fits(sizes.name, sizes.positions)
        if json is not None:
            read_rows(json)  # a file that cannot be added to is refused before anything is measured
        dtype = check_dtype(dtype)
        need_transformers()
    except ValueError as reason:
        raise refuse(reason) from None
    from .serving import ServingOptions, run
    from .session import ModelOptions

    of_model = ModelOptions(sizes, dtype, max_tokens, run_name, budget_s, seed, command_line(), commit)
    if prints_here():
        typer.echo(f"{sizes.name}, {sizes.layers} layers, random weights. {known.say}")
    raise typer.Exit(run_ranks(run, ServingOptions(of_model, workload, rounds, json), known.topology))
