"""The picture of a call: from the words that a kernel wrote to intervals, shares and a PNG."""

import pathlib
import re

import pytest
import torch

from tests.bench.test_run import bench  # noqa: F401 - a fixture
from tp_overlap_kernels.bench import timeline
from tp_overlap_kernels.bench.timeline import Interval
from tp_overlap_kernels.kernels.gemm_collectives import TRACE_ROLES, TRACE_STEPS, TRACE_WORDS

CONSUMER, COURIER = 0, 1
ORIGIN = (1 << 40) + 12345  # more than 32 bits


def trace_of(*written: tuple[int, int, int, str, int, int, int, int]) -> torch.Tensor:
    """Of two blocks: (block, role, place, step, owner, tile, begin, end) each; the rest zeros."""
    trace = torch.zeros(2, len(TRACE_ROLES), 4, TRACE_WORDS, dtype=torch.int32)
    for block, role, place, step, owner, tile, begin, end in written:
        trace.view(torch.int64)[block, role, place, :2] = torch.tensor([ORIGIN + begin, ORIGIN + end])
        trace[block, role, place, 4:7] = torch.tensor([TRACE_STEPS.index(step), owner, tile], dtype=torch.int32)
    return trace


TRACE = (
    (0, CONSUMER, 0, "multiply", 1, 0, 0, 600),
    (0, CONSUMER, 1, "stage", 1, 0, 600, 700),
    (0, COURIER, 0, "await tile", 1, 0, 50, 700),
    (1, CONSUMER, 0, "multiply", 0, 3, 100, 1000),
)


def test_intervals_are_those_that_were_written():
    found = timeline.intervals_of(trace_of(*TRACE))
    assert found == [
        Interval(0, "consumer", "multiply", 1, 0, 0, 600),
        Interval(0, "consumer", "stage", 1, 0, 600, 700),
        Interval(0, "courier", "await tile", 1, 0, 50, 700),
        Interval(1, "consumer", "multiply", 0, 3, 100, 1000),
    ]
    assert timeline.intervals_of(trace_of()) == []


def test_shares_are_means_over_the_blocks_that_have_the_role():
    of = timeline.shares(timeline.intervals_of(trace_of(*TRACE)))
    assert of["consumer", "multiply"] == pytest.approx((600 + 900) / 2000)
    assert of["consumer", "stage"] == pytest.approx(100 / 2000)
    assert of["courier", "await tile"] == pytest.approx(650 / 1000)


def test_every_step_and_role_of_the_kernels_has_its_name_and_colour():
    header = (pathlib.Path(__file__).parents[2] / "csrc/api.h").read_text()
    steps = re.findall(r"TPO_TRACE_(\w+) = (\d+)", header.partition("enum TpoTraceStep")[2].partition("};")[0])
    assert [name.lower().replace("_", " ") for name, _ in steps] == list(TRACE_STEPS[1:])
    assert [int(number) for _, number in steps] == list(range(1, len(TRACE_STEPS)))
    roles = re.findall(r"TPO_TRACE_(\w+) = (\d+)", header.partition("enum TpoTraceRole")[2].partition("};")[0])
    assert [name.lower() for name, _ in roles] == [*TRACE_ROLES, "roles"]
    assert set(timeline.COLOURS) == set(TRACE_STEPS[1:])


def test_the_picture_is_drawn(tmp_path):
    path = tmp_path / "some" / "timeline.png"
    meta = {"case": "gemm_all_reduce M=1 N=2 K=3", "plan": "sm90", "world_size": 2, "gpu": "NVIDIA H200"}
    timeline.draw(meta, timeline.intervals_of(trace_of(*TRACE)), path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_what_cannot_be_looked_at_is_refused(bench):  # noqa: F811
    code, text = bench("timeline")
    assert code == 2 and "torch sees no GPU here" in text
