"""The pages: every relative link leads somewhere, and the Python in them runs."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "refine_kernels").rglob("*.md")]
RUN = (
    "README.md",
    "docs/clients.md",
    "docs/prompt_once.md",
    "docs/extending.md",
    "docs/method.md",
)
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


@pytest.mark.parametrize(
    "name", ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
)
def test_the_commands_of_a_page_are_understood(name, tmp_path, monkeypatch):
    """Every setting of ``refine train`` and ``refine eval`` in a page is one, with a value that it takes."""
    monkeypatch.chdir(tmp_path)
    Path("my_run.yaml").write_text("max_steps: 3\n")
    rewards = types.ModuleType("my_rewards")
    rewards.correct = rewards.short = len
    monkeypatch.setitem(sys.modules, "my_rewards", rewards)
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word != "..."]
            for command, settings in (
                ("train", "refine.training.settings"),
                ("eval", "refine.evaluation.settings"),
            ):
                for start in (["refine", command], ["python", "-m", f"refine.{command}"]):
                    if words[: len(start)] == start and "--help" not in words:
                        importlib.import_module(settings).parse_settings(words[len(start) :])


def test_the_reference_has_every_public_name():
    """Of both packages; ``make docs`` fails where a name of the page is not there."""
    import refine
    import refine_kernels

    named = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M))
    for package in (refine, refine_kernels):
        assert {f"{package.__name__}.{name}" for name in package.__all__} <= named
    for name in named:
        module, _, attribute = name.rpartition(".")
        if name != "refine.integrations.trl_grpo.PromptOnceGRPOTrainer":  # needs trl
            assert getattr(importlib.import_module(module), attribute).__doc__


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for name in ("material", "mkdocstrings"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "One forward of the REFINE loss" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert 'href="quick_start/"' in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
