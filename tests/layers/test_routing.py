"""Fused or not: every reason is found, counted, and said once."""

import logging
from types import SimpleNamespace

import pytest
import torch

from tp_overlap_kernels.layers import counters, routing


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    routing.reset_counters()
    arena = SimpleNamespace(device=torch.device("cpu"), layout=SimpleNamespace(max_N=64))
    monkeypatch.setattr(routing, "find", {"a group": arena}.get)
    yield
    routing.reset_counters()


GOOD = {"group_name": "a group", "N": 64, "dtype": torch.bfloat16, "device": "cpu", "needs_grad": False}

REASONS = [
    ({"needs_grad": True}, "needs_grad", "inference_mode"),
    ({"dtype": torch.float32}, "dtype", "torch.float32"),
    ({"dtype": torch.float64}, "dtype", "torch.float64"),
    ({"group_name": "another"}, "not_initialised", "group 'another' has no arena. Call tp_overlap_kernels.init()"),
    ({"device": "cuda"}, "device", "on cuda, while its group was initialised for cpu"),
    ({"N": 65}, "max_N", "out_features=65 exceeds max_N=64"),
]


def fuses(layer="mlp.down_proj", rank=0, **changes):
    return routing.fuses(layer, rank=rank, **(GOOD | changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_call_that_fits_is_fused_and_counted_without_a_word(dtype, caplog):
    assert fuses(dtype=dtype) and fuses(dtype=dtype)
    assert counters() == {"fused": 2} and not caplog.records


@pytest.mark.parametrize(("changes", "reason", "sentence"), REASONS, ids=[row[1] for row in REASONS])
def test_a_call_that_does_not_fit_is_counted_each_time_and_said_once(changes, reason, sentence, caplog):
    assert not any([fuses(**changes), fuses(layer="o_proj", **changes), fuses(**changes)])
    assert counters() == {f"unfused: {reason}": 3}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("mlp.down_proj runs unfused: ") and sentence in record.getMessage()


def test_each_reason_is_said_by_itself_and_only_on_rank_0(caplog):
    fuses(dtype=torch.float32)
    fuses(N=100)
    fuses(needs_grad=True, rank=1)
    assert len(caplog.records) == 2
    assert counters() == {"unfused: dtype": 1, "unfused: max_N": 1, "unfused: needs_grad": 1}


def test_counters_are_a_copy():
    counters()["fused"] = 7
    assert counters() == {}


def test_a_compiled_call_decides_and_counts_while_it_is_traced():
    def call(x):
        return x + 1 if fuses(dtype=x.dtype, device=x.device.type) else x

    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    for M in (2, 3, 4):
        assert torch.equal(compiled(torch.zeros(M, dtype=torch.bfloat16)), torch.ones(M, dtype=torch.bfloat16))
    assert counters() == {"fused": 1}
