"""The settings: every environment variable of the package, read here and nowhere else.

| variable                 | default | meaning                                                                     |
| ------------------------ | ------- | --------------------------------------------------------------------------- |
| TP_OVERLAP               | auto    | adapters: 0 off, 1 required, auto where it works. Plugins that engines load |
|                          |         | by themselves do nothing unless it is set                                   |
| TP_OVERLAP_MAX_TOKENS    | 8192    | default `max_M` of `init`                                                   |
| TP_OVERLAP_TIMEOUT       | 30      | seconds a device wait lasts before the group fails; 0 waits for ever        |
| TP_OVERLAP_PLAN          |         | force one plan, `name` or `name:key=value,...`; all ranks alike             |
| TP_OVERLAP_TABLE         |         | path of another dispatch table                                              |
| TP_OVERLAP_CPU_BACKEND   | ref     | CPU tensors: `ref` (torch, fast) or `interp` (the Triton kernels, interpreted) |
| TP_OVERLAP_LOG_LEVEL     |         | level of the package's logger                                               |
| TP_OVERLAP_RANKS_PER_NODE |        | for tests and experiments: ranks of torch.distributed, counted in so many,  |
|                          |         | are taken to be on different nodes, and do not map each other's memory      |

Arguments win over the environment.
"""

import functools
import os
from dataclasses import dataclass

from .errors import InvalidInput


@dataclass(frozen=True)
class Settings:
    """The environment as it was at the first look."""

    overlap: str
    overlap_is_set: bool
    max_tokens: int
    timeout_s: float
    plan: str | None
    table: str | None
    cpu_backend: str
    log_level: str | None
    ranks_per_node: int | None


def _choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        raise InvalidInput(f"{name} must be one of {', '.join(allowed)}, got {value!r}. Unset it for {default!r}.")
    return value


def _number(name: str, default: float, minimum: float) -> float:
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        raise InvalidInput(f"{name} must be a number, got {text!r}. Unset it for {default}.") from None
    if not value >= minimum:
        raise InvalidInput(f"{name} must be at least {minimum}, got {text!r}. Unset it for {default}.")
    return value


@functools.cache
def settings() -> Settings:
    """The settings, read once a process.

    Errors: InvalidInput names the variable, its value and what is allowed.
    """
    return Settings(
        overlap=_choice("TP_OVERLAP", "auto", ("0", "1", "auto")),
        overlap_is_set="TP_OVERLAP" in os.environ,
        max_tokens=int(_number("TP_OVERLAP_MAX_TOKENS", 8192, 1)),
        timeout_s=_number("TP_OVERLAP_TIMEOUT", 30.0, 0.0),
        plan=os.environ.get("TP_OVERLAP_PLAN") or None,
        table=os.environ.get("TP_OVERLAP_TABLE") or None,
        cpu_backend=_choice("TP_OVERLAP_CPU_BACKEND", "ref", ("ref", "interp")),
        log_level=os.environ.get("TP_OVERLAP_LOG_LEVEL") or None,
        ranks_per_node=int(_number("TP_OVERLAP_RANKS_PER_NODE", 0, 0)) or None,
    )
