"""The package as an index would hold it: built, installed into an empty folder, used from another one."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
ASSETS = (
    "default.yaml",
    "paper_rows.yaml",
    "recipes/pretrain_tiny_1.yaml",
    "tiny-delta-net/model.safetensors",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution and the wheel that is built of it."""
    for name in ("build", "setuptools"):
        pytest.importorskip(name)
    source, folder = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "runs", "build", "dist", "results")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True, ignore_dangling_symlinks=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("target")
    (wheel,) = built.glob("*.whl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    subprocess.run([*pip, str(wheel)], check=True)
    return target


def refine(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """The console script, from ``folder``."""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(installed / "bin" / "refine"), *words]
    return subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True)


def test_what_the_archives_hold(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"refine", "refine_kernels"}
    for asset in ASSETS:
        assert f"refine/assets/{asset}" in names
    assert "refine/reporting/page.html.jinja" in names
    with tarfile.open(sdist) as archive:
        members = ["/".join(name.split("/")[1:]) for name in archive.getnames()]
    assert {"CITATION.cff", "LICENSE", "README.md", "refine/assets/default.yaml"} <= set(members)
    assert not [name for name in members if name.startswith(("tests", "benchmarks", "docs"))]


def test_what_the_index_shows(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    about = email.message_from_string(archive.read(name).decode())
    assert (about["Author"], about["License-Expression"]) == ("the maintainers", "Apache-2.0")
    links = re.findall(r"\]\(([^)]+)\)", about.get_payload())
    assert links and all(link.startswith("https://") for link in links)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == about["Version"]


def test_the_commands_run_from_another_folder(installed, tmp_path):
    shown = refine(installed, tmp_path, "--help")
    assert shown.returncode == 0 and all(
        word in shown.stdout for word in ("train", "eval", "reproduce", "report")
    )
    assert str(installed) in refine(installed, tmp_path, "train", "--output_dir", str(installed)).stderr
    rows = refine(installed, tmp_path, "reproduce", "table3_*", "--list")
    assert rows.returncode == 0 and "table3_lact_refine" in rows.stdout
    (tmp_path / "text.md").write_text("The grass is green, and the sky is blue. " * 200)
    small = (
        "--dataset_name_or_path",
        "text.md",
        "--max_steps",
        "1",
        "--max_length",
        "256",
        "--output_dir",
        "here",
    )
    ran = refine(installed, tmp_path, "train", *small)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "here" / "final" / "config.json").is_file() and set(os.listdir(tmp_path)) == {
        "here",
        "text.md",
    }
    measured = refine(
        installed, tmp_path, "eval", "--model", "here/final", "--tasks", "copying", "--samples", "2"
    )
    assert measured.returncode == 0 and "copy_32_accuracy" in measured.stdout, measured.stderr
