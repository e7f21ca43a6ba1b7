"""The arena's layout: pure, bounded, without overlaps, and a function of capacity alone."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

import tp_overlap_kernels as tpo
from tp_overlap_kernels.memory.layout import ALIGNMENT_BYTES, SLACK_BYTES, layout, pitch, rows_per_rank

MAX_M = (1, 2, 3, 7, 8, 9, 17, 63, 64, 100, 512, 1000, 4096, 8192, 16384, 131072)
MAX_N = (1, 7, 16, 17, 128, 1000, 4096, 5120, 8192, 16384, 28672, 53248, 152064)
CAPACITIES = list(itertools.product(MAX_M, MAX_N, range(1, 9)))


def pieces(room):
    """(name, start, bytes) of everything in the arena, in order."""
    W = room.world_size
    return [
        ("done", room.done, 8 * W),
        ("header", room.header, 8 * 2 * W),
        ("closed", room.closed, 8 * W),
        ("one-shot flags", room.one_shot_flags, 8 * 2 * room.one_shot_tiles * W),
        ("partial flags", room.partial_flags, 8 * room.tile_slots),
        ("result flags", room.result_flags, 8 * room.tile_slots),
        ("sentinel", room.sentinel, 3 * W * room.sentinel_bytes),
        ("one-shot", room.one_shot, 2 * W * room.one_shot_bytes),
        ("staging", room.staging, (W - 1) * room.staging_slot_bytes),
        ("result", room.result, room.max_M * pitch(room.max_N) * room.itemsize),
        ("end", room.total_bytes, 0),
    ]


def test_pieces_are_all_there_is():
    offsets = {"done", "header", "closed", "one_shot_flags", "partial_flags", "result_flags", "sentinel", "one_shot"}
    sizes = {"max_M", "max_N", "itemsize", "world_size", "tile_slots", "one_shot_tiles"}
    offsets |= {"staging", "result", "total_bytes"}
    sizes |= {"sentinel_bytes", "one_shot_bytes", "staging_slot_bytes"}
    fields = {field.name for field in dataclasses.fields(layout(1, 1, 2, 1))}
    assert fields == offsets | sizes, "a new region: add it to `pieces`"


def test_nothing_overlaps_and_everything_is_aligned():
    for max_M, max_N, W in CAPACITIES:
        room = layout(max_M, max_N, 2, W)
        for (name, start, size), (following, next_start, _) in itertools.pairwise(pieces(room)):
            assert start % ALIGNMENT_BYTES == 0 and size >= 0, (name, max_M, max_N, W)
            assert start + size <= next_start, (name, following, max_M, max_N, W)
        for nbytes in (room.sentinel_bytes, room.one_shot_bytes, room.staging_slot_bytes):
            assert nbytes % ALIGNMENT_BYTES == 0, "slots, too, begin at aligned addresses"


def test_the_bound_holds():
    for max_M, max_N, W in CAPACITIES:
        bound = 2 * max_M * pitch(max_N) * 2 + SLACK_BYTES
        total = layout(max_M, max_N, 2, W).total_bytes
        assert total <= bound, f"max_M={max_M}, max_N={max_N}, W={W}: {total} bytes, {total - bound} too many"
        if max_N % 16 == 0:
            assert total <= 2 * max_M * max_N * 2 + 4 * 2**20


def test_a_call_of_full_size_fits():
    for max_M, max_N, W in CAPACITIES:
        room = layout(max_M, max_N, 2, W)
        assert room.staging_slot_bytes >= rows_per_rank(max_M, W) * pitch(max_N) * 2 or W == 1
        assert room.total_bytes - room.result >= max_M * pitch(max_N) * 2


@pytest.mark.parametrize("W, rows", [(2, 64), (4, 16), (8, 8)])
def test_decode_has_its_fast_ways(W, rows):
    """At the default capacity the latency kernels hold the messages that they are for."""
    room = layout(8192, 8192, 2, W)
    assert room.one_shot_bytes >= rows * 8192 * 2
    assert room.sentinel_bytes >= 64 << 10
    assert room.one_shot_tiles >= 8192 // 32


def test_regions_sum_to_the_whole():
    for max_M, max_N, W in CAPACITIES[::7]:
        room = layout(max_M, max_N, 2, W)
        assert sum(room.regions().values()) == room.total_bytes == tpo.bytes_needed(max_M, max_N, world_size=W)
        assert min(room.regions().values()) >= 0


def test_the_figures_of_the_documentation():
    """At most 256 MiB and a little for 8192 rows of 8192 columns, where one buffer a layer would take gigabytes."""
    for W in range(1, 9):
        staged = (W - 1) * -(-8192 // W) + 8192  # rows: partials of the peers, and sums
        assert staged * 8192 * 2 <= tpo.bytes_needed(8192, 8192, world_size=W) <= (256 << 20) + SLACK_BYTES
