"""Shared memory of CPU ranks, wherever they run: it works, or the error says what to change. Nothing is left behind.

Each rank is a process of its own, which changes its surroundings first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import stat
from pathlib import Path

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.cases import BF16, Case
from tests.ops import faults
from tests.ops.calls import Call, invoke, operands
from tests.ops.faults import Outcome, run_job
from tests.ops.judge import judge
from tp_overlap_kernels.memory import store as stores

CALL = Call("gemm_all_reduce", Case(33, 40, 24, BF16, 2, ""))
CLONE_NEWNS, MS_PRIVATE_ALL = 0x20000, (1 << 18) | (1 << 14)
NOBODY = 65534


def long_temporary_folder(rank, folder):
    """Longer than the name of a socket may be."""
    path = Path(folder, *["x" * 100] * 3)
    path.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(path)


def read_only_temporary_folder(rank, folder):
    os.environ["TMPDIR"] = "/proc"  # root, too, cannot write there
    with pytest.raises(OSError):
        Path("/proc/tp_overlap").write_text("")


def open_umask(rank, folder):
    os.umask(0)


def tiny_shm(rank, folder):
    """A /dev/shm of 64 KiB, of this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.mount(None, b"/", None, MS_PRIVATE_ALL, None):
        raise PermissionError(ctypes.get_errno(), "no mount namespace")
    if libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
        raise PermissionError(ctypes.get_errno(), "no mount")
    assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 64 << 10


def small_files(rank, folder):
    """ulimit -f, on one rank alone."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def few_descriptors(rank, folder):
    """ulimit -n, on one rank alone: one descriptor is left, and that is for its own memory."""
    if rank == 1:
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, used + 1))
        with contextlib.suppress(OSError):
            while True:
                last = os.open("/dev/null", os.O_RDONLY)
        os.close(last)


def run_in(rank: int, world_size: int, change: str, folder: str):
    """What init and a call come to; the modes of the shared files; the names that were made."""
    before = names(folder)
    try:
        globals()[change](rank, folder)
    except PermissionError as reason:
        return str(reason)
    made = Outcome.of(lambda: tpo.init(max_M=256, max_N=1024))
    modes = {
        stat.S_IMODE(os.stat(f"/proc/self/fd/{fd}").st_mode)
        for fd in os.listdir("/proc/self/fd")
        if "memfd:tp_overlap" in (os.readlink(f"/proc/self/fd/{fd}") if os.path.exists(f"/proc/self/fd/{fd}") else "")
    }
    out = None if made.error else invoke(CALL, operands(CALL, rank), rank)
    left = names(folder) - before
    tpo.close()
    return made, modes, out, left


def names(folder: str) -> set[str]:
    return {*os.listdir("/dev/shm"), *os.listdir("/tmp")} - {Path(folder).name}


@pytest.mark.parametrize("change", [long_temporary_folder, read_only_temporary_folder, open_umask, tiny_shm])
def test_it_works(change, tmp_path):
    codes, answers = run_job(2, tmp_path, run_in, change.__name__, str(tmp_path))
    if isinstance(answers[0], str):
        pytest.skip(f"needs CAP_SYS_ADMIN for a /dev/shm of its own: {answers[0]}")
    assert codes == [0, 0]
    for made, modes, _, left in answers:
        assert made.error == "" and modes == {0o600}, made
        assert not [name for name in left if "tp_overlap" in name or "torch" in name]
    judge(CALL, "ref", [out for _, _, out, _ in answers])


@pytest.mark.parametrize(
    "change, says",
    [(small_files, "ulimit -n, -f"), (few_descriptors, "ulimit")],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_limit_of_one_rank_is_said_on_both(change, says, tmp_path):
    codes, answers = run_job(2, tmp_path, run_in, change.__name__, str(tmp_path))
    assert codes == [0, 0]
    for rank, (made, modes, _, _) in enumerate(answers):
        assert made.error == "UnsupportedTopology" and says in made.text, made
        assert made.text.startswith("init: cannot " if rank == 1 else "init: on rank 1: cannot "), made
        assert modes == set(), "files are left open"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_cannot_open_the_files():
    store = object.__new__(stores.SharedMemoryStore)
    pid, fd = store._make(4096, "tp_overlap_kernels")
    try:
        assert [open_as(user, f"/proc/{pid}/fd/{fd}") for user in (0, NOBODY)] == ["opened", "Permission denied"]
    finally:
        os.close(fd)


def open_as(user: int, path: str) -> str:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(user)
            os.setuid(user)
            os.close(os.open(path, os.O_RDWR))
            os.write(theirs, b"opened")
        except OSError as reason:
            os.write(theirs, os.strerror(reason.errno).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        return answer.read()


def test_nothing_is_left_by_ranks_that_are_killed(tmp_path):
    """Memory and names go with the last process, whatever its end."""
    before = names(str(tmp_path))
    free = shared_memory_kib()
    codes, _ = run_job(2, tmp_path, fill_and_die)
    assert codes == [-9, -9]
    assert not [name for name in names(str(tmp_path)) - before if "tp_overlap" in name]
    assert shared_memory_kib() < free + 40_000, "64 MiB were touched"


def fill_and_die(rank: int, world_size: int) -> None:
    tpo.init(max_M=2048, max_N=4096)
    from tp_overlap_kernels.memory import arena as arenas

    (arena,) = arenas.all_arenas()
    arena.store.buffer.fill_(1)
    assert arena.store.buffer.numel() > 32 << 20
    torch.distributed.barrier()
    faults.ENDS["SIGKILL"]()


def shared_memory_kib() -> int:
    """Pages of shared memory in the whole machine."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Shmem:"))
