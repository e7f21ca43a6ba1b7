"""`serving`: the loop and the report on hand-made times, the verb on CPU ranks, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.bench.models import ranked
from tp_overlap_kernels.bench import cli
from tp_overlap_kernels.bench.models import cli as models_cli
from tp_overlap_kernels.bench.models.batching import Request, Served, Workload, serve
from tp_overlap_kernels.bench.models.configs import sizes_of
from tp_overlap_kernels.bench.models.serving_report import median_of, read_rows, slowest, summary, write_rows

pytest.importorskip("transformers", "5.17", reason="needs transformers >= 5.17: pip install -e .[transformers]")

SMALL = Workload(num_prompts=5, max_concurrency=2, input_len=20, output_len=4, range_ratio=0.25)


@dataclasses.dataclass
class HandClock:
    """An engine and a timer: a prefill takes 10 s, a decode step 1 s. A token is 100 times its request plus its number,
    so that a token that came from another slot shows."""

    slots: int
    at: float = 0.0
    steps: list[str] = dataclasses.field(default_factory=list)
    held: dict[int, int] = dataclasses.field(default_factory=dict)

    def prefill(self, slot: int, request: Request) -> int:
        self.at += 10
        self.held[slot] = 100 * request.number
        self.steps.append(f"prefill {request.number}")
        return self.held[slot]

    def decode(self) -> list[int]:
        self.at += 1
        self.held = {slot: token + 1 for slot, token in self.held.items()}
        self.steps.append("decode")
        return [self.held.get(slot, -1) for slot in range(self.slots)]

    def now(self) -> float:
        return self.at

    def arrived(self, waiting: Sequence[Request]) -> int:
        return sum(request.arrival_s <= self.at for request in waiting)

    def wait_for(self, request: Request) -> None:
        self.at = max(self.at, request.arrival_s)


# ---- tasks, run on every rank


def served(rank: int, world_size: int, path: str, workload: Workload, rounds: int, budget_s: float | None) -> int:
    from tp_overlap_kernels.bench.models import serving, session

    ranked.quiet()
    model = session.ModelOptions(sizes_of("tiny"), max_tokens=64, budget_s=budget_s, commit="abc")
    options = serving.ServingOptions(model, workload, rounds, pathlib.Path(path))
    return serving.run(ranked.world(rank, world_size), options)


# ---- tests


def test_a_request_takes_a_slot_as_soon_as_one_is_free():
    clock = HandClock(slots=2)
    requests = [Request(0, 0.0, 5, 3), Request(1, 0.0, 5, 1), Request(2, 0.0, 5, 2), Request(3, 99.0, 5, 1)]
    log = serve(requests, clock, clock)
    assert clock.steps == ["prefill 0", "prefill 1", "prefill 2", "decode", "decode", "prefill 3"]
    assert [each.tokens for each in log] == [[0, 1, 2], [100], [200, 201], [300]]
    assert [each.sent_s for each in log] == [0.0, 0.0, 20.0, 99.0], "sent when it has come and a place is free"
    assert [each.times_s for each in log] == [[10, 31, 32], [20], [30, 31], [109]]


def test_the_report_of_a_hand_made_log():
    log = [
        Served(Request(0, 0.0, 7, 3), 0.0, [1.0, 3.0, 4.0], [1, 2, 3]),
        Served(Request(1, 0.0, 9, 1), 2.0, [5.0], [1]),
        Served(Request(2, 0.0, 4, 2), 4.0, [8.0, 8.5], [1, 2]),
    ]
    report = summary(log)
    assert report["duration"] == 8.5 and report["completed"] == 3
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (20, 6)
    assert report["request_throughput"] == 3 / 8.5 and report["total_throughput"] == 26 / 8.5
    assert report["input_throughput"] == 20 / 8.5 and report["output_throughput"] == 6 / 8.5
    expected = {
        "e2e_latency": [4000.0, 3000.0, 4500.0],
        "ttft": [1000.0, 3000.0, 4000.0],
        "tpot": [1500.0, 500.0],
        "itl": [2000.0, 1000.0, 500.0],
    }
    for name, values in expected.items():
        assert report[f"mean_{name}_ms"] == pytest.approx(sum(values) / len(values))
        assert report[f"median_{name}_ms"] == (sorted(values)[1] if len(values) == 3 else sum(values) / 2)
        assert report[f"std_{name}_ms"] == pytest.approx(np.std(values))
        top, below = sorted(values)[-1], sorted(values)[-2]
        for percent in (90, 95, 99):  # between the two largest, by the rank's fraction
            fraction = percent / 100 * (len(values) - 1) - (len(values) - 2)
            assert report[f"p{percent}_{name}_ms"] == pytest.approx(below + fraction * (top - below))
    assert report["max_itl_ms"] == 2000.0 and report["concurrency"] == 11.5 / 8.5


def test_one_token_a_request_has_no_time_between_tokens():
    report = summary([Served(Request(0, 0.0, 7, 1), 0.0, [2.0], [1])])
    assert report["mean_tpot_ms"] == report["max_itl_ms"] == 0.0 and report["mean_ttft_ms"] == 2000.0


def test_the_slowest_rank_counts_token_by_token_and_the_median_over_rounds():
    request = Request(0, 0.0, 1, 2)
    (both,) = slowest([[Served(request, 0.0, [1.0, 5.0], [3, 4])], [Served(request, 0.5, [2.0, 4.0], [3, 4])]])
    assert (both.sent_s, both.times_s, both.tokens) == (0.5, [2.0, 5.0], [3, 4])
    assert median_of([{"a": 1.0, "n": 3}, {"a": 9.0, "n": 3}, {"a": 2.0, "n": 3}]) == {"a": 2.0, "n": 3}


def test_a_workload_is_the_same_for_a_seed_and_within_its_bounds():
    workload = Workload(num_prompts=300, input_len=40, output_len=8, range_ratio=0.5, request_rate=4.0)
    requests = workload.requests(3)
    assert requests == workload.requests(3) != workload.requests(4)
    assert {request.input_len for request in requests} == set(range(20, 41))
    assert {request.output_len for request in requests} == set(range(4, 9))
    arrivals = [request.arrival_s for request in requests]
    gaps = np.diff(arrivals)
    # The mean of n exponential gaps has a standard error of 1 / n**0.5 of itself: four of them.
    assert arrivals[0] == 0.0 and gaps.min() > 0 and abs(gaps.mean() * 4.0 - 1) < 4 / len(gaps) ** 0.5
    assert {request.arrival_s for request in SMALL.requests(0)} == {0.0}


def test_a_prefill_fills_its_slot_and_no_other():
    from tp_overlap_kernels.bench.models.serving import ArmEngine, padded
    from tp_overlap_kernels.bench.models.slots import SlotCache
    from tp_overlap_kernels.bench.models.steps import Prefill

    cache = SlotCache(sizes_of("tiny"), 2, 3, 64, torch.float32, torch.device("cpu"))
    inputs = {length: Prefill(cache, 1, length) for length in (32, 16)}

    def step(length: int) -> Any:
        def run() -> None:
            seen.append((length, inputs[length].filling.item(), inputs[length].last.item()))
            cache.tokens[inputs[length].filling] = 40 + length

        return run

    seen: list[tuple[int, int, int]] = []
    session: Any = types.SimpleNamespace(prompt=lambda batch, tokens, salt: torch.full((batch, tokens), 9 + salt))
    steps = {length: (each, step(length)) for length, each in inputs.items()}
    engine = ArmEngine(session, cache, steps, lambda: cache.tokens.add_(1))
    requests = [Request(0, 0.0, 17, 2), Request(1, 0.0, 5, 2)]
    engine.prompts(requests)
    assert [engine.prefill(2, requests[0]), engine.prefill(1, requests[1])] == [72, 56]
    assert seen == [(32, 2, 16), (16, 1, 4)], "the shortest length that holds the prompt"
    assert inputs[16].ids[0].tolist() == [10] * 5 + [0] * 11
    assert engine.decode() == [1, 57, 73]
    lengths = {padded(tokens, 1000) for tokens in range(1, 1001)}
    assert len(lengths) == 8 and all(padded(tokens, 1000) >= tokens for tokens in range(1, 1001))


def test_rank_0_says_which_requests_have_come():
    from tp_overlap_kernels.bench.models.serving import RankTimer

    waiting = [Request(0, 0.0, 1, 1), Request(1, 0.0, 1, 1), Request(2, 3600.0, 1, 1)]
    asked: list[int] = []
    world: Any = types.SimpleNamespace(barrier=lambda: None, from_rank_0=lambda value: asked.append(value) or 1)
    assert RankTimer(world, at_once=False).arrived(waiting) == 1 and asked == [2]
    assert RankTimer(world, at_once=True).arrived(waiting) == 3 and asked == [2], "then no rank need ask"


@pytest.mark.parametrize("rate", [math.inf, 200.0], ids=["all at once", "one by one"])
def test_every_arm_serves_the_workload(ranks, tmp_path, rate):
    path = tmp_path / "serving.json"
    workload = dataclasses.replace(SMALL, request_rate=rate)
    assert ranks(2).run(served, str(path), workload, 2, None, timeout=240) == [0, 0]
    rows = json.loads(path.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["nccl", "ours", "ours_sums", "ceiling"]
    requests = workload.requests(0)
    for row in rows:
        assert row["completed"] == row["num_prompts"] == 5 and row["rounds"] == 2
        assert row["total_input_tokens"] == sum(request.input_len for request in requests)
        assert row["total_output_tokens"] == sum(request.output_len for request in requests)
        assert 0 < row["median_ttft_ms"] <= row["p99_ttft_ms"] <= row["p99_e2e_latency_ms"]
        assert 0 < row["concurrency"] <= 2
        assert row["correct"] is (None if row["arm"] == "ceiling" else True)
        assert len(row["same_tokens"]) == 2 and all(0 <= same <= 5 for same in row["same_tokens"])
        assert row["arm"] not in ("nccl", "ours_sums") or row["same_tokens"] == [5, 5]
        assert row["request_rate"] == ("inf" if math.isinf(rate) else rate) and row["run"]["commit"] == "abc"


def test_a_spent_budget_leaves_files_as_they_are(ranks, tmp_path):
    path = tmp_path / "serving.json"
    other = {"model": "m", "layers": 1, "published_layers": 1, "world_size": 2, "arm": "ours"}
    write_rows([other], path)
    for each in (path, tmp_path / "new.json"):
        assert ranks(2).run(served, str(each), SMALL, 1, 0.0, timeout=120) == [0, 0]
    assert read_rows(path) == [other] and not (tmp_path / "new.json").exists()


def test_rows_of_the_same_model_are_replaced_and_others_kept(tmp_path):
    path = tmp_path / "serving.json"
    row = {"model": "m", "layers": 1, "published_layers": 1, "world_size": 2, "arm": "ours", "duration": 1.0}
    write_rows([row, row | {"arm": "nccl"}], path)
    write_rows([row | {"duration": 2.0}, row | {"layers": 2}], path)
    assert [(x["layers"], x["arm"], x["duration"]) for x in read_rows(path)] == [
        (1, "nccl", 1.0),
        (1, "ours", 2.0),
        (2, "ours", 1.0),
    ]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--random-range-ratio", "1.5"], "between 0 and 1"),
        (["--request-rate", "0"], "--request-rate is a positive number"),
        (["--random-input-len", "600"], "more than tiny's 512 positions"),
        (["--ranks", "1"], "nothing to reduce"),
        (["--model", "tiny", "--layers", "3"], "between 1 and the 2"),
        (["--json", __file__], "is no result of serving"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(monkeypatch, arguments, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models_cli, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    done = CliRunner().invoke(cli.app, ["serving", *arguments])
    assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output


def test_options_reach_the_ranks(monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models_cli, "run_ranks", lambda *arguments: seen.append(arguments) or 0)
    arguments = ["--num-prompts", "7", "--max-concurrency", "3", "--random-output-len", "5", "--request-rate", "2"]
    assert CliRunner().invoke(cli.app, ["serving", *arguments, "--rounds", "2"]).exit_code == 0
    ((_, options, _),) = seen
    assert options.workload == Workload(7, 3, 24, 5, 0.5, 2.0) and options.rounds == 2


def test_both_verbs_are_in_the_help():
    said = CliRunner().invoke(cli.app, ["--help"]).output
    assert "one-batch" in said and "serving" in said
