"""The measured table: nearest shapes, a digest that ranks can compare, files that say what is wrong with them."""

import json

import pytest

from tp_overlap_kernels.dispatch.problem import Plan, Problem
from tp_overlap_kernels.dispatch.table import TABLES, Entry, Table, file_name, load, parse, save
from tp_overlap_kernels.errors import InvalidInput

AR = "gemm_all_reduce"


def entry(M, us=10.0, N=8192, K=4096, op=AR, dtype="bfloat16", plan="two_shot"):
    return Entry(op, N, K, dtype, M, (Plan(Plan.parse(plan).name, Plan.parse(plan).params, us=us),))


def table(*entries):
    return Table("test.json", "NVIDIA H200", 2, entries)


def found(measured, M, N=8192, K=4096, op=AR, dtype="bfloat16", world_size=2):
    """The time of the entry that answers: here each entry has its own."""
    plans = measured.lookup(Problem(op, M, N, K, dtype, world_size))
    return plans[0].us if plans else None


# ---- lookup

BY_M = table(entry(1, 1.0), entry(64, 64.0), entry(128, 128.0), entry(8192, 8192.0))


@pytest.mark.parametrize(
    ("M", "us"),
    [
        (1, 1.0),
        (64, 64.0),
        (7, 1.0),
        (9, 64.0),
        (90, 64.0),
        (91, 128.0),
        (1024, 128.0),
        (1025, 8192.0),
        (99999, 8192.0),
    ],
)
def test_the_nearest_M_in_log2_answers(M, us):
    assert found(BY_M, M) == us


def test_equal_distances_go_to_the_smaller_M():
    assert found(BY_M, 8) == 1.0


def test_no_rows_are_looked_up_as_one():
    assert found(BY_M, 0) == 1.0


def test_a_measured_shape_is_taken_exactly_and_another_by_distance_in_log2():
    shapes = table(
        entry(1, 1.0, 4096, 2048), entry(1, 2.0, 8192, 2048), entry(1, 3.0, 8192, 4096), entry(1, 4.0, 8192, 14784)
    )
    assert found(shapes, 1, 8192, 4096) == 3.0
    assert found(shapes, 1, 5120, 2560) == 1.0
    assert found(shapes, 1, 7168, 2048) == 2.0
    assert found(shapes, 1, 8192, 9000) == 4.0


def test_the_shape_decides_before_M():
    shapes = table(entry(1, 1.0, 8192, 4096), entry(4096, 2.0, 8192, 2048))
    assert found(shapes, 4096, 8192, 4096) == 1.0


def test_a_shape_far_from_all_that_was_measured_finds_nothing():
    assert found(BY_M, 64, 1024, 4096) == 64.0  # 3 octaves
    assert found(BY_M, 64, 1000, 4096) is None
    assert found(BY_M, 64, 2048, 1024) is None


def test_op_and_world_size_must_match():
    assert found(BY_M, 64, op="gemm_reduce_scatter") is None
    assert found(BY_M, 64, world_size=4) is None


def test_a_dtype_of_the_same_width_stands_in_where_its_own_was_not_measured():
    both = table(entry(64, 1.0), entry(64, 2.0, dtype="float16"))
    assert found(both, 64, dtype="float16") == 2.0
    assert found(BY_M, 64, dtype="float16") == 64.0
    assert found(BY_M, 64, dtype="float32") is None


def test_all_reduce_is_looked_up_by_elements():
    sizes = table(*(entry(1, float(n), n, 0, "all_reduce", plan="one_shot") for n in (8192, 65536, 524288)))
    assert found(sizes, 1, 20000, 0, "all_reduce") == 8192.0
    assert found(sizes, 1, 100000, 0, "all_reduce") == 65536.0


def test_candidates_keep_their_order_and_say_where_they_were_measured():
    plans = (Plan("chunked", us=1.0), Plan("two_shot", us=2.0), Plan("unfused_nccl", us=3.0))
    measured = table(Entry(AR, 8192, 4096, "bfloat16", 4096, plans))
    exact = measured.lookup(Problem(AR, 4096, 8192, 4096, "bfloat16", 2))
    assert exact == list(plans) and [plan.why for plan in exact] == ["measured"] * 3
    near = measured.lookup(Problem(AR, 4000, 8000, 4096, "float16", 2))
    assert near == list(plans) and near[0].why == "measured at M=4096 N=8192 K=4096 bfloat16, the nearest"


# ---- digest


def test_digest_is_pinned_and_ignores_order_and_name():
    entries = (entry(1), entry(64, plan="one_shot:block_m=16"))
    digest = table(*entries).digest()
    assert digest == "670177e3bb8d81b3"
    assert digest == table(*entries[::-1]).digest()
    assert digest == Table("elsewhere.json", "NVIDIA H200", 2, entries).digest()


@pytest.mark.parametrize(
    "other",
    [
        table(entry(2)),
        table(entry(1, us=11.0)),
        table(entry(1, N=4096)),
        table(entry(1, K=1)),
        table(entry(1, op="gemm_reduce_scatter", plan="push")),
        table(entry(1, dtype="float16")),
        table(entry(1, plan="two_shot:block_m=128")),
        table(entry(1), entry(2)),
        Table("test.json", "NVIDIA H100", 2, (entry(1),)),
        Table("test.json", "NVIDIA H200", 4, (entry(1),)),
    ],
    ids=["M", "us", "N", "K", "op", "dtype", "params", "another entry", "device", "world_size"],
)
def test_digest_depends_on(other):
    assert other.digest() != table(entry(1)).digest()


# ---- files


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.name)
def test_every_table_of_the_package_is_valid_and_has_the_name_that_load_looks_for(path):
    shipped = parse(path.read_text(), path.name)
    assert path.name == file_name(shipped.device, shipped.world_size)
    assert load(None, shipped.device, shipped.world_size) == shipped or shipped.name != str(path)


def test_load_finds_the_table_by_device_and_world_size(tmp_path):
    assert file_name("NVIDIA H100 80GB HBM3", 8) == "nvidia_h100_80gb_hbm3_w8.json"
    assert load(None, "NVIDIA H200", 2).device == "NVIDIA H200"
    assert load(None, "NVIDIA H200", 1) is None, "one rank has nothing to choose"
    assert load(None, "Abacus", 2) is None
    assert load(tmp_path, "NVIDIA H200", 2) is None, "a directory without it"


def test_what_was_saved_is_what_is_loaded(tmp_path):
    path = tmp_path / file_name("NVIDIA H200", 2)
    plans = (Plan("chunked", (("chunks", 2),), us=1.5), Plan("unfused_nccl", us=2.25))
    entries = [entry(64), Entry(AR, 8192, 4096, "bfloat16", 8, plans), entry(1, op="all_reduce", plan="sentinel")]
    saved = save(path, {"device": "NVIDIA H200", "world_size": 2, "commit": "abc"}, entries)
    for where in (path, tmp_path, str(path)):
        loaded = load(where, "NVIDIA H200", 2)
        assert loaded == saved and loaded.digest() == saved.digest()
    assert loaded.lookup(Problem(AR, 8, 8192, 4096, "bfloat16", 2))[1].us == 2.25
    assert json.loads(path.read_text())["meta"]["commit"] == "abc"


def test_save_refuses_what_load_would_refuse_and_leaves_the_file_alone(tmp_path):
    path = tmp_path / "t.json"
    with pytest.raises(InvalidInput, match=r"entries\[1\] has the same"):
        save(path, {"device": "x", "world_size": 2}, [entry(64), entry(64)])
    with pytest.raises(InvalidInput, match="device"):
        save(path, {"world_size": 2}, [])
    assert not path.exists()


def test_a_named_file_that_is_missing_or_of_another_world_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"nowhere\.json: cannot be read"):
        load(tmp_path / "nowhere.json", "NVIDIA H200", 2)
    path = tmp_path / "mine.json"
    save(path, {"device": "x", "world_size": 4}, [])
    with pytest.raises(InvalidInput, match=r"mine\.json: measured with world_size=4, but the group has 2"):
        load(path, "NVIDIA H200", 2)


GOOD = {"op": AR, "N": 8192, "K": 4096, "dtype": "bfloat16", "M": 64, "plan": "one_shot", "us": 12.5}


@pytest.mark.parametrize(
    ("changes", "place", "problem"),
    [
        ({"op": "gemm"}, "entries[0].op", "must be one of gemm_all_reduce"),
        ({"op": 3}, "entries[0].op", "must be one of gemm_all_reduce"),
        ({"op": None}, "entries[0]", "has no 'op'"),
        ({"N": 0}, "entries[0].N", "at least 1, got 0"),
        ({"N": "8192"}, "entries[0].N", "got '8192'"),
        ({"K": -1}, "entries[0].K", "at least 0, got -1"),
        ({"M": 1.5}, "entries[0].M", "got 1.5"),
        ({"M": True}, "entries[0].M", "got True"),
        ({"dtype": "bf16"}, "entries[0].dtype", "must be one of bfloat16"),
        ({"plan": "fastest"}, "entries[0].plan", "unknown name 'fastest'"),
        ({"plan": "two_shot:block=1"}, "entries[0].plan", "cannot read 'block=1'"),
        ({"plan": "push"}, "entries[0].plan", "'push' is not a plan of gemm_all_reduce"),
        ({"plan": "local"}, "entries[0].plan", "'local' is not a plan of gemm_all_reduce"),
        ({"plan": None}, "entries[0]", "has no 'plan'"),
        ({"us": None}, "entries[0]", "has no 'us'"),
        ({"us": 0}, "entries[0].us", "positive number, got 0"),
        ({"us": float("nan")}, "entries[0].us", "positive number, got nan"),
        ({"us": "fast"}, "entries[0].us", "positive number, got 'fast'"),
        ({"runners_up": {}}, "entries[0].runners_up", "must be a list"),
        ({"runners_up": [{"plan": "two_shot"}]}, "entries[0].runners_up[0]", "has no 'us'"),
        ({"runners_up": [{"plan": "two_shot", "us": 1.0}]}, "entries[0]", "sorted by us, got [12.5, 1.0]"),
        ({"runners_up": ["two_shot"]}, "entries[0].runners_up[0]", "must be an object"),
    ],
    ids=lambda value: str(value),
)
def test_a_malformed_entry_is_refused_with_file_and_place(changes, place, problem):
    broken = {key: value for key, value in (GOOD | changes).items() if value is not None}
    text = json.dumps({"meta": {"device": "x", "world_size": 2}, "entries": [broken]})
    with pytest.raises(InvalidInput) as caught:
        parse(text, "broken.json")
    assert str(caught.value).startswith(f"dispatch table broken.json: {place}: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1"),
        ('{"meta": {},', "line 1"),
        ("[]", "the document: must be an object"),
        ("{}", "the document: has no 'meta'"),
        ('{"meta": [], "entries": []}', "meta: must be an object"),
        ('{"meta": {}}', "the document: has no 'entries'"),
        ('{"meta": {}, "entries": 3}', "entries: must be a list"),
        ('{"meta": {"world_size": 2}, "entries": []}', "meta: has no 'device'"),
        ('{"meta": {"device": "x", "world_size": "two"}, "entries": []}', "meta.world_size: must be a whole number"),
    ],
)
def test_a_malformed_document_is_refused_with_file_and_place(text, problem):
    with pytest.raises(InvalidInput) as caught:
        parse(text, "broken.json")
    assert str(caught.value).startswith("dispatch table broken.json: ") and problem in str(caught.value)
