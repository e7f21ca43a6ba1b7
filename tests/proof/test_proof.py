"""Each part of the proof on CPU ranks, with small counts: it passes on what is right, and fails on what is not."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from unittest import mock

import pytest
import torch

from tests import fuzz
from tests.kernels import gates
from tests.kernels.launched import copying, gemm
from tests.proof import bits, builds, delay, faults, fuzzed, hog, payload, replay, report, sanitizer, soak
from tests.proof.faults import Fault, Story
from tests.proof.ranks import Machine
from tests.proof.report import Found, merged

CPU = Machine(2, "cpu")


# --- results that are wrong on purpose


def one_element(out, earlier):
    out = out.clone()
    out.view(-1)[-1] += 1
    return out


def nan(out, earlier):
    return torch.where(torch.arange(out.numel()).view(out.shape) == 0, float("nan"), out)


def of_an_earlier_call(out, earlier):
    return earlier


def spoiling(spoil, rank: int, victim: int, nth: int):
    """`payload.invoke`, of which `victim` gets another result in its nth call with the first row that it sees twice."""
    invoke, seen, results = payload.invoke, 0, {}

    def spoiled(row, given, weight):
        nonlocal seen
        out = invoke(row, given, weight)
        earlier, results[row] = results.get(row), out
        if rank == victim and earlier is not None and out.numel():
            seen += 1
            if seen == nth:
                return spoil(out, earlier)
        return out

    return mock.patch.object(payload, "invoke", spoiled)


def spoiled(rank, world_size, part, spoil, *args):
    with spoiling(spoil, rank, victim=1, nth=5):
        return part(rank, world_size, *args)


# --- calls in a row, replays, bits


def test_calls_in_a_row(ranks):
    found = merged(ranks(2).run(soak.run, CPU, 60, 3), "mismatches")
    assert found.failures == [] and found.counts["mismatches"] == 0
    assert found.counts["calls"] == 60 == sum(row["calls"] for row in found.rows)
    assert len({(row["op"], row["plan"]) for row in found.rows}) >= 9, "plans were left out"


@pytest.mark.parametrize("spoil", [nan, of_an_earlier_call])
def test_one_wrong_result_among_calls_in_a_row(ranks, spoil):
    found = merged(ranks(2).run(spoiled, soak.run, spoil, CPU, 40, 3), "mismatches")
    assert len(found.failures) == 1 and "rank 1, call" in found.failures[0], found.failures


def test_a_rank_left_out_of_a_sum_is_seen_in_every_row():
    rows = [
        payload.Row("all_reduce", "", 1, 64, 0, torch.bfloat16),
        payload.Row("gemm_all_reduce", "", 8, 32, 16, torch.float16),
    ]
    tables = [payload.Tables(rank, 2, torch.device("cpu"), rows, 8, 5) for rank in range(2)]
    for row in rows:
        products = []
        for one in tables:
            given, weight = one.given(row, 16), one.weight(row)
            products.append(given if weight is None else given @ weight.T)
        wrong = torch.zeros(3, dtype=torch.int64)
        for i, out in enumerate((products[0] + products[1], products[0], 2 * products[0])):
            payload.count_wrong(out, tables[0].wanted(row, 16), wrong[i])
        assert wrong[0] == 0 and (wrong[1:] > 0.9 * products[0].numel()).all(), wrong


def test_no_two_calls_have_the_same_data():
    row = payload.Row("all_reduce", "", 1, 16, 0, torch.bfloat16)
    tables = payload.Tables(0, 2, torch.device("cpu"), [row], 1000)
    assert len({tables.offset(number) for number in range(1000)}) == 1000
    assert tables.offset(999) + 16 <= tables.mine[torch.bfloat16].numel()


def test_replays(ranks):
    found = merged(ranks(2).run(replay.run, CPU, 20, 3), "mismatches")
    assert found.failures == [] and found.counts["replays"] == 20
    assert {row["graph"] for row in found.rows} == {3, 4}


def test_one_wrong_result_in_a_replay(ranks):
    found = merged(ranks(2).run(spoiled, replay.run, of_an_earlier_call, CPU, 12, 3), "mismatches")
    assert found.counts["mismatches"] == 1 and "rank 1: 1 wrong calls in a graph" in found.failures[0], found.failures


def test_bits(ranks):
    by_start = [ranks(2).run(bits.hashes, CPU, 2, 3)] * 2
    found = bits.judge(by_start)
    assert found.failures == [] and found.counts["calls"] > 200
    other = copy.deepcopy(by_start[1])
    for rank in (0, 1):
        other[rank][0]["graph"][1] += 1
    found = bits.judge([by_start[0], other])
    assert found.counts["mismatches"] == 2 and "start 1, rank 0, graph" in found.failures[0]


def test_one_result_with_other_bits(ranks):
    found = bits.judge([ranks(2).run(spoiled, bits.hashes, one_element, CPU, 2, 3)])
    assert found.counts["mismatches"] == 1, found.failures


# --- random calls


def test_random_calls(ranks):
    found = merged(ranks(2).run(fuzzed.run, CPU, 40, 7, 60.0))
    assert found.failures == [] and found.counts["cases"] == 40


def off_by_a_rounding(rank, world_size, *args):
    right = fuzz.invoke

    def wrong(call, tensors, rank):
        out = right(call, tensors, rank)
        return out + 2.0**-4 if call.number == 12 and rank == 0 else out

    with mock.patch.object(fuzz, "invoke", wrong):
        return fuzzed.run(rank, world_size, *args)


def test_a_wrong_random_call_is_shrunk_to_one_line(ranks):
    found = merged(ranks(2).run(off_by_a_rounding, CPU, 20, 0, 60.0))
    assert len(found.failures) == 1 and "shrunk: python -m tests.fuzz" in found.failures[0], found.failures


def test_too_few_random_calls_are_a_violation(ranks):
    found = merged(ranks(2).run(fuzzed.run, CPU, 40, 7, 0.0))
    assert "of 40 cases within" in found.failures[0]


# --- delays


def test_the_build_with_delays_is_right(ranks):
    settings = [delay.Setting(point, point % 2, point % 3, 5000) for point in range(len(delay.POINTS))]
    found = merged(ranks(2).run(delay.run, CPU, None, settings, {5000: 24}, 5), "calls")
    line, failures = delay.judge(None, found)
    assert failures == [] and line["settings"] == 5 and line["calls"] == 240


@pytest.mark.parametrize("mutant", delay.MUTANTS_ON["cpu"])
def test_a_broken_order_is_noticed(ranks, mutant):
    settings = [setting for setting in delay.settings(2, (20_000,)) if setting.point in (1, 3)]
    found = merged(ranks(2).run(delay.run, CPU, mutant, settings, {20_000: 24}, 5, timeout=120), "calls")
    line, failures = delay.judge(mutant, found)
    assert failures == [] and line["mismatches"] > 0


def test_a_mutant_that_nothing_notices_is_a_violation():
    found = Found(dict.fromkeys(("settings", "calls", "mismatches", "seconds"), 0))
    assert delay.judge("one staging half", found)[1] == ["mutant 'one staging half': no setting notices it"]


def test_the_sweep_has_ninety_settings():
    assert len({str(setting) for setting in delay.settings(2)}) == 90


def kernels():
    yield gemm("gemm_all_reduce", "one_shot", 16, 1024, 128)
    yield copying("two_shot", 65_536)


def test_delays_are_compiled_into_their_build_alone():
    before = [made.compile().asm["ptx"] for made in kernels()]
    with builds.built("compiled", None, table=0x7F0012345600):
        delayed = [made.compile().asm["ptx"] for made in kernels()]
    after = [made.compile().asm["ptx"] for made in kernels()]
    assert before == after
    for ours, theirs in zip(before, delayed, strict=True):
        assert "held_back" not in ours and theirs.count("held_back:") > 4
        gates.barrier_before_release(theirs)


def test_the_mutant_without_a_barrier_has_none():
    with builds.built("compiled_mutant", "release without barrier", table=0x7F0012345600):
        with pytest.raises(AssertionError, match="no barrier of the CTA between"):
            gates.barrier_before_release(copying("two_shot", 65_536).compile().asm["ptx"])


def test_an_edit_that_finds_nothing_is_an_error():
    stale = {"stale": (builds.Edit("lang/signal.py", "no such text", ""),)}
    with mock.patch.dict(builds.MUTANTS, stale), pytest.raises(AssertionError, match="does not hold 'no such text'"):
        with builds.built("stale", "stale", table=0):
            pass


# --- faults


def test_faults():
    chosen = [
        Fault("killed", 1, "eager"),
        Fault("stopped", 0, "graph"),
        *(Fault("mismatch", 1, m) for m in faults.MODES),
    ]
    found = faults.run(CPU, chosen, timeout_s=1.0, limit_s=60, at_once=2)
    assert found.failures == [] and found.counts["as promised"] == 4 and found.counts["a job afterwards"] == "clean"


STORIES = {
    Fault("late", 1, "eager"): Story(0, True, "PeerTimeout", "rank 0 waited for rank 1", 1.1, True, "PeerTimeout"),
    Fault("killed", 1, "graph"): Story(0, True, "PeerDied", "rank 1 (pid 7)", 0.2, True, "PeerDied"),
}


@pytest.mark.parametrize("fault", STORIES, ids=str)
@pytest.mark.parametrize(
    "change, complaint",
    [
        ({}, None),
        ({"error": "GroupFailed"}, "raised GroupFailed"),
        ({"error": ""}, "raised nothing"),
        ({"seconds": 3.5}, "after 3.50 s"),
        ({"text": "rank 0 waited"}, "nobody names rank 1"),
        ({"nan": False}, "is not NaN"),
        ({"refused": ""}, "the next call raised nothing"),
        ({"clean": False}, "a call before the fault was wrong"),
        (None, "rank 0 left no story"),
    ],
)
def test_what_a_survivor_must_tell(fault, change, complaint):
    told = [Story(1, True)] if fault.kind == "late" else []
    told += [dataclasses.replace(STORIES[fault], **change)] if change is not None else []
    wrong = faults.judge(fault, told, 2, timeout_s=1.0)
    assert [text for text in wrong if complaint in text] if complaint else wrong == [], wrong


# --- few SMs


def test_calls_beside_a_hog(ranks):
    found = merged(ranks(2).run(hog.run, CPU, 1, 5.0, 3, timeout=120))
    assert found.failures == [] and found.counts["trials"] == found.counts["completed"] == len(found.rows) > 30


DONE, LATE = hog.Trial("completed", "completed", 0, 0.1, 0), hog.Trial("unfinished", "completed", 0, 2.5, 0)
RAISED, NEVER = hog.Trial("PeerTimeout", "PeerTimeout", 0, 0.6, 0), hog.Trial("unfinished", "unfinished", 0, 2.5, 0)


@pytest.mark.parametrize(
    "free_sms, plan, everyone, complaint",
    [
        (1, "two_shot", [DONE, DONE], None),
        (1, "two_shot", [RAISED, DONE], None),
        (1, "two_shot", [LATE, DONE], "ranks [0] neither complete nor raise beside it"),
        (1, "sm90", [DONE, LATE], None),
        (66, "sm90", [DONE, LATE], "ranks [1] neither complete nor raise beside it"),
        (1, "sm90", [NEVER, DONE], "neither complete nor raise when it has ended"),
        (1, "sm90", [dataclasses.replace(DONE, seconds=8.0), DONE], "the host was held for 8.0 s"),
        (1, "two_shot", [DONE, dataclasses.replace(DONE, wrong=1)], "1 wrong calls"),
    ],
)
def test_what_may_happen_beside_a_hog(free_sms, plan, everyone, complaint):
    row = payload.Row("gemm_all_reduce", plan, 1, 8, 8, torch.bfloat16)
    line = hog.judge(free_sms, (0, 1), row, everyone, 0.5, hog.Hog(torch.device("cpu")))
    assert [text for text in line["failures"] if complaint in text] if complaint else line["failures"] == []


# --- compute-sanitizer


def tool(tmp_path, says: str) -> str:
    """A stand-in for the tool: runs the command and says what it found."""
    file = tmp_path / "sanitizer"
    file.write_text(
        f'#!/bin/sh\nwhile [ "$1" != "{sys.executable}" ]; do shift; done\n"$@"\ncode=$?\necho "{says}"\nexit $code\n'
    )
    file.chmod(0o755)
    return str(file)


def test_sanitizer(tmp_path):
    found = sanitizer.run(CPU, ("memcheck",), 100, tool(tmp_path, "========= ERROR SUMMARY: 0 errors"))
    assert found.failures == [] and found.counts["calls"] > 50 and found.counts["errors"] == 0


@pytest.mark.parametrize(
    "exit_code, output, complaint",
    [
        (0, "calls 9, wrong 0\n========= ERROR SUMMARY: 3 errors", "3 errors"),
        (0, "calls 9, wrong 2\n========= ERROR SUMMARY: 0 errors", "2 wrong results"),
        (0, "calls 9, wrong 0", "nothing was checked"),
        (0, "========= ERROR SUMMARY: 0 errors", "nothing was checked"),
        (1, "calls 9, wrong 0\n========= ERROR SUMMARY: 0 errors", "exit code 1"),
        (None, "calls 9, wrong 0", "not done within its time"),
    ],
)
def test_what_the_sanitizer_may_say(exit_code, output, complaint):
    _, failures = sanitizer.judge(sanitizer.Checked("memcheck", 0, exit_code, output))
    assert any(complaint in text for text in failures), failures


def test_a_sanitizer_that_is_not_there_is_a_violation():
    assert "nothing was checked" in sanitizer.run(CPU, ("memcheck",), 5, "/no/such/tool").failures[0]


# --- the command


def test_a_violation_is_printed_written_and_an_exit_code(tmp_path, capsys):
    path = tmp_path / "soak.json"
    found = Found({"calls": 3}, [{"op": "all_reduce", "calls": 3}], ["rank 1, call 2: 7 wrong elements"])
    assert report.finish("soak", found, {"gpu": "none"}, path) == 1
    assert "VIOLATION rank 1, call 2" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["failures"] == found.failures and written["meta"] == {"gpu": "none", "part": "soak"}
    assert report.finish("soak", Found({"calls": 3}), {}, None) == 0


def test_the_command_line(tmp_path):
    path = tmp_path / "soak.json"
    command = [sys.executable, "-m", "tests.proof", "soak", "--device", "cpu", "--count", "8", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert written["counts"]["calls"] == 8 and written["failures"] == [] and written["counts"]["seed"] == 1
    assert {"gpu", "driver", "torch", "triton", "commit", "command", "date"} <= set(written["meta"])
