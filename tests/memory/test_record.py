"""The record of a failed wait: written by a device or a host, read as an exception that says everything."""

from __future__ import annotations

import pytest
import torch

import tp_overlap_kernels as tpo
from tp_overlap_kernels.kernels import (
    all_reduce_one_shot_push,
    all_reduce_one_shot_push_add_rms_norm,
    all_reduce_two_shot_push,
    gemm_all_reduce_one_shot_push,
    gemm_all_reduce_two_shot_push,
    gemm_reduce_scatter_push,
    reduce_scatter_push,
)
from tp_overlap_kernels.lang import signal
from tp_overlap_kernels.memory.record import ABORTED, MISMATCH, OPS, TIMEOUT, WORDS, FailedWait, Record, op_code

CPU = torch.device("cpu")
WAIT = FailedWait(TIMEOUT, "gemm_all_reduce", rank=3, peer=5, tile=77, wanted=9 << 16 | 0xABCD, seen=8 << 16 | 0x1234)


def test_what_is_written_is_read():
    for code in (TIMEOUT, MISMATCH, ABORTED):
        for op in OPS:
            record = Record(CPU)
            assert record.read() is None and not record.failed
            wait = FailedWait(code, op, 1, 0, 2**31, (1 << 62) | 7, 0)
            record.write(wait)
            assert record.read() == wait and record.failed


def test_words_as_a_device_writes_them():
    record = Record(CPU)
    assert record.words.dtype == torch.int64 and record.words.numel() == WORDS
    record.words[2:9] = torch.tensor([2, 2, 6, 1, 40, 5 << 16 | 1, 5 << 16 | 2])
    assert record.read() is None and not record.failed, "not before the last word is there"
    record.words[1] = 1
    assert record.read() is None and record.failed
    record.words[1] = 2
    assert record.read() == FailedWait(MISMATCH, "gemm_reduce_scatter", 6, 1, 40, 5 << 16 | 1, 5 << 16 | 2)


def test_an_abort_is_a_failure_without_a_wait():
    record = Record(CPU)
    record.abort()
    assert record.failed and record.read() is None and record.words[0] == 1


@pytest.mark.parametrize(
    "code, dead, error, parts",
    [
        (TIMEOUT, {}, tpo.PeerTimeout, ["for 2.5 s", "TP_OVERLAP_TIMEOUT", "late, gone, or in another call"]),
        (MISMATCH, {}, tpo.CallMismatch, ["hash wanted 0xabcd, seen 0x1234", "same calls in the same order"]),
        (ABORTED, {}, tpo.GroupFailed, ["until the wait was aborted"]),
        (ABORTED, {5: 4242, 1: 17}, tpo.PeerDied, ["process of rank 1 (pid 17), rank 5 (pid 4242) has ended"]),
        (TIMEOUT, {5: 4242}, tpo.PeerDied, ["rank 5 (pid 4242) has ended"]),
    ],
    ids=["late", "another call", "aborted", "dead", "dead before it was noticed"],
)
def test_the_error_says_what_is_known(code, dead, error, parts):
    wait = FailedWait(code, WAIT.op, WAIT.rank, WAIT.peer, WAIT.tile, WAIT.wanted, WAIT.seen)
    raised = wait.error("tp", 2.5, dead)
    text = str(raised)
    assert type(raised) is error and isinstance(raised, tpo.GroupFailed)
    assert text.startswith("gemm_all_reduce: rank 3 waited for rank 5 (tile 77, epoch wanted 9, seen 8) in group 'tp'")
    assert [part for part in parts if part not in text] == [], text
    assert text.endswith(
        "The output is NaN and the group refuses further calls; close() and init() on every rank make a new one."
    )


def test_the_numbers_are_those_of_the_kernels():
    kernels = {
        gemm_all_reduce_one_shot_push: "gemm_all_reduce",
        gemm_all_reduce_two_shot_push: "gemm_all_reduce",
        gemm_reduce_scatter_push: "gemm_reduce_scatter",
        reduce_scatter_push: "gemm_reduce_scatter",
        all_reduce_one_shot_push: "all_reduce",
        all_reduce_two_shot_push: "all_reduce",
        all_reduce_one_shot_push_add_rms_norm: "all_reduce_add_rms_norm",
    }
    for module, op in kernels.items():
        assert module.OP.value == op_code(op), module.__name__
    assert (signal.TIMEOUT.value, signal.MISMATCH.value, signal.ABORTED.value) == (TIMEOUT, MISMATCH, ABORTED)
