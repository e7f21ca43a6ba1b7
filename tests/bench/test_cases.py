"""The presets are the layers that were measured before, and the floor is what the project is held against."""

import csv
import pathlib

import pytest

from tp_overlap_kernels.bench import cases

BASELINE = list(csv.DictReader(pathlib.Path(__file__).with_name("h200_unfused_w2.csv").read_text().splitlines()))


def baseline_case(line: dict[str, str], op: str = cases.GEMM_ALL_REDUCE) -> cases.Case:
    layer = cases.Layer(line["layer"], line["shard"], int(line["N"]), int(line["K_local"]))
    return cases.Case(op, layer, int(line["M"]), "bfloat16", int(line["world_size"]))


def test_h200_baseline_is_the_grid_of_the_csv():
    grid = [
        (layer.name, layer.shard, layer.N, layer.K_local, M)
        for layer in cases.preset_layers("h200_baseline", tp=2)
        for M in cases.M_GRID
    ]
    assert grid == [(r["layer"], r["shard"], int(r["N"]), int(r["K_local"]), int(r["M"])) for r in BASELINE]


@pytest.mark.parametrize("line", BASELINE, ids=lambda line: f"{line['layer']}-{line['shard']}-{line['M']}")
def test_link_time_is_that_of_the_csv(line):
    assert cases.link_us(baseline_case(line), 390.0) == pytest.approx(float(line["link_floor"]), abs=0.06)


def test_reduce_scatter_sends_half_of_all_reduce():
    line = BASELINE[-1]
    all_reduce, reduce_scatter = baseline_case(line), baseline_case(line, cases.GEMM_REDUCE_SCATTER)
    assert reduce_scatter.wire_bytes * 2 == all_reduce.wire_bytes


@pytest.mark.parametrize("world_size, share", [(1, 0.0), (2, 1.0), (4, 1.5), (8, 1.75)])
def test_wire_bytes_of_an_all_reduce_grow_to_twice_the_message(world_size, share):
    case = cases.Case(cases.GEMM_ALL_REDUCE, cases.Layer("any", "", 512, 64), 32, "float16", world_size)
    assert case.wire_bytes == share * 32 * 512 * 2


@pytest.mark.parametrize(
    "mm_us, link, floor", [(100.0, 40.0, 102.0), (40.0, 100.0, 102.0), (None, 40.0, None), (40.0, None, None)]
)
def test_floor_is_the_longer_one_and_a_round_trip(mm_us, link, floor):
    assert cases.floor_us(mm_us, link) == floor


@pytest.mark.parametrize(
    "M, world_size, rows",
    [(8, 2, [(0, 4), (4, 8)]), (1, 2, [(0, 1), (1, 1)]), (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)])],
)
def test_owned_rows_cover_M_once(M, world_size, rows):
    case = cases.Case(cases.GEMM_REDUCE_SCATTER, cases.Layer("any", "", 8, 8), M, "bfloat16", world_size)
    assert [case.owned_rows(rank) for rank in range(world_size)] == rows


@pytest.mark.parametrize("preset", cases.MODELS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_of_a_model_add_up_to_it(preset, tp):
    model = cases.MODELS[preset]
    o_proj, down_proj = cases.preset_layers(preset, tp)
    assert (o_proj.N, down_proj.N) == (model.hidden, model.hidden)
    assert (o_proj.K_local * tp, down_proj.K_local * tp) == (model.attention, model.intermediate)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: cases.preset_layers("llama-2", 2), "llama-3-8b"),
        (lambda: cases.preset_layers("llama-3-8b", 3), "does not divide"),
        (lambda: cases.parse_layer("512"), "N,K_local"),
        (lambda: cases.parse_layer("0,16"), ">= 1"),
        (lambda: cases.parse_grid("1,two"), "integers"),
        (lambda: cases.parse_grid("0"), "at least 1"),
    ],
    ids=["unknown preset", "tp that does not divide", "layer without K", "empty layer", "M no number", "M zero"],
)
def test_bad_choices_say_what_is_allowed(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_layer_and_grid_as_the_command_line_gives_them():
    assert cases.parse_layer("mine=512,64") == cases.Layer("mine", "", 512, 64)
    assert cases.parse_layer("512,64") == cases.Layer("512x64", "", 512, 64)
    assert cases.parse_grid("64,1,1") == [1, 64]
