"""The measured table: which plan was fastest for which shape, on one kind of device at one world size.

The tuner measures it and writes it with `save`; `load` finds and checks it; `lookup` answers for any shape.

    {"meta": {"device": "NVIDIA H200", "world_size": 2, ...anything that says where it comes from...},
     "entries": [{"op": "gemm_all_reduce", "N": 8192, "K": 4096, "dtype": "bfloat16", "M": 4096,
                  "plan": "chunked:chunks=2,own_chunks=2", "us": 479.0,
                  "runners_up": [{"plan": "two_shot:block_m=128,block_n=256", "us": 503.0}]}]}

"us" is a median in microseconds, graph mode, the slowest rank; runners_up are sorted by it. all_reduce: M = 1, K = 0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InvalidInput
from .problem import ITEMSIZE, PLAN_NAMES, Plan, Problem

TABLES = Path(__file__).parent / "tables"

# A measured shape speaks for a problem whose N and K differ from its own by at most this much taken together, in log2.
# Beyond it (8 times as wide, say) GEMM and transfer stand in another relation, and the rule of thumb knows better.
MAX_SHAPE_DISTANCE = 3.0


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measured problem: its plans with their times, fastest first."""

    op: str
    N: int
    K: int
    dtype: str
    M: int
    plans: tuple[Plan, ...]

    def to_json(self) -> dict[str, Any]:
        best, *others = self.plans
        runners_up = [{"plan": str(plan), "us": plan.us} for plan in others]
        return {
            **{"op": self.op, "N": self.N, "K": self.K, "dtype": self.dtype, "M": self.M},
            **{"plan": str(best), "us": best.us, "runners_up": runners_up},
        }


@dataclasses.dataclass(frozen=True)
class Table:
    """Entries in a fixed order, whatever the order of the file."""

    name: str  # of the file, for people; not part of the digest
    device: str
    world_size: int
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        order = sorted(self.entries, key=lambda entry: (entry.op, entry.dtype, entry.N, entry.K, entry.M))
        object.__setattr__(self, "entries", tuple(order))

    def lookup(self, problem: Problem) -> list[Plan]:
        """Plans for `problem`, fastest first, from the nearest measured shape; empty when none is near.

        The shape (N, K) is taken exactly where it was measured, else the nearest in log2; of that shape the nearest M
        in log2. Equal distances go to the smaller numbers. A dtype that was not measured uses one of the same width.
        """
        same_op = [entry for entry in self.entries if entry.op == problem.op]
        usable = [entry for entry in same_op if entry.dtype == problem.dtype] or [
            entry for entry in same_op if ITEMSIZE[entry.dtype] == ITEMSIZE[problem.dtype]
        ]
        if not usable or problem.world_size != self.world_size:
            return []
        entry = min(usable, key=lambda entry: _nearness(entry, problem))
        if _shape_distance(entry, problem) > MAX_SHAPE_DISTANCE:
            return []
        exact = (entry.N, entry.K, entry.M, entry.dtype) == (problem.N, problem.K, problem.M, problem.dtype)
        why = "measured" if exact else f"measured at M={entry.M} N={entry.N} K={entry.K} {entry.dtype}, the nearest"
        return [dataclasses.replace(plan, why=why) for plan in entry.plans]

    def digest(self) -> str:
        """Hex digest of what `lookup` depends on; ranks compare it at init. The layout of the file does not count."""
        content = [self.device, self.world_size, [entry.to_json() for entry in self.entries]]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def _shape_distance(entry: Entry, problem: Problem) -> float:
    return _octaves(entry.N, problem.N) + _octaves(entry.K, problem.K)


def _nearness(entry: Entry, problem: Problem) -> tuple[float, int, int, float, int]:
    return (_shape_distance(entry, problem), entry.N, entry.K, _octaves(entry.M, problem.M), entry.M)


def _octaves(a: int, b: int) -> float:
    return abs(math.log2(max(a, 1)) - math.log2(max(b, 1)))


# ---- files


def file_name(device: str, world_size: int) -> str:
    """ "NVIDIA H200", 2 -> "nvidia_h200_w2.json"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + f"_w{world_size}.json"


def load(path: str | Path | None, device: str, world_size: int) -> Table | None:
    """The table for `world_size` ranks on `device`, or None when the package has none.

    path: None for the package's own tables, a directory with files named as there, or a file. A file that the user
    named is used on any device, but must be of the same world size.
    Errors: InvalidInput names the file, the place in it, and what is wrong.
    """
    if world_size == 1:
        return None  # nothing to choose
    place = TABLES if path is None else Path(path)
    if place.is_dir():
        place = place / file_name(device, world_size)
        if not place.exists():
            return None
    try:
        text = place.read_text(encoding="utf-8")
    except OSError as error:
        reason = f"dispatch table {place}: cannot be read ({error}). Correct TP_OVERLAP_TABLE or unset it."
        raise InvalidInput(reason) from error
    table = parse(text, str(place))
    if table.world_size != world_size:
        raise InvalidInput(
            f"dispatch table {place}: measured with world_size={table.world_size}, but the group has {world_size}. "
            f"Give a directory that holds {file_name(device, world_size)}, or tune one for this world size."
        )
    return table


def parse(text: str, name: str) -> Table:
    """A table from JSON text. `name` stands in errors and in explanations."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidInput(
            f"dispatch table {name}: no JSON at line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    root = _Field(name, "the document", document)
    meta = root.item("meta")
    entries = [_entry(field) for field in root.item("entries").items()]
    seen: dict[tuple, int] = {}
    for index, entry in enumerate(entries):
        first = seen.setdefault((entry.op, entry.N, entry.K, entry.dtype, entry.M), index)
        if first != index:
            raise InvalidInput(
                f"dispatch table {name}: entries[{index}] has the same op, N, K, dtype and M as entries[{first}]."
            )
    return Table(name, meta.item("device").text(), meta.item("world_size").whole(1), tuple(entries))


def save(path: str | Path, meta: dict[str, Any], entries: Iterable[Entry]) -> Table:
    """Writes a table, one entry a line, after reading it back as `load` would. Returns it.

    meta needs "device" and "world_size"; more keys (driver, versions, commit, command line) are kept for people.
    """
    ordered = Table(str(path), str(meta.get("device")), int(meta.get("world_size", 0)), tuple(entries)).entries
    lines = ",\n".join("  " + json.dumps(entry.to_json()) for entry in ordered)
    text = f'{{\n "meta": {json.dumps(meta)},\n "entries": [\n{lines}\n ]\n}}\n'
    table = parse(text, str(path))
    Path(path).write_text(text, encoding="utf-8")
    return table


def _entry(field: _Field) -> Entry:
    op = field.item("op").one_of(PLAN_NAMES)
    plans = [_plan(field, op), *(_plan(runner_up, op) for runner_up in field.item("runners_up", []).items())]
    times = [plan.us or 0.0 for plan in plans]
    if times != sorted(times):
        field.refuse(f"plan and runners_up must be sorted by us, got {times}")
    return Entry(
        op=op,
        N=field.item("N").whole(1),
        K=field.item("K").whole(0),
        dtype=field.item("dtype").one_of(ITEMSIZE),
        M=field.item("M").whole(1),
        plans=tuple(plans),
    )


def _plan(field: _Field, op: str) -> Plan:
    written = field.item("plan")
    try:
        plan = Plan.parse(written.text())
    except InvalidInput as error:
        written.refuse(str(error))
    if plan.name not in PLAN_NAMES[op]:
        written.refuse(f"{plan.name!r} is not a plan of {op}; those are {', '.join(PLAN_NAMES[op])}")
    return dataclasses.replace(plan, us=field.item("us").positive())


@dataclasses.dataclass(frozen=True)
class _Field:
    """A value of the document with its place in it, so that every refusal can say where."""

    file: str
    place: str
    value: Any

    def refuse(self, problem: str) -> NoReturn:
        raise InvalidInput(f"dispatch table {self.file}: {self.place}: {problem}.")

    def item(self, key: str, default: Any = None) -> _Field:
        if not isinstance(self.value, dict):
            self.refuse(f"must be an object, got {self.value!r}")
        if key not in self.value and default is None:
            self.refuse(f"has no {key!r}")
        place = key if self.place == "the document" else f"{self.place}.{key}"
        return _Field(self.file, place, self.value.get(key, default))

    def items(self) -> list[_Field]:
        if not isinstance(self.value, list):
            self.refuse(f"must be a list, got {self.value!r}")
        return [_Field(self.file, f"{self.place}[{index}]", value) for index, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value:
            self.refuse(f"must be a string, got {self.value!r}")
        return self.value

    def one_of(self, allowed: Iterable[str]) -> str:
        if self.value not in tuple(allowed):
            self.refuse(f"must be one of {', '.join(allowed)}, got {self.value!r}")
        return self.value

    def whole(self, least: int) -> int:
        if type(self.value) is not int or self.value < least:
            self.refuse(f"must be a whole number of at least {least}, got {self.value!r}")
        return self.value

    def positive(self) -> float:
        if type(self.value) not in (int, float) or not 0 < self.value < math.inf:
            self.refuse(f"must be a positive number, got {self.value!r}")
        return float(self.value)
