"""What a run leaves behind: rows, and the JSON file that holds them.

{"meta": {gpu, world_size, link_gbps, driver, torch, triton, commit, command, date, ...},
 "rows": [{op, layer, M, N, K_local, dtype, world_size, mode, provider, us, p10_us, p90_us, mm_us, link_us, floor_us,
           correct, ...}]}
A row without a time (`us` null) has its `reason`; `correct` is false for a wrong result and null where none was made.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .cases import LAUNCH_US, Case, floor_us, link_us
from .launch import World
from .timing import Times

CONTROLS = ("matmul", "ref", "interp")  # not ways that a user would choose between: never the best unfused one


@dataclass
class Row:
    """One provider's outcome in one case and mode. Times are microseconds a call."""

    op: str
    layer: str
    M: int
    N: int
    K_local: int
    dtype: str
    world_size: int
    mode: str
    provider: str
    us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    mm_us: float | None = None
    link_us: float | None = None
    floor_us: float | None = None
    correct: bool | None = None
    reason: str | None = None
    host_us: float | None = None
    plan: str | None = None
    samples: int | None = None
    tflops: float | None = None  # of one rank: 2 * M * N * K_local / us
    wire_gbps: float | None = None  # bytes that must leave a rank / us
    overlap: float | None = None  # (mm + communication - us) / min of the two; communication = best unfused - mm

    @classmethod
    def of(cls, case: Case, mode: str, provider: str) -> Row:
        return cls(case.op, case.layer.label, case.M, case.N, case.K_local, case.dtype, case.world_size, mode, provider)

    def take(self, times: Times) -> None:
        self.us, self.p10_us, self.p90_us = round(times.us, 3), round(times.p10_us, 3), round(times.p90_us, 3)
        self.samples, self.correct = times.samples, True
        self.host_us = None if times.host_us is None else round(times.host_us, 2)

    @property
    def is_ours(self) -> bool:
        return self.provider.partition(":")[0] == "ours"

    @property
    def is_unfused(self) -> bool:
        return not self.is_ours and self.provider.partition(":")[0] not in CONTROLS


def best_unfused(rows: list[Row]) -> Row | None:
    """The fastest of the ways that do not use this library, among the rows of one case and mode."""
    return min((row for row in rows if row.is_unfused and row.us), key=lambda row: row.us or math.inf, default=None)


def complete(rows: list[Row], case: Case, link_gbps: float | None) -> None:
    """Fills in what needs the other rows of the case: floor, rates, overlap."""
    mm = next((row.us for row in rows if row.provider == "matmul"), None)
    mm = 0.0 if case.K_local == 0 else mm
    link = link_us(case, link_gbps)
    floor = floor_us(mm, link)
    best = best_unfused(rows)
    for row in rows:
        row.mm_us = mm
        row.link_us = None if link is None else round(link, 3)
        row.floor_us = None if floor is None else round(floor, 3)
        if not row.us:
            continue
        row.tflops = round(case.flops / row.us / 1e6, 1)
        if row.provider != "matmul":
            row.wire_gbps = round(case.wire_bytes / row.us / 1e3, 1)
        if row.is_ours and mm and best is not None and best.us:
            hidden = min(mm, best.us - mm)
            row.overlap = round((best.us - row.us) / hidden, 3) if hidden > 0 else None


@dataclass
class Results:
    """Rows of a run, written to `path` after every case, so that an interrupted run keeps what it measured."""

    meta: dict[str, Any]
    path: pathlib.Path | None = None
    rows: list[Row] = field(default_factory=list)

    def add(self, rows: list[Row]) -> None:
        self.rows += rows
        if self.path is not None:
            write_json(self.path, {"meta": self.meta, "rows": [asdict(row) for row in self.rows]})


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """One row a line, so that results can be compared by eye and by diff. Replaces the file in one step."""
    lines = []
    for key, value in content.items():
        if isinstance(value, list):
            body = ",\n".join("  " + json.dumps(each) for each in value)
            lines.append(f'"{key}": [\n{body}\n]')
        else:
            lines.append(f'"{key}": {json.dumps(value, indent=2)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(temporary, path)
    path.chmod(0o644)


def read_rows(path: pathlib.Path) -> tuple[dict[str, Any], list[Row]]:
    """(meta, rows) of a file that `Results` wrote; unknown fields are left out.

    Errors: ValueError names the file and what it lacks.
    """
    try:
        content = json.loads(path.read_text())
        known = set(Row.__dataclass_fields__)
        return content["meta"], [Row(**{k: v for k, v in row.items() if k in known}) for row in content["rows"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of this benchmark: {type(error).__name__}: {error}") from error


def describe_run(
    world: World, link_gbps: float | None, link_how: str, command: str, commit: str | None
) -> dict[str, Any]:
    """The meta part of the file: what the numbers depend on and rows do not say."""
    cuda = world.device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(world.device)
        if cuda
        else f"none ({platform.processor() or platform.machine()})",
        "world_size": world.world_size,
        "ranks_per_device": world.topology.ranks_per_device,
        "link_gbps": None if link_gbps is None else round(link_gbps, 1),
        "link": link_how,
        "floor": f"max(mm_us, link_us) + {LAUNCH_US:g} us",
        "driver": _nvidia_smi("driver_version") if cuda else None,
        "clocks_max_sm_mem_mhz": _nvidia_smi("clocks.max.sm,clocks.max.mem") if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "triton": _version("triton"),
        "commit": commit or _commit(),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _nvidia_smi(what: str) -> str | None:
    text = _output(["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"])
    return text.splitlines()[0].strip() if text else None


def _commit() -> str | None:
    """Of the working tree that this file lies in, with a plus where it has changes."""
    here = str(pathlib.Path(__file__).resolve().parent)
    commit = _output(["git", "-C", here, "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return None
    return commit + ("+" if _output(["git", "-C", here, "status", "--porcelain", "--untracked-files=no"]) else "")
