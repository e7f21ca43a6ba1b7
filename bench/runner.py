"""`run`, on each rank: for every layer and M, check all providers, time those that are right, and report."""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import report
from .attempts import Attempt, Dropped, Outcome, together
from .cases import MESSAGES, Case, Layer, cases
from .inputs import LayerInputs, MessageInputs
from .launch import TimeBudget, World
from .link import link_gbps
from .provider import Provider, Session
from .providers import close, default_names, label, make, recovered
from .results import Results, Row, complete, describe_run
from .timing import Clock, CpuClock, CudaClock, Effort, Turn, measure, one_line
from .truth import Truth

WRONG_RESULT, PROVIDER_FAILED = 1, 2  # exit codes
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RunOptions:
    """What the command line asks of `run`."""

    ops: tuple[str, ...]
    layers: tuple[Layer, ...]
    grid: tuple[int, ...]
    modes: tuple[str, ...]
    dtype: str = "bfloat16"
    providers: tuple[str, ...] = ()  # empty: all that fit the op
    store: str = "auto"  # of our arena
    json_path: pathlib.Path | None = None
    budget_s: float | None = None
    seed: int = 0
    effort: Effort = field(default_factory=Effort)
    command: str = ""
    commit: str | None = None


@dataclass
class Verdicts:
    """What decides the exit code."""

    wrong: int = 0
    failed: int = 0

    def exit_code(self) -> int:
        return WRONG_RESULT if self.wrong else PROVIDER_FAILED if self.failed else 0


class Run:
    """One rank's state of a run."""

    def __init__(self, world: World, options: RunOptions) -> None:
        self.world, self.options = world, options
        self.console = report.console() if world.rank == 0 else Console(quiet=True)
        self.clock: Clock = CudaClock(world) if world.device.type == "cuda" else CpuClock(world)
        gbps, how = None, "none: CPU ranks"
        if isinstance(self.clock, CudaClock):
            gbps, how = (None, "none: one rank") if world.world_size == 1 else link_gbps(world, self.clock)
        self.link_gbps = gbps
        described = describe_run(world, gbps, how, options.command, options.commit) if world.rank == 0 else {}
        if described and options.effort.load_ms:
            described["load_ms"] = options.effort.load_ms
        meta = described and described | {"store": options.store}
        self.results = Results(meta, options.json_path if world.rank == 0 else None)
        max_N = max(layer.N for layer in options.layers)
        self.session = Session(world, max(options.grid), max_N, DTYPES[options.dtype], options.store)
        self.verdicts = Verdicts()
        gc.collect()
        gc.freeze()  # capturing collects garbage each time; what is here by now stays, and need not be looked through
        self.budget = TimeBudget(world, options.budget_s)
        self.providers: dict[str, Provider | Outcome] = {}

    def provider(self, name: str) -> Provider:
        """The provider of a name, made once; Dropped where it cannot be had."""
        if name not in self.providers:
            try:
                self.providers[name] = together(self.world, lambda: make(name, self.session))
            except Dropped as dropped:
                self.providers[name] = dropped.outcome
        made = self.providers[name]
        if isinstance(made, Outcome):
            raise Dropped(made)
        return made

    def names(self, op: str) -> list[str]:
        """The providers asked for; the GEMM alone is always among them, since the floor is made of it."""
        names = list(self.options.providers) or default_names(op, self.world)
        return names if op in MESSAGES or "matmul" in names else ["matmul", *names]

    def case(self, case: Case, inputs: LayerInputs, truth: Truth, mode: str) -> list[Row]:
        """Checks, then times, every provider in one case and mode."""
        rows = {name: Row.of(case, mode, label(name)) for name in self.names(case.op)}
        turns: dict[str, Turn] = {}
        attempts: dict[str, Attempt] = {}
        for name, row in rows.items():
            try:
                provider = self.provider(name)
                if case.op not in provider.ops:
                    raise Dropped(Outcome("declined", f"does not do {case.op}"))
                attempt = Attempt(provider, case, inputs, truth, self.clock)
                turns[name] = attempt.turn(attempt.timed(attempt.prepared(), mode))
                attempts[name] = attempt
                row.plan = _plan(provider, case)
            except Dropped as dropped:
                self.drop(row, dropped.outcome)
                if dropped.outcome.kind != "declined" and recovered(self.session):
                    for lost in [each for each in turns if attempts[each].provider.fused]:
                        del turns[lost]
                        self.drop(rows[lost], Outcome("failed", f"lost its graph when {name} failed"))
        for name, times, failure in measure(turns, self.clock, self.options.effort):
            try:
                if times is None:
                    raise Dropped(Outcome("failed", failure or "no time"))
                attempts[name].sample_and_verify(turns[name])
                rows[name].take(times)
            except Dropped as dropped:
                self.drop(rows[name], dropped.outcome)
        recovered(self.session)
        complete(list(rows.values()), case, self.link_gbps)
        return list(rows.values())

    def drop(self, row: Row, outcome: Outcome) -> None:
        """Keeps the reason in the row, and counts what makes the run fail: any wrong result, and a failure of ours or
        of a provider that the user named."""
        row.reason = outcome.reason
        if outcome.kind == "wrong":
            row.correct = False
            self.verdicts.wrong += 1
        elif outcome.kind == "failed":
            mine = row.provider.partition(":")[0] in ("ours", "ref", "interp")
            self.verdicts.failed += mine or row.provider in map(label, self.options.providers)

    def layer(self, layer: Layer) -> Iterator[list[Row]]:
        """Rows of each case of a layer, as they are ready. Inputs are made once for all its M."""
        options = self.options
        for kind, ops in by_inputs(options.ops):
            inputs = kind(layer, max(options.grid), DTYPES[options.dtype], self.world, options.seed)
            for M in options.grid:
                if self.budget.spent():
                    return
                truth = Truth(inputs, M)
                for case in cases(ops, layer, [M], options.dtype, self.world.world_size):
                    for mode in options.modes:
                        yield self.case(case, inputs, truth, mode)
                        release(self.world)
                del truth


def release(world: World) -> None:
    """Graphs hold memory, and their outputs with it, until they are collected."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def by_inputs(ops: tuple[str, ...]) -> list[tuple[type[LayerInputs], list[str]]]:
    """The kinds of inputs that a run needs, each with the ops that take them."""
    with_weight = [op for op in ops if op not in MESSAGES]
    without = [op for op in ops if op in MESSAGES]
    kinds: list[tuple[type[LayerInputs], list[str]]] = []
    if with_weight:
        kinds.append((LayerInputs, with_weight))
    if without:
        kinds.append((MessageInputs, without))
    return kinds


def _plan(provider: Provider, case: Case) -> str | None:
    try:
        return provider.plan(case)
    except Exception as error:
        return f"unknown: {one_line(error)}"


def run(world: World, options: RunOptions) -> int:
    """The whole run on one rank; the exit code is the same on all."""
    state = Run(world, options)
    total = len(options.layers) * len(options.ops) * len(options.grid) * len(options.modes)
    measured = 0
    with progress_bar(state.console) as progress:
        task = progress.add_task("measuring", total=total)
        for layer in options.layers:
            rows: list[Row] = []
            progress.update(task, description=escape(layer.label))
            for of_case in state.layer(layer):
                rows += of_case
                state.results.add(of_case)
                measured += 1
                progress.advance(task)
            print_layer(state.console, rows)
    finish(state, total - measured)
    close(state.session)
    return world.from_rank_0(state.verdicts.exit_code())


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def print_layer(console: Console, rows: list[Row]) -> None:
    for op, mode in dict.fromkeys((row.op, row.mode) for row in rows):
        chosen = [row for row in rows if row.op == op and row.mode == mode]
        console.print(f"[bold]{escape(report.heading(chosen))}[/]", highlight=False)
        console.print(report.table(chosen))
        for line in report.reasons(chosen):
            console.print(f"  {escape(line)}", highlight=False)
        console.print()


def finish(state: Run, unmeasured: int) -> None:
    for part in report.summary(state.results.rows):
        state.console.print(part)
    meta: dict[str, Any] = state.results.meta
    if meta:
        link = "no link" if meta["link_gbps"] is None else f"link {meta['link_gbps']} GB/s"
        state.console.print(
            escape(f"{meta['gpu']}, W={meta['world_size']}, {link} ({meta['link']}), "),
            f"torch {meta['torch']}, triton {meta['triton']}",
            sep="",
        )
    right = sum(row.correct is True for row in state.results.rows)
    state.console.print(f"{right} results are right by float64 and were timed.")
    if unmeasured:
        state.console.print(
            f"{unmeasured} cases were not measured: the budget of {state.options.budget_s:g} s was spent."
        )
    if state.results.path is not None:
        state.console.print(f"Written to {state.results.path}")
    if state.verdicts.wrong:
        state.console.print(f"[red bold]{state.verdicts.wrong} wrong results. They have no time.[/]")
    if state.verdicts.failed:
        state.console.print(f"[red bold]{state.verdicts.failed} failures of providers that had to run.[/]")
