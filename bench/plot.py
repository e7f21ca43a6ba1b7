"""`plot`: time against M, one small panel a layer, for each op and mode of a result file."""

from __future__ import annotations

import math
import pathlib
from typing import Any

from .report import by_case
from .results import Row, read_rows

PANEL_INCHES = (4.4, 3.5)
COLUMNS = 3
# Ours stands out; ways without us are cool colours; what bounds them all is grey.
OURS = ("#c1121f", "#e85d04", "#9d0208", "#f48c06", "#7f4f24", "#d81159")
OTHERS = ("#1d3557", "#457b9d", "#2a9d8f", "#7b6d8d", "#6a994e", "#219ebc", "#5e548e")


def plot(results: pathlib.Path, out: pathlib.Path | None = None) -> list[pathlib.Path]:
    """Writes a PNG for each op and mode in the file and returns their paths: `out` itself where there is one, else
    names that end in op and mode. Errors: ValueError where the file holds no times."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    meta, rows = read_rows(results)
    timed = [row for row in rows if row.us]
    if not timed:
        raise ValueError(f"{results} holds no times to plot")
    groups = list(dict.fromkeys((row.op, row.mode) for row in timed))
    base = out or results.with_suffix(".png")
    written = []
    for op, mode in groups:
        path = base if len(groups) == 1 else base.with_name(f"{base.stem}_{op}_{mode}{base.suffix}")
        _figure([row for row in timed if (row.op, row.mode) == (op, mode)], meta, f"{op}, {mode}", path)
        written.append(path)
    return written


def _figure(rows: list[Row], meta: dict, title: str, path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(row.layer for row in rows))
    columns = min(COLUMNS, len(layers))
    lines = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines + 1.1), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    colours = _colours(list(dict.fromkeys(row.provider for row in rows)))
    for index, panel in enumerate(panels.flat):
        if index < len(layers):
            _panel(panel, [row for row in rows if row.layer == layers[index]], colours)
        else:
            panel.axis("off")
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    link = f", link {meta['link_gbps']:g} GB/s" if meta.get("link_gbps") else ""
    figure.suptitle(f"{title}   ({meta.get('world_size')} x {meta.get('gpu')}{link})", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _colours(providers: list[str]) -> dict[str, str]:
    mine = [name for name in providers if name.partition(":")[0] in ("ours", "ref", "interp")]
    others = [name for name in providers if name not in mine and name != "matmul"]
    colours = {name: OURS[i % len(OURS)] for i, name in enumerate(mine)}
    return colours | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)} | {"matmul": "#999999"}


def _panel(panel: Any, rows: list[Row], colours: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator

    head = rows[0]
    panel.set_title(f"{head.layer}   N={head.N} K={head.K_local}", fontsize=10)
    floor = sorted((M, group[0].floor_us) for (*_, M), group in by_case(rows).items() if group[0].floor_us)
    if floor:
        panel.plot(*zip(*floor, strict=True), color="black", linestyle="--", linewidth=1.4, label="floor", zorder=4)
    for name in dict.fromkeys(row.provider for row in rows):
        points = sorted((row.M, row.us) for row in rows if row.provider == name and row.us)
        mine = name.partition(":")[0] in ("ours", "ref", "interp")
        style = ":" if name == "matmul" else "-"
        panel.plot(
            *zip(*points, strict=True),
            color=colours[name],
            linestyle=style,
            linewidth=2.2 if mine else 1.2,
            marker="o" if mine else ".",
            markersize=4,
            label="matmul alone" if name == "matmul" else name,
            zorder=5 if mine else 3,
        )
    sizes = sorted({row.M for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(sizes, [str(M) for M in sizes], rotation=45, fontsize=8)
    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.tick_params(axis="y", labelsize=8)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel("M", fontsize=9)
    panel.set_ylabel("us a call", fontsize=9)
    panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
