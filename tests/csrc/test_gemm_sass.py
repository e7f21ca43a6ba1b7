"""The CUDA GEMMs, compiled for sm_90a and read: tensor cores kept busy, nothing spilled, no fence in the mainloop.

Of those that sum over ranks, too: who publishes a tile has seen it written, and who reads one has acquired its flag.
"""

from __future__ import annotations

import re

import pytest

from tests.csrc.built import CSRC, compiled_alone, needs_nvcc, reached

pytestmark = needs_nvcc

ALONE = "gemm"
ADDING = ("gemm_reduce_scatter_push_add", "gemm_all_reduce_one_shot_push")  # the copy engine adds: kTmaAdds
COLLECTIVES = ("gemm_reduce_scatter_push", "gemm_all_reduce_two_shot_push", *ADDING)
SPILT = {"gemm_reduce_scatter_push_add": (8, 8, 8)}  # bytes of stack, stores, loads: while a failed wait is told of
REGISTERS = dict.fromkeys(COLLECTIVES, (56, 224)) | {ALONE: (40, 232)}  # of producers and consumers


@pytest.fixture(scope="module", params=[ALONE, *COLLECTIVES])
def compiled(request) -> tuple[dict[str, list[str]], str, str]:
    """Instructions of each kernel by its name, the assembler's report, and which file it is."""
    built = compiled_alone(request.param)
    lines = r"/\*[0-9a-f]{4,5}\*/\s+(.*?) ;"
    return {name: re.findall(lines, text) for name, text in built.sass.items()}, built.report, request.param


def variants(file: str, cols: str = r"\d+") -> int:
    """Shapes for which the file has kernels, those of tiles of so many columns."""
    return len(re.findall(rf"variant<Host, CollectiveShape<{cols},", (CSRC / "kernels" / f"{file}.cu").read_text()))


def places(code: list[str], opcode: str) -> list[int]:
    return [i for i, line in enumerate(code) if re.search(rf"\b{opcode}", line)]


def mainloop(code: list[str]) -> list[str]:
    """From the first product to the wait for the last one."""
    return code[places(code, "HGMMA")[0] : places(code, r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0")[0]]


def consumers(code: list[str]) -> list[str]:
    """What the consumer warpgroups execute."""
    (start,), (other,) = places(code, "USETMAXREG.TRY_ALLOC"), places(code, "USETMAXREG.DEALLOC")
    return code[start:other] if start < other else code[start:]


def test_products_are_not_serialised_and_registers_move_between_warps(compiled):
    _, report, _ = compiled
    assert "C7510" not in report and "C7508" not in report  # ptxas: wgmma serialised; setmaxnreg ignored


def is_traced(name: str) -> bool:
    """Such kernels store what they did, too, and serve nobody."""
    return bool(re.search(r"Lb[01]ELb1EEE", name))


def test_nothing_spills_and_the_launch_has_its_registers(compiled):
    kernels, report, file = compiled
    usage = r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    spilt = {name: tuple(map(int, bytes_)) for name, *bytes_ in re.findall(usage, report, flags=re.S)}
    assert set(spilt) == set(kernels)
    for name, code in kernels.items():
        if is_traced(name) and file in ADDING:
            continue
        assert spilt[name] == SPILT.get(file, (0, 0, 0))
        told = places(code, r"ATOMG\.E\.CAS")  # by the one that first gives up waiting
        assert all(min(abs(i - cas) for cas in told) < 10 for i in places(code, "LDL|STL"))
        assert not places(code, "CALL")
    assert set(re.findall(r"Used (\d+) registers", report)) == {"168"}  # 384 threads; handed over by USETMAXREG
    producers, consumers = REGISTERS[file]
    for code in kernels.values():
        (give,) = places(code, f"USETMAXREG.DEALLOC.CTAPOOL {producers:#x}")
        (take,) = places(code, f"USETMAXREG.TRY_ALLOC.CTAPOOL UP0, {consumers:#x}")
        ends = sorted((give, take, places(code, "EXIT")[-1]))  # behind it lie the slow paths of waits, of both
        for start, most in ((give, producers), (take, consumers)):
            end = ends[ends.index(start) + 1]
            assert max(int(number) for line in code[start:end] for number in re.findall(r"\bR(\d+)\b", line)) < most


def test_a_stage_is_four_products_in_a_row(compiled):
    kernels, _, _ = compiled
    for code in kernels.values():
        first, *rest = products = places(code, "HGMMA")
        assert len(products) == 4  # 64 elements of K, 16 a product; the loop over stages is not unrolled
        assert rest[-1] - first < 28  # nothing but addresses in between
        assert not places(code[first : rest[-1]], "WARPGROUP|SYNCS|BAR")


def test_no_fence_waits_for_memory_in_the_mainloop(compiled):
    kernels, _, _ = compiled
    for code in kernels.values():
        assert not places(mainloop(code), "MEMBAR|ERRBAR|CCTL")
        assert not places(consumers(code), r"MEMBAR\.\w+\.(GPU|SYS)")


def test_the_copy_engine_moves_all_data_and_a_cluster_shares_it(compiled):
    kernels, _, file = compiled
    traced = [name for name in kernels if is_traced(name)]
    assert len(traced) == variants(file)  # bf16 alone
    assert len(kernels) == 3 * len(traced) or file == ALONE
    for name, code in kernels.items():
        if name in traced:
            continue
        down, across = re.search(r"ShapeILi\d+E(?:Li[12]E)?Li([12])ELi([12])ELi\dELi\dE", name).groups()
        assert len(places(code, "UTMALDG.2D.MULTICAST")) == (down == "2") + (across == "2")
        assert len(places(code, "UTMALDG.2D")) == 2
        assert places(code, "UTMASTG.2D")
        stores = [code[i] for i in places(code, r"STG?\.E")]
        assert bool(stores) == (file in COLLECTIVES)
        assert all("STRONG" in store or ".E.128" in store for store in stores)  # signals; the NaNs of a failed call
        assert not places(consumers(code), r"STG?\.E")


def test_the_copy_engine_adds_where_a_kernel_says_so_and_nowhere_else(compiled):
    kernels, _, file = compiled
    for name, code in kernels.items():
        adds, in_name = places(code, r"UTMAREDG\.2D\.ADD"), re.search(r"Lb1ELb[01]EEE", name)
        assert bool(adds) == bool(in_name) == (file in ADDING)
        assert adds == places(code, "UTMAREDG")


def entries_of(file: str) -> list[str]:
    """The PTX of a file's kernels for tiles of 128 and 256 columns, bf16."""
    shape = r"Bf16ENS_15CollectiveShapeILi(?:128|256)E\w*Lb[01]ELb0EEE"
    entries = compiled_alone(file).text.split(".entry")[1:]
    found = [entry for entry in entries if re.search(shape, entry.split("(")[0])]
    assert len(found) == variants(file, "(?:128|256)") >= 2
    return found


def program(entry: str) -> list[str]:
    """By lines without labels and declarations."""
    return [line.strip() for line in entry.splitlines() if line.strip().endswith(";")]


@pytest.fixture(scope="module", params=COLLECTIVES)
def entries(request) -> list[str]:
    return entries_of(request.param)


@pytest.fixture
def programs(entries) -> list[list[str]]:
    return [program(entry) for entry in entries]


@pytest.fixture(params=ADDING)
def adding(request) -> list[str]:
    return entries_of(request.param)


BLOCK_BEGINS = r"barrier\.cluster\.wait\.acquire"


def flags(program: list[str]) -> list[int]:
    """Where slots are raised; the record of a failure, whose words come before its release, is none."""
    releases = places(program, r"st\.release\.sys")
    return [i for i in releases if not any("st.relaxed.sys" in line for line in program[i - 4 : i])]


def test_a_tile_is_published_after_it_has_been_written_not_merely_read(entries):
    push, written = r"cp\.async\.bulk\.global\.shared::cta", r"cp\.async\.bulk\.wait_group 0;"
    leaving = r"atom\.acq_rel\.gpu\.global\.add"  # a block that goes on to the end has published all it pushed
    for entry in entries:
        assert flags(reached(entry, "never", behind=push)) and flags(reached(entry, "never", behind=written))
        assert not flags(reached(entry, f"{written}|{leaving}", behind=push))
        assert not flags(reached(entry, rf"fence\.proxy\.async;|{leaving}", behind=written))


def test_what_peers_wrote_is_loaded_after_an_acquire_and_a_proxy_fence(entries):
    load, acquire = r"cp\.async\.bulk\.shared::cluster\.global\.mbarrier", r"ld\.acquire\.sys"
    for entry in entries:
        assert places(reached(entry, "never", behind=acquire), load)
        assert places(program(entry), acquire)[0] < places(program(entry), load)[0]
        assert not places(reached(entry, r"fence\.proxy\.async;", behind=acquire), load)


def test_words_that_peers_write_are_read_at_system_scope_and_never_cached(programs):
    for program in programs:
        assert places(program, r"ld\.acquire\.sys\.global")
        assert not places(program, r"ld\.volatile|ld\.acquire\.(gpu|cta)(?!\.shared::cta)")
        cached = {line.split()[0] for line in program if line.startswith("ld.global")}
        assert cached <= {"ld.global.nc.s64", "ld.global.nc.u32"}  # where the arenas lie; pairs of the bias


def test_waits_for_peers_look_at_the_clock_and_at_the_abort_word(programs):
    for program in programs:
        polls = len(places(program, r"ld\.acquire\.sys\.global"))
        assert len(places(program, r"mov\.u64 \S+, %globaltimer")) * 3 == polls >= 6  # a wait polls in three places


def test_the_own_tile_is_told_of_after_it_has_been_written_not_merely_read(adding):
    for code in map(program, adding):
        stored = places(code, r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta")[-1]
        written = next(i for i in range(stored, len(code)) if code[i] == "cp.async.bulk.wait_group 0;")
        told = min(i for i in places(code, r"st\.release\.cta\.shared::cta") if i > written)
        assert "fence.proxy.async;" in code[written:told]
        assert not places(code[written:told], r"cp\.async\.bulk\.(tensor\.2d\.)?global")  # no other tile's wait


def test_a_tile_is_added_after_the_own_one_lies_there_and_a_proxy_fence(adding):
    add, own_is_there = r"cp\.reduce\.async\.bulk\.tensor", r"ld\.acquire\.cta\.shared::cta"
    for entry in adding:
        assert places(reached(entry, "never", behind=own_is_there), add)
        warp_meets = r"shfl\.sync"  # one lane has acquired, and tells the others whether to add NaN
        assert not places(reached(entry, f"{own_is_there}|{warp_meets}", behind=BLOCK_BEGINS), add)
        assert not places(reached(entry, r"fence\.proxy\.async", behind=own_is_there), add)
