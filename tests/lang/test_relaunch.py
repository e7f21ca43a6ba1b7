"""lang/relaunch.py against Triton's own launcher, with stand-ins for the C function and the driver."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import triton
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from tests import fake_driver
from tp_overlap_kernels.lang import relaunch
from tp_overlap_kernels.lang.launch import Issued, Launch

NAMES = ["a_desc", "b_desc", "bias_ptr", "out_ptr", "heap_ptr", "M", "one", "WORLD", "HAS_BIAS"]
GRID = 5

pytestmark = pytest.mark.skipif(
    ".".join(triton.__version__.split(".")[:2]) not in relaunch.VERSIONS,
    reason="this Triton is launched the public way",
)


@pytest.fixture
def driver(monkeypatch):
    active = fake_driver.Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    return active


def _tensors():
    return [torch.zeros(16, 64, dtype=torch.bfloat16) for _ in range(2)] + [torch.zeros(64, dtype=torch.bfloat16)] * 2


def _args(a, b, bias, out, heap):
    describe = lambda x: TensorDescriptor(x, [16, 64], [64, 1], [16, 32])
    return (describe(a), describe(b), bias, out, heap, 16, 1)


class _Case:
    """One launch that has been made the public way."""

    def __init__(self, tma=True):
        self.heap = torch.zeros(2, dtype=torch.int64)
        self.tensors = _tensors()
        args = _args(*self.tensors, self.heap)
        self.compiled, self.c = fake_driver.compiled(NAMES, (*args, 2, True), constants=2, tma=tma)
        kernel = SimpleNamespace(arg_names=NAMES)
        self.launch = Launch(kernel, {"WORLD": 2, "HAS_BIAS": True}, False, self.compiled, (2, True))
        self.issued = self.launch(GRID, *args)

    def again(self):
        return self.issued.again(**self.addresses(self.tensors))

    def addresses(self, tensors):
        return dict(zip(NAMES, [x.data_ptr() for x in tensors], strict=False))


@pytest.mark.parametrize("tma", [True, False], ids=["descriptors", "pointers"])
def test_it_launches_what_the_public_way_launches(driver, tma):
    case = _Case(tma)
    again = case.again()
    assert again is not None
    for tensors in (case.tensors, _tensors(), _tensors()):
        case.launch(GRID, *_args(*tensors, case.heap))
        public, public_head = case.c.last, case.c.calls[-1][:7]
        assert again(*(x.data_ptr() for x in tensors))
        assert case.c.last == public
        assert case.c.calls[-1][:7] == public_head


def test_a_known_address_is_not_encoded_again(driver):
    case = _Case()
    again, addresses = case.again(), [x.data_ptr() for x in case.tensors]
    again(*addresses)
    before = len(driver.encoded)
    again(*addresses)
    assert len(driver.encoded) == before


def test_encoded_descriptors_are_bounded(driver, monkeypatch):
    monkeypatch.setattr(relaunch, "MAX_ADDRESSES", 4)
    case = _Case()
    again, rest = case.again(), [x.data_ptr() for x in case.tensors[1:]]
    for number in range(20):
        again(1 << 20 | number << 4, *rest)
        assert case.c.last[0][1] == 1 << 20 | number << 4
    assert all(len(maps.known) <= 4 for maps in case.launch._maps.values())


def test_the_stream_is_that_of_the_call(driver):
    case = _Case()
    again = case.again()
    driver.stream = 99
    assert again(*(x.data_ptr() for x in case.tensors))
    assert case.c.calls[-1][relaunch.STREAM] == 99


def test_no_tensor_is_kept(driver):
    case = _Case()
    again = case.again()
    kept = [weakref.ref(x) for x in case.tensors]
    case.c.calls.clear()
    case.tensors = case.issued = None
    gc.collect()
    assert again is not None and [ref() for ref in kept] == [None] * 4


def test_hooks_see_every_launch(driver, monkeypatch):
    case = _Case()
    again, addresses = case.again(), [x.data_ptr() for x in case.tensors]
    launches = len(case.c.calls)
    knobs.runtime.launch_enter_hook.add(print)
    try:
        assert not again(*addresses)
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", print)
    assert not again(*addresses)
    monkeypatch.undo()
    assert len(case.c.calls) == launches


def test_another_number_of_arguments_means_the_public_way(driver):
    case = _Case()
    case.c.takes += 1
    assert case.again() is None


def test_an_unknown_version_means_the_public_way(driver, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    assert _Case().again() is None


def test_scratch_memory_means_the_public_way(driver):
    case = _Case()
    case.compiled._run.global_scratch_size = 128
    case.compiled._run.launch = lambda *args: None
    assert case.again() is None


def test_a_launcher_of_another_make_means_the_public_way(driver):
    case = _Case()
    case.compiled._run = SimpleNamespace(launch=print, global_scratch_size=0, profile_scratch_size=0)
    assert case.again() is None


def test_refused_arguments_mean_the_public_way_from_then_on(driver, caplog):
    case = _Case()
    again, addresses = case.again(), [x.data_ptr() for x in case.tensors]
    case.c.takes += 1
    assert not again(*addresses)
    assert "fast way" in caplog.text
    case.c.takes -= 1
    assert not again(*addresses)


def test_a_failed_launch_is_told(driver):
    """The driver's own errors are not taken for refused arguments."""
    case = _Case()
    again = case.again()

    def fails(*args):
        raise RuntimeError("Triton Error [CUDA]: no")

    again.function = fails
    with pytest.raises(RuntimeError, match="CUDA"):
        again(*(x.data_ptr() for x in case.tensors))


@pytest.mark.parametrize("which", ["a_desc", "out_ptr"])
def test_copied_or_misaligned_arguments_are_not_prepared(driver, which):
    case = _Case()
    for wrong in (case.addresses(case.tensors)[which] + 2, case.addresses(case.tensors)[which] + 4096):
        assert case.issued.again(**(case.addresses(case.tensors) | {which: wrong})) is None


def test_interpreted_launches_are_not_prepared():
    launch = Launch(SimpleNamespace(arg_names=NAMES), {}, on_cpu=True)
    assert Issued(launch, 1, ()).again() is None
