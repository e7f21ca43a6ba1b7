"""What the PTX and the machine code of a kernel must show, each as a function that raises and says what it found.

Order is looked at in the text: our signals are inline assembly that holds its own barrier, so what must stand before a
release stands right before it, whatever branch it is in.
"""

from __future__ import annotations

import re

from tests import ptx as compiler

BARRIER = re.compile(r"\b(barrier\.(sync|red)|bar\.(sync|red))")
WEAK_STORE = re.compile(r"\bst\.global\b")
WEAK_LOAD = re.compile(r"\bld\.global\b")
RELEASE = re.compile(r"\bst\.release\.sys\.global")
ON_REGISTERS = re.compile(r"(mov|setp)\.")
RECORD_WRITTEN = re.compile(r"st\.release\.sys\.global\.b64 \[%\w+ \+ 8\], 2;")  # one thread's own words before it


def lines_of(ptx: str) -> list[str]:
    """Instructions, without comments and directives."""
    stripped = (re.sub(r"//.*", "", line).strip() for line in ptx.split("\n"))
    return [line for line in stripped if line and not line.startswith((".", "$", "{", "}", ")"))]


def count(ptx: str, pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines_of(ptx))


def barrier_before_release(ptx: str) -> None:
    """A barrier of the CTA stands right before each release: one thread releases what all have stored.

    A barrier further up would do only as long as no branch goes around it.
    """
    releases, since_barrier = 0, None
    for line in lines_of(ptx):
        assert "cp.async.bulk" not in line or ".global.shared" not in line, (
            f"an asynchronous store, not looked at: {line}"
        )
        if BARRIER.search(line):
            since_barrier = []
        elif RELEASE.search(line) and not RECORD_WRITTEN.search(line):
            releases += 1
            others = ["anything"] if since_barrier is None else [x for x in since_barrier if not ON_REGISTERS.match(x)]
            assert not others, f"no barrier of the CTA between {others[-1]!r} and {line!r}"
        elif since_barrier is not None:
            since_barrier.append(line)
    assert releases, "nothing is released at system scope"


def barrier_after_acquire(ptx: str) -> None:
    """No data is loaded or stored between an acquire, which one thread does, and the barrier that joins the others."""
    acquires, open_since = 0, None
    for line in lines_of(ptx):
        if "ld.acquire.sys.global" in line:
            acquires, open_since = acquires + 1, line
        elif BARRIER.search(line):
            open_since = None
        elif WEAK_LOAD.search(line) or WEAK_STORE.search(line):
            assert open_since is None, f"no barrier of the CTA between {open_since!r} and {line!r}"
    assert acquires, "nothing is acquired at system scope"
    assert open_since is None, "the last wait joins nobody"


def every_wait_has_a_clock(ptx: str) -> None:
    """From each acquire to the barrier behind it, the timer is read and the abort word looked at."""
    text = "\n".join(lines_of(ptx))
    waits = re.findall(r"ld\.acquire\.sys\.global.*?(?:barrier\.red|\Z)", text, flags=re.S)
    assert waits, "nothing waits"
    for wait in waits:
        assert "%globaltimer" in wait, f"a wait without end: {wait[:120]!r}"
        assert re.search(r"ld\.relaxed\.sys\.global\.b64 failed", wait), (
            f"a wait that cannot be aborted: {wait[:120]!r}"
        )


def whole_epochs_are_compared(ptx: str) -> None:
    """A slot counts as raised from its epoch on, all 48 bits of it: a slot that is seldom written may be far behind."""
    text = "\n".join(lines_of(ptx))
    waits = re.findall(r"ld\.acquire\.sys\.global.*?bra arrived", text, flags=re.S)
    assert waits, "nothing waits"
    for wait in waits:
        assert re.search(r"b64 (\w+), .*\nshr\.u64 (\w+), \1, 16;\nsetp\.ge\.[su]64 \w+, \2, wanted;", wait), (
            f"compared otherwise: {wait!r}"
        )


def system_scope(ptx: str) -> None:
    """What is acquired and released reaches other devices; device scope is for words of `control`, none is narrower.

    Nothing polls with `volatile`, which acquires nothing, and no fence stands in the place of a release.
    """
    for line in lines_of(ptx):
        assert not re.search(r"\bmembar\b|\bfence\.(sc|acq_rel)", line), f"a fence, not looked at: {line!r}"
        found = re.search(r"\b(ld|st|atom|red)\.(\S+)", line)
        if not found or "global" not in found[2]:
            continue
        kind, modifiers = found[1], found[2].split(".")
        assert not {"volatile", "mmio", "cta", "cluster"} & set(modifiers), f"too small a scope: {line!r}"
        if {"acquire", "release"} & set(modifiers):
            assert "sys" in modifiers, f"no other device sees it: {line!r}"
        if kind in ("atom", "red"):
            assert "acq_rel" in modifiers and {"gpu", "sys"} & set(modifiers), f"an atomic without order: {line!r}"


def sixteen_byte_accesses(ptx: str, narrow_loads: bool = False) -> None:
    """Tiles go 16 bytes at a time, and no store is narrower than a word of 8 (a header).

    narrow_loads: a bias is loaded one column a thread.
    """
    assert count(ptx, r"\bst\.global\.v4\.b32"), "no 16-byte store"
    narrow = [line for line in lines_of(ptx) if re.search(r"\bst\.global\.(v2\.)?(b8|b16|b32)\b", line)]
    assert not narrow, f"{len(narrow)} narrow stores, the first {narrow[0]!r}"
    narrow = [line for line in lines_of(ptx) if re.search(r"\bld\.global\.(v2\.)?(b8|b16)\b", line)]
    assert not narrow or narrow_loads, f"{len(narrow)} narrow loads, the first {narrow[0]!r}"


def plain_loads(compiled) -> None:
    """No load goes the way of data that nobody writes: a peer may have written it."""
    assert not count(compiled.asm["ptx"], r"\bld\.global\S*\.nc"), "ld.global.nc"
    constant = re.findall(r"LDG\.\S*CONSTANT\S*", compiler.sass(compiled))
    assert not constant, f"{len(constant)} loads as of constants: {constant[0]}"


# Arguments that a row, a slot or an owner is multiplied by, and where large regions begin.
STRIDES = ("pitch", "out_pitch", "part", "slot_bytes", "staging_slot_bytes", "slots_offset", "staging_offset")
STRIDES += ("result_offset",)


def addresses_in_64_bits(compiled, names: tuple[str, ...] = STRIDES) -> None:
    """A stride or an offset is widened before anything is multiplied by it or added to it; PTX no longer says which."""
    ttir = compiled.asm["ttir"]
    arguments = ttir[ttir.index("tt.func public") :].split(")\n")[0].split("{\n")[0]
    present = [name for name in names if re.search(rf"%{name}: i(32|64)", arguments)]
    assert present, "no stride among the arguments"
    for line in ttir.split("\n"):
        for name in present:
            words = r"arith\.(muli|shli)"
            if name != "part":  # which local indices are compared with, and which is rounded up to blocks
                words += r"|tt\.splat|arith\.addi"
            narrow = re.search(rf"= ({words}) .*%{name}\b.*: (i32|tensor<\w+xi32>)", line)
            assert not narrow, f"{name} in 32 bits: {line.strip()}"


def no_multicast(ptx: str) -> None:
    """Multicast is switched off where these kernels run."""
    found = re.findall(r"multimem\S*|\S*multicast\S*", ptx)
    assert not found, found[0]


def tensor_cores(ptx: str) -> None:
    assert count(ptx, r"wgmma\.mma_async"), "no wgmma"
    assert not count(ptx, r"\bmma\.sync"), "mma.sync"


def pipelined(compiled, block_m: int, block_n: int, block_k: int, num_stages: int) -> None:
    """Shared memory holds the stages, TMA fills them, and the copies of the first ones stand before the loop."""
    stage = (block_m + block_n) * block_k * 2
    shared = compiled.metadata.shared
    assert shared >= (num_stages - 1) * stage, f"{shared} bytes of shared memory hold {shared / stage:.1f} stages"
    copies = count(compiled.asm["ptx"], r"cp\.async\.bulk\.tensor\.2d\.shared")
    assert copies >= 2 * num_stages, f"{copies} copies for {num_stages} stages"


def no_spills(compiled, allowed_bytes: int = 0) -> None:
    used = compiler.resources(compiled)
    assert used["LOCAL"] == 0 and used["STACK"] <= allowed_bytes, used


def fits_an_sm(compiled) -> None:
    """227 KiB of shared memory and 64 Ki registers: else nothing is launched."""
    warps = compiled.metadata.num_warps
    assert compiled.metadata.shared <= 227 << 10, f"{compiled.metadata.shared} bytes of shared memory"
    assert compiler.resources(compiled)["REG"] * warps * 32 <= 65536


def waits_for_the_kernel_before(ptx: str, may_read: bool = False) -> None:
    """Launched before the kernel before it has ended: nothing in memory is touched until that one has.

    may_read: but for loads of what that kernel does not write.
    """
    touches = r"\b(st|atom|red)\.\S*global" if may_read else r"\b(ld|st|atom|red)\.\S*global"
    for line in lines_of(ptx):
        if "griddepcontrol.wait" in line:
            return
        assert not re.search(touches, line), f"before griddepcontrol.wait: {line!r}"
    raise AssertionError("no griddepcontrol.wait")
