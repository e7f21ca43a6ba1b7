"""Mutants are run by `make mutants`; here only that each could be: its patch fits, and its tests exist."""

from __future__ import annotations

import re

import pytest

from tests.mutants import run


@pytest.mark.parametrize("mutant", run.all_mutants(), ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_made(tmp_path, mutant):
    run.copy_tree(tmp_path)
    run.apply(mutant, tmp_path)
    changed = re.findall(r"^\+\+\+ b/(\S+)", mutant.patch.read_text(), re.M)
    assert changed
    for name in changed:
        text = (tmp_path / name).read_text()
        assert text != (run.ROOT / name).read_text()
        if name.endswith(".py"):
            compile(text, name, "exec")
    assert mutant.breaks and mutant.killers


def test_the_tests_that_kill_exist():
    killers = sorted({killer for mutant in run.all_mutants() for killer in mutant.killers})
    code, output = run.pytest_in(run.ROOT, ["--collect-only", *killers])
    assert code == run.PASSED, output


def test_none_is_missing():
    """The seventeen kinds of fault, some of them in two places."""
    assert {int(mutant.name[:2]) for mutant in run.all_mutants()} == set(range(1, 18))


def test_a_patch_that_does_not_fit_is_refused(tmp_path):
    mutant = run.all_mutants()[0]
    run.copy_tree(tmp_path)
    run.apply(mutant, tmp_path)
    with pytest.raises(AssertionError, match="no longer applies"):
        run.apply(mutant, tmp_path)


@pytest.mark.parametrize(
    "body, dead",
    [("assert 1 == 2", True), ("assert 1 == 1", False), ("import pytest; pytest.skip('here')", False)],
)
def test_only_a_test_that_fails_has_killed(tmp_path, body, dead):
    (tmp_path / "test_one.py").write_text(f"def test_one():\n    {body}\n")
    assert (run.pytest_in(tmp_path, ["test_one.py::test_one"])[0] == run.FAILED) == dead
    assert run.pytest_in(tmp_path, ["test_one.py::test_two"])[0] != run.FAILED
