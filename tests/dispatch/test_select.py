"""Choosing: which plan for which problem, on what, and why not another."""

import ast
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import tp_overlap_kernels.dispatch
from tp_overlap_kernels.dispatch.problem import OPS, PLAN_NAMES, Plan, Problem, Topology
from tp_overlap_kernels.dispatch.select import runnable, select, why_not
from tp_overlap_kernels.dispatch.table import Entry, Table
from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.memory.layout import pitch

MIB = 1 << 20


def h200(world_size=2, **changes):
    limits = {"native": True, "one_shot_bytes": 4 * MIB, "sentinel_bytes": MIB, "staged_bytes": 64 * MIB}
    limits |= {"tile_slots": 1 << 16}
    return Topology("NVIDIA H200", "cuda", world_size, **(limits | changes))


def cpu(backend, world_size=2):
    return Topology("cpu", backend, world_size, one_shot_bytes=MIB)


def gemm(op, M, N=8192, K=4096, world_size=2, dtype="bfloat16"):
    return Problem(op, M, N, K, dtype, world_size)


def elements(n, world_size=2, dtype="bfloat16"):
    return Problem("all_reduce", 1, n, 0, dtype, world_size)


AR, RS = "gemm_all_reduce", "gemm_reduce_scatter"

# (problem, topology, name of the plan, why)
RULES = [
    (gemm(AR, 1), h200(), "decode", "decode"),
    (gemm(AR, 16), h200(), "decode", "the last M of the CUDA kernel for decode"),
    (gemm(AR, 17), h200(), "one_shot", "one row more"),
    (gemm(AR, 1), h200(native=False), "one_shot", "decode without the CUDA library"),
    (gemm(AR, 64), h200(), "one_shot", "the last M of one-shot"),
    (gemm(AR, 65), h200(), "unfused_one_shot", "one row more, and 1 MiB of sentinels is too small for it"),
    (gemm(AR, 65), h200(sentinel_bytes=4 * MIB), "unfused_sentinel", "one row more, and there is room"),
    (gemm(AR, 257), h200(sentinel_bytes=8 * MIB), "unfused_two_shot", "more than 4 MiB"),
    (gemm(AR, 17), h200(one_shot_bytes=1024), "unfused_two_shot", "the arena is too small for one-shot"),
    (gemm(AR, 64, world_size=8), h200(8), "unfused_two_shot", "seven peers would each get 1 MiB"),
    (gemm(AR, 8, world_size=8), h200(8), "decode", "decode on eight ranks"),
    (gemm(AR, 20, N=1000), h200(one_shot_bytes=40320), "one_shot", "rows of 1000 take 1008 in the arena"),
    (
        gemm(AR, 20, N=1000),
        h200(one_shot_bytes=40319),
        "unfused_two_shot",
        "rows of 1000 do not fit, 40000 bytes would",
    ),
    (gemm(AR, 511), h200(), "unfused_two_shot", "too few tiles to hide anything, too long for one-shot"),
    (gemm(AR, 512), h200(), "sm90_add", "the first M of the CUDA kernels"),
    (gemm(AR, 512), h200(native=False), "unfused_two_shot", "no CUDA library"),
    (gemm(AR, 256, world_size=4), h200(4), "unfused_two_shot", "three peers would each get 4 MiB"),
    (gemm(AR, 1024), h200(), "sm90_add", "prefill"),
    (gemm(AR, 1024), h200(native=False), "two_shot", "prefill without the CUDA library"),
    (gemm(AR, 8192, K=14784), h200(), "chunked", "prefill with a very long GEMM"),
    (gemm(AR, 4096, K=14784), h200(), "sm90_add", "copies too small for the copy engine"),
    (gemm(AR, 8192, K=14784, world_size=4), h200(4), "sm90", "chunked is for two ranks"),
    (gemm(AR, 8192, N=4100), h200(), "two_shot", "rows that the copy engine cannot store"),
    (gemm(AR, 8192, N=120), h200(), "two_shot", "less than a tile across"),
    (gemm(AR, 8192, world_size=8), h200(8, native=False), "two_shot", "large M on eight ranks"),
    (gemm(RS, 16), h200(), "one_shot", "decode"),
    (gemm(RS, 16), h200(one_shot_bytes=1024), "unfused_sentinel", "the arena is too small for one-shot"),
    (gemm(RS, 65), h200(), "unfused_sentinel", "one row more than decode"),
    (gemm(RS, 65, world_size=3), h200(3), "unfused_push", "three ranks"),
    (gemm(RS, 511), h200(), "unfused_push", "too few tiles to hide anything"),
    (gemm(RS, 512), h200(), "sm90", "one row more"),
    (gemm(RS, 512), h200(native=False), "unfused_push", "without the CUDA library"),
    (gemm(RS, 513), h200(native=False), "push", "one row more"),
    (gemm(RS, 8192), h200(), "sm90", "prefill with a long GEMM"),
    (gemm(RS, 1024, K=1024), h200(), "sm90_add", "the link takes as long"),
    (gemm(AR, 1024, world_size=4), h200(4), "sm90", "more than two ranks"),
    (gemm(RS, 8192), h200(native=False), "chunked", "without the CUDA library"),
    (gemm(RS, 8192, world_size=3), h200(3), "sm90", "a world that divides nothing"),
    (gemm(RS, 8192, world_size=3), h200(3, native=False), "push", "and no CUDA library"),
    (elements(8192), h200(), "sentinel", "decode"),
    (elements(8192), h200(native=False), "one_shot", "no CUDA library"),
    (elements(8192), h200(sentinel_bytes=4096), "one_shot", "the sentinel region is too small"),
    (elements(8192, dtype="float32"), h200(), "one_shot", "sentinels are 2-byte pairs"),
    (elements(2 * MIB), h200(sentinel_bytes=8 * MIB), "sentinel", "two ranks, exactly 4 MiB"),
    (elements(2 * MIB + 1), h200(sentinel_bytes=8 * MIB), "two_shot", "two ranks, one element over 4 MiB"),
    (elements(128 * 1024, 3), h200(3), "sentinel", "exactly 256 KiB"),
    (elements(128 * 1024 + 1, 3), h200(3), "one_shot", "one element over 256 KiB"),
    (elements(256 * 1024, 3), h200(3), "one_shot", "exactly 512 KiB"),
    (elements(256 * 1024 + 1, 3), h200(3), "two_shot", "one element over 512 KiB"),
    (elements(8192), h200(native=False, one_shot_bytes=0), "two_shot", "nothing but two-shot left"),
    (gemm(AR, 32, N=64), cpu("interp"), "one_shot", "interpreted, small"),
    (gemm(AR, 33, N=64), cpu("interp"), "two_shot", "interpreted, one row more"),
    (gemm(AR, 32, N=65536), cpu("interp"), "two_shot", "interpreted, too large for the arena"),
    (gemm(RS, 4096), cpu("interp"), "push", "interpreted"),
    (elements(8), cpu("interp"), "one_shot", "interpreted, small"),
    (elements(MIB), cpu("interp"), "two_shot", "interpreted, large"),
    (gemm(AR, 8192), cpu("ref"), "ref", "the CPU reference"),
    (gemm(RS, 1), cpu("ref", 2), "ref", "the CPU reference"),
    (elements(5, world_size=1), cpu("ref", 1), "local", "one rank"),
    (gemm(AR, 4096, world_size=1), h200(1), "local", "one rank on a GPU"),
    (gemm(AR, 0), h200(), "one_shot", "no rows at all"),
    (elements(0), cpu("interp"), "one_shot", "no elements at all"),
]


@pytest.mark.parametrize(
    ("problem", "topology", "name"),
    [row[:3] for row in RULES],
    ids=[f"{row[0].op}: {row[3]} ({index})" for index, row in enumerate(RULES)],
)
def test_rule_of_thumb(problem, topology, name):
    plan = select(problem, topology)
    assert plan.name == name
    assert plan.why


def test_some_plan_runs_whatever_the_problem_and_the_machine():
    topologies = [
        Topology("x", backend, world, ranks, native, room, room)
        for backend in ("cuda", "interp", "ref")
        for world in (1, 2, 3, 4, 8)
        for ranks in (1, 2)
        for native in (False, True)
        for room in (0, 4096, 64 * MIB)
    ]
    sizes = [(0, 1, 1), (1, 1, 1), (1, 8192, 1024), (77, 1032, 328), (4099, 1032, 328), (8192, 28672, 28672)]
    for topology, op, size, dtype in itertools.product(topologies, OPS, sizes, ("bfloat16", "float16")):
        M, N, K = (1, size[0] * size[1], 0) if op == "all_reduce" else size
        problem = Problem(op, M, N, K, dtype, topology.world_size)
        plan = select(problem, topology)
        assert why_not(plan, problem, topology) is None
        assert plan.name in runnable(problem, topology)


# ---- parameters


def test_gemm_plans_come_with_all_tile_parameters():
    needed = {"block_m", "block_n", "block_k", "num_stages", "num_warps", "group_m"}
    for topology in (h200(), cpu("interp")):
        for problem, name in ((gemm(AR, 16, N=256), "one_shot"), (gemm(AR, 4096), "two_shot"), (gemm(RS, 99), "push")):
            assert set(dict(select(problem, topology, forced=name).params)) == needed


@pytest.mark.parametrize(
    ("M", "N", "block_m", "block_n"),
    [(4096, 8192, 128, 256), (512, 4096, 128, 128)],
    ids=["large tiles", "smaller tiles where large ones leave SMs idle"],
)
def test_tiles_of_two_shot(M, N, block_m, block_n):
    plan = select(gemm(AR, M, N), h200(), forced="two_shot")
    assert (plan.get("block_m"), plan.get("block_n")) == (block_m, block_n)


@pytest.mark.parametrize(
    ("M", "N", "block_m", "block_n"),
    [(1, 8192, 16, 64), (17, 8192, 32, 64), (64, 8192, 64, 64), (16, 4096, 16, 32), (1, 152064, 16, 128)],
)
def test_tiles_of_one_shot(M, N, block_m, block_n):
    plan = select(gemm(AR, M, N), h200(), forced="one_shot")
    assert (plan.get("block_m"), plan.get("block_n")) == (block_m, block_n)


# ---- the table


def table(*plans, op=AR, M=4096, N=8192, K=4096):
    timed = tuple(Plan(p.name, p.params, us=100.0 + i) for i, p in enumerate(Plan.parse(text) for text in plans))
    return Table("test.json", "NVIDIA H200", 2, (Entry(op, N, K, "bfloat16", M, timed),))


def test_the_table_wins_over_the_rule_and_its_parameters_over_the_defaults():
    plan = select(gemm(AR, 4096), h200(), table("two_shot:block_m=64,num_stages=5", "chunked"))
    assert (plan.name, plan.us, plan.why) == ("two_shot", 100.0, "measured")
    assert (plan.get("block_m"), plan.get("num_stages"), plan.get("block_n")) == (64, 5, 256)


def test_a_runner_up_serves_where_the_winner_cannot_run():
    measured = table("unfused_sentinel", "one_shot", "unfused_nccl", M=65)
    fits = {"sentinel_bytes": 2 * MIB}
    assert select(gemm(AR, 65), h200(**fits), measured).name == "unfused_sentinel"
    assert select(gemm(AR, 65), h200(native=False, **fits), measured).name == "one_shot"
    assert select(gemm(AR, 65), h200(native=False, one_shot_bytes=0), measured).name == "unfused_nccl"


@pytest.mark.parametrize(
    ("M", "us", "chosen"), [(64, 109.0, "one_shot"), (64, 111.0, "unfused_sentinel"), (65, 101.0, "unfused_sentinel")]
)
def test_at_decode_a_plan_of_one_launch_may_be_a_little_slower(M, us, chosen):
    plans = Plan("unfused_sentinel", us=100.0), Plan("unfused_one_shot", us=100.5), Plan("one_shot", us=us)
    measured = Table("test.json", "NVIDIA H200", 2, (Entry(AR, 8192, 4096, "bfloat16", M, plans),))
    assert select(gemm(AR, M), h200(sentinel_bytes=2 * MIB), measured).name == chosen


def test_the_rule_serves_where_nothing_measured_can_run():
    measured = table("unfused_sentinel", "one_shot", M=64)
    assert select(gemm(AR, 64), h200(native=False, one_shot_bytes=0), measured).name == "unfused_two_shot"


def test_a_table_of_a_gpu_says_nothing_about_the_cpu():
    assert select(gemm(AR, 4096), cpu("interp"), table("unfused_nccl")).name == "two_shot"
    assert select(gemm(AR, 4096), cpu("ref"), table("two_shot")).name == "ref"


def test_an_empty_table_leaves_the_rule():
    empty = Table("empty.json", "NVIDIA H200", 2, ())
    for problem, topology, name, _ in RULES:
        assert select(problem, topology, empty).name == name


def test_the_choice_does_not_depend_on_the_order_of_the_entries():
    grid = [(op, N, M) for op in (AR, RS) for N in (4096, 8192) for M in (1, 64, 4096)]
    names = {op: itertools.cycle(PLAN_NAMES[op]) for op in (AR, RS)}
    entries = [Entry(op, N, 4096, "bfloat16", M, (Plan(next(names[op]), us=10.0),)) for op, N, M in grid]
    problems = [
        gemm(op, M, N, K) for op in (AR, RS) for M in (1, 8, 100, 9999) for N in (3000, 5793, 8192) for K in (4096, 999)
    ]
    first = Table("t", "NVIDIA H200", 2, tuple(entries))
    for shuffled in (entries[::-1], entries[5:] + entries[:5], entries[1::2] + entries[::2]):
        other = Table("t", "NVIDIA H200", 2, tuple(shuffled))
        assert [select(p, h200(), other) for p in problems] == [select(p, h200(), first) for p in problems]
        assert other.digest() == first.digest()


# ---- what a machine excludes


@pytest.mark.parametrize(
    ("name", "problem", "topology", "reason"),
    [
        ("one_shot", gemm(AR, 512), h200(one_shot_bytes=MIB), "8388608 bytes exceeds the one-shot region of 1048576"),
        ("unfused_one_shot", gemm(AR, 512), h200(one_shot_bytes=MIB), "exceeds the one-shot region"),
        ("unfused_sentinel", gemm(AR, 512), h200(), "exceeds the sentinel region of 1048576"),
        ("unfused_sentinel", gemm(AR, 1), h200(native=False), "the CUDA library is not loaded"),
        ("unfused_sentinel", gemm(RS, 129), h200(), "1064960 bytes exceeds the sentinel region of 1048576"),
        ("decode", gemm(AR, 129), h200(sentinel_bytes=8 * MIB), "takes M <= 128, not 129"),
        ("decode", gemm(AR, 64, N=8193), h200(), "1064960 bytes exceeds the sentinel region of 1048576"),
        ("decode", gemm(AR, 1), h200(native=False), "the CUDA library is not loaded"),
        ("decode", gemm(AR, 1), cpu("interp"), "no CPU twin"),
        ("sentinel", elements(64, dtype="float32"), h200(), "not float32"),
        ("sm90", gemm(AR, 4096), h200(native=False), "the CUDA library is not loaded"),
        ("sm90", gemm(RS, 4096, N=4100), h200(), "N must be a multiple of 8 for the copy engine, got 4100"),
        ("sm90", gemm(AR, 64), cpu("interp"), "no CPU twin"),
        (
            "sm90:block_n=64",
            gemm(AR, 64),
            h200(),
            "no kernel with block_n=64,stagings=1",
        ),
        (
            "sm90:block_n=256,stagings=2",
            gemm(AR, 64),
            h200(),
            "stagings=2,cluster_m=2,cluster_n=1; there are block_n=128,stagings=1",
        ),
        ("sm90_add", gemm(AR, 4096, world_size=4), h200(4), "sm90_add works with world_size=2, not 4"),
        ("sm90_add:stagings=2", gemm(AR, 64), h200(), "no kernel with block_n=128,stagings=2"),
        ("sm90:stagings=3", gemm(AR, 64), h200(), "no kernel with block_n=128,stagings=3"),
        (
            "sm90:cluster_m=1,cluster_n=2",
            gemm(RS, 64),
            h200(staged_bytes=1 << 16),
            "no room for 128 rows a rank in tiles of 256 columns",
        ),
        (
            "sm90:cluster_m=1,cluster_n=2",
            gemm(AR, 64),
            h200(),
            "stagings=1,cluster_m=1,cluster_n=2; there",
        ),
        ("sm90:block_n=256", gemm(AR, 64, N=520), h200(staged_bytes=5 * 65536), "max_M=512 and max_N=768 has"),
        ("chunked", gemm(AR, 8192, world_size=4), h200(4), "world_size=2, not 4"),
        ("chunked", gemm(RS, 8192, world_size=8), h200(8), "world_size=2, not 8"),
        ("unfused_nccl", gemm(AR, 8192), h200(ranks_per_device=2), "two ranks on one device"),
        ("nccl", elements(64), h200(ranks_per_device=2), "two ranks on one device"),
        ("unfused_nccl", gemm(AR, 8), cpu("interp"), "no CPU twin"),
        ("two_shot", gemm(AR, 8), cpu("ref"), "knows only the plan 'ref'"),
        ("two_shot", gemm(AR, 8, world_size=1), h200(1), "knows only the plan 'local'"),
        ("ref", gemm(AR, 8), h200(), "for the ref backend"),
        ("local", gemm(AR, 8), h200(), "for one rank"),
        ("push", gemm(AR, 8), h200(), "not a plan of gemm_all_reduce"),
        ("two_shot", gemm(RS, 8), h200(), "not a plan of gemm_reduce_scatter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_forced_plan_that_cannot_run_is_refused_with_the_reason_and_the_way_out(name, problem, topology, reason):
    with pytest.raises(InvalidInput) as caught:
        select(problem, topology, forced=name)
    text = str(caught.value)
    assert text.startswith(f"{problem.op}: the forced plan {name!r} cannot run") and reason in text
    assert f"Force one of {', '.join(runnable(problem, topology))}, or none" in text
    for way_out in runnable(problem, topology):
        assert select(problem, topology, forced=way_out).name == way_out


def test_a_forced_plan_is_taken_over_table_and_rule():
    measured = table("chunked")
    assert select(gemm(AR, 4096), h200(), measured, forced="unfused_nccl") == Plan("unfused_nccl")
    assert select(gemm(AR, 4096), h200(), measured, forced="two_shot:block_n=64").get("block_n") == 64
    assert select(gemm(AR, 4096), h200(), measured, forced="").name == "chunked"


@pytest.mark.parametrize(
    ("problem", "given", "expected"),
    [
        (gemm(AR, 4096, K=2048), "", (128, 66, 1, 24)),
        (gemm(AR, 8192, K=2048), "", (128, 66, 1, 24)),
        (gemm(AR, 4096, K=4096), "", (256, 66, 1, 32)),
        (gemm(AR, 2048, K=4096), "", (128, 66, 1, 24)),
        (gemm(RS, 4096, K=2048), "", (128, 66, 2, 24)),
        (gemm(RS, 4096, K=4096), "", (256, 66, 1, 32)),
        (gemm(RS, 512, K=4096), "", (128, 66, 2, 24)),
        (gemm(RS, 4096, K=2048), ":block_n=256", (256, 66, 1, 32)),
        (gemm(RS, 4096, K=4096), ":block_n=128", (128, 66, 2, 24)),
        (gemm(AR, 1024, world_size=4), "", (128, 22, 1, 24)),
        (gemm(RS, 99, world_size=8), "", (128, 10, 2, 24)),
    ],
)
def test_tiles_and_their_order_of_the_kernels_for_hopper(problem, given, expected):
    plan = select(problem, h200(problem.world_size), forced="sm90" + given)
    assert (plan["block_n"], plan["lead"], plan["stagings"], plan["senders"]) == expected
    assert (plan["group_m"], plan["piece"]) == (8, 2048 if plan["block_n"] == 256 else 65536)
    whole = f"sm90:block_n={plan['block_n']},stagings={plan['stagings']}"
    assert plan == select(problem, h200(problem.world_size), forced=whole)  # and so has the same call hash


@pytest.mark.parametrize(
    ("problem", "given", "expected"),
    [
        (gemm(AR, 4096, K=2048), "", (128, 66, 1, 65536, 24)),
        (gemm(AR, 1024, K=4096), "", (128, 66, 1, 2048, 24)),
        (gemm(AR, 2048, K=4096), "", (256, 0, 1, 2048, 32)),
        (gemm(AR, 2048, K=4096), ":block_n=128", (128, 66, 1, 2048, 24)),
        (gemm(RS, 1024, K=1024), "", (128, 66, 2, 65536, 24)),
        (gemm(RS, 8192, K=4096), "", (256, 0, 1, 2048, 32)),
    ],
)
def test_tiles_of_the_kernels_for_hopper_that_the_l2_cache_adds(problem, given, expected):
    plan = select(problem, h200(), forced="sm90_add" + given)
    assert tuple(plan[name] for name in ("block_n", "lead", "stagings", "piece", "senders")) == expected


def test_several_plans_can_be_forced_so_that_every_op_finds_its_own():
    assert select(gemm(AR, 4096), h200(), forced="two_shot;push").name == "two_shot"
    assert select(gemm(RS, 4096), h200(), forced="two_shot;push").name == "push"
    assert select(elements(8), h200(), forced="two_shot;push").name == "two_shot"


def test_a_problem_of_another_group_is_refused():
    with pytest.raises(InvalidInput, match=r"world_size=4.*world_size=2"):
        select(gemm(AR, 8, world_size=4), h200(2))


# ---- agreement with the arena


def test_rows_in_the_arena_are_as_wide_as_the_arena_makes_them():
    for N in (1, 15, 16, 17, 1000, 8192):
        assert gemm(AR, 3, N=N).arena_bytes == 3 * pitch(N) * 2


# ---- purity


def test_dispatch_imports_only_the_standard_library_and_errors():
    allowed = set(sys.stdlib_module_names)
    for file in Path(tp_overlap_kernels.dispatch.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, file.name
            elif isinstance(node, ast.ImportFrom) and node.level == 2:
                assert node.module == "errors", file.name


def test_dispatch_loads_no_triton_and_starts_no_cuda():
    code = (
        "import sys, tp_overlap_kernels.dispatch;"
        "assert 'triton' not in sys.modules, 'triton was imported';"
        "torch = sys.modules.get('torch');"
        "assert torch is None or not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("M", "N", "K", "block_n", "splits"),
    [
        (1, 8192, 4096, 64, 1),  # 128 blocks
        (16, 4096, 2048, 64, 2),
        (64, 8192, 4096, 128, 2),
        (64, 4096, 7168, 128, 4),
        (65, 4096, 7168, 64, 2),
        (16, 512, 4096, 64, 8),  # no cluster is larger
        (16, 512, 512, 64, 2),  # a part has four stages at least
        (16, 16384, 4096, 64, 1),
    ],
)
def test_the_decode_kernel_has_a_block_for_every_sm_where_k_can_be_split(M, N, K, block_n, splits):
    plan = select(gemm(AR, M, N, K), h200(sentinel_bytes=4 * MIB), forced="decode")
    assert (plan["block_n"], plan["splits"]) == (block_n, splits)


# ---- several nodes


def on_nodes(inside, nodes=2):
    return dataclasses.replace(inside, world_size=nodes * inside.world_size, inside=inside)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("inside", [h200(1), h200(2), cpu("interp", 2), cpu("ref", 4)], ids=lambda t: f"{t.backend}")
def test_on_several_nodes_there_are_two_plans(op, inside):
    topology = on_nodes(inside, 3)
    problem = Problem(op, *((1, 8192, 0) if op == "all_reduce" else (16, 8192, 512)), "bfloat16", topology.world_size)
    flat = "nccl" if op.startswith("all_reduce") else "unfused_nccl"
    assert topology.nodes == 3 and runnable(problem, topology) == [flat, "two_level"]
    assert select(problem, topology, forced=f"{flat};push") == Plan(flat)
    assert select(problem, topology).name == "two_level"
    assert why_not(Plan("two_level"), problem, inside) == "it is for several nodes"
    assert "one device" in why_not(Plan("nccl"), elements(8, 4), on_nodes(h200(ranks_per_device=2)))
    assert "do not map" in why_not(Plan("two_shot"), elements(8, 4), on_nodes(h200()))


@pytest.mark.parametrize(
    ("per_node", "nodes", "names"),
    [
        pytest.param(2, 2, ["two_level", "two_level", "two_level"], id="the network has much to carry a rank"),
        pytest.param(8, 2, ["unfused_nccl", "two_level", "nccl"], id="the gather is not worth it"),
        pytest.param(4, 8, ["unfused_nccl", "two_level", "nccl"], id="nor with many nodes"),
        pytest.param(4, 3, ["two_level", "two_level", "nccl"], id="behind a GEMM alone"),
        pytest.param(1, 2, ["two_level", "two_level", "two_level"], id="both are the same"),
    ],
)
def test_on_gpus_two_levels_are_taken_where_they_cost_less_than_one(per_node, nodes, names):
    topology, W = on_nodes(h200(per_node), nodes), per_node * nodes
    problems = [gemm(AR, 4096, world_size=W), gemm(RS, 4096, world_size=W), elements(1 << 24, W)]
    assert [select(problem, topology).name for problem in problems] == names
    on_cpu = on_nodes(cpu("ref", per_node), nodes)
    assert {select(problem, on_cpu).name for problem in problems} == {"two_level"}


def test_the_plan_inside_is_that_of_the_nodes_reduce_scatter():
    """Of as many rows as the node sums, by the table of its ranks; an all-reduce has none."""
    measured = Table(
        "test.json",
        "NVIDIA H200",
        2,
        (
            Entry(
                RS,
                8192,
                4096,
                "bfloat16",
                4096,
                (
                    Plan.parse(
                        "push:block_m=64",
                    ),
                ),
            ),
        ),
    )
    for op in (AR, RS, "gemm_all_reduce_add_rms_norm"):
        plan = select(gemm(op, 4096, world_size=4), on_nodes(h200()), measured)
        assert plan.inside == select(gemm(RS, 4096), h200(), measured)
        assert plan.inside.name == "push" and plan.inside["block_m"] == 64
        assert str(plan) == f"two_level;{plan.inside}", "ranks that differ inside differ in their hash"
    assert select(gemm(AR, 4097, world_size=4), on_nodes(h200())).inside == select(gemm(RS, 4097), h200())
    assert select(elements(8, 4), on_nodes(h200())).inside is None
    assert select(gemm(AR, 16), on_nodes(h200(1))).inside.name == "local"


def test_rows_of_the_nodes_reduce_scatter():
    """A reduce-scatter over all ranks fills up its last block: the blocks of one place on all nodes are then one."""
    assert gemm(RS, 9, world_size=4).inside(2) == gemm(RS, 12, world_size=2)
    assert gemm(AR, 9, world_size=4).inside(2) == gemm(RS, 9, world_size=2)
    assert gemm(RS, 0, world_size=4).inside(2) == gemm(RS, 0, world_size=2)


def test_what_is_forced_beside_two_level_is_for_the_inside():
    topology, problem = on_nodes(h200()), gemm(AR, 4096, world_size=4)
    plan = select(problem, topology, forced="two_level;push:block_m=64;two_shot")
    assert (plan.name, plan.inside.name, plan.inside["block_m"]) == ("two_level", "push", 64)
    assert select(problem, topology, forced="two_level") == select(problem, topology)
    with pytest.raises(
        InvalidInput, match=r"do not map .* Force one of unfused_nccl, two_level, .* 'two_level;push'\."
    ):
        select(problem, topology, forced="two_shot")
    with pytest.raises(InvalidInput, match="gemm_reduce_scatter: the forced plan 'two_shot' cannot run"):
        select(problem, topology, forced="two_level;two_shot")
    with pytest.raises(InvalidInput, match="it is for several nodes"):
        select(gemm(AR, 4096), h200(), forced="two_level")


def test_a_backend_is_that_of_the_nodes_too():
    topology = on_nodes(cpu("ref")).with_backend("interp")
    assert (topology.backend, topology.inside.backend) == ("interp", "interp")
