"""What Triton's own last form (TTGIR) must show: there loads still say where their addresses come from.

An address that is an integer made into a pointer lies in an arena, since the bases come from a table; all else is an
argument of the kernel. The printed form is read: a block's operations stand under each other at one indentation.
"""

from __future__ import annotations

import re

DEFINITION = re.compile(r"^(%[\w-]+)(:\d+)? = ")
OPERATION = re.compile(r"^(?:%[\w-]+(?::\d+)? = )?([a-z_]+\.[\w.]+|scf\.\w+)")
THROUGH = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "ttg.convert_layout", "tt.bitcast")
# Operations that touch no memory which others write: they may stand between a wait and the load that it is for.
HARMLESS = re.compile(
    r"arith\.|math\.|ttg\.convert_layout|tt\.(addptr|splat|broadcast|expand_dims|make_range|int_to_ptr)"
)


class Line:
    """One operation: its place, and its text without locations."""

    def __init__(self, number: int, text: str):
        self.number, self.indent = number, len(text) - len(text.lstrip())
        self.text = re.sub(r" loc\(.*", "", text.strip())
        operation = OPERATION.match(self.text)
        self.operation = operation[1] if operation else ""


def lines_of(ttgir: str) -> list[Line]:
    body = ttgir[ttgir.index("tt.func public") :].split("\n")[1:]
    return [Line(number, text) for number, text in enumerate(body) if text.strip()]


def in_arena(lines: list[Line], at: int, name: str) -> bool:
    """Whether the pointer `name`, used in line `at`, was made from an integer."""
    indent = lines[at].indent
    for before in range(at - 1, -1, -1):
        line = lines[before]
        indent = min(indent, line.indent)  # names of a block that has ended are other names
        if line.indent > indent or not line.text.startswith(f"{name} = "):
            continue
        if line.operation == "tt.int_to_ptr":
            return True
        assert line.operation in THROUGH, f"a pointer that comes from {line.text!r}"
        return in_arena(lines, before, re.findall(r"%[\w-]+", line.text)[1])
    return False  # an argument


def loads_of_tiles(lines: list[Line]) -> list[int]:
    """Loads of data in an arena: of tiles, since single words are addresses and epochs."""
    found = []
    for at, line in enumerate(lines):
        if line.operation in ("tt.load", "ttg.async_copy_global_to_local") and "x!tt.ptr<" in line.text:
            pointer = re.findall(r"%[\w-]+", line.text.split(" = ")[1])[0]
            if in_arena(lines, at, pointer):
                found.append(at)
    return found


def loads_follow_their_wait(compiled, wait: str = "barrier.red") -> None:
    """Between a wait and the load of what it waited for stand only operations on registers, in one block.

    So the load was neither pulled out of the loop that waits, nor pipelined into an iteration before. wait: what the
    piece of assembly holds that ends one.
    """
    lines = lines_of(compiled.asm["ttgir"])
    tiles = loads_of_tiles(lines)
    assert tiles, "nothing is loaded from an arena"
    for at in tiles:
        line = lines[at]
        assert line.operation == "tt.load", f"an asynchronous copy from an arena: {line.text!r}"
        for before in reversed(lines[:at]):
            if before.operation == "tt.elementwise_inline_asm" and wait in before.text:
                break
            is_word = before.operation == "tt.load" and "x!tt.ptr<" not in before.text
            assert before.indent == line.indent and (is_word or HARMLESS.match(before.operation)), (
                f"between {line.text!r} and the wait before it: {before.text!r}"
            )
        else:
            raise AssertionError(f"no wait stands before {line.text!r}")


def tma_of_arguments(compiled) -> None:
    """TMA moves the GEMM's operands alone: what a peer has written would need a fence between the proxies, and what it
    stores is published by no flag of ours."""
    text = compiled.asm["ttgir"]
    copies = re.findall(r"ttng\.async_tma_(\w+) (%[\w-]+)", text)
    assert copies, "no TMA"
    others = [copy for copy in copies if copy not in {("copy_global_to_local", f"%{name}_desc") for name in "ab"}]
    assert not others, others[0]
