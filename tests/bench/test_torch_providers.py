"""torch's symmetric memory as a rival: what its collectives are given and what comes back, with stand-ins for them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tp_overlap_kernels.bench.cases import ALL_REDUCE, ALL_REDUCE_NORM, GEMM_ALL_REDUCE, Case, Layer
from tp_overlap_kernels.bench.launch import Topology, World
from tp_overlap_kernels.bench.norm import EPS, norm_operands
from tp_overlap_kernels.bench.provider import Session
from tp_overlap_kernels.bench.providers import default_names, make

LAYER = Layer("any", "", 48, 40)
ALONE = ("copy+symm_mem_one_shot", "copy+symm_mem_two_shot")


@dataclasses.dataclass
class FakeOps:
    """torch.ops.symm_mem on one process, as if each of two ranks had the same message.

    As on a device, the two-shot collective leaves sums in the symmetric memory that it was given.
    """

    symmetric: torch.Tensor

    def one_shot_all_reduce_copy(self, buffer, local, op, group_name):
        assert self._is_symmetric(buffer) and not self._is_symmetric(local) and (op, group_name) == ("sum", "group")
        assert local.is_contiguous() and local.shape == buffer.shape
        return 2 * buffer.copy_(local)

    def two_shot_all_reduce_out(self, buffer, op, group_name, out):
        assert self._is_symmetric(buffer) and not self._is_symmetric(out) and (op, group_name) == ("sum", "group")
        assert out.is_contiguous() and out.shape == buffer.shape
        return out.copy_(buffer.mul_(2))

    def _is_symmetric(self, tensor):
        return tensor.untyped_storage().data_ptr() == self.symmetric.untyped_storage().data_ptr()


@pytest.fixture
def session(monkeypatch):
    world = World(0, Topology(2, "cuda"), torch.device("cuda"), "group", None)
    session = Session(world, max_M=16, max_N=64, dtype=torch.bfloat16)
    symmetric = session.once("symmetric buffer", lambda: torch.full((session.max_elems,), torch.nan).bfloat16())
    monkeypatch.setattr(torch.ops, "symm_mem", FakeOps(symmetric))
    return session


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("M", [1, 16])
def test_an_all_reduce_alone_takes_any_message_and_gives_a_result_of_its_own(session, name, M):
    message = torch.randn(M, LAYER.N).bfloat16()
    call = make(name, session).prepare(Case(ALL_REDUCE, LAYER, M, "bfloat16", 2), message)
    results, wanted = [], []
    for _ in range(3):
        before = message.clone()
        results.append(call(None))
        wanted.append(2 * before)
        assert torch.equal(message, before), "the message has changed"
        message.copy_(torch.randn(M, LAYER.N))
    for result, sum_ in zip(results, wanted, strict=True):
        assert torch.equal(result, sum_), "a later call wrote into the result"
    assert len({each.untyped_storage().data_ptr() for each in (*results, message)}) == 4


def test_a_norm_behind_it_is_that_of_the_sum(session):
    message = torch.randn(3, LAYER.N).bfloat16()
    case = Case(ALL_REDUCE_NORM, LAYER, 3, "bfloat16", 2)
    y, new_residual = make("copy+symm_mem_one_shot+rms_norm", session).prepare(case, message)(None)
    residual, weight = norm_operands(LAYER, 3, message.dtype, message.device)
    assert torch.equal(new_residual, 2 * message + residual)
    assert torch.equal(y, torch.nn.functional.rms_norm(new_residual, weight.shape, weight, EPS))


def test_a_run_compares_with_them_where_there_are_gpus(session):
    names = default_names(ALL_REDUCE, session.world)
    assert set(names) == {"ours", "copy+nccl", *ALONE}
    assert not {*ALONE} & {*default_names(GEMM_ALL_REDUCE, session.world)}
    cpu = World(0, Topology(2, "cpu"), torch.device("cpu"), "group", None)
    assert not {*ALONE} & {*default_names(ALL_REDUCE, cpu)}
