"""The CUDA library: loaded by path on first use, checked by its ABI number, called through ctypes.

`libtpo_kernels.so` lies beside this file where the package was built with nvcc; without it the Triton kernels serve.
It links the CUDA runtime statically and loads on machines without a GPU or a driver too.
"""

import ctypes
import functools
from pathlib import Path

from .errors import NativeLibraryError, TpOverlapError

ABI_VERSION = 10  # TPO_ABI_VERSION in csrc/api.h
LIBRARY_PATH = Path(__file__).with_name("libtpo_kernels.so")


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, its functions typed. Raises NativeLibraryError with the path and the loader's reason."""
    if not path.exists():
        raise NativeLibraryError(
            f"native: no CUDA library at {path}: the package was built without nvcc, without cmake, or with "
            "TPO_SKIP_CUDA=1. Install it again where nvcc and cmake are on PATH, or choose another plan."
        )
    try:
        library = ctypes.CDLL(str(path))
        library.tpo_abi_version.restype = ctypes.c_int
        found = library.tpo_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"native: {path} could not be loaded: {error}. Install the package again.") from error
    if found != ABI_VERSION:
        raise NativeLibraryError(
            f"native: {path} has ABI version {found}, this package needs {ABI_VERSION}. Install the package again, so "
            "that both come from the same sources."
        )
    library.tpo_error_string.restype = ctypes.c_char_p
    library.tpo_error_string.argtypes = [ctypes.c_int]
    library.tpo_prepare.restype = ctypes.c_int
    library.tpo_prepare.argtypes = [ctypes.c_int]
    return library


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The package's library, loaded once a process and kept till its end. Raises NativeLibraryError."""
    return load(LIBRARY_PATH)


def available() -> bool:
    """Whether the library is there, loads, and has the right ABI. Says nothing about devices; never raises."""
    try:
        library()
    except NativeLibraryError:
        return False
    return True


def runs_on_current_device() -> bool:
    """Whether the library is there and has machine code for the current CUDA device. Creates that device's context."""
    return available() and library().tpo_prepare(1) == 0


def check(error: int, what: str) -> None:
    """Raise TpOverlapError if a function of the library returned a CUDA error. what: begins the message."""
    if error:
        text = library().tpo_error_string(error).decode()
        raise TpOverlapError(f"{what}: {text} (CUDA error {error}).")
