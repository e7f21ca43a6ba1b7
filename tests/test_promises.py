"""The README's promises name tests that exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHEET = (ROOT / "README.md").read_text().partition("## Promises")[2].partition("\n## ")[0]
ROWS = [line for line in SHEET.splitlines() if line.startswith("|")][2:]


def named(row: str) -> list[tuple[str, str]]:
    """(file, test) of a row; a name that begins with :: is in the file before it."""
    found, file = [], ""
    for path, test in re.findall(r"`([\w/.]*)::(\w+)`", row):
        file = path or file
        found.append((file, test))
    return found


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip()[:40] for row in ROWS])
def test_a_promise_has_its_test(row):
    assert named(row)
    for file, test in named(row):
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M), f"{file}::{test}"


def test_there_is_a_sheet():
    assert len(ROWS) >= 10
