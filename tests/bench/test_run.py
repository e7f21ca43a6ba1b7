"""The command line, as a person runs it: two CPU ranks that it starts itself, and providers made for the purpose."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from tp_overlap_kernels.bench import cli

PROVIDERS = """
import torch.distributed as dist

def right(a, w, group_name):
    out = a @ w.T
    dist.all_reduce(out)
    return out

def doubled(a, w, group_name):
    return 2 * right(a, w, group_name)

def right_at_first(a, w, group_name, calls=[]):
    calls.append(None)
    return right(a, w, group_name) * (1 if len(calls) <= 3 else 2)

def raises_on_rank_1(a, w, group_name):
    if dist.get_rank() == 1:
        raise RuntimeError("no room on this rank")
    return a @ w.T

def parts_company_at_one_row(a, w, group_name):
    import torch
    if a.shape[0] > 1:
        return right(a, w, group_name)
    return torch.ops.tp_overlap.gemm_all_reduce(a, w[: 16 * (1 + dist.get_rank())], group_name)

def dies_on_rank_1(a, w, group_name):
    if dist.get_rank() == 1:
        import os
        os._exit(9)
    return right(a, w, group_name)
"""


@pytest.fixture
def bench(tmp_path):
    """bench(*arguments) -> (exit code, what it printed). Providers of the text above are in the module `made_here`."""
    (tmp_path / "made_here.py").write_text(PROVIDERS)

    def call(*arguments: str) -> tuple[int, str]:
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "tp_overlap_kernels.bench", *arguments]
        environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        return done.returncode, done.stdout + done.stderr

    return call


def small(*arguments: str) -> list[str]:
    return ["run", "--op", "gemm_all_reduce", "--layer", "48,40", "--m", "1,16", "--target-ms", "5", *arguments]


def rows_of(path: pathlib.Path) -> dict[tuple[str, int], dict]:
    return {(row["provider"], row["M"]): row for row in json.loads(path.read_text())["rows"]}


def test_a_right_provider_is_timed(bench, tmp_path):
    code, text = bench(*small("--provider", "mine=made_here:right", "--json", "out.json"))
    assert code == 0, text
    rows = rows_of(tmp_path / "out.json")
    assert set(rows) == {(name, M) for name in ("matmul", "mine") for M in (1, 16)}
    for row in rows.values():
        assert row["correct"] is True and row["us"] > 0 and row["p10_us"] <= row["us"] <= row["p90_us"]
    meta = json.loads((tmp_path / "out.json").read_text())["meta"]
    assert meta["store"] == "auto"
    for name in ("gpu", "world_size", "link_gbps", "driver", "torch", "triton", "commit", "command", "date"):
        assert name in meta
    assert "--layer 48,40" in meta["command"]


@pytest.mark.parametrize("name", ["doubled", "right_at_first"])
def test_a_wrong_result_has_no_time_and_fails_the_run(bench, tmp_path, name):
    code, text = bench(*small("--provider", f"mine=made_here:{name}", "--json", "out.json"))
    assert code == 1, text
    rows = rows_of(tmp_path / "out.json")
    for M in (1, 16):
        assert rows["mine", M]["us"] is None and rows["mine", M]["correct"] is False
        assert "tolerance" in rows["mine", M]["reason"]
        assert rows["matmul", M]["correct"] is True
    assert "WRONG" in text and "wrong results" in text


def test_a_provider_that_fails_on_one_rank_is_dropped_on_all(bench, tmp_path):
    arguments = ["--provider", "mine=made_here:raises_on_rank_1", "--provider", "matmul+gloo", "--json", "out.json"]
    code, text = bench(*small(*arguments))
    assert code == 2, text
    rows = rows_of(tmp_path / "out.json")
    assert rows["mine", 1]["reason"] == "rank 1: RuntimeError: no room on this rank"
    assert rows["mine", 1]["us"] is None and rows["mine", 1]["correct"] is None
    assert rows["matmul+gloo", 16]["us"] > 0


def test_a_rank_that_dies_ends_the_run(bench):
    code, text = bench(*small("--provider", "mine=made_here:dies_on_rank_1"))
    assert code not in (0, 1, 2), text


def test_a_spent_budget_keeps_what_was_measured_and_says_what_was_not(bench):
    code, text = bench(*small("--provider", "matmul+gloo", "--budget-s", "0"))
    assert code == 0 and "2 cases were not measured" in text


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["run", "--op", "gemm"], "gemm_all_reduce"),
        (["run", "--preset", "llama-2"], "h200_baseline"),
        (["run", "--device", "cpu", "--mode", "graph"], "needs a GPU"),
        (["run", "--dtype", "float64"], "bfloat16"),
        (["run", "--device", "cuda"], "no GPU"),
        (["run", "--store", "gpu"], "--store is one of auto, symm_mem, nvshmem, shm, local, got 'gpu'"),
        (["plot", __file__], "no result of this benchmark"),
    ],
    ids=["op", "preset", "graph on a CPU", "dtype", "GPU that is not there", "store", "a file of something else"],
)
def test_bad_arguments_are_refused_with_what_is_allowed(monkeypatch, arguments, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output


def test_an_unknown_provider_is_refused_by_name(bench):
    code, text = bench(*small("--provider", "matmul+mpi"))
    assert code == 2 and "no provider is called 'matmul+mpi'" in text


def test_a_gemm_for_hopper_declines_elsewhere_and_says_so(bench):
    code, text = bench(*small("--provider", "matmul:sm90"))
    assert code == 0 and "matmul:sm90: needs a GPU of compute capability 9.0" in text, text


def test_our_ops_run_on_the_cpu_and_say_their_plan(bench, tmp_path):
    providers = [f"--provider={name}" for name in ("ref", "interp", "interp:two_shot;push")]
    code, text = bench("run", "--layer", "64,32", "--m", "5", "--target-ms", "5", *providers, "--json", "out.json")
    assert code == 0, text
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    plans = {(row["op"], row["provider"]): (row["plan"] or "").partition(":")[0] for row in rows if row["us"]}
    assert plans["gemm_all_reduce", "ref"] == "ref"
    assert plans["gemm_all_reduce", "interp"] == "one_shot"
    assert plans["gemm_all_reduce", "interp:two_shot;push"] == "two_shot"
    assert plans["gemm_reduce_scatter", "interp:two_shot;push"] == "push"


def test_our_arena_lies_in_the_store_that_is_named(bench, tmp_path):
    """One that cannot serve here says so, in the library's words, and nothing else is taken for it."""
    code, text = bench(*small("--provider", "ref", "--store", "shm", "--json", "out.json"))
    assert code == 0, text
    assert json.loads((tmp_path / "out.json").read_text())["meta"]["store"] == "shm"
    code, text = bench(*small("--provider", "ref", "--store", "nvshmem", "--json", "out.json"))
    assert code == 2, text
    rows = rows_of(tmp_path / "out.json")
    assert rows["ref", 1]["us"] is None and "store 'nvshmem' cannot serve 2 ranks on cpu" in rows["ref", 1]["reason"]
    assert json.loads((tmp_path / "out.json").read_text())["meta"]["store"] == "nvshmem"


def test_a_plan_that_cannot_run_a_case_is_no_failure(bench, tmp_path):
    arguments = ["--provider", "interp:push", "--op", "gemm_reduce_scatter", "--op", "gemm_all_reduce"]
    code, text = bench("run", "--layer", "64,32", "--m", "5", "--target-ms", "5", *arguments, "--json", "out.json")
    assert code == 0, text
    reasons = {
        row["op"]: row["reason"] for row in json.loads((tmp_path / "out.json").read_text())["rows"] if row["reason"]
    }
    assert list(reasons) == ["gemm_all_reduce"] and "push" in reasons["gemm_all_reduce"]


def test_an_all_reduce_alone_has_no_gemm_and_a_norm_gives_two_results(bench, tmp_path):
    ops = ("all_reduce", "all_reduce_add_rms_norm", "gemm_all_reduce_add_rms_norm")
    chosen = [argument for op in ops for argument in ("--op", op)]
    code, text = bench("run", *chosen, *("--layer", "64,32", "--m", "5", "--target-ms", "5", "--json", "out.json"))
    assert code == 0, text
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert all(row["us"] and row["K_local"] == 32 * row["op"].startswith("gemm") for row in rows)
    ours = {"ref", "interp"}
    assert {op: {row["provider"] for row in rows if row["op"] == op} for op in ops} == {
        "all_reduce": ours | {"copy+gloo"},
        "all_reduce_add_rms_norm": ours | {"copy+gloo+rms_norm"},
        "gemm_all_reduce_add_rms_norm": ours | {"matmul", "matmul+gloo+rms_norm"},
    }
    plans = {row["op"]: row["plan"] for row in rows if row["provider"] == "interp"}
    assert plans["all_reduce_add_rms_norm"] == "one_shot_norm"
    assert plans["gemm_all_reduce_add_rms_norm"] == "unfused_one_shot_norm"


def test_explain_prints_the_plan_without_a_gpu():
    done = CliRunner().invoke(cli.app, ["explain", "gemm_all_reduce", "16", "8192", "4096", "--device", "NVIDIA H200"])
    assert done.exit_code == 0 and "plan" in done.output and "M=16 N=8192 K=4096" in done.output
    refused = CliRunner().invoke(cli.app, ["explain", "gemm", "16", "8192", "4096"])
    assert refused.exit_code == 2 and "gemm_all_reduce" in refused.output


def test_a_group_that_failed_in_one_case_measures_the_next(bench, tmp_path):
    providers = ["--provider", "interp", "--provider", "mine=made_here:parts_company_at_one_row"]
    code, text = bench(*small(*providers, "--json", "out.json"))
    assert code == 2, text
    rows = rows_of(tmp_path / "out.json")
    assert "CallMismatch" in rows["mine", 1]["reason"]
    assert rows["interp", 16]["us"] > 0 and rows["mine", 16]["us"] > 0
