"""A thread that notices what a hung device cannot tell: a peer's process has ended, or a wait has failed.

It looks every 50 ms. A dead peer makes it ask all device waits of this rank to end, so that a survivor fails in
well under a second and not after the timeout; a failed wait is printed on stderr once, since the host may be
blocked in a synchronisation.
"""

import os
import select
import sys
import threading

from .record import Record

PERIOD_S = 0.05


class Watch:
    """Watches the peers of one group. `dead` maps rank to pid of those that ended."""

    def __init__(self, record: Record, pids: dict[int, int], describe):
        self._record, self._describe = record, describe
        opened = {rank: self._open(pid) for rank, pid in pids.items()}
        self._fds = {fd: (rank, pids[rank]) for rank, fd in opened.items() if fd is not None}
        self.dead: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tp_overlap_watch", daemon=True)
        self._thread.start()

    @staticmethod
    def _open(pid: int) -> int | None:
        try:
            return os.pidfd_open(pid)
        except OSError:  # another PID namespace: the timeout remains
            return None

    def _run(self) -> None:
        poll = select.poll()
        for fd in self._fds:
            poll.register(fd, select.POLLIN)
        printed = False
        while not self._stop.wait(PERIOD_S):
            for fd, _ in poll.poll(0):
                poll.unregister(fd)
                rank, pid = self._fds[fd]
                self.dead[rank] = pid
                self._record.abort()
            if not printed and self._record.read() is not None:
                printed = True
                print(f"tp_overlap_kernels: {self._describe()}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop looking and close the descriptors."""
        self._stop.set()
        self._thread.join()
        for fd in self._fds:
            os.close(fd)
