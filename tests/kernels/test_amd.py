"""Every Triton kernel of ours, compiled for gfx942 (MI300) without a GPU, and read. None has ever run on one."""

from __future__ import annotations

import importlib
import os
import pathlib
import pickle
import pkgutil
import re
import subprocess
import sys
import types

import pytest
import triton

from tests.kernels import gcn_gates as gates
from tests.kernels import ir_gates
from tests.kernels.amd_compiled import LAUNCHES, WORDS, Compiled
from tp_overlap_kernels import kernels

ROOT = pathlib.Path(__file__).parents[2]
CASES = [*LAUNCHES, *WORDS]
NOTIFY = [name for name in CASES if name not in ("add_rms_norm", "spoil_call", "begin_call", "wait_peers", "wait_peer")]
NOTIFY.remove("words: wait_for_all")
WAIT = [name for name in CASES if name not in ("add_rms_norm", "spoil_call", "begin_call", "notify_peer", "end_call")]
WAIT.remove("words: add_at_all")
MOVE_TILES = [name for name in CASES if name in LAUNCHES and "call" not in name and "peer" not in name]
LOAD_FROM_ARENAS = [name for name in MOVE_TILES if name != "add_rms_norm"]
PARTIALS = ("two_shot_push", "reduce_scatter_push")  # of kernels with a GEMM, where one peer gets each


@pytest.fixture(scope="module")
def amd(tmp_path_factory) -> dict[str, Compiled]:
    path = tmp_path_factory.mktemp("gfx942") / "compiled.pickle"
    command = [sys.executable, "-m", "tests.kernels.amd_compiled", str(path)]
    env = os.environ | {"TRITON_CACHE_DIR": str(path.parent / "cache")}  # the usual one does not know lang/target.py
    made = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert made.returncode == 0, made.stderr[-4000:]
    return {name: Compiled(*values) for name, values in pickle.loads(path.read_bytes()).items()}


@pytest.mark.parametrize("name", CASES)
def test_a_code_object_comes_of_it(amd, name):
    gates.is_of_gfx942(amd[name].asm["amdgcn"], amd[name].asm["hsaco"])
    gates.fits_a_compute_unit(amd[name].asm["amdgcn"], amd[name].shared)


@pytest.mark.parametrize("name", NOTIFY)
def test_an_arrival_is_a_release_of_the_whole_block(amd, name):
    gates.barrier_before_release(amd[name].asm["amdgcn"])


@pytest.mark.parametrize("name", WAIT)
def test_a_wait_acquires_and_ends(amd, name):
    gates.invalidated_after_waits(amd[name].asm["amdgcn"])
    gates.every_wait_has_a_clock(amd[name].asm["amdgcn"])
    if name in MOVE_TILES:  # of several waves; those of `words` go on to a branch that is decided already
        gates.looks_are_handed_round(amd[name].asm["amdgcn"])


@pytest.mark.parametrize("name", LOAD_FROM_ARENAS)
def test_loads_follow_their_wait(amd, name):
    ir_gates.loads_follow_their_wait(amd[name], "buffer_inv sc0 sc1")


@pytest.mark.parametrize("name", MOVE_TILES)
def test_tiles_move_16_bytes_at_a_time(amd, name):
    partials = name.startswith("gemm") and any(part in name for part in PARTIALS)
    gates.wide_accesses(amd[name].asm["amdgcn"], narrow_loads="of 4 ranks" in name, partials=partials)


def test_a_header_is_not_left_in_the_cache(amd):
    """Nothing is released behind it before the first tile has been sent."""
    stored = [line for line in gates.lines_of(amd["begin_call"].asm["amdgcn"]) if "_store_" in line]
    assert [line for line in stored if re.search(r"^global_store_dwordx2 .* sc0 sc1$", line)], stored


def test_blocks_begin_one_after_the_other(amd):
    text = "\n".join(gates.lines_of(amd["gemm_all_reduce_two_shot_push"].asm["amdgcn"]))
    assert re.search(r"s_memrealtime.*?s_sleep.*?s_memrealtime.*?s_cbranch", text, re.S), "nobody sleeps by the clock"


def test_no_kernel_is_left_out(amd):
    """A kernel has the name of its file, or stands in stream_signals."""
    launched = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        values = vars(importlib.import_module(f"{kernels.__name__}.{module.name}"))
        jitted = {name for name, value in values.items() if isinstance(value, triton.runtime.JITFunction)}
        launched |= jitted if module.name == "stream_signals" else jitted & {module.name}
    assert len(launched) >= 15
    assert launched == {amd[name].kernel for name in LAUNCHES}


# --- each gate fails where it should


def spoilt(amd, name: str, pattern: str, by: str) -> str:
    good = amd[name].asm["amdgcn"]
    bad = re.sub(pattern, by, good)
    assert bad != good
    return bad


@pytest.mark.parametrize(
    "pattern, by, text",
    [
        (r"buffer_wbl2 sc0 sc1", "buffer_wbl2 sc1", "no barrier, wait or write-back"),
        (r"(buffer_wbl2 sc0 sc1\n)s_waitcnt .*", r"\1", "no barrier, wait or write-back"),
        (r"\ts_barrier\n", "", "no barrier, wait or write-back"),
        (r"(\ts_barrier\n)", r"\1\tglobal_store_dwordx4 v[0:1], v[2:5], off\n", "global_store"),
        (r"(buffer_wbl2 sc0 sc1\n)", r"\1\tbuffer_store_dwordx4 v[2:5], v1, s[0:3], 0 offen\n", "buffer_store"),
        (r"(global_atomic_swap_x2 .*) sc1", r"\1", "no other device sees it"),
        (r"global_atomic_swap_x2 .*", "", "nothing is released"),
    ],
)
def test_a_weaker_release_does_not_pass(amd, pattern, by, text):
    with pytest.raises(AssertionError, match=text):
        gates.barrier_before_release(spoilt(amd, "all_reduce_one_shot_push", pattern, by))


def test_a_way_around_the_barrier_does_not_pass(amd):
    good = amd["all_reduce_one_shot_push"].asm["amdgcn"]
    around = r"\ts_cbranch_scc1 .LBB9_9\n\1.LBB9_9:\n"
    bad = re.sub(r"(\tbuffer_wbl2 sc0 sc1\n(?:.*\n)*?\ts_barrier\n)", around, good, count=1)
    assert bad != good
    with pytest.raises(AssertionError, match="no barrier, wait or write-back"):
        gates.barrier_before_release(bad)


def test_a_weaker_acquire_does_not_pass(amd):
    for by in ("buffer_inv sc1", ""):
        with pytest.raises(AssertionError, match="not invalidated"):
            gates.invalidated_after_waits(spoilt(amd, "all_reduce_one_shot_push", r"buffer_inv sc0 sc1", by))
    with pytest.raises(AssertionError, match="nothing is acquired"):
        gates.invalidated_after_waits(spoilt(amd, "all_reduce_one_shot_push", r", off sc0 sc1", ", off"))
    with pytest.raises(AssertionError, match="no barrier between"):
        gates.looks_are_handed_round(spoilt(amd, "all_reduce_one_shot_push", r"\ts_barrier\n", ""))
    with pytest.raises(AssertionError, match="a wait without end"):
        gates.every_wait_has_a_clock(spoilt(amd, "all_reduce_one_shot_push", r"s_memrealtime", "s_memtime"))


def test_a_load_away_from_its_acquire_does_not_pass(amd):
    asm = amd["all_reduce_one_shot_push"].asm
    without = types.SimpleNamespace(asm={"ttgir": asm["ttgir"].replace("buffer_inv sc0 sc1", "s_nop 0")})
    with pytest.raises(AssertionError, match=r"wait before it|no wait stands before"):
        ir_gates.loads_follow_their_wait(without, "buffer_inv sc0 sc1")


@pytest.mark.parametrize(
    "pattern, by",
    [
        (r"(global_load)_dwordx4 (.* off\n)", r"\1_ushort \2"),
        (r"(global_store)_dwordx4 (.* off\n)", r"\1_dwordx2 \2"),
        (r"(global_store)_dwordx4 (.* off\n)", r"\1_short \2"),
    ],
)
def test_narrow_accesses_do_not_pass(amd, pattern, by):
    with pytest.raises(AssertionError, match=r"accesses"):
        gates.wide_accesses(spoilt(amd, "all_reduce_one_shot_push", pattern, by))


def test_what_does_not_fit_does_not_pass(amd):
    text = amd["add_rms_norm"].asm["amdgcn"]
    with pytest.raises(AssertionError, match="of LDS"):
        gates.fits_a_compute_unit(text, 96 << 10)
    with pytest.raises(AssertionError, match="of scratch"):
        gates.fits_a_compute_unit(text.replace("; ScratchSize: 0", "; ScratchSize: 16"), 0)
    with pytest.raises(AssertionError, match="an ELF for"):
        gates.is_of_gfx942(text, b"\x7fELF" + bytes(64))
