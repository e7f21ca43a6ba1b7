"""What the GEMMs that sum over ranks cannot do is refused before any launch; no GPU and no driver needed."""

import pytest
import torch

from tp_overlap_kernels import native
from tp_overlap_kernels.errors import TpOverlapError
from tp_overlap_kernels.kernels import gemm
from tp_overlap_kernels.kernels.gemm_collectives import SCHEDULES, TILE_BYTES, GemmCollectiveLauncher
from tp_overlap_kernels.kernels.start import Start

pytestmark = pytest.mark.skipif(
    not native.LIBRARY_PATH.exists(), reason="needs libtpo_kernels.so: install the package where nvcc and cmake are"
)
OPS = tuple(SCHEDULES)  # and plans
ARENA = {f"{name}_ptr": 4096 for name in ("base_table", "control", "record")}
ARENA |= dict.fromkeys(("header_offset", "done_offset", "partial_flags_offset", "result_flags_offset"), 0)
ARENA |= {"staging_offset": 0, "result_offset": 0, "timeout_ns": 0, "rank": 0, "world_size": 2, "blocks": 132}
ROOM = {"staging_slot_bytes": 2 * TILE_BYTES[256], "result_bytes": 2 * TILE_BYTES[256], "tile_slots": 4}
RIGHT = {"a_ptr": 4096, "b_ptr": 4096, "bias_ptr": 0, "out_ptr": 4096, "M": 512, "N": 256, "K": 64, "stream": 0}
RIGHT |= {
    "a_stride": 64,
    "b_stride": 64,
    "dtype_code": 0,
    "group_rows": 8,
    "lead_tiles": 0,
    "piece_bytes": 4096,
    "senders": 0,
    "call_hash": 7,
    "start": Start.IN_ORDER,
}


def launch(monkeypatch, of, **changes):
    """Launch with something changed, without loading kernels. of: plan and op."""
    monkeypatch.setattr(native, "check", lambda error, what: None)
    launcher = GemmCollectiveLauncher(*of, **(ARENA | ROOM | {k: v for k, v in changes.items() if k in ARENA | ROOM}))
    monkeypatch.undo()
    wide = {"schedule": SCHEDULES[of][256, 1, 2, 1]}
    launcher(**(RIGHT | wide | {k: v for k, v in changes.items() if k in RIGHT | wide}))


@pytest.mark.parametrize("op", OPS, ids="-".join)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"N": 252}, id="rows of out not of 16 bytes"),
        pytest.param({"out_ptr": 4104}, id="out not aligned"),
        pytest.param({"a_stride": 60}, id="rows of a overlap"),
        pytest.param({"dtype_code": 2}, id="unknown dtype"),
        pytest.param({"schedule": gemm.PING_PONG}, id="a schedule of the bare GEMM alone"),
        pytest.param({"schedule": gemm.Schedule(99, 256, 256, 2, 8)}, id="unknown schedule"),
        pytest.param({"world_size": 1}, id="nobody to send to"),
        pytest.param({"world_size": 9}, id="too many ranks"),
        pytest.param({"rank": 2}, id="no such rank"),
        pytest.param({"blocks": 0}, id="no blocks"),
        pytest.param({"lead_tiles": -1}, id="negative lead"),
        pytest.param({"piece_bytes": 0}, id="pieces of nothing"),
        pytest.param({"piece_bytes": 264}, id="pieces that are not aligned"),
        pytest.param({"start": Start.WEIGHTS_AHEAD}, id="no way to begin"),
        pytest.param({"senders": -1}, id="fewer senders than none"),
        pytest.param({"M": 513}, id="more tiles than staging holds"),
        pytest.param({"tile_slots": 3}, id="more tiles than flags"),
    ],
)
def test_it_is_refused(monkeypatch, op, changes):
    with pytest.raises(TpOverlapError, match=rf"{op[1]}: .*invalid argument"):
        launch(monkeypatch, op, **changes)


def test_more_sums_than_the_arena_takes_are_refused(monkeypatch):
    with pytest.raises(TpOverlapError, match=r"invalid argument"):
        launch(monkeypatch, ("sm90", "gemm_all_reduce"), result_bytes=2 * TILE_BYTES[256] - 1)


@pytest.mark.parametrize("op", OPS, ids="-".join)
@pytest.mark.parametrize(
    ("intervals", "dtype_code", "reason"),
    [(0, 0, "invalid argument"), (8, 1, "invalid argument"), (8, 0, "driver")],
    ids=["no room", "fp16, of which none is built", "right"],
)
def test_a_trace_needs_room_and_bf16(monkeypatch, op, intervals, dtype_code, reason):
    if reason == "driver" and torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    monkeypatch.setattr(native, "check", lambda error, what: None)
    launcher = GemmCollectiveLauncher(*op, **(ARENA | ROOM))
    monkeypatch.undo()
    launcher.trace(4096, intervals)
    with pytest.raises(TpOverlapError, match=rf"{op[1]}: .*{reason}"):
        launcher(**(RIGHT | {"schedule": SCHEDULES[op][256, 1, 2, 1], "dtype_code": dtype_code}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("op", OPS, ids="-".join)
def test_what_is_right_comes_as_far_as_the_driver(monkeypatch, op):
    for schedule in SCHEDULES[op].values():
        with pytest.raises(TpOverlapError, match=rf"{op[1]}: .*driver"):
            launch(monkeypatch, op, schedule=schedule, tile_slots=16, result_bytes=4 * TILE_BYTES[256])
    with pytest.raises(TpOverlapError, match=rf"{op[1]}: the CUDA kernels could not be loaded: .*driver"):
        GemmCollectiveLauncher(*op, **(ARENA | ROOM))


@pytest.mark.parametrize("op", OPS, ids="-".join)
@pytest.mark.parametrize("empty", ["M", "N"])
def test_nothing_to_compute_launches_nothing(monkeypatch, op, empty):
    launch(monkeypatch, op, **{empty: 0})
