"""`tune`, on each rank: measures every candidate plan of every case and writes the dispatch table.

Candidates that fail or are wrong are dropped before any timing, on all ranks alike. A first pass times the rest
briefly; the fastest of each plan name and all near the best are timed again, taking turns, and make the entry: the
best plan and its runners-up. The table is written after every case, so that a tuner that is stopped can go on.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape

from tp_overlap_kernels.dispatch import problem as dispatch_problem
from tp_overlap_kernels.dispatch import table as dispatch_table
from tp_overlap_kernels.errors import InvalidInput

from . import report
from .attempts import Attempt, Dropped, together
from .candidates import candidates
from .cases import ALL_REDUCE, Case, Layer, cases
from .inputs import LayerInputs
from .launch import TimeBudget, World
from .provider import Session
from .providers import Ours, close, recovered
from .results import describe_run
from .runner import DTYPES, by_inputs, progress_bar, release
from .timing import Clock, CpuClock, CudaClock, Effort, Turn, measure
from .truth import Truth

FIRST_PASS = Effort(target_ms=6.0, least=3, most=10)
FINAL = Effort(target_ms=40.0, least=10, most=30)
# Calls that take so long in the first pass are products for the most part, which stand at the limit of power: each
# candidate is timed at the clock that it has by itself.
LOADED_FROM_US = 150.0
LOADED_FIRST_PASS = Effort(target_ms=12.0, least=3, most=10, load_ms=60.0)
LOADED_FINAL = Effort(target_ms=40.0, least=10, most=30, load_ms=100.0)
NEAR = 1.06  # times the best of the first pass: timed again
FINALISTS = 8


@dataclass(frozen=True)
class TuneOptions:
    """What the command line asks of `tune`."""

    ops: tuple[str, ...]
    layers: tuple[Layer, ...]
    grid: tuple[int, ...]
    table_path: pathlib.Path
    mode: str = "graph"
    dtype: str = "bfloat16"
    merge: bool = False  # keep the entries of an existing table, and skip what they answer
    again: bool = False  # with merge: measure those cases again too
    budget_s: float | None = None
    seed: int = 0
    specs: tuple[str, ...] = ()  # instead of the list of candidates
    command: str = ""
    commit: str | None = None


@dataclass
class Tuning:
    """One rank's state of the tuner. Entries are kept by problem, so that a new measurement replaces an old one."""

    world: World
    options: TuneOptions
    clock: Clock
    session: Session
    console: Console
    entries: dict[tuple, dispatch_table.Entry] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # spec -> last reason, for the summary

    def wanted(self, case: Case) -> bool:
        return self.options.again or problem_key(case) not in self.entries

    def case(self, case: Case, inputs: LayerInputs, truth: Truth) -> dispatch_table.Entry | None:
        """The entry of a case, or None where no candidate survived."""
        dropped: dict[str, str] = {}  # spec -> kind
        ready = None
        while ready is None:
            ready = self.attempt_all(case, inputs, truth, dropped)
        turns = {spec: turn for spec, (_, turn) in ready.items()}
        rough, last = self.times(turns, FIRST_PASS), FINAL
        if rough and min(rough.values()) >= LOADED_FROM_US and isinstance(self.clock, CudaClock):
            rough, last = self.times({spec: turns[spec] for spec in rough}, LOADED_FIRST_PASS), LOADED_FINAL
        final = self.times({spec: turns[spec] for spec in finalists(rough)}, last)
        for spec in list(final):
            try:
                attempt, turn = ready[spec]
                attempt.sample_and_verify(turn)  # still right after all those turns
            except Dropped as reason:
                del final[spec]
                self.drop(spec, case, reason, dropped)
        recovered(self.session)
        entry = entry_of(case, final)
        self.console.print(escape(_line(case, entry, len(ready), Counter(dropped.values()))), highlight=False)
        return entry

    def attempt_all(
        self, case: Case, inputs: LayerInputs, truth: Truth, dropped: dict[str, str]
    ) -> dict[str, tuple[Attempt, Turn]] | None:
        """Attempts and turns of all candidates that are right; `dropped` names those to leave out and gets those that
        fail. None where a failure cost the arena and with it the graphs captured so far: to be called again."""
        ready: dict[str, tuple[Attempt, Turn]] = {}
        for spec in self.options.specs or candidates(case):
            if spec in dropped:
                continue
            try:
                provider = together(self.world, functools.partial(self.provider, spec))
                attempt = Attempt(provider, case, inputs, truth, self.clock)
                ready[spec] = attempt, attempt.turn(attempt.timed(attempt.prepared(), self.options.mode))
            except Dropped as reason:
                self.drop(spec, case, reason, dropped)
                if reason.outcome.kind != "declined" and recovered(self.session):
                    return None
        return ready

    def drop(self, spec: str, case: Case, reason: Dropped, dropped: dict[str, str]) -> None:
        dropped[spec] = reason.outcome.kind
        self.refused[spec] = f"{reason.outcome.kind}: {reason.outcome.reason} (M={case.M}, {case.layer.label})"

    def provider(self, spec: str) -> Ours:
        """CPU ranks, which the tuner's own tests use, have plans only where the kernels are interpreted."""
        backend = "interp" if isinstance(self.clock, CpuClock) else None
        return Ours(f"ours:{spec}", self.session, spec, cpu_backend=backend)

    def times(self, turns: dict[str, Turn], effort: Effort) -> dict[str, float]:
        """Microseconds a call of each spec that ran to the end."""
        measured = {}
        for spec, times, failure in measure(turns, self.clock, effort):
            if times is None:
                self.refused[spec] = f"failed: {failure}"
            else:
                measured[spec] = times.us
        return measured

    def save(self, meta: dict) -> None:
        if self.world.rank == 0 and self.entries:
            self.options.table_path.parent.mkdir(parents=True, exist_ok=True)
            dispatch_table.save(self.options.table_path, meta, self.entries.values())


def problem_key(case: Case) -> tuple:
    """(op, N, K, dtype, M) as the table has them: an all-reduce is a row of M * N elements."""
    if case.op == ALL_REDUCE:
        return case.op, case.M * case.N, 0, case.dtype, 1
    return case.op, case.N, case.K_local, case.dtype, case.M


def finalists(rough: dict[str, float]) -> list[str]:
    """Specs to time again: the fastest of each plan name, since the best may be unable to run elsewhere, and all that
    are near the best."""
    ordered = sorted(rough, key=lambda spec: rough[spec])
    best_of_name: dict[str, str] = {}
    for spec in ordered:
        best_of_name.setdefault(spec.partition(":")[0], spec)
    near = [spec for spec in ordered if rough[spec] <= NEAR * rough[ordered[0]]][:FINALISTS]
    return list(dict.fromkeys([*near, *best_of_name.values()]))


def entry_of(case: Case, times: dict[str, float]) -> dispatch_table.Entry | None:
    plans = []
    for spec, us in sorted(times.items(), key=lambda item: item[1]):
        plan = dispatch_problem.Plan.parse(spec)
        plans.append(dispatch_problem.Plan(plan.name, plan.params, us=round(us, 2)))
    op, N, K, dtype, M = problem_key(case)
    return dispatch_table.Entry(op, N, K, dtype, M, tuple(plans)) if plans else None


def _line(case: Case, entry: dispatch_table.Entry | None, tried: int, dropped: Counter[str]) -> str:
    left_out = ", ".join(f"{count} {kind}" for kind, count in dropped.items()) or "none dropped"
    what = f"{case.op} {case.layer.label} M={case.M}"
    if entry is None:
        return f"{what}: no candidate ran ({left_out})"
    shown = ", ".join(f"{plan} {plan.us:.1f}" for plan in entry.plans[:3])
    return f"{what}: {shown} us ({tried} timed, {left_out})"


def work(state: Tuning) -> Iterator[tuple[Case, LayerInputs, Truth] | None]:
    """Every case with its inputs and truth; None for one that an existing table answers. All ranks alike."""
    options = state.options
    for layer in options.layers:
        for kind, ops in by_inputs(options.ops):
            todo = {
                M: [case for case in cases(ops, layer, [M], options.dtype, state.world.world_size)]
                for M in options.grid
            }
            inputs = None
            for M, of_M in todo.items():
                truth = None
                for case in of_M:
                    if not state.wanted(case):
                        yield None
                        continue
                    inputs = inputs or kind(layer, max(options.grid), DTYPES[options.dtype], state.world, options.seed)
                    truth = truth or Truth(inputs, M)
                    yield case, inputs, truth


def tune(world: World, options: TuneOptions) -> int:
    """The whole tuning on one rank. Exit code 0 when every case that was reached has an entry."""
    cuda = world.device.type == "cuda"
    state = Tuning(
        world,
        options,
        CudaClock(world) if cuda else CpuClock(world),
        Session(world, max(options.grid), max(layer.N for layer in options.layers), DTYPES[options.dtype]),
        report.console() if world.rank == 0 else Console(quiet=True),
    )
    meta = describe_run(world, None, "not measured", options.command, options.commit)
    meta = {"device": meta["gpu"] if cuda else "cpu", **meta}
    if options.merge:
        found = world.from_rank_0(existing(options.table_path, meta) if world.rank == 0 else None)
        if isinstance(found, InvalidInput):
            raise found
        state.entries, meta["earlier"] = found
    budget, reached, empty = TimeBudget(world, options.budget_s), 0, 0
    total = len(options.layers) * len(options.ops) * len(options.grid)
    with progress_bar(state.console) as progress:
        task = progress.add_task("tuning", total=total)
        for item in work(state):
            if budget.spent():
                state.console.print(f"the budget of {options.budget_s:g} s is spent; go on with --merge")
                break
            if item is not None:
                entry = state.case(*item)
                if entry is None:
                    empty += 1
                else:
                    state.entries[problem_key(item[0])] = entry
                    state.save(meta)
                release(world)
            reached += 1
            progress.advance(task)
    for spec, reason in state.refused.items():
        state.console.print(escape(f"  dropped {spec}: {reason}"), highlight=False)
    state.console.print(f"{reached} of {total} cases; table: {options.table_path}")
    close(state.session)
    return 1 if empty else 0


def existing(path: pathlib.Path, meta: dict) -> tuple[dict[tuple, dispatch_table.Entry], list[dict]] | InvalidInput:
    """For a run that `meta` describes, to go on from a table: its entries by problem, and what described the runs that
    made them, oldest first. An error, for all ranks to raise, where the table is of another machine."""
    if not path.exists():
        return {}, []
    text = path.read_text(encoding="utf-8")
    try:
        table = dispatch_table.parse(text, str(path))
    except InvalidInput as error:
        return error
    theirs, ours = (table.device, table.world_size), (meta["device"], meta["world_size"])
    if theirs != ours:
        return InvalidInput(
            f"--merge: {path} was measured on {theirs[0]!r} with {theirs[1]} ranks, but this is {ours[0]!r} with "
            f"{ours[1]}. Name another file in --out."
        )
    described = json.loads(text)["meta"]
    earlier = described.pop("earlier", [])
    return {(each.op, each.N, each.K, each.dtype, each.M): each for each in table.entries}, [*earlier, described]
