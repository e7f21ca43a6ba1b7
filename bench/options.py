"""Options that several verbs share, and how a verb refuses what it cannot do."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer
from rich.console import Console

from . import cases

STORES = ("auto", "symm_mem", "nvshmem", "shm", "local")

complain = Console(stderr=True)

Dtype = Annotated[str, typer.Option("--dtype", help="bfloat16 or float16.")]
Tp = Annotated[
    int | None, typer.Option("--tp", min=1, help="Degree of the model's shards; the number of ranks if not given.")
]
Ranks = Annotated[
    int | None, typer.Option("--ranks", "--world-size", min=1, max=8, help="Ranks to start; ignored under torchrun.")
]
RanksPerDevice = Annotated[
    int, typer.Option("--ranks-per-device", min=1, max=8, help="More than 1 puts several ranks on one GPU, over gloo.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cuda or cpu.")]
Budget = Annotated[
    float | None,
    typer.Option("--budget-s", min=0, help="Start no case after this many seconds. What is measured is kept."),
]
Store = Annotated[
    str, typer.Option("--store", help="Where our arena lies: auto, symm_mem, nvshmem, shm or local, as of tpo.init.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the random inputs.")]
Commit = Annotated[
    str | None, typer.Option("--commit", help="What to write down as the commit; git is asked otherwise.")
]


def refuse(reason: object) -> typer.Exit:
    complain.print(f"bench: {reason}", style="red", markup=False, highlight=False)
    return typer.Exit(2)


def check_dtype(dtype: str) -> str:
    if dtype not in cases.ITEMSIZE:
        raise ValueError(f"--dtype is one of {', '.join(cases.ITEMSIZE)}, got {dtype!r}")
    return dtype


def check_store(store: str) -> str:
    if store not in STORES:
        raise ValueError(f"--store is one of {', '.join(STORES)}, got {store!r}")
    return store


def command_line() -> str:
    return shlex.join(["python", "-m", "tp_overlap_kernels.bench", *sys.argv[1:]])
