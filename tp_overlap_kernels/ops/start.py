"""Whether a kernel may begin while the one before it on the stream still runs, and load the weight then.

That one may be what writes the weight, so it is loaded ahead only where it is known to be at rest: the same tensor as
in an earlier call, and torch has counted no write to it since (`Tensor._version`). A write that torch does not count
(through `.data`, or by a kernel of the user's own through a bare pointer) must not be the last thing on the stream
before the call.
"""

import weakref

from torch import Tensor

from ..kernels.start import Start
from ..memory.arena import Arena

_MAX_WEIGHTS = 4096  # that an arena remembers


def start_with(arena: Arena, b: Tensor | None) -> Start:
    """How the next launch begins that reads this weight; None: a copy that was made for the call."""
    if arena.topology.ranks_per_device > 1:
        return Start.IN_ORDER  # blocks that wait for this rank's would take the room of another rank's
    at_rest = b is not None and _is_at_rest(arena, b)
    return Start.WEIGHTS_AHEAD if at_rest else Start.LAUNCHED_AHEAD


def _is_at_rest(arena: Arena, b: Tensor) -> bool:
    """Whether this tensor was seen in an earlier call and has not been written since, as far as torch knows."""
    if b.is_inference():
        return False  # its writes are not counted
    seen: dict[int, tuple[weakref.ref[Tensor], tuple[int, int]]] = arena.cache.setdefault("weights seen", {})
    before, now = seen.get(id(b)), (b._version, b.data_ptr())
    if before is not None and before[1] == now and before[0]() is b:
        return True
    if len(seen) >= _MAX_WEIGHTS:
        seen.clear()
    seen[id(b)] = (weakref.ref(b), now)
    return False
