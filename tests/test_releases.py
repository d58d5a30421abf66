"""``tests/releases.py``: its sets are what the project states, and what it is asked for wrongly is named."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

from tests.releases import NEWEST, OLDEST, ROOT, SETS


def test_the_ends_of_the_stated_ranges_are_run():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package in ("torch", "triton", "transformers"):
        (stated,) = (one for one in project["dependencies"] if re.match(rf"{package}\b", one))
        assert f">={OLDEST[package].removesuffix('.0')}" in re.split(r"[,;]", stated.removeprefix(package))[0]
    assert project["requires-python"] == f">={SETS['oldest'].python}"
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {f"{package}=={release}" for package, release in NEWEST.items()} <= set(pinned)


def test_every_set_is_in_the_docs_and_runs_files_that_exist():
    page = (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")
    assert [name for name in SETS if name not in page] == []
    assert [file for one in SETS.values() for file in one.files if not (ROOT / file).exists()] == []
    shifts = [chosen.shift for chosen in SETS.values()]
    assert len(set(shifts)) == len(shifts)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["middel"], "there is no set 'middel'; sets are oldest, "),
        (
            ["oldest", "--with", "transformers"],
            "--with must be PACKAGE=RELEASE, as transformers=5.24.0, got transformers",
        ),
    ],
)
def test_what_there_is_not_is_named(words, said):
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "releases.py", *words], capture_output=True, text=True
    )
    assert done.returncode == 2 and said in done.stderr
