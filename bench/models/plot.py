"""The figure of `one-batch`: the time of each case beside that of `nccl`, one line of panels a model."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from .arms import CEILING, NCCL, OURS, OURS_SUMS

COLOURS = {OURS: "#c1121f", OURS_SUMS: "#f4a261", CEILING: "#999999"}
LABELS = {OURS: "ours", OURS_SUMS: "ours, sums alone", CEILING: "ceiling: no all-reduce"}
PANELS = {"prefill_latency": "prefill", "median_decode_latency": "decode step"}
BAR = 0.27
IDENTITY = ("model", "layers", "published_layers", "world_size", "batch_size", "input_len", "output_len", "arm")

Line = dict[str, Any]


def read_lines(path: pathlib.Path) -> list[Line]:
    """Lines of a file that `one-batch` has written. Of a case and arm that was measured again the last one counts.

    Errors: ValueError names the file and the line.
    """
    kept: dict[tuple[Any, ...], Line] = {}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            kept[tuple(line[key] for key in IDENTITY)] = line
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}:{number} is no line of one-batch: {type(error).__name__}: {error}") from error
    return list(kept.values())


def plot(results: pathlib.Path, out: pathlib.Path | None = None) -> list[pathlib.Path]:
    """Writes a PNG, `out` or one beside the results. Errors: ValueError where the file holds no times."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    from matplotlib.figure import Figure

    lines = [line for line in read_lines(results) if "prefill_latency" in line]
    if not lines:
        raise ValueError(f"{results} holds no times to plot")
    models = list(dict.fromkeys(map(name_of, lines)))
    figure = Figure(figsize=(15, 3.6 * len(models) + 0.6), layout="constrained")
    panels = figure.subplots(len(models), len(PANELS), squeeze=False)
    for row, model in zip(panels, models, strict=True):
        mine = [line for line in lines if name_of(line) == model]
        for panel, (field, title) in zip(row, PANELS.items(), strict=True):
            _panel(panel, beside_nccl(mine, field))
            panel.set_title(f"{title}: {model}", fontsize=10)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS), frameon=False
    )
    run = lines[-1]["run"]
    legend = "batch x input + output, and what nccl takes"
    figure.suptitle(f"time beside nccl's   ({lines[-1]['world_size']} x {run['gpu']};  {legend})", fontsize=12)
    path = out or results.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return [path]


def name_of(line: Line) -> str:
    """The model of a line, how much of it, and over how many ranks."""
    layers, published = line["layers"], line["published_layers"]
    cut = "" if layers == published else f", {layers} of {published} layers"
    return f"{line['model']}{cut}, TP={line['world_size']}"


def beside_nccl(lines: Iterable[Line], field: str) -> list[tuple[str, dict[str, float]]]:
    """(label, percent of nccl's time by arm) of each case in which nccl and another arm have the field.

    A prefill does not depend on the tokens that are made after it: cases that differ in nothing else are one.
    """
    cases: dict[tuple[int, ...], dict[str, float]] = {}
    for line in lines:
        if field in line:
            key: tuple[int, ...] = (line["batch_size"], line["input_len"])
            if field != "prefill_latency":
                key += (line["output_len"],)
            cases.setdefault(key, {})[line["arm"]] = line[field]
    found = []
    for key, seconds in sorted(cases.items()):
        base = seconds.pop(NCCL, None)
        if base and seconds:
            label = f"{key[0]} x {key[1]}" + (f" + {key[2]}" if len(key) > 2 else "") + f"\n{1e3 * base:.3g} ms"
            found.append((label, {arm: 100 * each / base for arm, each in seconds.items()}))
    return found


def _panel(panel: Any, cases: list[tuple[str, dict[str, float]]]) -> None:
    """Bars hang from nccl's 100 %: their length is what is saved, or lost above it."""
    for number, (arm, colour) in enumerate(COLOURS.items()):
        offset = BAR * (number - (len(COLOURS) - 1) / 2)
        places = [place + offset for place, (_, percents) in enumerate(cases) if arm in percents]
        changes = [percents[arm] - 100 for _, percents in cases if arm in percents]
        panel.bar(places, changes, BAR, bottom=100, color=colour, label=LABELS[arm])
        for place, change in zip(places, changes, strict=True):
            side = "bottom" if change > 0 else "top"
            panel.annotate(f"{100 + change:.1f}", (place, 100 + change), ha="center", va=side, fontsize=5)
    everything = [100.0] + [percent for _, percents in cases for percent in percents.values()]
    panel.axhline(100, color="#1d3557", linewidth=1.2)
    panel.set_ylim(min(everything) - 2, max(everything) + 2)
    panel.set_xticks(range(len(cases)), [label for label, _ in cases], rotation=60, fontsize=7)
    panel.set_ylabel("% of nccl's time", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
