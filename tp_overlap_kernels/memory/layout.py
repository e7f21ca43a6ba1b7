"""The arena's layout: what lies where, as a pure function of capacity. No shape of a call ever moves an address.

    offset 0      pads      64-bit slots: done, headers, one-shot flags, partial flags, result flags
                  sentinel  3 buffers x W slots, for the one-shot kernels that need no flags
                  one-shot  2 halves x W slots, for the one-shot kernels
                  staging   W - 1 slots of ceil(max_M / W) rows: the partials that peers push to the rows we own
                  result    max_M rows: the sums that their owners push to us, on the way to the caller's fresh tensor

Bound: 2 * max_M * max_N * itemsize + 4 MiB in all (max_N rounded up to 16), whatever the number of layers, ops and
ranks.
"""

from dataclasses import dataclass
from typing import Any

ALIGNMENT_BYTES = 512
SLACK_BYTES = 4 << 20
MAX_WORLD_SIZE = 8
PITCH_ELEMS = 16  # rows of partials start at multiples of this many elements

_MAX_TILE_SLOTS = 65536
_NARROWEST_TILE = 32  # columns: of these, every owner has flags for one row of tiles at least
_ONE_SHOT_TILES = 2048
_MAX_ONE_SHOT_BYTES = 8 << 20
_MAX_SENTINEL_BYTES = 256 << 10
_MAX_SPARE_SENTINEL_BYTES = 4 << 20  # where nothing else wants it: what two ranks send without flags


def align_up(value: int, to: int = ALIGNMENT_BYTES) -> int:
    """`value` rounded up to a multiple of `to`."""
    return -(-value // to) * to


def align_down(value: int, to: int = ALIGNMENT_BYTES) -> int:
    """`value` rounded down to a multiple of `to`."""
    return value // to * to


def rows_per_rank(M: int, world_size: int) -> int:
    """c = ceil(M / W): rank r owns the rows [r * c, min(M, (r + 1) * c))."""
    return -(-M // world_size)


def pitch(N: int) -> int:
    """Elements between two rows of a partial in the arena."""
    return align_up(N, PITCH_ELEMS)


@dataclass(frozen=True)
class Layout:
    """Offsets and sizes in bytes, equal on all ranks. Slots (64-bit words) are counted in `*_slots`."""

    max_M: int
    max_N: int
    itemsize: int
    world_size: int
    done: int  # [W] calls finished, one word a peer
    header: int  # [2, W] by parity: the call word of the sentinel kernel
    closed: int  # [W] nonzero once that rank has closed the group
    one_shot_flags: int  # [2, one_shot_tiles, W]
    partial_flags: int  # [tile_slots]: own tile * W + source
    result_flags: int  # [tile_slots]: owner * tiles_per_owner + tile
    tile_slots: int
    one_shot_tiles: int
    sentinel: int
    sentinel_bytes: int  # largest message of the sentinel kernels
    one_shot: int
    one_shot_bytes: int  # largest message (M * pitch(N) * itemsize) of the one-shot kernels
    staging: int
    staging_slot_bytes: int  # ceil(max_M / W) rows of one peer
    result: int
    total_bytes: int

    @property
    def pads_bytes(self) -> int:
        """Bytes of all signal pads together."""
        return self.sentinel

    def limits(self) -> dict[str, Any]:
        """What dispatch has to know of it, under the names of `dispatch.Topology`."""
        shares = max(2, self.world_size - 1)  # of the other ranks in the result; or two, of all tiles
        return {
            "one_shot_bytes": self.one_shot_bytes,
            "sentinel_bytes": self.sentinel_bytes,
            "staged_bytes": min(self.staging_slot_bytes, (self.total_bytes - self.result) // shares),
            "tile_slots": self.tile_slots,
        }

    def regions(self) -> dict[str, int]:
        """Bytes by region; they sum to total_bytes."""
        return {
            "pads": self.pads_bytes,
            "sentinel": self.one_shot - self.sentinel,
            "one_shot": self.staging - self.one_shot,
            "staging": self.result - self.staging,
            "result": self.total_bytes - self.result,
        }


def layout(max_M: int, max_N: int, itemsize: int, world_size: int) -> Layout:
    """The layout for a capacity. Pure; the same on every rank.

    max_M: rows of the largest call that runs in one piece. max_N: columns of the widest. itemsize: bytes an element
    (2).
    """
    W = world_size
    row_bytes = pitch(max_N) * itemsize
    tiles = max((-(-max_M // 64) + W) * -(-max_N // 64), W * -(-max_N // _NARROWEST_TILE))
    tile_slots = min(_MAX_TILE_SLOTS, tiles + 64)
    words = {
        "done": W,
        "header": 2 * W,
        "closed": W,
        "one_shot_flags": 2 * _ONE_SHOT_TILES * W,
        "partial_flags": tile_slots,
        "result_flags": tile_slots,
    }
    offsets, end = {}, 0
    for name, count in words.items():
        offsets[name], end = end, align_up(end + 8 * count)
    bound = align_down(2 * max_M * row_bytes) + SLACK_BYTES
    staging_slot = align_up(rows_per_rank(max_M, W) * row_bytes)
    result_bytes = align_up(max_M * row_bytes)
    # what the bound leaves for the latency kernels once staging and one whole output fit
    spare = bound - end - (W - 1) * staging_slot - result_bytes
    sentinel_bytes = min(_MAX_SENTINEL_BYTES, align_down(max(spare, 0) // 2 // (3 * W)))
    spare -= 3 * W * sentinel_bytes
    one_shot_bytes = min(_MAX_ONE_SHOT_BYTES, align_down(max(spare, 0) // (2 * W)))
    spare -= 2 * W * one_shot_bytes
    more = min(_MAX_SPARE_SENTINEL_BYTES - sentinel_bytes, align_down(max(spare, 0) // (3 * W)))
    sentinel_bytes += more if one_shot_bytes == _MAX_ONE_SHOT_BYTES else 0
    sentinel = end
    one_shot = sentinel + 3 * W * sentinel_bytes
    staging = one_shot + 2 * W * one_shot_bytes
    result = staging + (W - 1) * staging_slot
    return Layout(
        max_M=max_M,
        max_N=max_N,
        itemsize=itemsize,
        world_size=W,
        **offsets,
        tile_slots=tile_slots,
        one_shot_tiles=_ONE_SHOT_TILES,
        sentinel=sentinel,
        sentinel_bytes=sentinel_bytes,
        one_shot=one_shot,
        one_shot_bytes=one_shot_bytes,
        staging=staging,
        staging_slot_bytes=staging_slot,
        result=result,
        total_bytes=result + result_bytes,
    )
