"""What the assembly of a kernel for gfx942 must show, each as a function that raises and says what it found.

Memory model: "User Guide for AMDGPU Backend" of LLVM, gfx942. Order is looked at backwards, on all ways on which an
instruction may have been reached. A CTA of one wave has no s_barrier; there LLVM writes a comment, which is kept.
"""

from __future__ import annotations

import re

MEMORY = re.compile(r"^(global|buffer|flat|scratch)_(load|store|atomic)")
BARRIER = re.compile(r"^(s_barrier|; wave barrier)")
WAITED = re.compile(r"^s_waitcnt .*\bvmcnt\(0\)")
WRITTEN_BACK = re.compile(r"^buffer_wbl2 sc0 sc1$")
INVALIDATED = re.compile(r"^buffer_inv sc0 sc1$")
LABEL = re.compile(r"^\.LBB")
# An atomic that returns nothing (no sc0), at system scope (sc1): an arrival, or the word that a record has been written
ARRIVAL = re.compile(r"^global_atomic_(swap|add)_x2 (?!.*\bsc0\b).*\bsc1$")
ANY_ARRIVAL = re.compile(r"^global_atomic_(swap|add)_x2 (?!.*\bsc0\b)")
RECORD = re.compile(r" offset:8 sc1$")  # written by the thread that has written the record, behind no barrier
POLL = re.compile(r"^global_load_dword(x2)? .*, off sc0 sc1$")
CLOCK = re.compile(r"^s_memrealtime")
# A record, words of `control` and headers: of 8 bytes, or 16 where two lie side by side.
WORDS_STORED = re.compile(r"^global_store_dwordx[24] .*(sc0 sc1|offset:(8|16|24|32|48|64))$")
# control[HEADERS] and control[HEADERS_BYTES]; a world's limit of time
WORDS_LOADED = re.compile(r"^global_load_(dwordx4 .* offset:64|dwordx2 .* offset:16)$")


def lines_of(text: str) -> list[str]:
    """Instructions and labels of the kernel."""
    code = re.search(r"^\w+:[^\n]*\n(.*?)^\t\.section", text, flags=re.S | re.M)[1]
    stripped = (line.strip() for line in code.split("\n"))
    kept = (line if BARRIER.match(line) else re.sub(r"\s*;.*", "", line) for line in stripped)
    return [line for line in kept if line and (LABEL.match(line) or BARRIER.match(line) or line[0] not in ".;")]


def came_from(lines: list[str]) -> list[list[int]]:
    """For each line those that may have come right before; none before the first."""
    at_label = {line.rstrip(":"): at for at, line in enumerate(lines) if LABEL.match(line)}
    before: list[list[int]] = [[] for _ in lines]
    for at, line in enumerate(lines):
        if at + 1 < len(lines) and not re.match(r"s_(branch|endpgm|setpc_b64)\b", line):
            before[at + 1].append(at)
        jump = re.match(r"s_c?branch\w* (\S+)", line)
        if jump:
            before[at_label[jump[1]]].append(at)
    return before


def behind(lines: list[str], before: list[list[int]], at: int, wanted: list[re.Pattern]) -> str | None:
    """On all ways backwards from `at` stand the wanted ones, in this order, with no access of memory between; else the
    access, or the beginning, to which one may come without them."""
    seen, open_ways = set(), [(earlier, 0) for earlier in before[at]]
    while open_ways:
        place, have = open_ways.pop()
        if (place, have) in seen:
            continue
        seen.add((place, have))
        if wanted[have].match(lines[place]):
            have += 1
            if have == len(wanted):
                continue
        elif MEMORY.match(lines[place]) or not before[place]:
            return lines[place]
        open_ways += [(earlier, have) for earlier in before[place]]
    return None


def barrier_before_release(text: str) -> None:
    """Before each arrival: the barrier, before that the wait for stores, before that what is written back."""
    lines = lines_of(text)
    before, arrivals = came_from(lines), 0
    for at, line in enumerate(lines):
        if not ANY_ARRIVAL.match(line):
            continue
        assert ARRIVAL.match(line), f"no other device sees it: {line!r}"
        wanted = [WAITED, WRITTEN_BACK]
        if not RECORD.search(line):
            wanted, arrivals = [BARRIER, *wanted], arrivals + 1
        other = behind(lines, before, at, wanted)
        assert other is None, f"no barrier, wait or write-back between {other!r} and {line!r}"
    assert arrivals, "nothing is released at system scope"


def invalidated_after_waits(text: str) -> None:
    """After a slot has been looked at, nothing is loaded but other words until caches are invalidated; by the end they
    have been."""
    lines = lines_of(text)
    before = came_from(lines)
    assert any(POLL.match(line) for line in lines), "nothing is acquired at system scope"
    for at, line in enumerate(lines):
        if not re.match(r"(global|buffer)_load_|s_endpgm", line) or POLL.match(line) or WORDS_LOADED.match(line):
            continue
        seen, open_ways = set(), [at]
        while open_ways:
            for earlier in before[open_ways.pop()]:
                assert not POLL.match(lines[earlier]), (
                    f"caches are not invalidated between {lines[earlier]!r} and {line!r}"
                )
                if earlier not in seen and not INVALIDATED.match(lines[earlier]):
                    seen.add(earlier)
                    open_ways.append(earlier)


def looks_are_handed_round(text: str) -> None:
    """Of several waves none decides by what it alone has seen: a look at a word leads to a barrier, not to a branch."""
    lines = lines_of(text)
    polls = [at for at, line in enumerate(lines) if POLL.match(line)]
    assert polls, "nothing waits"
    for at in polls:
        place = at + 1
        while not re.match(r"s_barrier|s_cbranch|s_endpgm", lines[place]):
            jump = re.match(r"s_branch (\S+)", lines[place])
            place = lines.index(f"{jump[1]}:") if jump else place + 1
        assert lines[place] == "s_barrier", f"no barrier between {lines[at]!r} and {lines[place]!r}"


def every_wait_has_a_clock(text: str) -> None:
    """From the first look at the slot to the acquire behind it, in the text, the clock is read."""
    parts = [part.split("\n") for part in "\n".join(lines_of(text)).split("buffer_inv sc0 sc1")]
    waits = [part for part in parts if any(POLL.match(line) for line in part)]
    assert waits, "nothing waits"
    for wait in waits:
        assert any(CLOCK.match(line) for line in wait), f"a wait without end, behind {wait[:3]}"


def wide_accesses(text: str, *, narrow_loads: bool = False, partials: bool = False) -> None:
    """Tiles are loaded and stored 16 bytes at a time.

    narrow_loads: a bias is loaded one column a thread. partials: the accumulator is stored as the matrix cores leave
    it, 8 bytes a thread (Triton's pass for epilogues saves the way through LDS, where a tile is stored once).
    """
    plain = [line for line in lines_of(text) if not WORDS_STORED.match(line)]
    widths: dict[str, list[str]] = {}
    for line in plain:
        found = re.match(r"(?:global|buffer)_(load|store)_(\w+)", line)
        if found:
            widths.setdefault(f"{found[1]} {found[2]}", []).append(line)
    assert {"load dwordx4", "store dwordx4"} <= widths.keys(), f"no accesses of 16 bytes: {sorted(widths)}"
    allowed = {"load dwordx4", "store dwordx4", "load dwordx2"}  # of 8: addresses of arenas, slots
    allowed |= {"load ushort", "load short_d16_hi", "load short_d16", "load dword"} if narrow_loads else set()
    allowed |= {"store dwordx2"} if partials else set()
    narrow = sorted(widths.keys() - allowed)
    assert not narrow, f"narrow accesses: {narrow[0]}, {widths[narrow[0]][0]!r}"


def fits_a_compute_unit(text: str, shared: int) -> None:
    """64 KiB of LDS, and no registers in memory."""
    assert shared <= 64 << 10, f"{shared} bytes of LDS"
    scratch = re.findall(r"; ScratchSize: (\d+)", text)
    assert scratch and set(scratch) == {"0"}, f"{scratch} bytes of scratch"


def is_of_gfx942(text: str, code_object: bytes) -> None:
    assert '.amdgcn_target "amdgcn-amd-amdhsa--gfx942' in text
    assert code_object[:4] == b"\x7fELF", code_object[:4]
    machine = int.from_bytes(code_object[18:20], "little")
    processor = int.from_bytes(code_object[48:52], "little") & 0xFF
    assert (machine, processor) == (224, 0x4C), f"an ELF for machine {machine}, processor {processor:#x}"
