"""The pages: every relative link leads somewhere, and the Python in them runs."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "refine_kernels").rglob("*.md")]
RUN = ("README.md", "docs/clients.md", "docs/prompt_once.md", "docs/extending.md", "docs/method.md")
TINY = ROOT / "refine" / "assets" / "tiny-delta-net"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+://", target):
            path, _, heading = target.partition("#")
            found = page.parent / path if path else page
            assert found.exists(), f"{target} is not there"
            if heading:
                headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.M)
                anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
                assert heading in anchors, f"{target}: {found.name} has no such heading"


@pytest.mark.parametrize("name", RUN)
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    """Its blocks, one after the other, with the packaged model in the place of your own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)
    assert blocks
    ids = torch.randint(1000, (2, 200))
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # classes of a page look their annotations up there
    vars(page).update(input_ids=ids, mask=torch.ones_like(ids))
    for block in blocks:
        if "Trainer" in block:
            pytest.importorskip("accelerate")
        code = block.replace("path/or/name", str(TINY))
        exec(compile(code, name, "exec"), vars(page))


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
