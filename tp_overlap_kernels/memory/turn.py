"""One call of a group at a time: threads take turns on the host, streams on the device.

The signals of a group count its calls, so two of them in flight at once would take each other's slots. A call on
another stream than the one before waits for that one; so does a captured call, for a call of the same capture. What a
replayed graph runs beside is not seen here: that is ordered by whoever replays it.

While the stream stays the same a turn costs 0.5 us: a lock, and the stream's handle.
"""

import threading
from typing import Any

import torch


def _current_stream(index: int | None) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# The stream as an integer without a Stream object around it: 0.2 us and not 2. Triton takes it from there, too.
stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)


class Turn:
    """The context in which a call is issued. Streams are remembered as objects, not kept alive: torch's live for ever.

    A stream of the caller's own making (ExternalStream) must outlive the group's next call on another one.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._on_device = device.type == "cuda"
        self._lock = threading.Lock()
        self._handle: int | None = None  # of the last call's stream, if that call was not captured
        self._last: Any = None  # the last call's stream
        self._eager: Any = None  # the stream of the last call that was not captured

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._on_device and stream_of(self._device.index) != self._handle:
            try:
                self._change_stream()
            except BaseException:
                self._lock.release()
                raise

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def _change_stream(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        if torch.cuda.is_current_stream_capturing():
            # An edge from an eager call cannot be captured; one from a call of this capture must be.
            if self._last is not None and self._last != stream and _is_capturing(self._last):
                stream.wait_stream(self._last)
            self._handle = None
        else:
            if self._eager is not None and self._eager != stream and not _is_capturing(self._eager):
                stream.wait_stream(self._eager)
            self._eager, self._handle = stream, stream.cuda_stream
        self._last = stream


def _is_capturing(stream: Any) -> bool:
    if stream.cuda_stream == 0:  # the default stream: no capture, and asking may be an error while others capture
        return False
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()
