"""The tuner: which specs it tries, which it times again, and the table it leaves behind."""

import json

import pytest

from tests.bench.test_run import bench  # noqa: F401 - a fixture
from tp_overlap_kernels.bench import candidates, cases, tune
from tp_overlap_kernels.dispatch import problem, table


def case_of(op: str, M: int, world_size: int = 2) -> cases.Case:
    return cases.Case(op, cases.Layer("any", "", 8192, 4096), M, "bfloat16", world_size)


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("M", cases.M_GRID)
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_case_has_candidates_that_dispatch_knows(op, M, world_size):
    specs = candidates.candidates(case_of(op, M, world_size))
    assert 4 <= len(specs) <= 40 and len(set(specs)) == len(specs)
    for spec in specs:
        plan = problem.Plan.parse(spec)
        assert plan.name in problem.PLAN_NAMES[op]
        assert plan.name != "chunked" or world_size == 2
    unfused = {"unfused_nccl", "nccl"} & {spec.partition(":")[0] for spec in specs}
    assert unfused, "what the library must never be slower than is always tried"


def test_finalists_are_the_near_ones_and_the_best_of_each_name():
    rough = {"a:block_m=1": 10.0, "a:block_m=2": 10.4, "a:block_m=4": 12.0, "b": 30.0, "c:chunks=2": 20.0, "c": 21.0}
    assert tune.finalists(rough) == ["a:block_m=1", "a:block_m=2", "c:chunks=2", "b"]
    assert tune.finalists({}) == []


def test_an_entry_is_sorted_and_all_reduce_counts_elements():
    entry = tune.entry_of(case_of(cases.ALL_REDUCE, 4), {"two_shot": 9.0, "one_shot": 4.004})
    assert entry is not None
    assert (entry.M, entry.N, entry.K) == (1, 4 * 8192, 0)
    assert [(str(plan), plan.us) for plan in entry.plans] == [("one_shot", 4.0), ("two_shot", 9.0)]
    assert tune.entry_of(case_of(cases.GEMM_ALL_REDUCE, 4), {}) is None


def test_a_table_is_made_and_completed(bench, tmp_path):  # noqa: F811
    path = tmp_path / "table.json"
    arguments = ["tune", "--layer", "64,32", "--op", "gemm_all_reduce", "--out", str(path)]
    arguments += ["--plan", "one_shot", "--plan", "two_shot", "--plan", "push"]
    code, text = bench(*arguments, "--m", "1")
    assert code == 0, text
    assert "push" in text and "not a plan of" in text
    first = table.parse(path.read_text(), "first").entries
    made_by = json.loads(path.read_text())["meta"]["command"]
    assert [entry.M for entry in first] == [1]
    assert {plan.name for plan in first[0].plans} == {"one_shot", "two_shot"}

    code, text = bench(*arguments, "--m", "1,40", "--merge")
    assert code == 0, text
    both = table.parse(path.read_text(), "both").entries
    assert [entry.M for entry in both] == [1, 40]
    assert both[0].plans[0].us == first[0].plans[0].us, "what is there is kept and not measured again"
    meta = json.loads(path.read_text())["meta"]
    assert [run["command"] for run in meta["earlier"]] == [made_by], "what made the entries that were kept"

    path.write_text(json.dumps({"meta": {**meta, "device": "another GPU"}, "entries": []}))
    code, text = bench(*arguments, "--m", "1", "--merge")
    assert code != 0 and "another GPU" in text and "--out" in text


def test_no_candidate_that_runs_is_a_failure(bench, tmp_path):  # noqa: F811
    arguments = ["--layer", "64,32", "--m", "1", "--op", "gemm_all_reduce", "--plan", "push"]
    code, text = bench("tune", *arguments, "--out", str(tmp_path / "table.json"))
    assert code == 1 and "no candidate ran" in text
    assert not (tmp_path / "table.json").exists()
