"""A thread that notices what a hung device cannot tell: a peer has ended, failed or closed, or a wait has failed.

It looks every 50 ms. A dead peer, or one that says on the board that it has failed, makes it ask all device waits of
this rank to end, so that a survivor fails in well under a second and not after the timeout. What has become of this
rank it says on the board, and a failed wait on stderr, once, since the host may be blocked in a synchronisation.

A notice counts at the second look: its words have long come by then, where stores come out of order too; and so has
everything that a peer sent before it closed.
"""

import os
import select
import sys
import threading

from .board import CLOSED, FAILED, Board, Notice
from .record import Record

PERIOD_S = 0.05


class Watch:
    """Watches the peers of one group.

    dead: pid by rank of those that ended. told: notices by rank of those that failed. closed: those that closed.
    """

    def __init__(self, record: Record, pids: dict[int, int], describe, board: Board | None = None):
        self._record, self._describe, self._board = record, describe, board
        opened = {rank: self._open(pid) for rank, pid in pids.items()}
        self._fds = {fd: (rank, pids[rank]) for rank, fd in opened.items() if fd is not None}
        self.dead: dict[int, int] = {}
        self.told: dict[int, Notice] = {}
        self.closed: set[int] = set()
        self._silent = set(board.peers()) if board else set()  # peers of which there is no notice yet
        self._fresh: set[int] = set()  # there is one, seen once
        self._posted = False
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
            self._read_board()
            self.post_failure()
            if not printed and self._record.read() is not None:
                printed = True
                print(f"tp_overlap_kernels: {self._describe()}", file=sys.stderr, flush=True)

    def _read_board(self) -> None:
        if self._board is None:
            return
        for rank in sorted(self._silent):
            notice = self._board.read(rank)
            if notice is None:
                continue
            if rank not in self._fresh:
                self._fresh.add(rank)
                continue
            self._silent.discard(rank)
            if notice.state == FAILED:
                self.told[rank] = notice
                self._record.abort()
            elif notice.state == CLOSED:
                self.closed.add(rank)
                self._record.close_peer(rank)

    def post_failure(self) -> None:
        """Tell the peers, once, if this rank has failed."""
        wait = self._record.read()
        if self._board is not None and not self._posted and (wait is not None or self.dead):
            self._posted = True
            self._board.post(FAILED, wait, tuple(self.dead))

    def post_end(self) -> None:
        """Tell the peers that this rank takes no further part: it has failed, or it has closed the group."""
        self.post_failure()
        if self._board is not None and not self._posted:
            self._board.post(FAILED if self._record.failed else CLOSED)

    def close(self) -> None:
        """Stop looking and close the descriptors and the board."""
        self._stop.set()
        self._thread.join()
        for fd in self._fds:
            os.close(fd)
        if self._board is not None:
            self._board.close()
