"""`one-batch`, on each rank: prefill and decode of one batch, in arms that take turns.

A case is a batch of equally long prompts and the number of tokens to make. Each arm first runs it eagerly, with every
row-parallel sum checked (checked.py); an arm that is wrong has no times. Then prefill and a decode step are captured,
each in one graph, and sampled in turns: the maximum over ranks of each sample, then the median (../timing.py).
One line of JSON a case and arm, with the keys of SGLang's one_batch benchmark; docs/models.md has them all.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..attempts import Dropped, Outcome, together
from ..launch import TimeBudget, World
from ..runner import release
from ..timing import Effort, Times, Turn, measure
from .arms import ARMS, CEILING, NCCL
from .checked import checked_pass
from .grid import BatchCase
from .session import ModelOptions, ModelSession, opened
from .slots import SlotCache
from .steps import Decode, Prefill, Recorder, Step, StepTimed

WRONG_RESULT, ARM_FAILED = 1, 2  # exit codes
STEPS_A_SAMPLE = 8  # of decode; fewer where fewer are asked for
TIMED_MS = {"cuda": Effort(target_ms=1500.0, least=3, most=30), "cpu": Effort(target_ms=20.0, least=2, most=3)}


@dataclass(frozen=True)
class OneBatchOptions:
    """What the command line asks of `one-batch`. Lines are added to result_path; effort None: by device."""

    model: ModelOptions
    cases: tuple[BatchCase, ...]
    result_path: pathlib.Path | None = None
    effort: Effort | None = None


@dataclass
class Measured:
    """What came of an arm in a case. same_tokens: how many of the batch have the first token of nccl's eager pass."""

    prefill: Times | None = None
    same_tokens: int | None = None
    decode: Times | None = None
    correct: bool | None = None
    reason: str | None = None


class OneBatch:
    """One rank's state of the run. `prefills`: (times, same_tokens) by batch and input_len, whatever the output_len."""

    def __init__(self, session: ModelSession, options: OneBatchOptions) -> None:
        self.session, self.options = session, options
        self.effort = options.effort or TIMED_MS[session.world.device.type]
        self.prefills: dict[tuple[int, int], dict[str, tuple[Times, int | None]]] = {}
        self.wrong = self.failed = 0

    def case(self, case: BatchCase) -> dict[str, Measured]:
        """Checks and times every arm. Collective."""
        session = self.session
        sizes, world = session.options.sizes, session.world
        length = case.input_len + case.output_len
        cache = SlotCache(sizes, world.world_size, case.batch, length, session.dtype, world.device)
        prefill, decode = Prefill(cache, case.batch, case.input_len), Decode(cache)
        prefill.ids.copy_(session.prompt(case.batch, case.input_len))
        recorder = Recorder(session.clock)
        found = {arm: Measured() for arm in ARMS}
        prefills: dict[str, Turn] = {}
        decodes: dict[str, Turn] = {}
        known = self.prefills.setdefault((case.batch, case.input_len), {})
        tokens: dict[str, Tensor] = {}
        for arm, measured in found.items():
            try:
                tokens[arm] = checked_pass(
                    session.arms, arm, session.clock, prefill, decode if case.decode_steps else None
                )
                measured.correct = None if arm == CEILING else True
                if arm not in known:
                    prefills[arm] = self._turn(arm, recorder, lambda: prefill(session.arms.model), lambda: None, 1)
                if case.decode_steps:
                    steps = min(case.decode_steps, STEPS_A_SAMPLE)
                    first = lambda: cache.positions.fill_(case.input_len)
                    decodes[arm] = self._turn(arm, recorder, lambda: decode(session.arms.model), first, steps)
            except Dropped as dropped:
                prefills.pop(arm, None)
                self._drop(measured, dropped.outcome)
        for turns, field in ((prefills, "prefill"), (decodes, "decode")):
            for arm, times, failure in measure(turns, session.clock, self.effort):
                setattr(found[arm], field, times)
                if times is None:
                    self._drop(found[arm], Outcome("failed", failure or "no time"))
        for arm, turn in prefills.items():
            if (times := found[arm].prefill) is not None:
                turn.sample(session.clock)  # once more, so that the tokens are this arm's
                known[arm] = times, int((cache.tokens == tokens[NCCL]).sum()) if NCCL in tokens else None
        for arm, measured in found.items():
            if measured.reason is None:
                measured.prefill, measured.same_tokens = known[arm]
            else:
                measured.prefill = measured.decode = None
        return found

    def _turn(self, arm: str, recorder: Recorder, call: Step, before: Step, steps: int) -> Turn:
        arms = self.session.arms

        def step() -> Step:
            with arms.active(arm):
                return recorder.step(call)

        timed = StepTimed(self.session.clock, together(self.session.world, step), before, steps)
        return Turn(timed, lambda: arms.active(arm), arms.check)

    def _drop(self, measured: Measured, outcome: Outcome) -> None:
        measured.reason = outcome.reason
        measured.correct = False if outcome.kind == "wrong" else None
        self.wrong += outcome.kind == "wrong"
        self.failed += outcome.kind != "wrong"


def line(case: BatchCase, arm: str, measured: Measured, run_name: str) -> dict[str, Any]:
    """SGLang's keys, in its order and units (seconds, tokens a second), then ours. What has no time lacks its keys."""
    fields: dict[str, Any] = {
        "run_name": run_name,
        "batch_size": case.batch,
        "input_len": case.input_len,
        "output_len": case.output_len,
    }
    if measured.prefill is not None:
        prefill = measured.prefill.us / 1e6
        total = prefill
        fields |= {"prefill_latency": prefill, "prefill_throughput": case.batch * case.input_len / prefill}
        if measured.decode is not None:
            decode = measured.decode.us / 1e6
            total += case.decode_steps * decode
            fields |= {"median_decode_latency": decode, "median_decode_throughput": case.batch / decode}
        tokens = case.batch * (case.input_len + case.output_len)
        fields |= {"total_latency": total, "overall_throughput": tokens / total}
    fields |= {"arm": arm, "correct": measured.correct, "reason": measured.reason}
    fields["same_tokens"] = measured.same_tokens
    for what, times in (("prefill", measured.prefill), ("decode", measured.decode)):
        if times is not None:
            fields |= {f"{what}_p10": times.p10_us / 1e6, f"{what}_p90": times.p90_us / 1e6}
            fields[f"{what}_samples"] = times.samples
    return fields


def spoken(case: BatchCase, found: dict[str, Measured]) -> str:
    """A case in a line or two: milliseconds of each arm, and what it takes of the first one's time."""
    parts = [case.label]
    for what in ("prefill", "decode"):
        times = {arm: getattr(measured, what) for arm, measured in found.items()}
        base = times[NCCL]
        texts = []
        for arm, each in times.items():
            if each is not None:
                beside = f" ({100 * (each.us / base.us - 1):+.1f} %)" if base and arm != NCCL else ""
                texts.append(f"{arm} {each.us / 1e3:.3f}{beside}")
        if texts:
            parts.append(f"{what} ms: " + ", ".join(texts))
    parts += [f"{arm}: no times: {measured.reason}" for arm, measured in found.items() if measured.reason]
    return "   ".join(parts)


def run(world: World, options: OneBatchOptions) -> int:
    """All cases on one rank; the exit code is the same on all."""
    budget = TimeBudget(world, options.model.budget_s)
    with opened(world, options.model) as session:
        state = OneBatch(session, options)
        done = 0
        for case in options.cases:
            if budget.spent():
                break
            found = state.case(case)
            release(world)
            done += 1
            session.console.print(spoken(case, found), markup=False, highlight=False)
            if world.rank == 0 and options.result_path is not None:
                name = options.model.run_name or options.model.sizes.name
                write([line(case, arm, each, name) | session.about for arm, each in found.items()], options.result_path)
        if done < len(options.cases):
            session.console.print(f"{len(options.cases) - done} cases were not measured: the budget was spent.")
        if done and options.result_path is not None:
            session.console.print(f"Added to {options.result_path}")
        return WRONG_RESULT if state.wrong else ARM_FAILED if state.failed else 0


def write(lines: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Adds lines to a file of JSON lines, after every case, so that a run that is stopped keeps what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in lines)
