"""The numbers of a serving run, under the names of SGLang's serving benchmark, from the times of its tokens."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..results import write_json
from .batching import Served

PERCENTILES = (90, 95, 99)


def summary(served: Sequence[Served]) -> dict[str, Any]:
    """Throughputs a second; latencies in milliseconds, each with mean, median, std and percentiles.

    e2e: from sending a request to its last token. ttft: to its first. tpot: (e2e - ttft) / (tokens - 1), a request.
    itl: the time between two tokens of a request, all of them. Requests of one token have neither tpot nor itl.
    concurrency: requests under way, a mean over the duration.
    """
    duration = max(each.times_s[-1] for each in served)
    inputs = sum(each.request.input_len for each in served)
    outputs = sum(len(each.tokens) for each in served)
    e2e = [each.times_s[-1] - each.sent_s for each in served]
    ttft = [each.times_s[0] - each.sent_s for each in served]
    longer = [each for each in served if len(each.tokens) > 1]
    tpot = [(each.times_s[-1] - each.times_s[0]) / (len(each.tokens) - 1) for each in longer]
    itl = [float(gap) for each in longer for gap in np.diff(each.times_s)]
    return {
        "duration": duration,
        "completed": len(served),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(served) / duration,
        "input_throughput": inputs / duration,
        "output_throughput": outputs / duration,
        "total_throughput": (inputs + outputs) / duration,
        **_spread("e2e_latency", e2e),
        **_spread("ttft", ttft),
        **_spread("tpot", tpot),
        **_spread("itl", itl),
        "max_itl_ms": 1e3 * max(itl, default=0.0),
        "concurrency": sum(e2e) / duration,
    }


def _spread(name: str, seconds: list[float]) -> dict[str, float]:
    """0 where there are none, as SGLang has it."""
    values = 1e3 * np.array(seconds or [0.0])
    fields = {"mean": values.mean(), "median": np.median(values), "std": values.std()}
    fields |= {f"p{each}": np.percentile(values, each) for each in PERCENTILES}
    return {f"{statistic}_{name}_ms": float(value) for statistic, value in fields.items()}


def median_of(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Field by field, the median over summaries; counts are those of every round."""
    return {
        name: value if isinstance(value, int) else float(np.median([each[name] for each in rounds]))
        for name, value in rounds[0].items()
    }


def slowest(by_rank: Sequence[Sequence[Served]]) -> list[Served]:
    """One log of those of all ranks: each time is that of the last rank to have it."""
    return [
        Served(
            ranks[0].request,
            max(each.sent_s for each in ranks),
            [max(times) for times in zip(*(each.times_s for each in ranks), strict=True)],
            ranks[0].tokens,
        )
        for ranks in zip(*by_rank, strict=True)
    ]


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of a file of `serving`, none where there is no file. Errors: ValueError where it holds something else."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            _identity(row)
        return rows
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of serving: {type(error).__name__}: {error}") from error


def write_rows(made: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Replaces the rows of the same model, ranks and arms in a file, and keeps those of others."""
    identities = {_identity(row) for row in made}
    write_json(path, {"rows": [row for row in read_rows(path) if _identity(row) not in identities] + made})


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "layers", "published_layers", "world_size", "arm"))
