"""Fixtures that every test may use, and the settings that keep results equal from run to run.

Triton decides when a kernel is defined whether it will be compiled or interpreted. Without a GPU it is
imported here, first of all, with its interpreter on; then the variable is taken back, so that a test runs
the backend a user would get on this machine unless it asks for the ``interpreter`` fixture.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # tests in several processes: one thread for each, and for the processes that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# what PyTorch has compiled of an earlier state of an op is no test of this one
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # a plugin of pytest may have imported torch before
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

INTERPRET = not torch.cuda.is_available()


def _import_kernels() -> None:
    """Import every file of kernels once, so that all of them are defined in the same mode."""
    import importlib
    import importlib.util
    import pkgutil

    if importlib.util.find_spec("triton") is None:
        return

    import refine_kernels

    for module in pkgutil.walk_packages(refine_kernels.__path__, "refine_kernels."):
        if "triton" in module.name.rpartition(".")[2]:
            importlib.import_module(module.name)


if INTERPRET:
    _before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    _import_kernels()
    if _before is None:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def interpreter(monkeypatch):
    """Let ``backend="triton"`` (and the default backend) run on CPU tensors, where there is no GPU."""
    pytest.importorskip("triton")
    if INTERPRET:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _gpu_alive():
    """A kernel that reads or writes where it must not ends every later CUDA call of its process. So each test
    waits for its own kernels, which makes the error that test's; the tests after it there are skipped by name."""
    if INTERPRET or not torch.cuda.is_initialized():
        yield
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.skip(f"an earlier test of this process broke its CUDA context: {str(error).splitlines()[0]}")
    yield
    torch.cuda.synchronize()


@pytest.fixture
def default_device():
    """New tensors are on the GPU, where there is one."""
    if INTERPRET:
        yield torch.device("cpu")
        return
    torch.set_default_device("cuda")
    yield torch.device("cuda")
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _no_report(request, monkeypatch):
    """Training runs write no report, which takes a third of a second, but in the tests that look at it."""
    training = sys.modules.get("refine.train")
    if training is not None and request.node.get_closest_marker("with_report") is None:
        monkeypatch.setattr(training, "write_report", lambda folders, output_file: output_file)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the public implementations; tests that need them are skipped where they are not."""
    root = Path(__file__).resolve().parents[1]
    for folder in (
        Path(os.environ.get("REFINE_GOLDEN_DIR", "")),
        root / "shared" / "golden",
        root.parent / "shared" / "golden",
    ):
        if str(folder) != "." and folder.is_dir():
            return folder
    pytest.skip("no golden numbers here: set REFINE_GOLDEN_DIR to their folder")
