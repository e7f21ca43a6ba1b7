"""The words as AMD GPUs have them, interpreted: how a wait ends, what it leaves, who counts.

Their assembly has stand-ins here; what the compiler makes of it is looked at in tests/kernels/test_amd.py.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl

from tp_overlap_kernels.lang import distributed, gcn, signal, signal_amd
from tp_overlap_kernels.lang.interpreter import as_tensor, interpret, substitute, value_of
from tp_overlap_kernels.memory.record import ABORTED, MISMATCH, TIMEOUT, FailedWait, Record

OP, RANK, PEER, TILE = 1, 0, 1, 7
EPOCH, HASH = 5, 9
WORD = EPOCH << 16 | HASH
FIRST_LOOK = 512  # polls before a wait looks at anything but its slot


@triton.jit
def wait_for_one(slot_ptr, out_ptr, control_ptr, record_ptr, word, timeout_ns, rank, peer, tile_id):
    who = signal.waiter(1, rank, peer, tile_id)
    status = signal_amd.wait(slot_ptr.to(tl.int64), word, timeout_ns, control_ptr, record_ptr, who)
    tl.store(out_ptr, status)


@triton.jit
def wait_for_words(words_ptr, out_ptr, table_ptr, count, wanted, BITS: tl.constexpr):
    address = words_ptr.to(tl.int64)
    wanted = tl.full((), 0, tl.int64) + wanted
    status = distributed._poll_amd(address, count, wanted, table_ptr.to(tl.int64), "acquire", BITS)
    tl.store(out_ptr, status)


@triton.jit
def raise_slots(set_ptr, added_ptr, word):
    signal_amd.notify(set_ptr.to(tl.int64), tl.full((), 0, tl.int64) + word)
    signal_amd.notify_add(added_ptr.to(tl.int64), tl.full((), 0, tl.int64) + word)


@triton.jit
def count(control_ptr):
    signal_amd.count_in(control_ptr, tl.load(control_ptr) + 1)


@contextlib.contextmanager
def stand_ins(looks: Callable[[int, int], None] = lambda n, address: None) -> Iterator[list[str]]:
    """For the assembly: a few threads a program, and a clock that goes on by a millisecond whenever it is read.

    looks(n, address): what happens before the n-th look at a word. Yields what was passed, in order.
    """
    passed: list[str] = []
    state = {"looks": 0, "now": 1000}

    def look(address: int) -> None:
        state["looks"] += 1
        looks(state["looks"], address)

    def word_at(address):
        look(value_of(address))
        return as_tensor(ctypes.c_int64.from_address(value_of(address)).value, tl.int64)

    def words_at(addresses, BITS):
        look(int(addresses.handle.data[0]))
        dtype = tl.int64 if value_of(BITS) == 64 else tl.int32
        return tl.load(addresses.to(tl.pointer_type(dtype))).to(tl.int64)

    def clock_ns():
        passed.append("clock")
        state["now"] += 1_000_000
        return as_tensor(state["now"], tl.int64)

    with contextlib.ExitStack() as stack:
        for name, stand_in in (("word_at", word_at), ("words_at", words_at), ("clock_ns", clock_ns)):
            stack.enter_context(substitute(getattr(gcn, name), stand_in))
        for name in ("join", "release", "acquire"):
            stack.enter_context(substitute(getattr(gcn, name), lambda name=name: passed.append(name)))
        yield passed


class Group:
    """What a wait is given."""

    def __init__(self) -> None:
        self.slot, self.out = torch.zeros(1, dtype=torch.int64), torch.full((1,), -1, dtype=torch.int32)
        self.headers, self.record = torch.zeros(2, 8, dtype=torch.int64), Record(torch.device("cpu"))
        self.control = torch.zeros(64, dtype=torch.int64)
        self.control[signal.HEADERS.value] = self.headers.data_ptr()
        self.control[signal.HEADERS_BYTES.value] = 64

    def wait(self, happens: Callable[[int, int], None] = lambda n, address: None, timeout_ns: int = 0) -> list[str]:
        def looks(n: int, address: int) -> None:
            assert n < 5000, "a wait that does not end"
            happens(n, address)

        with stand_ins(looks) as passed:
            args = self.slot, self.out, self.control, self.record.words, WORD, timeout_ns, RANK, PEER, TILE
            interpret(wait_for_one, 1, *args)
        return passed

    def failed(self, code: int, seen: int) -> bool:
        """Whether the record, the status and control say so."""
        expected = FailedWait(code, "gemm_all_reduce", RANK, PEER, TILE, WORD, seen)
        return (self.record.read(), self.out.item(), self.control[signal.FAILED.value].item()) == (expected, code, 1)


@pytest.mark.parametrize("arrives", [1, 2, FIRST_LOOK + 4])
@pytest.mark.parametrize("word", [WORD, (EPOCH + 1) << 16 | 4, 1 << 40 << 16], ids=["this call", "next call", "far"])
def test_an_arrival_ends_it_well(arrives, word):
    group = Group()

    def happens(n, address):
        if n == arrives:
            group.slot[0] = word

    assert group.wait(happens)[-1] == "acquire"
    assert group.out.item() == 0
    assert group.record.read() is None and group.control[signal.FAILED.value] == 0


def test_words_of_older_calls_do_not_end_it():
    group = Group()
    group.slot[0] = (EPOCH - 1) << 16 | HASH
    group.wait(timeout_ns=1)
    assert group.failed(TIMEOUT, (EPOCH - 1) << 16 | HASH)


def test_it_lasts_as_long_as_it_may():
    """The clock is read first when the wait has lasted for a while: then its time begins."""
    group = Group()
    passed = group.wait(timeout_ns=2_500_000)
    assert passed == ["clock"] * 4 + ["release", "acquire"]  # 3 ms after the first is the first that is too late
    assert group.failed(TIMEOUT, 0)


def test_another_call_of_the_peer_is_seen_in_its_slot():
    group = Group()
    group.slot[0] = WORD + 1
    assert group.wait() == ["release", "acquire"]  # of the record; of the slot
    assert group.failed(MISMATCH, WORD + 1)


@pytest.mark.parametrize("header, code", [(WORD + 1, MISMATCH), (WORD, TIMEOUT), ((EPOCH - 2) << 16 | 3, TIMEOUT)])
def test_another_call_of_the_peer_is_seen_in_its_header(header, code):
    group = Group()
    group.headers[EPOCH & 1, PEER] = header
    group.headers[~EPOCH & 1, PEER] = WORD + 2  # of another epoch's parity: not looked at
    group.headers[EPOCH & 1, PEER + 1] = WORD + 3  # another peer's
    group.wait(timeout_ns=1)
    assert group.failed(code, header if code == MISMATCH else 0)


@pytest.mark.parametrize("sent", [0, WORD], ids=["sent nothing", "sent just then"])
def test_all_waits_told_to_end(sent):
    group = Group()
    group.record.words[0] = 1
    abort = group.record.words.data_ptr()

    def happens(n, address):
        if address == abort:
            group.slot[0] = sent

    group.wait(happens)
    assert group.failed(ABORTED, sent)


@pytest.mark.parametrize(
    "closed, arrives, code",
    [(PEER, None, ABORTED), (PEER, "at once", 0), (2, 600, 0)],
    ids=["sent nothing", "behind the look that finds it closed", "another one closed"],
)
def test_a_peer_that_has_closed(closed, arrives, code):
    group = Group()
    abort = group.record.words.data_ptr()

    def happens(n, address):
        if address == abort:
            group.record.close_peer(closed)
            if arrives == "at once":
                group.slot[0] = WORD
        if n == arrives:
            group.slot[0] = WORD

    group.wait(happens)
    assert group.out.item() == code
    assert group.failed(ABORTED, 0) == (code == ABORTED)


def test_after_a_failure_no_wait_lasts_and_none_reports():
    group = Group()
    group.control[signal.FAILED.value] = 1
    group.wait()
    assert group.out.item() == ABORTED
    assert group.record.read() is None


def test_one_wait_reports():
    group = Group()
    group.control[signal.REPORTER.value] = 1  # another CTA is about to
    group.wait(timeout_ns=1)
    assert group.out.item() == TIMEOUT and group.control[signal.FAILED.value] == 1
    assert group.record.read() is None


def test_an_arrival_follows_a_release():
    slots = torch.tensor([3, 4])
    with stand_ins() as passed:
        interpret(raise_slots, 1, slots, slots[1:], 10)
    assert slots.tolist() == [10, 14]
    assert passed == ["release", "release"]


def test_the_last_program_advances_the_epoch():
    control = torch.zeros(16, dtype=torch.int64)
    for call in (1, 2):
        with stand_ins() as passed:
            interpret(count, 3, control)
        assert control[signal.EPOCH.value] == call and control[signal.ENTERED.value] == 0
        assert passed == ["join"] * 3


@pytest.fixture(params=[1, 4], ids=["1 thread", "4 threads"])
def threads(request, monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(distributed, "threads", lambda: tl.constexpr(request.param))
    vars(distributed._poll_amd.fn).pop("_cpu_python", None)  # which has been rewritten for one thread
    yield
    vars(distributed._poll_amd.fn).pop("_cpu_python", None)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_words_are_waited_for_one_after_the_other(dtype):
    """As many at a time as there are threads. What lies behind the last is not looked at."""
    words, out = torch.tensor([2, 0, 2, 2, 2, 2, 7], dtype=dtype), torch.full((1,), -1, dtype=torch.int32)
    table = torch.zeros(16, dtype=torch.int64)

    def looks(n, address):
        assert n < 5000
        if n == 600:
            words[1] = 2

    with stand_ins(looks) as passed:
        interpret(wait_for_words, 1, words, out, table, 6, 2, dtype.itemsize * 8)
    assert out.item() == 0 and passed[-1] == "acquire" and words[1] == 2


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("wanted", [2, -2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_word_that_does_not_come(dtype, wanted):
    words, out = torch.tensor([wanted, 1, wanted], dtype=dtype), torch.full((1,), -1, dtype=torch.int32)
    table = torch.zeros(16, dtype=torch.int64)
    table[distributed.TIMEOUT_NS.value] = 1
    with stand_ins():
        interpret(wait_for_words, 1, words, out, table, 3, wanted, dtype.itemsize * 8)
        assert out.item() == 1
        left = [table[at.value].item() for at in (distributed.ADDRESS, distributed.WANTED, distributed.SEEN)]
        assert left == [words[1:].data_ptr(), wanted, 1]
        assert table[distributed.FAILED.value] == 1
        table[distributed.SEEN.value] = -7
        interpret(wait_for_words, 1, words, out, table, 3, wanted, dtype.itemsize * 8)
    assert out.item() == 1 and table[distributed.SEEN.value] == -7, "reported twice"


def test_one_wait_leaves_its_word():
    words, out = torch.zeros(1, dtype=torch.int64), torch.full((1,), -1, dtype=torch.int32)
    table = torch.zeros(16, dtype=torch.int64)
    table[distributed.TIMEOUT_NS.value], table[distributed.FAILED.value] = 1, 1
    with stand_ins(), substitute(gcn.word_at, lambda address: as_tensor(0, tl.int64)):  # it failed just after the look
        interpret(wait_for_words, 1, words, out, table, 1, 2, 64)
    assert out.item() == 1 and table[distributed.ADDRESS.value] == 0
