"""Every exception this package raises on purpose.

A message begins with the name of the op or call, says what is wrong with its values, and ends with the fix.
"""


class TpOverlapError(RuntimeError):
    """Base of all errors of this package."""


class InvalidInput(TpOverlapError, ValueError):
    """An argument that this rank can see to be wrong. Raised before the rank enters a collective."""


class NotInitialised(TpOverlapError):
    """The process group has no arena: `init` was not called for it, or `close` was."""


class UnsupportedTopology(TpOverlapError):
    """The machine cannot do what was asked for by name: no peer access, no such store, another architecture."""


class NativeLibraryError(TpOverlapError):
    """The CUDA library could not be loaded. The text holds the path tried and the loader's reason."""


class GroupFailed(TpOverlapError):
    """A call of this group failed on the device. The group refuses further calls until `close` and `init`."""


class PeerTimeout(GroupFailed):
    """A peer did not arrive within the timeout."""


class PeerDied(GroupFailed):
    """The process of a peer has ended."""


class PeerClosed(GroupFailed):
    """A peer has closed the group while this rank still waits for it."""


class CallMismatch(GroupFailed):
    """A peer made another call (op, shape, dtype or bias) where this rank made its own."""
