"""Quantiles, the slowest rank, ratios and the result file: arithmetic that no machine is needed for."""

import io
import json

import pytest
from rich.console import Console

from tests.bench.test_cases import BASELINE, baseline_case
from tp_overlap_kernels.bench import cases, plot, report, results, timing

WAYS = {
    "matmul": "mm",
    "matmul+nccl": "mm_nccl_ar",
    "matmul+symm_mem_two_shot": "mm_two_shot_ar",
    "matmul+symm_mem_one_shot": "mm_one_shot_ar",
}


def baseline_rows(ours: float | None = None) -> list[results.Row]:
    """The measured table as rows of a run; `ours` adds a provider that takes so much of the best unfused time."""
    rows: list[results.Row] = []
    for line in BASELINE:
        case = baseline_case(line)
        times = {name: float(line[column]) for name, column in WAYS.items() if line[column]}
        if ours is not None:
            times["ours"] = ours * float(line["best_unfused_ar"])
        group = []
        for name, us in times.items():
            group.append(results.Row.of(case, "graph", name))
            group[-1].take(timing.Times(us, us, us, samples=10))
        results.complete(group, case, link_gbps=390.0)
        rows += group
    return rows


def text_of(*parts: object) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    for part in parts:
        console.print(part)
    return console.export_text()


def test_quantiles_interpolate():
    assert timing.quantiles([float(value) for value in range(11)]) == (5.0, 1.0, 9.0)
    assert timing.quantiles([3.0]) == (3.0, 3.0, 3.0)


def test_the_slowest_rank_counts_in_each_sample():
    assert timing.slowest_rank([[1.0, 5.0, 2.0], [4.0, 3.0, 2.0]]) == [4.0, 5.0, 2.0]
    # The median of maxima is not the maximum of medians: here 4 and not 2.
    assert timing.quantiles(timing.slowest_rank([[1.0, 5.0, 2.0], [4.0, 3.0, 2.0]]))[0] == 4.0


@pytest.mark.parametrize("copies", [1, 3, 10, 17])
def test_rotation_uses_every_copy_and_ends_with_the_checked_one(copies):
    order = timing.rotation(max(10, copies), copies)
    assert order[-1] == 0 and set(order) == set(range(copies))


@pytest.mark.parametrize(
    "sample_us, rounds",
    [(1.0, 50), (2000.0, 30), (30000.0, 10)],
    ids=["short calls", "the target decides", "long calls"],
)
def test_rounds_follow_the_time_there_is(sample_us, rounds):
    assert timing.rounds_for(sample_us, target_ms=60.0, least=10, most=50) == rounds


def test_floor_ratios_are_those_that_were_published():
    """Geometric means over the CSV, as they were computed when it was measured."""
    ratios = report.floor_ratios(baseline_rows())
    published = {
        "matmul+nccl": (1.50, 2.20, 1.73, 1.78),
        "best unfused of each case": (1.36, 1.65, 1.55, 1.52),
    }
    for name, means in published.items():
        for inside, mean in zip(report.BANDS.values(), means, strict=True):
            assert report.geometric_mean(r for M, r in ratios[name] if inside(M)) == pytest.approx(mean, abs=0.006)


def test_the_gemm_alone_is_never_the_best_unfused_way():
    best = results.best_unfused(baseline_rows(ours=0.5)[:5])
    assert best is not None and best.provider == "matmul+symm_mem_one_shot"


def test_summary_names_the_worst_case_and_counts_losses():
    rows = baseline_rows(ours=1.0)
    slow = next(row for row in rows if row.provider == "ours" and row.M == 256)
    slow.us = 1.25 * (slow.us or 0.0)
    text = text_of(*report.summary(rows))
    assert "worst 1.250" in text and "M=256" in text and "more than 3 % slower in 1" in text


def test_overlap_is_one_where_everything_short_is_hidden():
    case = baseline_case(BASELINE[20])
    group = [results.Row.of(case, "graph", name) for name in ("matmul", "matmul+nccl", "ours")]
    for row, us in zip(group, (100.0, 140.0, 100.0), strict=True):
        row.take(timing.Times(us, us, us, samples=10))
    results.complete(group, case, 390.0)
    assert group[2].overlap == 1.0


def test_table_shows_wrong_and_absent_times_without_numbers():
    rows = baseline_rows(ours=1.0)[:5]
    rows[1].us, rows[1].correct, rows[1].reason = None, False, "ranks hold different bits"
    rows[2].us, rows[2].correct, rows[2].reason = None, None, "not here"
    text = text_of(report.table(rows), *report.reasons(rows))
    assert "WRONG" in text and "ranks hold different bits" in text and "not here (M = 1)" in text


def test_result_file_has_the_fields_that_were_agreed(tmp_path):
    path = tmp_path / "folder" / "results.json"
    kept = results.Results({"gpu": "any"}, path)
    rows = baseline_rows(ours=0.9)
    kept.add(rows[:5])
    first = json.loads(path.read_text())
    kept.add(rows[5:])
    content = json.loads(path.read_text())
    assert len(first["rows"]) == 5 and len(content["rows"]) == len(rows)
    agreed = "op layer M N K_local dtype world_size mode provider us p10_us p90_us mm_us link_us floor_us correct"
    for row in content["rows"]:
        assert set(agreed.split()) <= set(row)
    meta, again = results.read_rows(path)
    assert meta == {"gpu": "any"} and again == rows


def test_a_file_of_something_else_is_refused_by_name(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"cells": []}')
    with pytest.raises(ValueError, match=r"other\.json"):
        results.read_rows(path)


def test_plot_writes_a_picture_an_op(tmp_path):
    rows = baseline_rows(ours=0.9)
    for row in baseline_rows(ours=0.8):
        row.op = cases.GEMM_REDUCE_SCATTER
        rows.append(row)
    path = tmp_path / "results.json"
    results.Results({"gpu": "NVIDIA H200", "world_size": 2, "link_gbps": 390.0}, path).add(rows)
    written = plot.plot(path)
    assert [each.name for each in written] == [
        "results_gemm_all_reduce_graph.png",
        "results_gemm_reduce_scatter_graph.png",
    ]
    for each in written:
        assert each.read_bytes().startswith(b"\x89PNG") and each.stat().st_size > 20_000


def test_plot_of_nothing_says_so(tmp_path):
    path = tmp_path / "results.json"
    results.Results({}, path).add([results.Row.of(baseline_case(BASELINE[0]), "graph", "ours")])
    with pytest.raises(ValueError, match="no times"):
        plot.plot(path)
