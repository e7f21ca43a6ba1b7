"""What a person reads: one table a layer, op and mode, and a summary at the end."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .results import Row, best_unfused

BANDS: dict[str, Callable[[int], bool]] = {
    "M <= 64": lambda M: M <= 64,
    "M 65..1023": lambda M: 64 < M < 1024,
    "M >= 1024": lambda M: M >= 1024,
    "all M": lambda M: True,
}
SLOWER_IS_A_LOSS = 1.03  # more than this times the best unfused way: beyond what a rerun explains
WIDTH_WITHOUT_TERMINAL = 180


def console() -> Console:
    """A console that does not fold tables to 80 columns where output goes to a file."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=WIDTH_WITHOUT_TERMINAL)


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str, str, int], list[Row]]:
    """Rows of (op, mode, layer, M), in the order they came."""
    grouped: dict[tuple[str, str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row.op, row.mode, row.layer, row.M].append(row)
    return grouped


def heading(rows: list[Row]) -> str:
    head = rows[0]
    shape = f"N={head.N} K_local={head.K_local}   {head.dtype}   W={head.world_size}"
    return f"{head.op}   {head.layer}   {shape}   {head.mode}; us a call, median of the slowest rank"


def table(rows: list[Row]) -> Table:
    """Of the rows of one layer, op and mode: a line for each M, a column for each provider, then how ours compares.
    Columns that would be blank are left out."""
    providers = list(dict.fromkeys(row.provider for row in rows))
    ours = next((name for name in providers if name.partition(":")[0] == "ours"), None)
    groups = list(by_case(rows).values())
    columns = [*_measured_columns(providers, ours), *_comparing_columns(ours, rows[0].mode)]
    filled = [(column, [column.cell(group) for group in groups]) for column in columns]
    filled = [(column, cells) for column, cells in filled if any(cells)]
    result = Table()
    for column, _ in filled:
        result.add_column(column.header, justify="right", style=column.style)
    for line in zip(*(cells for _, cells in filled), strict=True):
        result.add_row(*line)
    return result


@dataclass(frozen=True)
class Column:
    """A header, and what stands below it for the rows of one case."""

    header: str
    cell: Callable[[list[Row]], str]
    style: str = ""


def _measured_columns(providers: list[str], ours: str | None) -> list[Column]:
    def cell(name: str) -> Callable[[list[Row]], str]:
        return lambda group: next((_time(row) for row in group if row.provider == name), "")

    return [
        Column("M", lambda group: str(group[0].M)),
        Column("link", lambda group: _number(group[0].link_us), "dim"),
        Column("floor", lambda group: _number(group[0].floor_us), "dim"),
        *(Column(escape(_folded(name)), cell(name), "bold" if name == ours else "") for name in providers),
    ]


def _comparing_columns(ours: str | None, mode: str) -> list[Column]:
    """Of the first provider that is ours; empty where it has no time."""
    if ours is None:
        return []

    def of_ours(text: Callable[[Row], str]) -> Callable[[list[Row]], str]:
        return lambda group: next((text(row) for row in group if row.provider == ours and row.us), "")

    columns = [
        Column(f"{ours}\n/ floor", of_ours(lambda row: _number(ratio(row.us, row.floor_us), 2))),
        Column(f"{ours} / best\nunfused", lambda group: of_ours(lambda row: _against(row, best_unfused(group)))(group)),
        Column("overlap", of_ours(lambda row: _number(row.overlap, 2))),
        Column("TFLOP/s", of_ours(lambda row: _number(row.tflops, 0))),
        Column("wire\nGB/s", of_ours(lambda row: _number(row.wire_gbps, 0))),
        Column("plan", of_ours(lambda row: escape((row.plan or "").partition(":")[0]))),
    ]
    return columns + ([Column("host us\na call", of_ours(lambda row: _number(row.host_us)))] if mode == "eager" else [])


def ratio(us: float | None, other_us: float | None) -> float | None:
    return us / other_us if us and other_us else None


def _against(row: Row, best: Row | None) -> str:
    value = None if best is None else ratio(row.us, best.us)
    return f"[red]{value:.2f}[/]" if value is not None and value > SLOWER_IS_A_LOSS else _number(value, 2)


def _folded(name: str) -> str:
    return (
        name.replace("+", "\n+")
        .replace("symm_mem_", "symm_mem\n")
        .replace("nccl_", "nccl\n")
        .replace("fused_", "fused\n")
    )


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _time(row: Row) -> str:
    if row.us is not None:
        return _number(row.us)
    return "[red]WRONG[/]" if row.correct is False else "-"


def reasons(rows: list[Row]) -> list[str]:
    """Why providers have no time, each reason once with the sizes it was met at."""
    met: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in rows:
        if row.us is None and row.reason:
            met[row.provider, row.reason].append(row.M)
    return [
        f"{provider}: {reason} (M = {', '.join(map(str, sorted(set(sizes))))})"
        for (provider, reason), sizes in met.items()
    ]


def summary(rows: list[Row]) -> list[Table | str]:
    """Geometric means of time / floor by band of M for every provider, and how ours compares with the best unfused."""
    parts: list[Table | str] = []
    for op, mode in dict.fromkeys((row.op, row.mode) for row in rows):
        chosen = [row for row in rows if row.op == op and row.mode == mode]
        means = _means_table(chosen, f"{op}, {mode}: time / floor, geometric mean")
        if means.row_count:
            parts.append(means)
        parts += _comparison(chosen)
    return parts


def _means_table(rows: list[Row], title: str) -> Table:
    result = Table(title=title, title_justify="left")
    result.add_column("provider")
    for band in BANDS:
        result.add_column(band, justify="right")
    result.add_column("cases", justify="right")
    for name, ratios in floor_ratios(rows).items():
        means = [geometric_mean(ratio for M, ratio in ratios if inside(M)) for inside in BANDS.values()]
        result.add_row(escape(name), *(_number(mean, 2) for mean in means), str(len(ratios)))
    return result


def floor_ratios(rows: list[Row]) -> dict[str, list[tuple[int, float]]]:
    """provider -> [(M, time / floor)], and the same for the best unfused of each case."""
    ratios: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for (*_, M), group in by_case(rows).items():
        for row in group:
            if row.us and row.floor_us and row.provider != "matmul":
                ratios[row.provider].append((M, row.us / row.floor_us))
        best = best_unfused(group)
        if best is not None and best.us and best.floor_us:
            ratios["best unfused of each case"].append((M, best.us / best.floor_us))
    return ratios


def _comparison(rows: list[Row]) -> list[str]:
    lines = []
    for name in dict.fromkeys(row.provider for row in rows if row.is_ours):
        against = []
        for group in by_case(rows).values():
            mine = next((row for row in group if row.provider == name and row.us), None)
            best = best_unfused(group)
            if mine is not None and mine.us and best is not None and best.us:
                against.append((mine.us / best.us, mine, best))
        if not against:
            continue
        worst, mine, best = max(against, key=lambda each: each[0])
        losses = sum(ratio > SLOWER_IS_A_LOSS for ratio, _, _ in against)
        mean = geometric_mean(ratio for ratio, _, _ in against)
        lines.append(
            f"{name} / best unfused: geometric mean {mean:.3f} over {len(against)} cases; worst {worst:.3f} "
            f"({mine.layer}, M={mine.M}: {mine.us:.1f} us against {best.us:.1f} of {best.provider}); "
            f"more than 3 % slower in {losses}"
        )
    return lines
