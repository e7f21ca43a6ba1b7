"""Known calls: what is skipped, what is still looked at, and what is launched. One rank, no device.

The fused plans run on CPU tensors up to the C launcher (tests/fake_driver.py), which keeps what it was given.
"""

import functools

import pytest
import torch
import triton

import tp_overlap_kernels as tpo
from tests import fake_driver
from tp_overlap_kernels import errors
from tp_overlap_kernels.dispatch import Plan
from tp_overlap_kernels.lang.launch import Launch
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.ops import (
    all_reduce,
    all_reduce_add_rms_norm,
    checks,
    gemm_all_reduce,
    gemm_all_reduce_add_rms_norm,
    gemm_reduce_scatter,
    launches,
    norm_launches,
    prepared,
    scatter_sentinel,
)

PARAMS = "block_m=16,block_n=64,block_k=64,num_stages=3,num_warps=4,group_m=8"
M, N, K = 24, 96, 64
GEMMS = [(gemm_all_reduce, "one_shot"), (gemm_all_reduce, "two_shot"), (gemm_reduce_scatter, "push")]
GEMMS += [(gemm_reduce_scatter, "one_shot")]
SUMS = [(all_reduce, "one_shot"), (all_reduce, "two_shot"), (all_reduce, "sentinel")]
IDS = [f"{module.OP}-{plan}" for module, plan in GEMMS]


@pytest.fixture
def arena():
    tpo.init(max_M=64, max_N=128)
    yield arenas.get("local")
    tpo.close()


class _FakeLaunch(Launch):
    """Compiled to a kernel that nothing runs. c: what was launched."""

    def __call__(self, grid, *args):
        if self._compiled is None:
            names = [name for name in self.kernel.arg_names[len(args) :]]
            self._constants = tuple(self.meta[name] for name in names)
            whole = (*args, *self._constants)
            self._compiled, self.c = fake_driver.compiled(self.kernel.arg_names, whole, len(names))
        return super().__call__(grid, *args)


class _Sentinel:
    calls = ()

    def __call__(self, *args):
        self.calls = (*self.calls, args)


class _Fused:
    """The fused plans on this machine. made: every Launch."""

    def __init__(self, monkeypatch, arena):
        self.patch, self.arena, self.made, self.planned = monkeypatch, arena, [], 0
        monkeypatch.setattr(triton.runtime.driver, "_active", fake_driver.Driver())
        monkeypatch.setattr(launches, "Launch", self._launch)
        monkeypatch.setattr(all_reduce, "stream_of", lambda index: fake_driver.STREAM)
        monkeypatch.setattr(scatter_sentinel, "stream_of", lambda index: fake_driver.STREAM)
        self.sentinel = arena.cache["sentinel"] = arena.cache["scatter sentinel"] = _Sentinel()

    def _launch(self, kernel, meta, on_cpu):
        self.made.append(_FakeLaunch(kernel, meta))
        return self.made[-1]

    def plan(self, module, name):
        tiled = module is not all_reduce and not name.startswith("unfused")
        plan = Plan.parse(f"{name}:{PARAMS}") if tiled else Plan(name)

        def planned(*args):
            self.planned += 1
            return plan, 7

        self.patch.setattr(module, "plan_for", planned)

    @property
    def calls(self):
        """The kernels' arguments in every launch, in order."""
        return [fake_driver.values_of(args) for launch in self.made for args in launch.c.calls]


@pytest.fixture
def fused(monkeypatch, arena):
    if triton.__version__.split(".")[:2] not in (["3", "6"], ["3", "7"]):
        pytest.skip("known calls go the public way with this Triton")
    return _Fused(monkeypatch, arena)


def _inputs(dtype=torch.bfloat16):
    return torch.zeros(M, K, dtype=dtype), torch.zeros(N, K, dtype=dtype)


@pytest.mark.parametrize(("module", "plan"), GEMMS, ids=IDS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_a_known_call_launches_what_an_unknown_one_would(fused, module, plan, with_bias):
    fused.plan(module, plan)
    op = getattr(torch.ops.tp_overlap, module.OP)
    kept = []  # so that every call has addresses of its own
    for _ in range(3):
        inputs = (*_inputs(), "local", torch.zeros(N, dtype=torch.bfloat16) if with_bias else None)
        out = op(*inputs)
        known = fused.arena.prepared.copy()
        fused.arena.prepared.clear()
        getattr(torch.ops.tp_overlap, module.OP + "_out")(*inputs[:3], out, inputs[3])
        assert fused.calls[-1] == fused.calls[-2]
        fused.arena.prepared.update(known)
        kept.append((inputs, out))
    assert fused.planned == 4
    assert len({str(values) for values in fused.calls}) == 3


@pytest.mark.parametrize(("module", "plan"), GEMMS, ids=IDS)
def test_a_known_call_skips_checks_and_planning(fused, monkeypatch, module, plan):
    fused.plan(module, plan)
    op = getattr(torch.ops.tp_overlap, module.OP)
    results = [op(*_inputs(), "local") for _ in range(4)]
    assert fused.planned == 1 and len(fused.calls) == 4
    assert len({result.data_ptr() for result in results}) == 4
    assert all(result.is_contiguous() and result.shape == results[0].shape for result in results)


@pytest.mark.parametrize("shape", [(M, K), (4, 6, K), (2, 3, 4, K)], ids=str)
def test_leading_dimensions(fused, shape):
    fused.plan(gemm_all_reduce, "one_shot")
    a, b = torch.zeros(shape, dtype=torch.bfloat16), _inputs()[1]
    for _ in range(2):
        assert torch.ops.tp_overlap.gemm_all_reduce(a, b, "local").shape == (*shape[:-1], N)
    assert len(fused.calls) == 2 and fused.planned == 1


def test_misaligned_operands_are_copied_in_a_known_call(fused):
    fused.plan(gemm_all_reduce, "one_shot")
    a, b = _inputs()
    torch.ops.tp_overlap.gemm_all_reduce(a, b, "local")
    off = torch.zeros(M * K + 1, dtype=torch.bfloat16)[1:].view(M, K)
    torch.ops.tp_overlap.gemm_all_reduce(off, b, "local")
    address = fused.calls[-1][0][1]
    assert fused.planned == 1 and address % 16 == 0 and address != off.data_ptr()


def test_a_call_first_seen_misaligned_is_right_when_aligned(fused):
    fused.plan(gemm_all_reduce, "one_shot")
    b = _inputs()[1]
    off = torch.zeros(M * K + 1, dtype=torch.bfloat16)[1:].view(M, K)
    for a in (off, off.clone(), off):
        torch.ops.tp_overlap.gemm_all_reduce(a, b, "local")
        address = fused.calls[-1][0][1]
        assert address % 16 == 0 and (address == a.data_ptr()) == (a is not off)


def test_a_known_call_with_one_tensor_twice_keeps_the_operands_apart(fused):
    fused.plan(gemm_all_reduce, "one_shot")
    x, y = (torch.zeros(64, 64, dtype=torch.bfloat16) for _ in range(2))
    torch.ops.tp_overlap.gemm_all_reduce(x, x, "local")
    torch.ops.tp_overlap.gemm_all_reduce(x, y, "local")
    maps = [value for value in fused.calls[-1] if isinstance(value, tuple)]
    assert [value[1] for value in maps] == [x.data_ptr(), y.data_ptr()]


@pytest.mark.parametrize(("module", "plan"), SUMS, ids=[f"all_reduce-{plan}" for _, plan in SUMS])
def test_a_known_all_reduce(fused, module, plan):
    fused.plan(module, plan)
    for _ in range(3):
        x = torch.zeros(8, 40, dtype=torch.bfloat16)
        out = torch.ops.tp_overlap.all_reduce(x, "local")
        if plan == "sentinel":
            assert fused.sentinel.calls[-1] == (x.data_ptr(), out.data_ptr(), 320, 0, 7, fake_driver.STREAM)
        else:
            assert fused.calls[-1][:2] == [x.data_ptr(), out.data_ptr()]
    assert fused.planned == 1


def test_a_known_all_reduce_of_strided_input_reads_a_copy(fused):
    fused.plan(all_reduce, "sentinel")
    x = torch.zeros(40, 8, dtype=torch.bfloat16).t()
    for _ in range(2):
        torch.ops.tp_overlap.all_reduce(x, "local")
        assert fused.sentinel.calls[-1][0] != x.data_ptr()


NORMS = [(all_reduce_add_rms_norm, "one_shot_norm"), (gemm_all_reduce_add_rms_norm, "unfused_one_shot_norm")]


@pytest.mark.parametrize(("module", "plan"), NORMS, ids=[plan for _, plan in NORMS])
@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in place"])
def test_a_known_call_with_a_norm(fused, monkeypatch, module, plan, in_place):
    """Launched once the ordinary way; again with the addresses of its own tensors."""
    fused.plan(module, plan)
    ordinary, ops, kept = [], torch.ops.tp_overlap, []
    counted = functools.partial(_counted, norm_launches.all_reduce_add_rms_norm, ordinary)
    monkeypatch.setattr(norm_launches, "all_reduce_add_rms_norm", counted)
    for _ in range(3):
        given = _inputs() if module is gemm_all_reduce_add_rms_norm else (torch.zeros(M, N, dtype=torch.bfloat16),)
        residual, weight = torch.zeros(M, N, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.bfloat16)
        if in_place:
            y = torch.zeros(M, N, dtype=torch.bfloat16) if len(given) == 2 else given[0]
            results = y, residual
            getattr(ops, module.OP + "_out")(*given, residual, weight, 1e-5, "local", *results)
        else:
            results = getattr(ops, module.OP)(*given, residual, weight, 1e-5, "local")
        x = results[0] if len(given) == 2 else given[0]
        addresses = [tensor.data_ptr() for tensor in (x, residual, weight, *results)]
        assert fused.calls[-1][:5] == addresses and 1e-5 in fused.calls[-1]
        kept.append((given, residual, weight, results))  # so that every call has addresses of its own
    assert fused.planned == len(ordinary) == 1 and len(fused.calls) == 3


@pytest.mark.parametrize("which", range(5), ids=["x", "residual", "weight", "y", "new_residual"])
def test_a_call_with_a_norm_never_sees_odd_addresses(fused, which):
    """Known or not: else the order in which squares are added would depend on where a rank's tensors lie."""
    fused.plan(all_reduce_add_rms_norm, "one_shot_norm")
    for offset in (1, 0, 0, 1, 3):
        shapes, tensors = [(M, N), (M, N), (N,), (M, N), (M, N)], []
        for i, shape in enumerate(shapes):
            memory = torch.ones(torch.Size(shape).numel() + 8, dtype=torch.bfloat16)
            first = offset if i == which else 0
            tensors.append(memory[first : first + torch.Size(shape).numel()].view(shape))
        *given, y, new_residual = tensors
        torch.ops.tp_overlap.all_reduce_add_rms_norm_out(*given, 1e-5, "local", y, new_residual)
        launched, own = fused.calls[-1][:5], [tensor.data_ptr() for tensor in tensors]
        assert not any(address % 16 for address in launched)
        assert [i for i in range(5) if launched[i] != own[i]] == [which] * (offset > 0)


UNFUSED = [(gemm_all_reduce, "unfused_one_shot"), (gemm_all_reduce, "unfused_two_shot")]
UNFUSED += [(gemm_all_reduce, "unfused_sentinel"), (gemm_reduce_scatter, "unfused_push")]
UNFUSED += [(gemm_reduce_scatter, "unfused_sentinel")]
UNFUSED_IDS = [f"{module.OP}-{plan}" for module, plan in UNFUSED]


@pytest.mark.parametrize(("module", "plan"), [*UNFUSED[:2], UNFUSED[3]], ids=[*UNFUSED_IDS[:2], UNFUSED_IDS[3]])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_the_launch_behind_a_product_is_had_again(fused, monkeypatch, module, plan, with_bias):
    fused.plan(module, plan)
    ordinary = []
    for function in (launches.all_reduce_one_shot, launches.all_reduce_two_shot, launches.reduce_scatter):
        monkeypatch.setattr(launches, function.__name__, functools.partial(_counted, function, ordinary))
    kept = []  # so that every call has addresses of its own
    for _ in range(3):
        inputs = (*_inputs(), "local", torch.zeros(N, dtype=torch.bfloat16) if with_bias else None)
        kept.append((inputs, getattr(torch.ops.tp_overlap, module.OP)(*inputs)))
    assert len(ordinary) == 1 and len(fused.calls) == 3
    inputs, out = kept[-1]
    fused.arena.prepared.clear()
    getattr(torch.ops.tp_overlap, module.OP + "_out")(*inputs[:3], out, inputs[3])
    assert len(ordinary) == 2
    assert fused.calls[-1][1:] == fused.calls[-2][1:]  # the first is what cuBLAS wrote; for a scatter that is elsewhere
    if module is gemm_all_reduce:
        assert fused.calls[-1][0] == fused.calls[-2][0] == out.data_ptr()


def _counted(function, calls, *args):
    calls.append(function)
    return function(*args)


@pytest.mark.parametrize(("module", "plan"), UNFUSED, ids=UNFUSED_IDS)
def test_another_call_hash_is_another_launch(fused, monkeypatch, module, plan):
    fused.plan(module, plan)
    op = getattr(torch.ops.tp_overlap, module.OP)
    op(*_inputs(), "local")
    monkeypatch.setattr(module, "plan_for", lambda *args: (Plan(plan), 8))
    fused.arena.prepared = {key: kept for key, kept in fused.arena.prepared.items() if key[0] != module.OP}
    op(*_inputs(), "local")
    values = fused.sentinel.calls[-1] if plan == "unfused_sentinel" else fused.calls[-1]
    assert 8 in values and 7 not in values


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_a_known_scatter_without_flags(fused, with_bias):
    fused.plan(gemm_reduce_scatter, "unfused_sentinel")
    bias = torch.zeros(N, dtype=torch.bfloat16) if with_bias else None
    for _ in range(3):
        out = torch.ops.tp_overlap.gemm_reduce_scatter(*_inputs(), "local", bias)
        x_ptr, *others = fused.sentinel.calls[-1]
        assert others == [out.data_ptr(), M * N, M * N, 0, 7, fake_driver.STREAM] and x_ptr != out.data_ptr()
    assert fused.planned == 1


def _warm(op="gemm_all_reduce", **kinds):
    a, b = _inputs(**kinds)
    for _ in range(2):
        getattr(torch.ops.tp_overlap, op)(a, b, "local")
    return a, b


@pytest.mark.parametrize("op", ["gemm_all_reduce", "gemm_reduce_scatter"])
class TestStillRefused:
    """After equal calls that went through."""

    @pytest.mark.parametrize("which", [0, 1])
    def test_inputs_that_require_grad(self, arena, op, which):
        inputs = _warm(op)
        inputs[which].requires_grad_()
        with pytest.raises(errors.InvalidInput, match="no backward"):
            getattr(torch.ops.tp_overlap, op)(*inputs, "local")
        with torch.no_grad():
            getattr(torch.ops.tp_overlap, op)(*inputs, "local")

    def test_a_bias_that_requires_grad(self, arena, op):
        inputs, bias = _warm(op), torch.zeros(N, dtype=torch.bfloat16)
        getattr(torch.ops.tp_overlap, op)(*inputs, "local", bias)
        with pytest.raises(errors.InvalidInput, match="no backward"):
            getattr(torch.ops.tp_overlap, op)(*inputs, "local", bias.requires_grad_())

    def test_a_failed_group(self, arena, op):
        inputs = _warm(op)
        arena.record.abort()
        with pytest.raises(errors.GroupFailed):
            getattr(torch.ops.tp_overlap, op)(*inputs, "local")

    def test_a_closed_group(self, arena, op):
        inputs = _warm(op)
        tpo.close()
        with pytest.raises(errors.NotInitialised):
            getattr(torch.ops.tp_overlap, op)(*inputs, "local")
        tpo.init(max_M=64, max_N=128)

    @pytest.mark.parametrize("which", [0, 1])
    def test_another_dtype(self, arena, op, which):
        inputs = list(_warm(op))
        inputs[which] = inputs[which].to(torch.float16)
        with pytest.raises(errors.InvalidInput, match="one dtype"):
            getattr(torch.ops.tp_overlap, op)(*inputs, "local")

    def test_another_inner_size(self, arena, op):
        a, b = _warm(op)
        with pytest.raises(errors.InvalidInput, match="K must be equal"):
            getattr(torch.ops.tp_overlap, op)(a, b[:, :32], "local")

    def test_another_out(self, arena, op):
        inputs = _warm(op)
        into = getattr(torch.ops.tp_overlap, op + "_out")
        into(*inputs, "local", torch.empty(M, N, dtype=torch.bfloat16))
        for wrong in (
            torch.empty(M, N + 1, dtype=torch.bfloat16),
            torch.empty(M, N),
            torch.empty(N, M, dtype=torch.bfloat16).t(),
        ):
            with pytest.raises(errors.InvalidInput, match="out must"):
                into(*inputs, "local", wrong)

    def test_a_plan_that_cannot_run(self, arena, op):
        inputs = _warm(op)
        with tpo.force_plan("unfused_nccl"), pytest.raises(errors.InvalidInput):
            getattr(torch.ops.tp_overlap, op)(*inputs, "local")


def test_another_device_is_not_a_known_call(arena):
    a, b = _warm()
    keys = {prepared.key_of("op", a, b, None), prepared.key_of("op", a, b.to("meta"), None)}
    assert len(keys) == 2
    with pytest.raises(errors.InvalidInput, match="one device"):
        checks.check_gemm("op", a, b.to("meta"), None)


def test_a_known_all_reduce_is_still_refused(arena):
    x = torch.zeros(64, dtype=torch.bfloat16)
    for _ in range(2):
        torch.ops.tp_overlap.all_reduce(x, "local")
    with pytest.raises(errors.InvalidInput, match="no backward"):
        torch.ops.tp_overlap.all_reduce(x.clone().requires_grad_(), "local")
    arena.record.abort()
    with pytest.raises(errors.GroupFailed):
        torch.ops.tp_overlap.all_reduce(x, "local")


def test_known_calls_are_bounded_and_go_with_the_arena(arena, monkeypatch):
    monkeypatch.setattr(prepared, "MAX_CALLS", 3)
    for rows in range(1, 9):
        torch.ops.tp_overlap.gemm_all_reduce(torch.zeros(rows, K, dtype=torch.bfloat16), _inputs()[1], "local")
        assert 0 < len(arena.prepared) <= 3
    tpo.close()
    assert not arena.prepared
    tpo.init(max_M=64, max_N=128)
