"""The plan decode up to its launcher: when a weight may be loaded ahead, and what the short way does. No device."""

import dataclasses
import types

import pytest
import torch

import tp_overlap_kernels as tpo
from tp_overlap_kernels.dispatch import Plan
from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.kernels.start import Start
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.ops import decode, prepared

PLAN = Plan.parse("decode:block_n=64,splits=2")
M, N, K = 4, 96, 64
START = 13  # among the arguments of the launcher


class Fake:
    """The op's side of an arena, and the launcher, which keeps what it was given."""

    def __init__(self, monkeypatch, arena):
        self.calls, self.arena = [], arena
        arena.cache["decode"] = lambda *args: self.calls.append(args)
        monkeypatch.setattr(decode, "stream_of", lambda index: 5)

    def run(self, b, bias=None, a=None):
        out = torch.empty(M, b.shape[0], dtype=b.dtype)
        a = torch.zeros(M, b.shape[1], dtype=b.dtype) if a is None else a
        issued = decode.run(self.arena, PLAN, a, b, bias, out, 7)
        return issued, a, out

    def starts(self):
        found = [Start(call[START]).name for call in self.calls]
        self.calls.clear()
        return found


@pytest.fixture
def fake(monkeypatch):
    tpo.init(max_M=64, max_N=128)
    yield Fake(monkeypatch, arenas.get("local"))
    tpo.close()


def weight():
    return torch.zeros(N, K, dtype=torch.bfloat16)


def test_a_weight_goes_ahead_once_it_is_known_to_be_at_rest(fake):
    b, other = weight(), weight()
    for x in (b, other, b, b, other):
        fake.run(x)
    assert fake.starts() == ["LAUNCHED_AHEAD"] * 2 + ["WEIGHTS_AHEAD"] * 3


def swap(b):
    b.data = weight()


@pytest.mark.parametrize(
    "write", [lambda b: b.add_(1), lambda b: b[0].zero_(), lambda b: torch.neg(weight(), out=b), swap]
)
def test_a_weight_that_was_written_waits_for_its_writer(fake, write):
    b = weight()
    fake.run(b)
    fake.run(b)
    write(b)
    fake.run(b)
    fake.run(b)
    assert fake.starts() == ["LAUNCHED_AHEAD", "WEIGHTS_AHEAD", "LAUNCHED_AHEAD", "WEIGHTS_AHEAD"]


def test_a_fresh_tensor_in_the_same_memory_is_not_at_rest(fake):
    memory = weight()
    for _ in range(3):
        fake.run(torch.from_numpy(memory.view(torch.int16).numpy()).view(torch.bfloat16))
    assert fake.starts() == ["LAUNCHED_AHEAD"] * 3


def test_writes_to_an_inference_tensor_are_not_counted_so_it_never_goes_ahead(fake):
    with torch.inference_mode():
        b = weight()
    fake.run(b)
    fake.run(b)
    assert fake.starts() == ["LAUNCHED_AHEAD"] * 2


def test_a_copy_that_was_just_made_never_goes_ahead(fake):
    b = torch.zeros(N, K + 1, dtype=torch.bfloat16)[:, 1:]  # rows that TMA cannot read
    fake.run(b)
    fake.run(b)
    assert fake.starts() == ["LAUNCHED_AHEAD"] * 2


def test_ranks_that_share_a_device_begin_in_order(fake):
    fake.arena.topology = dataclasses.replace(fake.arena.topology, ranks_per_device=2)
    b = weight()
    fake.run(b)
    fake.run(b)
    assert fake.starts() == ["IN_ORDER"] * 2


def test_the_launcher_gets_sizes_strides_and_the_bias(fake):
    b, bias = torch.zeros(N, 80, dtype=torch.float16)[:, :K], torch.zeros(N, dtype=torch.float16)
    _, a, out = fake.run(b, bias)
    pointers = (a.data_ptr(), b.data_ptr(), bias.data_ptr(), out.data_ptr())
    assert fake.calls == [(*pointers, M, N, K, K, 80, 1, 64, 2, 0, Start.LAUNCHED_AHEAD, 7, 5)]


def test_the_short_way_takes_other_addresses_and_is_shown_the_weight(fake):
    b, other = weight(), weight()
    issued, a, out = fake.run(b)
    call = prepared.Prepared(fake.arena.turn, None, out)
    call.learn(issued, a, b, None, out)
    for x in (other, b, other, other):
        call.gemm(a, x, None, out)
    assert [call[1] for call in fake.calls[1:]] == [x.data_ptr() for x in (other, b, other, other)]
    assert not any(call[2] for call in fake.calls), "there is no bias"
    assert fake.starts() == ["LAUNCHED_AHEAD"] * 2 + ["WEIGHTS_AHEAD"] * 3


def test_there_is_no_short_way_where_an_operand_was_copied(fake):
    b = torch.zeros(N, K + 1, dtype=torch.bfloat16)[:, 1:]
    issued, a, out = fake.run(b)
    assert issued.again(a_desc=a.data_ptr(), b_desc=b.data_ptr(), bias_ptr=0, out_ptr=out.data_ptr()) is None


@pytest.mark.parametrize("spec", ["decode:block_n=96,splits=1", "decode:block_n=64,splits=3"])
def test_numbers_that_the_kernel_does_not_know_are_refused(fake, spec):
    with pytest.raises(InvalidInput, match="block_n must be one of 64, 128, splits one of 1, 2, 4, 8"):
        decode.rows_that_fit(fake.arena, Plan.parse(spec), N)


def test_rows_are_as_many_as_a_slot_holds(fake):
    arena = types.SimpleNamespace(layout=types.SimpleNamespace(sentinel_bytes=10 * 2 * 8192))
    assert decode.rows_that_fit(arena, PLAN, 8192) == decode.rows_that_fit(arena, PLAN, 8190) == 10
    with pytest.raises(InvalidInput, match="no room for one row"):
        decode.rows_that_fit(arena, PLAN, 1 << 20)
