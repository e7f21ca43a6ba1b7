"""Writes the measured tables and pictures of README.md and docs/ anew, from bench/results/, and the model of nodes.

    python docs/tables.py

A block between `<!-- numbers: NAME -->` and `<!-- end -->` is replaced by what the function of that name returns.
"""

from __future__ import annotations

import json
import pathlib
import re

from tp_overlap_kernels.bench.models import plot as models_plot
from tp_overlap_kernels.bench.models.arms import ARMS, CEILING, NCCL, OURS, OURS_SUMS
from tp_overlap_kernels.bench.models.serving_report import read_rows as read_serving_rows
from tp_overlap_kernels.bench.plot import plot
from tp_overlap_kernels.bench.report import BANDS, by_case, floor_ratios, geometric_mean
from tp_overlap_kernels.bench.results import Row, best_unfused, read_rows
from tp_overlap_kernels.dispatch import nodes_model

ROOT = pathlib.Path(__file__).resolve().parent.parent
ONE_BATCH = ROOT / "bench" / "results" / "h200x2_one_batch.jsonl"
WAYS = ("ours", "best unfused of each case", "matmul+nccl")
SHOWN_M = (16, 1024, 8192)
PROOF_PARTS = ("soak", "replay", "bits", "fuzz", "delay", "faults", "hog", "sanitizer")


def graph_rows(path: pathlib.Path) -> list[Row]:
    return [row for row in read_rows(path)[1] if row.mode == "graph"]


RESULTS = [path for path in sorted((ROOT / "bench" / "results").glob("*_gemm_*.json")) if graph_rows(path)]


def summary() -> str:
    """Time / floor by band of M, and the microseconds of six layers at a few M."""
    bands = [band for band in BANDS if band != "all M"]
    lines = [_line("op", "way", *bands), _line("---", "---", *["---:"] * len(bands))]
    for path in RESULTS:
        rows = graph_rows(path)
        ratios = floor_ratios(rows)
        for way in WAYS:
            means = [geometric_mean(ratio for M, ratio in ratios[way] if BANDS[band](M)) for band in bands]
            lines.append(_line(rows[0].op, way, *(f"{mean:.2f}" for mean in means)))
    return "\n".join(lines)


def six_rows() -> str:
    """Ours, and the best unfused way, of each layer of the first file at a few M."""
    rows = graph_rows(RESULTS[0])
    lines = [_line("layer", "N", "K a rank", *(f"M={M}" for M in SHOWN_M)), _line("---", *["---:"] * 5)]
    cases = _by_layer(rows)
    for layer, of_layer in cases.items():
        head = next(iter(of_layer.values()))[0]
        cells = [f"{_ours(of_layer[M]).us:.1f} / {best_unfused(of_layer[M]).us:.1f}" for M in SHOWN_M]
        lines.append(_line(layer, head.N, head.K_local, *cells))
    return "\n".join(lines)


def runs() -> str:
    """What each file says of itself."""
    lines = []
    for path in RESULTS:
        meta, rows = read_rows(path)
        lines.append(
            f"`{path.relative_to(ROOT)}`: {meta['world_size']} x {meta['gpu']}, link {meta['link_gbps']:g} GB/s each "
            f"way, {rows[0].dtype}, torch {meta['torch']}, triton {meta['triton']}, NCCL {meta['nccl']}, driver "
            f"{meta['driver']}, commit {meta['commit']}."
        )
    return "\n\n".join(lines)


def every_case() -> str:
    """For each file a table of layers by M."""
    parts = []
    for path in RESULTS:
        rows = graph_rows(path)
        cases = _by_layer(rows)
        grid = sorted({row.M for row in rows})
        lines = [f"`{rows[0].op}`: us of ours, (time / best unfused way), plan", "", _line("M", *cases)]
        lines.append(_line("---:", *["---:"] * len(cases)))
        lines += [_line(M, *(_cell(cases[layer][M]) for layer in cases)) for M in grid]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def proof(folder: pathlib.Path = ROOT / "bench" / "results" / "proof") -> str:
    """What each part of tests/proof counted, the last time it was run; then the tables of those that have few rows."""
    lines = [_line("part", "counts", "violations", "run"), "| --- | --- | ---: | --- |"]
    tables = []
    for part in PROOF_PARTS:
        files = [file for file in sorted(folder.glob("*.json")) if file.stem.partition("_")[0] == part]
        if not files:
            lines.append(_line(part, "not yet run", "", ""))
        for file in files:
            content = json.loads(file.read_text())
            meta, rows = content["meta"], content["rows"]
            counts = "; ".join(f"{name} {value}" for name, value in content["counts"].items())
            run = f"{meta['world_size']} ranks, {meta['gpu']}, commit {meta['commit']}, {meta['date'][:10]}"
            lines.append(_line(part, counts, len(content["failures"]), run))
            if rows and part in ("delay", "faults", "sanitizer"):
                tables += ["", f"`{file.name}`:", "", _line(*rows[0]), _line(*["---"] * len(rows[0]))]
                tables += [_line(*row.values()) for row in rows]
    return "\n".join(lines + tables)


def one_batch(path: pathlib.Path = ONE_BATCH) -> str:
    """Milliseconds of each arm, a line a prefill or decode; and how much of what the ceiling gains ours gains."""
    if not path.exists():
        return "Not measured yet."
    parts, lines = [], models_plot.read_lines(path)
    for model in dict.fromkeys(map(models_plot.name_of, lines)):
        mine = [line for line in lines if models_plot.name_of(line) == model]
        head = ("step", "batch", "input", *ARMS, "ours, of the ceiling's gain", "ours_sums, of it")
        table = [_line(*head), _line("---", *["---:"] * (len(head) - 1))]
        for step, field in (("prefill", "prefill_latency"), ("decode", "median_decode_latency")):
            cases: dict[tuple[int, int], dict[str, float]] = {}
            for line in mine:
                if field in line:
                    cases.setdefault((line["batch_size"], line["input_len"]), {})[line["arm"]] = line[field] * 1e3
            table += [_line(step, *case, *_of_arms(arms)) for case, arms in sorted(cases.items())]
        gpus, commits = (", ".join(dict.fromkeys(line["run"][key] for line in mine)) for key in ("gpu", "commit"))
        parts.append(f"{model}, milliseconds; {gpus}, commit {commits}:\n\n" + "\n".join(table))
    return "\n\n".join(parts)


def _of_arms(ms: dict[str, float]) -> list[str]:
    gain = ms[NCCL] - ms[CEILING]
    shares = [f"{100 * (ms[NCCL] - ms[arm]) / gain:.0f} %" if arm in ms else "" for arm in (OURS, OURS_SUMS)]
    return [f"{ms[arm]:.3f}" if arm in ms else "" for arm in ARMS] + shares


def serving(path: pathlib.Path = ROOT / "bench" / "results" / "h200x2_serving.json") -> str:
    """What a client sees, by model and arm."""
    if not path.exists():
        return "Not measured yet."
    fields = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "p99_itl_ms", "median_e2e_latency_ms")
    table = [_line("model", "layers", "arm", *fields), _line("---", "---:", "---", *["---:"] * len(fields))]
    for row in read_serving_rows(path):
        if row.get("correct") is not False:
            table.append(_line(row["model"], row["layers"], row["arm"], *(f"{row[field]:.2f}" for field in fields)))
    return "\n".join(table)


def nodes(sum_bytes: int = 8192 * 8192 * 2, inside: int = 8, link: float = 390.0) -> str:
    """The model of docs/performance.md, in microseconds behind the GEMM: by network and number of nodes.

    inside: ranks of a node. link, network: GB/s of a rank each way, inside a node and between nodes.
    """
    titles = (
        "GB/s a rank between nodes",
        "nodes",
        "scatter, hidden",
        "across",
        "gather",
        "AR",
        "AR flat",
        "RS",
        "RS flat",
    )
    lines = [_line(*titles), _line(*["---:"] * len(titles))]
    for network in (50.0, 12.5):
        for count in (2, 4, 8, 16, 32, 64):
            of = nodes_model.times(sum_bytes, count, inside, link, network)
            ways = (of.two_level("gemm_all_reduce"), of.one_level("gemm_all_reduce"), of.across, of.flat)
            lines.append(_line(f"{network:g}", count, *(f"{us:.0f}" for us in (of.hop, 2 * of.across, of.hop, *ways))))
    return "\n".join(lines)


def _by_layer(rows: list[Row]) -> dict[str, dict[int, list[Row]]]:
    cases: dict[str, dict[int, list[Row]]] = {}
    for (_, _, layer, M), group in by_case(rows).items():
        cases.setdefault(layer, {})[M] = group
    return cases


def _ours(group: list[Row]) -> Row:
    return next(row for row in group if row.provider == "ours")


def _cell(group: list[Row]) -> str:
    ours, best = _ours(group), best_unfused(group)
    return f"{ours.us:.1f} ({ours.us / best.us:.2f}) {ours.plan.partition(':')[0]}"


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    blocks = {
        "summary": summary,
        "six rows": six_rows,
        "runs": runs,
        "every case": every_case,
        "proof": proof,
        "model of nodes": nodes,
        "one-batch": one_batch,
        "serving": serving,
    }
    for path in (ROOT / "README.md", *(ROOT / "docs" / name for name in ("performance.md", "proof.md", "models.md"))):
        text = path.read_text()
        for name, block in blocks.items():
            pattern = rf"(<!-- numbers: {name} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda found, block=block: f"{found[1]}{block()}\n{found[2]}", text, flags=re.S)
        path.write_text(text)
    for results in RESULTS:
        plot(results, ROOT / "docs" / results.with_suffix(".png").name)
    if ONE_BATCH.exists():
        models_plot.plot(ONE_BATCH, ROOT / "docs" / ONE_BATCH.with_suffix(".png").name)


if __name__ == "__main__":
    main()
