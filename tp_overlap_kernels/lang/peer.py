"""Another rank's memory: `heap_ptr` is the table of arena bases (int64, one a rank, as this rank sees them).

Every arena has the same layout, so an offset in bytes means the same thing on every rank, and `symm_at` is one load
and one add.
"""

import triton
import triton.language as tl


@triton.jit
def symm_at(heap_ptr, offset, peer, DTYPE: tl.constexpr):
    """Pointer to the byte `offset` of `peer`'s arena, for elements of DTYPE. Offsets are multiples of 16 bytes.

    The hint after the cast is what makes 16-byte accesses out of a loaded address; without it a tile goes out as
    2-byte stores.
    """
    return tl.multiple_of((tl.load(heap_ptr + peer) + offset).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def slot_at(heap_ptr, offset, index, slot_bytes, peer, DTYPE: tl.constexpr):
    """`symm_at` for slot `index` of an array of slots at `offset`; 64-bit, since the array may pass 2^31 bytes."""
    start = tl.full((), 0, tl.int64) + slot_bytes
    return symm_at(heap_ptr, start * index + offset, peer, DTYPE)


@triton.jit
def staging_slot(source, owner):
    """Index of `source` among the W-1 staging slots of `owner`: rank order, the owner left out."""
    return source - (source > owner).to(tl.int32)
