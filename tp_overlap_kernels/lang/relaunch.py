"""The same launch again, with other addresses: all that this package knows of the inside of Triton's launcher.

The public runner encodes every TMA descriptor anew, looks up each pointer in the driver and builds metadata for
hooks, on every launch. A `Relaunch` calls the C launcher below it with a list of arguments made once, of which it
replaces the stream and the addresses. The list is not built by rules of ours: `bind` lets Triton's own launcher
hand its arguments to a recorder instead of the driver, and finds the places that change.

Versions other than `VERSIONS`, and anything that is not as expected, mean the public way, which every launch has
gone at least once. What is checked: that each argument stands where it should, and that the C launcher, asked with no
arguments, says that it takes as many as were recorded. Launch hooks in force mean the public way, too.

An encoded descriptor is 128 bytes that hold an address, no claim on the memory: one made for a tensor that is gone is
right for the next tensor of equal shape and strides at that address. The driver copies it in the launch, also when
the launch is captured.
"""

import copy
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

log = logging.getLogger(__name__)

VERSIONS = {"3.6": True, "3.7": False}  # whether the C launcher takes a kernel's arguments flat, behind its own
STREAM = 3  # index in the C launcher's arguments, behind the grid
MAX_ADDRESSES = 1024  # encoded descriptors of one shape
MAX_SHAPES = 1024


class _Unexpected(Exception):
    """Triton's launcher is not the one that this file was written for."""


@dataclass(slots=True)
class _At:
    """Stands for a tensor in a TensorDescriptor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@dataclass(slots=True)
class Maps:
    """Encoded descriptors of one shape, by address; bounded."""

    descriptor: TensorDescriptor
    meta: dict[str, Any] | None
    encode: Callable[[TensorDescriptor, Any], list]
    known: dict[int, Any] = field(default_factory=dict)

    def __call__(self, address: int) -> Any:
        """What the C launcher takes for a tensor at this address: a CUtensorMap, or the address (no TMA)."""
        descriptor = copy.copy(self.descriptor)
        descriptor.base = _At(address, self.descriptor.base.dtype)
        made = self.encode(descriptor, self.meta)[0]
        if made is descriptor.base:
            return address
        if len(self.known) >= MAX_ADDRESSES:
            self.known.clear()
        self.known[address] = made
        return made


@dataclass(slots=True)
class Relaunch:
    """One launch, ready to be made again. Not for two threads at once: the arguments are one list."""

    function: Callable | None
    args: list  # of the C launcher
    kernel_args: list  # those of the kernel: the same list, or one that stands in it
    slots: tuple[tuple[int, Maps | None], ...]  # a place in kernel_args for each address
    stream_of: Callable[[int], int]
    device: int

    def __call__(self, *addresses: int) -> bool:
        """Launch on the device's current stream with these addresses, multiples of 16.

        False: not launched, go the public way.
        """
        if self.function is None or _hooked():
            return False
        values = self.kernel_args
        for (slot, maps), address in zip(self.slots, addresses, strict=True):
            values[slot] = address if maps is None else maps.known.get(address) or maps(address)
        self.args[STREAM] = self.stream_of(self.device)
        try:
            self.function(*self.args)
        except (TypeError, ValueError, OverflowError) as reason:  # arguments refused: before anything was launched
            log.warning("the fast way to launch is refused (%s): launches go the public way, more slowly", reason)
            self.function = None
            return False
        return True


def _hooked() -> bool:
    """Whether somebody wants to see launches: a profiler, say. An empty chain of hooks is nobody."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))
    )


def bind(
    compiled: Any, names: list[str], grid: int, args: tuple, changing: tuple[str, ...], maps: dict
) -> Relaunch | None:
    """The launch of `compiled` with `args` (all of the kernel's, constexprs too), or None where the public way must do.

    changing: names of the arguments whose addresses will be given. maps: the owner's encoded descriptors.
    The result holds no tensor; whoever keeps it keeps alive what does not change.
    """
    flat = VERSIONS.get(".".join(triton.__version__.split(".")[:2]))
    if flat is None:
        return None
    try:
        return _bind(compiled, names, grid, args, changing, maps, flat)
    except (_Unexpected, AttributeError, LookupError, TypeError, ValueError, AssertionError) as reason:
        log.info("%s is launched the public way: %s", getattr(compiled, "name", "kernel"), reason)
        return None


def _bind(
    compiled: Any, names: list[str], grid: int, args: tuple, changing: tuple[str, ...], maps: dict, flat: bool
) -> Relaunch:
    launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        raise _Unexpected("it takes scratch memory, which is allocated launch by launch")
    device = driver.active.get_current_device()
    stream_of = driver.active.get_current_stream
    head = [grid, 1, 1, stream_of(device), compiled.function]
    recorded = _record(compiled, launcher, head, args)
    own = _takes(_beneath(launcher.launch))
    if own != len(recorded) or recorded[: len(head)] != head:
        raise _Unexpected(f"the launcher takes {own} arguments, was given {len(recorded)}")
    values = recorded if flat else list(recorded[-1])
    slots = _places(compiled, launcher, names, args, values, len(values) if not flat else None, maps)
    values[:] = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
    if not flat:
        recorded[-1] = values
        if len(launcher.arg_annotations) != len(values):
            raise _Unexpected(f"{len(launcher.arg_annotations)} annotations for {len(values)} arguments")
    return Relaunch(
        _beneath(launcher.launch), recorded, values, tuple(slots[name] for name in changing), stream_of, device
    )


def _record(compiled: Any, launcher: Any, head: list, args: tuple) -> list:
    """What Triton would give to the C launcher."""
    recorded: list[Any] = []
    probe = copy.copy(launcher)
    probe.launch = _module(launcher).wrap_handle_tensordesc(
        lambda *final: recorded.extend(final), dict(compiled.src.signature), _metas(compiled)
    )
    probe(*head, compiled.packed_metadata, None, None, None, *args)
    return recorded


def _module(launcher: Any) -> Any:
    return sys.modules[type(launcher).__module__]


def _metas(compiled: Any) -> Any:
    return getattr(compiled.metadata, "tensordesc_meta", None)


def _beneath(launch: Callable) -> Callable:
    """The C function under the Python one that expands descriptors, if there is that."""
    if not hasattr(launch, "__closure__"):
        return launch
    cells = dict(
        zip(launch.__code__.co_freevars, (cell.cell_contents for cell in launch.__closure__ or ()), strict=True)
    )
    return cells["launcher"]


def _takes(function: Callable) -> int:
    """How many arguments a C function takes, as it says itself when it gets none."""
    try:
        function()
    except TypeError as reason:
        found = re.search(r"exactly (\d+) argument", str(reason))
        if found:
            return int(found.group(1))
    raise _Unexpected("the launcher does not say how many arguments it takes")


def _places(
    compiled: Any, launcher: Any, names: list[str], args: tuple, values: list, count: int | None, maps: dict
) -> dict[str, tuple[int, Maps | None]]:
    """Where each argument stands in `values`. count: of the kernel's values; None where others stand before them."""
    encode = _module(launcher).make_tensordesc_arg
    metas = list(_metas(compiled) or ())
    expanded = []
    described = 0
    for arg in args:
        if isinstance(arg, TensorDescriptor):
            expanded.append(encode(arg, metas[described] if metas else None))
            described += 1
        else:
            expanded.append([arg])
    width = sum(len(parts) for parts in expanded)
    place = len(values) - width
    if len(names) != len(args) or place < 0 or (count is not None and place):
        raise _Unexpected(f"{len(args)} arguments become {len(values)} values, not {width}")
    places: dict[str, tuple[int, Maps | None]] = {}
    described = 0
    for name, arg, parts in zip(names, args, expanded, strict=True):
        held = values[place : place + len(parts)]
        if isinstance(arg, TensorDescriptor):
            same = type(held[0]) is type(parts[0]) and held[1:] == parts[1:]
            places[name] = place, _maps_of(maps, name, arg, metas[described] if metas else None, encode)
            described += 1
        else:
            same = held[0] is arg
            places[name] = place, None
        if not same:
            raise _Unexpected(f"argument {name!r} does not stand where it should")
        place += len(parts)
    return places


def _maps_of(maps: dict, name: str, descriptor: TensorDescriptor, meta: Any, encode: Callable) -> Maps:
    key = (name, *descriptor.shape, *descriptor.strides, *descriptor.block_shape)
    found = maps.get(key)
    if found is None:
        if len(maps) >= MAX_SHAPES:
            maps.clear()
        template = copy.copy(descriptor)
        template.base = _At(0, descriptor.base.dtype)
        found = maps[key] = Maps(template, meta, encode)
    return found
