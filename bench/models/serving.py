"""`serving`, on each rank: one workload of requests, continuously batched, by all arms in turns.

Every arm has a captured decode step over all slots, and a captured prefill of one prompt for each length that occurs,
rounded up (`padded`). All arms use the same cache and inputs, and run the same loop (batching.py); the host reads each
token before the next step, as a server that streams does. Times are those of the slowest rank, token by token; the
fields are those of SGLang's serving benchmark, the median over rounds (serving_report.py, docs/models.md).
"""

from __future__ import annotations

import functools
import math
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..attempts import Dropped, Outcome, together
from ..launch import TimeBudget, World
from ..runner import release
from .arms import ARMS, CEILING, NCCL
from .batching import Request, Served, Workload, serve
from .checked import checked_pass
from .serving_report import median_of, slowest, summary, write_rows
from .session import ModelOptions, ModelSession, opened
from .slots import SlotCache
from .steps import Decode, Prefill, Recorder, Step

WRONG_RESULT, ARM_FAILED = 1, 2  # exit codes
PADDED_LENGTHS = 8  # at most so many graphs of prefill an arm
ALIGNED_TOKENS = 16


@dataclass(frozen=True)
class ServingOptions:
    """What the command line asks of `serving`."""

    model: ModelOptions
    workload: Workload
    rounds: int = 1
    json_path: pathlib.Path | None = None


def padded(tokens: int, longest: int) -> int:
    """The length of the prefill that a prompt of `tokens` gets."""
    step = -(-longest // PADDED_LENGTHS)
    step = -(-step // ALIGNED_TOKENS) * ALIGNED_TOKENS
    return -(-tokens // step) * step


class RankTimer:
    """Wall time since all ranks were ready. Where requests come one by one, rank 0 says how many have."""

    def __init__(self, world: World, at_once: bool) -> None:
        self.world, self.at_once = world, at_once
        world.barrier()
        self.began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.began

    def arrived(self, waiting: Sequence[Request]) -> int:
        if self.at_once or not waiting:
            return len(waiting)
        now = self.now()
        return self.world.from_rank_0(sum(request.arrival_s <= now for request in waiting))

    def wait_for(self, request: Request) -> None:
        time.sleep(max(0.0, request.arrival_s - self.now()))


class ArmEngine:
    """The steps of one arm. `prefills`: by padded length, the inputs, which arms share, and the step."""

    def __init__(
        self, session: ModelSession, cache: SlotCache, prefills: dict[int, tuple[Prefill, Step]], decode: Step
    ) -> None:
        self.session, self.cache, self.prefills, self._decode = session, cache, prefills, decode
        self.slots = cache.slots
        self._prompts: dict[int, Tensor] = {}

    def prompts(self, requests: Sequence[Request]) -> None:
        """Makes the tokens of the requests, before any time is taken."""
        self._prompts = {each.number: self.session.prompt(1, each.input_len, each.number) for each in requests}

    def prefill(self, slot: int, request: Request) -> int:
        inputs, step = self.prefills[min(length for length in self.prefills if length >= request.input_len)]
        inputs.ids[:, : request.input_len] = self._prompts[request.number]
        inputs.filling.fill_(slot)
        inputs.last.fill_(request.input_len - 1)
        step()
        return int(self.cache.tokens[slot])

    def decode(self) -> list[int]:
        self._decode()
        return self.cache.tokens.tolist()


class Serving:
    """One rank's state of the run."""

    def __init__(self, session: ModelSession, options: ServingOptions) -> None:
        self.session, self.options = session, options
        self.requests = options.workload.requests(session.options.seed)
        self.engines: dict[str, ArmEngine] = {}
        self.dropped: dict[str, Outcome] = {}
        self._make_engines()

    def _make_engines(self) -> None:
        """Checks every step of every arm, and captures it. An arm that is wrong, or cannot, is dropped with why."""
        session, workload = self.session, self.options.workload
        world = session.world
        lengths = sorted({padded(request.input_len, workload.input_len) for request in self.requests})
        room = lengths[-1] + workload.output_len
        sizes = session.options.sizes
        cache = SlotCache(sizes, world.world_size, workload.max_concurrency, room, session.dtype, world.device)
        inputs = {length: Prefill(cache, 1, length) for length in lengths}
        decode = Decode(cache)
        for length, prefill in inputs.items():
            prefill.ids.copy_(session.prompt(1, length))
        recorder = Recorder(session.clock)
        for arm in ARMS:
            try:
                for prefill in inputs.values():
                    checked_pass(session.arms, arm, session.clock, prefill, decode)
                capture = functools.partial(self._captured, arm, recorder, cache, inputs, decode)
                self.engines[arm] = together(world, capture)
            except Dropped as dropped:
                self.dropped[arm] = dropped.outcome

    def _captured(
        self, arm: str, recorder: Recorder, cache: SlotCache, inputs: dict[int, Prefill], decode: Decode
    ) -> ArmEngine:
        model = self.session.arms.model
        with self.session.arms.active(arm):
            steps = {length: (each, recorder.step(functools.partial(each, model))) for length, each in inputs.items()}
            return ArmEngine(self.session, cache, steps, recorder.step(functools.partial(decode, model)))

    def round(self, arm: str) -> list[Served]:
        """The whole workload by one arm. Collective; Dropped where it failed on any rank."""
        session, engine = self.session, self.engines[arm]

        def served() -> list[Served]:
            engine.prompts(self.requests)
            timer = RankTimer(session.world, math.isinf(self.options.workload.request_rate))
            with session.arms.active(arm):
                log = serve(self.requests, engine, timer)
            session.clock.idle()
            session.arms.check()
            return log

        return slowest(session.world.gather(together(session.world, served)))


@dataclass
class Rounds:
    """What came of an arm. same_tokens: requests whose first token is that of nccl in the same round, by round."""

    summaries: list[dict[str, Any]]
    same_tokens: list[int | None]


def run(world: World, options: ServingOptions) -> int:
    """All rounds on one rank; the exit code is the same on all."""
    budget = TimeBudget(world, options.model.budget_s)
    with opened(world, options.model) as session:
        state = Serving(session, options)
        measured = {arm: Rounds([], []) for arm in ARMS}
        for _ in range(options.rounds):
            if budget.spent():
                session.console.print("The budget was spent before the last round.")
                break
            of_nccl: list[int] = []
            for arm in list(state.engines):
                try:
                    log = state.round(arm)
                except Dropped as dropped:
                    state.dropped[arm] = dropped.outcome
                    del state.engines[arm]
                    continue
                tokens = [each.tokens[0] for each in log]
                of_nccl = tokens if arm == NCCL else of_nccl
                measured[arm].summaries.append(summary(log))
                same = sum(a == b for a, b in zip(tokens, of_nccl, strict=True)) if of_nccl else None
                measured[arm].same_tokens.append(same)
                session.console.print(spoken(arm, measured[arm].summaries[-1]), markup=False, highlight=False)
        for arm, outcome in state.dropped.items():
            session.console.print(f"{arm}: no times: {outcome.reason}", markup=False, highlight=False)
        made = rows(state, measured)
        if world.rank == 0 and options.json_path is not None and made:
            write_rows(made, options.json_path)
            session.console.print(f"Written to {options.json_path}")
        kinds = {outcome.kind for outcome in state.dropped.values()}
        state.engines.clear()
        release(world)
        return WRONG_RESULT if "wrong" in kinds else ARM_FAILED if kinds else 0


def spoken(arm: str, fields: dict[str, Any]) -> str:
    """A round of an arm in a line."""
    medians = ", ".join(f"{name} {fields[f'median_{name}_ms']:.3f}" for name in ("ttft", "tpot", "itl", "e2e_latency"))
    return (
        f"{arm}: {fields['duration']:.2f} s, {fields['output_throughput']:.1f} output tokens/s, "
        f"{fields['total_throughput']:.1f} tokens/s; median ms: {medians}"
    )


def rows(state: Serving, measured: dict[str, Rounds]) -> list[dict[str, Any]]:
    """One row an arm that was measured or dropped: the workload, the medians, and what the run was."""
    workload, session = state.options.workload, state.session
    asked = {
        "backend": "transformers",
        "dataset_name": "random",
        "request_rate": "inf" if math.isinf(workload.request_rate) else workload.request_rate,
        "max_concurrency": workload.max_concurrency,
        "random_input_len": workload.input_len,
        "random_output_len": workload.output_len,
        "random_range_ratio": workload.range_ratio,
        "num_prompts": workload.num_prompts,
        "seed": session.options.seed,
    }
    name = session.options.run_name or session.options.sizes.name
    made = []
    for arm in ARMS:
        outcome, of_arm = state.dropped.get(arm), measured[arm]
        if outcome is None and not of_arm.summaries:
            continue
        row: dict[str, Any] = {"run_name": name, "arm": arm, "rounds": len(of_arm.summaries), **asked}
        if outcome is None:
            row |= median_of(of_arm.summaries)
            row |= {"correct": None if arm == CEILING else True, "reason": None, "same_tokens": of_arm.same_tokens}
        else:
            row |= {"correct": False if outcome.kind == "wrong" else None, "reason": outcome.reason}
        made.append(row | session.about)
    return made
