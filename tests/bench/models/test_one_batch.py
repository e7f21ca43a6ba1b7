"""`one-batch` on CPU ranks, its figure, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.bench.models import ranked
from tp_overlap_kernels.bench import cli
from tp_overlap_kernels.bench.launch import Topology
from tp_overlap_kernels.bench.models import cli as models_cli
from tp_overlap_kernels.bench.models import plot
from tp_overlap_kernels.bench.models.arms import ARMS
from tp_overlap_kernels.bench.models.configs import sizes_of
from tp_overlap_kernels.bench.models.grid import DEFAULT_CASES, BatchCase

CASES = (BatchCase(1, 16, 1), BatchCase(2, 8, 2), BatchCase(2, 8, 4))
OF_SGLANG = {"run_name", "batch_size", "input_len", "output_len", "prefill_latency", "prefill_throughput"} | {
    "total_latency",
    "overall_throughput",
}
OF_DECODE = {"median_decode_latency", "median_decode_throughput"}

pytest.importorskip("transformers", "5.17", reason="needs transformers >= 5.17: pip install -e .[transformers]")


# ---- tasks, run on every rank


def no_room(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("no room")


def measured(rank: int, world_size: int, path: str, budget_s: float | None, broken: str) -> int:
    """The exit code. broken: the arms that are ours leave the "sum" out, or `ours` "raises"."""
    from tp_overlap_kernels.bench.models import one_batch, session
    from tp_overlap_kernels.bench.timing import Effort

    ranked.quiet()
    opened = session.opened

    @contextlib.contextmanager
    def spoiled(*arguments: Any) -> Any:
        with opened(*arguments) as state:
            without = state.arms.forwards["ceiling"]
            if broken == "sum":
                state.arms.forwards |= {"ours": without, "ours_sums": without}
            else:
                state.arms.forwards["ours"] = dict.fromkeys(without, no_room)
            yield state

    model = session.ModelOptions(sizes_of("tiny"), max_tokens=64, run_name="mine", budget_s=budget_s, commit="abc")
    options = one_batch.OneBatchOptions(model, CASES, pathlib.Path(path), Effort(1.0, 2, 2))
    one_batch.opened = spoiled if broken else opened  # type: ignore[attr-defined]
    try:
        return one_batch.run(ranked.world(rank, world_size), options)
    finally:
        one_batch.opened = opened  # type: ignore[attr-defined]


def lines_of(path: pathlib.Path) -> dict[tuple[BatchCase, str], dict[str, Any]]:
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return {(BatchCase(*(x[k] for k in ("batch_size", "input_len", "output_len"))), x["arm"]): x for x in lines}


# ---- tests


def test_every_arm_of_a_case_is_a_line_with_the_keys_of_sglang(ranks, tmp_path):
    path = tmp_path / "out.jsonl"
    assert ranks(2).run(measured, str(path), None, "", timeout=240) == [0, 0]
    lines = lines_of(path)
    assert set(lines) == {(case, arm) for case in CASES for arm in ("nccl", "ours", "ours_sums", "ceiling")}
    for (case, arm), line in lines.items():
        assert set(line) >= OF_SGLANG and line["run_name"] == "mine" and line["reason"] is None
        assert (set(line) >= OF_DECODE) == (case.output_len > 1)
        assert line["correct"] is (None if arm == "ceiling" else True)
        assert 0 <= line["same_tokens"] <= case.batch
        assert arm not in ("nccl", "ours_sums") or line["same_tokens"] == case.batch
        assert line["model"] == "tiny" and line["layers"] == 2 and line["graph"] is False
        assert line["run"]["commit"] == "abc" and "torch" in line["run"] and "link_gbps" not in line["run"]
        decoded = (case.output_len - 1) * line.get("median_decode_latency", 0.0)
        assert line["prefill_latency"] > 0 and line["total_latency"] == pytest.approx(line["prefill_latency"] + decoded)
        tokens = case.batch * case.input_len
        assert line["prefill_throughput"] == pytest.approx(tokens / line["prefill_latency"])
    shared = [lines[case, "ours"]["prefill_latency"] for case in CASES[1:]]
    assert shared[0] == shared[1], "prefill does not depend on what follows it, and is timed once"
    assert ranks(2).run(measured, str(path), 0.0, "", timeout=120) == [0, 0]
    assert len(path.read_text().splitlines()) == len(lines), "a spent budget measures nothing, and keeps what there is"


@pytest.mark.parametrize(
    "broken, code, correct, says",
    [
        ("sum", 1, False, {"ours": "the op was not called", "ours_sums": "outside the tolerance"}),
        ("raises", 2, None, {"ours": "RuntimeError: no room"}),
    ],
    ids=["sum", "raises"],
)
def test_an_arm_that_is_wrong_or_fails_has_no_times_and_the_others_have(ranks, tmp_path, broken, code, correct, says):
    path = tmp_path / "out.jsonl"
    assert ranks(2).run(measured, str(path), None, broken, timeout=120) == [code, code]
    for (_, arm), line in lines_of(path).items():
        assert ("prefill_latency" in line) == (arm not in says)
        if arm in says:
            assert line["correct"] is correct and says[arm] in line["reason"]
            assert (f"{arm}: model.layers.0.self_attn.o_proj: " in line["reason"]) == (broken == "sum")
        elif arm == "nccl":
            assert line["correct"] is True and line["same_tokens"] == line["batch_size"]


def a_line(arm: str, prefill: float, decode: float | None = None, **other: Any) -> dict[str, Any]:
    fields = {"model": "tiny", "layers": 1, "published_layers": 2, "world_size": 2, "run": {"gpu": "none"}}
    fields |= {"batch_size": 1, "input_len": 8, "output_len": 1 if decode is None else 4, "arm": arm}
    fields |= {"prefill_latency": prefill} | ({} if decode is None else {"median_decode_latency": decode})
    return fields | other


def test_the_figure_shows_each_arm_beside_nccl(tmp_path):
    lines = [a_line("nccl", 2.0, 0.5), a_line("ours", 9.0, 0.4), a_line("ours", 1.5, 0.4), a_line("ceiling", 1.0, 0.1)]
    lines.append(a_line("ours_sums", 1.8, 0.45))
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = plot.read_lines(path)
    assert len(kept) == 4, "of what was measured again, the last counts"
    ((label, percents),) = plot.beside_nccl(kept, "prefill_latency")
    assert label == "1 x 8\n2e+03 ms" and percents == {"ours": 75.0, "ceiling": 50.0, "ours_sums": 90.0}
    ((label, percents),) = plot.beside_nccl(kept, "median_decode_latency")
    assert label.startswith("1 x 8 + 4") and percents == pytest.approx(
        {"ours": 80.0, "ceiling": 20.0, "ours_sums": 90.0}
    )
    assert {*plot.COLOURS} == {*plot.LABELS} == set(ARMS) - {"nccl"}, "a bar for each arm"
    done = CliRunner().invoke(cli.app, ["plot", str(path)])
    assert done.exit_code == 0 and (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG"), done.output


@pytest.mark.parametrize("text, says", [("{}\n", ":1 is no line of one-batch"), ("", "holds no times")])
def test_a_file_of_something_else_is_refused(tmp_path, text, says):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    done = CliRunner().invoke(cli.app, ["plot", str(path)])
    assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "llama-2"], "there are llama-3-8b"),
        (["--model", "llama-3-8b", "--layers", "33"], "between 1 and the 32"),
        (["--case", "1x2"], "BATCHxINPUTxOUTPUT"),
        (["--case", "1x0x1"], "positive numbers"),
        (["--batch-size", "1,x"], "--batch-size is one or more positive numbers"),
        (["--case", "1x511x2"], "1 x 511 + 2 tokens are more than the model's 512 positions"),
        (["--ranks", "1"], "nothing to reduce"),
        (["--ranks", "4"], "do not divide evenly over 4 ranks"),
        (["--dtype", "float64"], "bfloat16"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(monkeypatch, arguments, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models_cli, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    done = CliRunner().invoke(cli.app, ["one-batch", *arguments])
    assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output


def test_options_reach_the_ranks(monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models_cli, "run_ranks", lambda *arguments: seen.append(arguments) or 0)
    arguments = ["--batch-size", "16,1", "--input-len", "64", "--case", "1x100x1", "--model", "llama-3-8b"]
    arguments += ["--layers", "3", "--max-tokens", "128", "--budget-s", "9"]
    assert CliRunner().invoke(cli.app, ["one-batch", *arguments]).exit_code == 0
    ((_, options, topology),) = seen
    assert options.cases == (BatchCase(1, 64, 32), BatchCase(1, 100, 1), BatchCase(16, 64, 32)), "smallest first"
    assert topology == Topology(2, "cpu")
    model = options.model
    assert (model.sizes.layers, model.sizes.published_layers, model.max_tokens, model.budget_s) == (3, 32, 128, 9)


def test_the_default_cases_are_those_of_the_earlier_attempts():
    assert len(set(DEFAULT_CASES)) == 20
    assert {case.batch for case in DEFAULT_CASES} == {1, 16, 64, 128}
    assert {case.input_len for case in DEFAULT_CASES if case.output_len == 1} == {1000, 2000, 4000, 8000}
