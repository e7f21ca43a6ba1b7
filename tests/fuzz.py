"""Random calls against float64: op, plan, sizes, dtype, strides, offset, bias, all from a seed; ranks in lockstep.

    calls = [fuzz.case(seed, world_size, plans) for seed in range(100)]       # equal on every rank
    verdict = fuzz.run(calls, rank, device)                                   # None, or what is wrong; likewise
    fuzz.report(calls, verdict, lambda calls: fuzz.run(calls, rank, device))  # shrunk to one line for a shell

Calls given together follow each other without a pause, so one may disturb the next. Inputs are drawn on the device, for
speed: every rank can make every rank's, and compares its own result. By hand, on CPU ranks:

    python -m tests.fuzz --world-size 3 --backend interp --seed 0 --count 100
    python -m tests.fuzz --world-size 3 --backend interp 'op=gemm_all_reduce M=3 N=8 K=16 dtype=bfloat16 plan=one_shot'
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import shlex
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests import tolerance
from tests.cases import BF16, FP16, Case
from tests.ops.calls import CPU_PLANS, LAYOUTS, Call, cpu_plans, group_name, invoke, laid_out, out_shape
from tests.ops.judge import allowed
from tests.truth import Truth
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.ops import execute, launches


@dataclasses.dataclass(frozen=True)
class Domain:
    """The sizes that are drawn from, and the capacity of the arena, which some M exceed."""

    M: tuple[int, ...]
    N: tuple[int, ...]
    K: tuple[int, ...]
    elements: tuple[int, ...]  # of all_reduce
    max_M: int
    max_N: int


SMALL = Domain(
    M=(0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 97, 130),
    N=(1, 5, 8, 16, 24, 31, 32, 33, 72, 100, 130),
    K=(1, 3, 8, 16, 24, 48, 64, 100),
    elements=(0, 1, 7, 8, 15, 100, 1000, 1024, 4099, 9000, 20_001),
    max_M=64,
    max_N=136,
)
# Sizes of models and what lies beside them. Kernels are compiled anew where another of N, K divides by 16, or does not.
MODELS = Domain(
    M=(0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 255, 513, 1000, 1024, 2047, 2048, 4099, 8192, 8193),
    N=(8, 16, 72, 128, 200, 1000, 1024, 1032, 4096, 5120, 8192),
    K=(16, 48, 64, 100, 1024, 3696, 4096, 14784),
    elements=(0, 1, 7, 8, 1000, 4099, 8192, 65_537, 131_072, 524_288, 1_000_003, 8_388_608, 33_554_433),
    max_M=8192,
    max_N=8192,
)


# --- from a seed to a call


def case(seed: int, world_size: int, plans: Callable[[Call], Sequence[str | None]], domain: Domain = SMALL) -> Call:
    """The call of a seed; its inputs follow from the call. plans: those that can run a call, equal on all ranks."""
    choose = random.Random(f"{seed} {world_size}")
    op = choose.choice(list(CPU_PLANS))
    dtype = choose.choice([BF16, FP16])
    if op == "all_reduce":
        case = Case(1, choose.choice(domain.elements), 0, dtype, world_size, "")
    else:
        case = Case(*(choose.choice(some) for some in (domain.M, domain.N, domain.K)), dtype, world_size, "")
    layout = choose.choice([*LAYOUTS, "contiguous", "contiguous"])
    call = Call(
        op,
        case,
        number=seed,
        bias=op != "all_reduce" and choose.random() < 0.4,
        into_out=choose.random() < 0.3,
        layout=layout,
        layout_b=choose.choice([None, *LAYOUTS]) if op != "all_reduce" else None,
        leading=_leading(choose, op, case) if layout == "contiguous" else None,
    )
    return dataclasses.replace(call, plan=choose.choice([None, *plans(call)]))


def _leading(choose: random.Random, op: str, case: Case) -> tuple[int, ...] | None:
    rows = case.N if op == "all_reduce" else case.M
    factor = next((factor for factor in (5, 3, 2) if rows % factor == 0), 1)
    return choose.choice([None, (rows, 1), (factor, rows // factor), (1, factor, rows // factor)])


# --- a call as text


def write(call: Call) -> str:
    """One line without quotes; `read` makes the call again."""
    case, default = call.case, Call(call.op, call.case)
    words = [f"op={call.op}", f"M={case.M}", f"N={case.N}", f"K={case.K}", f"dtype={str(case.dtype).split('.')[1]}"]
    for field in ("number", "bias", "into_out", "plan", "layout", "layout_b", "leading"):
        value = getattr(call, field)
        if value != getattr(default, field):
            text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"{field}={text.replace(' ', '_')}")
    return " ".join(words)


def read(line: str, world_size: int) -> Call:
    """The call that `write` wrote."""
    words = dict(word.split("=", 1) for word in line.split())
    sizes = (int(words.pop(name)) for name in "MNK")
    case = Case(*sizes, getattr(torch, words.pop("dtype")), world_size, "")
    as_value = {
        "number": int,
        "bias": lambda text: text == "True",
        "into_out": lambda text: text == "True",
        "layout": lambda text: text.replace("_", " "),
        "layout_b": lambda text: text.replace("_", " "),
        "leading": lambda text: tuple(map(int, text.split("x"))),
        "plan": str,
    }
    return Call(words.pop("op"), case, **{name: as_value[name](text) for name, text in words.items()})


# --- one rank


def run(calls: Sequence[Call], rank: int, device: str = "cpu") -> str | None:
    """Make the calls in a row and compare each; None, or the first thing that is wrong. All ranks return the same.

    The group has an arena. Where it fails in a call, it is made anew, on every rank.
    """
    prepared = [_inputs(call, rank, device) for call in calls]
    dist.barrier()
    text, results = "", []
    try:
        for call, tensors in zip(calls, prepared, strict=True):
            with _forced(call):
                results.append(invoke(call, tensors, rank))
        if device != "cpu":
            torch.cuda.synchronize()
        tpo.check()
    except Exception:
        text = f"{write(calls[len(results)]) if len(results) < len(calls) else 'a call'}\n{traceback.format_exc()}"
    texts = _everyone(text)
    if any(texts):
        _begin_again()
        return _first(texts)
    for i, (call, result) in enumerate(zip(calls, results, strict=True)):
        found = _compare(call, result, rank, device)
        if found is not None:
            return f"call {i} of {len(calls)}: {found}"
    return None


def _forced(call: Call) -> contextlib.AbstractContextManager:
    return tpo.force_plan(call.plan) if call.plan else contextlib.nullcontext()


def _inputs(call: Call, rank: int, device: str) -> list[torch.Tensor]:
    tensors = laid_out(call, _drawn(call, rank, device))
    if device == "cpu" and call.case.dtype == BF16 and _plan_that_ran(call)[0] not in ("one_shot", "two_shot", "push"):
        # torch multiplies, and its oneDNN (torch 2.13, bf16, K no multiple of 32) reads past the end of a's rows: what
        # lies there times zero, which NaN would spread.
        for x in tensors:
            torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).nan_to_num_(0.0)
    return tensors


def _drawn(call: Call, rank: int, device: str) -> list[torch.Tensor]:
    """a (M, K), b (N, K) and perhaps bias (N,), the same on every rank; or x (N,). Of the scale 2**-4 to 2**4."""
    case = call.case
    shape = f"{call.op} {case.M} {case.N} {case.K} {case.dtype} {case.world_size} {call.number}"

    def normal(of: int, *sizes: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{shape} {of} {len(sizes)} {sizes}".encode()))
        return torch.randn(sizes, generator=generator, device=device)

    scale = 2.0 ** (call.number % 9 - 4)
    if call.op == "all_reduce":
        return [(normal(rank, case.N) * scale).to(case.dtype)]
    a = normal(rank, case.M, case.K) * scale
    b = normal(100 + rank, case.N, case.K) / max(case.K, 1) ** 0.5
    bias = [normal(-1, case.N).to(case.dtype)] if call.bias else []
    return [a.to(case.dtype), b.to(case.dtype), *bias]


def _truth(call: Call, device: str) -> Truth:
    """(M, N), from the rounded inputs of all ranks, with the bias."""
    case, partials, magnitude = call.case, [], 0.0
    for rank in range(case.world_size):
        first, *others = (x.double() for x in _drawn(call, rank, device))
        if call.op == "all_reduce":
            partials.append(first.view(1, -1))
            magnitude = magnitude + first.abs().view(1, -1)
        else:
            partials.append(first @ others[0].T)
            magnitude = magnitude + first.abs() @ others[0].abs().T
    stacked = torch.stack(partials)
    ref = stacked.sum(0) + others[1] if call.bias else stacked.sum(0)
    return Truth(ref, stacked, magnitude, case.dtype, case.K)


def _compare(call: Call, result: torch.Tensor, rank: int, device: str) -> str | None:
    """The result with float64, and with the other ranks' by bits; the same answer on all ranks."""
    case, text = call.case, ""
    try:
        assert result.dtype == case.dtype and result.shape == out_shape(call, rank), f"{result.dtype} {result.shape}"
        assert result.is_contiguous()
        wanted, bound = _allowed(call, device)
        rows = case.rows_of(rank) if call.op == "gemm_reduce_scatter" else slice(None)
        out = result.reshape(wanted.ref[rows].shape)
        tolerance.check(out, wanted.rows(rows), bound[rows], "out")
    except AssertionError as error:
        text = str(error)
    bits = None if call.op == "gemm_reduce_scatter" or text else zlib.crc32(_bytes(result))
    texts, hashes = zip(*_everyone((text, bits)), strict=True)
    if any(texts):
        return f"{write(call)}\n{_first(texts)}"
    if len(set(hashes)) > 1:
        return f"{write(call)}\nranks hold different bits: CRC-32 {hashes}"
    return None


def _allowed(call: Call, device: str) -> tuple[Truth, torch.Tensor]:
    wanted, case = _truth(call, device), call.case
    bias = _drawn(call, 0, device)[2] if call.bias else torch.empty(0)
    plan, rows = _plan_that_ran(call)
    if not wanted.ref.numel() or plan == "":
        return wanted, torch.zeros_like(wanted.ref)
    return allowed(call, plan, wanted, bias.to(device), rows if case.M > rows else None)


def _plan_that_ran(call: Call) -> tuple[str, int]:
    """Its name, and the rows of one launch of it; "" where nothing was launched."""
    case, arena = call.case, arenas.get(group_name())
    if not case.M or not case.N or (call.op != "all_reduce" and not case.K):
        return "", 0
    with _forced(call):
        plan, _ = execute.plan_for(arena, call.op, case.M, case.N, case.K, case.dtype, call.bias)
    fused = call.op == "gemm_all_reduce" and plan.name in ("two_shot", "chunked")
    return plan.name, launches.rows_that_fit(arena, plan, case.N, case.dtype.itemsize) if fused else case.M


def _bytes(result: torch.Tensor) -> bytes:
    return result.contiguous().view(-1).view(torch.int16).cpu().numpy().tobytes()


def _everyone(mine):
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, mine)
    return answers


def _first(texts: Sequence[str]) -> str:
    return "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)


def _begin_again() -> None:
    room = arenas.get(group_name()).layout
    tpo.close()
    tpo.init(max_M=room.max_M, max_N=room.max_N)


# --- from a failure to one line


def shrink(calls: Sequence[Call], fails: Callable[[list[Call]], bool], tries: int = 200) -> list[Call]:
    """The fewest and simplest calls found in `tries` attempts that still fail; ranks that all shrink stay in step."""
    kept = list(calls)
    left = iter(range(tries))
    progress = True
    while progress:
        progress = False
        for simpler in _fewer(kept):
            if next(left, None) is None:
                return kept
            if fails(simpler):
                kept, progress = simpler, True
                break
    return kept


def _fewer(calls: list[Call]) -> Iterator[list[Call]]:
    """Half of the calls, one call less, one call simpler."""
    if len(calls) > 1:
        half = len(calls) // 2
        yield calls[:half]
        yield calls[half:]
        for i in range(len(calls)):
            yield calls[:i] + calls[i + 1 :]
    for i, call in enumerate(calls):
        for simpler in _simpler(call):
            yield [*calls[:i], simpler, *calls[i + 1 :]]


def _simpler(call: Call) -> Iterator[Call]:
    """The call with one field less to look at."""
    default, case = Call(call.op, call.case), call.case
    for field in ("leading", "layout_b", "layout", "bias", "into_out"):
        if getattr(call, field) != getattr(default, field):
            yield dataclasses.replace(call, **{field: getattr(default, field)})
    if call.leading is not None:
        return  # sizes that fit it
    for name in "MNK":
        size = getattr(case, name)
        for smaller in sorted({1, 2, 8, 16, 32, size // 2, size - 1}):
            if 0 < smaller < size and not (call.op == "all_reduce" and name != "N"):
                yield dataclasses.replace(call, case=dataclasses.replace(case, **{name: smaller}))
    if case.dtype != BF16:
        yield dataclasses.replace(call, case=dataclasses.replace(case, dtype=BF16))


def report(calls: Sequence[Call], verdict: str, again: Callable[[list[Call]], str | None]) -> str:
    """What was wrong, and the shortest command that shows it. again: `run` with the rank and device of the caller."""
    shortest = shrink(calls, lambda some: again(some) is not None)
    lines = " ".join(shlex.quote(write(call)) for call in shortest)
    return f"{verdict}\nshrunk: python -m tests.fuzz --world-size {calls[0].case.world_size} {lines}"


# --- CPU ranks


def on_cpu(rank: int, world_size: int, backend: str, calls: Sequence[Call], together: int = 10) -> str | None:
    """What a rank of the pool does: the calls, `together` at a time; None, or the report of the first that fails."""
    info = tpo.init(max_M=SMALL.max_M, max_N=SMALL.max_N)
    if (info.max_M, info.max_N) != (SMALL.max_M, SMALL.max_N):
        tpo.close()
        tpo.init(max_M=SMALL.max_M, max_N=SMALL.max_N)
    with tpo.cpu_backend(backend), torch.inference_mode():
        for start in range(0, len(calls), together):
            row = list(calls[start : start + together])
            verdict = run(row, rank)
            if verdict is not None:
                return report(row, verdict, lambda some: run(some, rank)) + f" --backend {backend}"
    return None


def cpu_case(seed: int, world_size: int, backend: str) -> Call:
    """The call of a seed for CPU ranks."""
    named = backend == "interp" and world_size > 1
    return case(seed, world_size, lambda call: cpu_plans(call.op, world_size) if named else [])


def main() -> None:
    from tests.dist import RankPool

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random calls on CPU ranks.")
    parser.add_argument("calls", nargs="*", help="calls as a failure prints them; none: those of the seeds")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--backend", choices=("interp", "ref"), default="interp")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--count", type=int, default=100)
    chosen = parser.parse_args()
    W, seeds = chosen.world_size, range(chosen.seed, chosen.seed + chosen.count)
    calls = [read(line, W) for line in chosen.calls] or [cpu_case(seed, W, chosen.backend) for seed in seeds]
    if not chosen.calls:
        print(f"seeds {seeds.start} to {seeds.stop - 1}")
    pool = RankPool(W)
    verdict = pool.run("tests.fuzz:on_cpu", chosen.backend, calls, timeout=30 + 10 * len(calls))[0]
    pool.close()
    print(verdict or f"{len(calls)} calls, nothing wrong")
    raise SystemExit(verdict is not None)


if __name__ == "__main__":
    main()
