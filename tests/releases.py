"""``python tests/releases.py``: the suite under other releases, threads, instruction sets, seeds, one line each.

Makes a throw-away environment per set (under ``.releases/``, up to 7 GB, removed after its run unless ``--keep``
is given), installs the set beside this checkout and runs the tests that are not slow, or those that a release can
touch. What should change no result is shifted along with the releases, so that a few sets cover all of it: the
threads of each process, PyTorch's instruction set (one that the processor lacks becomes the largest it has; its
line says so) and every seed. A set takes up to 25 minutes, so this is not part of the suite; the newest releases
are what ``make test`` runs. A Python that is not installed is said and left out. Which release of a set a failure
belongs to, ``--with`` tells: ``python tests/releases.py oldest --with transformers=5.24.0``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Set(NamedTuple):
    """What the suite is run with."""

    python: str
    releases: dict[str, str]
    threads: int = 1
    instructions: str = ""  # ATEN_CPU_CAPABILITY: default, avx2, avx512; empty: what PyTorch takes by itself
    shift: int = 0  # REFINE_TEST_SEED_SHIFT
    files: tuple[str, ...] = ()  # a part of the suite; empty: all of it


# triton 3.6's interpreter takes numbers out of arrays in a way that numpy 2.4 refuses
OLDEST = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "numpy": "2.3.5"}
MIDDLE = {"torch": "2.14.1", "triton": "3.7.1", "transformers": "5.20.2"}
# constraints.txt: the newest torch whose CPU build is small; the newest of all is a set of its own
NEWEST = {"torch": "2.13.0", "triton": "3.9.0", "transformers": "5.24.0"}
KERNELS = ("tests/refine_kernels", "tests/refine/test_triton_step.py")  # what a release of triton can change
MODELS = (  # what a release of transformers can change: models, caches, generation, checkpoints, clients
    "tests/clients",
    "tests/refine/test_adapters.py",
    "tests/refine/test_eval_generation.py",
    "tests/refine/test_hybrid_checkpoints.py",
    "tests/refine/test_hybrid_models.py",
    "tests/refine/test_hybrid_runs.py",
    "tests/refine/test_hybrid_states.py",
    "tests/refine/test_hybrid_step.py",
    "tests/refine/test_lact_model.py",
    "tests/refine/test_lm_eval.py",
    "tests/refine/test_models.py",
    "tests/refine/test_saving.py",
    "tests/refine_kernels/test_integrations.py",
    "tests/refine_kernels/test_linear_logprob_shims.py",
)
SETS = {
    "oldest": Set("3.11", OLDEST, threads=1, instructions="default", shift=1),
    "Python 3.13": Set("3.13", NEWEST, threads=2, instructions="avx2", shift=2),
    "middle": Set("3.11", MIDDLE, threads=4, instructions="avx512", shift=3),
    "torch 2.15": Set("3.11", NEWEST | {"torch": "2.15.0"}, shift=9),
    "Python 3.12": Set("3.12", NEWEST, instructions="avx2", shift=10),
    "Python 3.14": Set("3.14", NEWEST, threads=2, shift=11),
    "triton 3.8": Set("3.11", NEWEST | {"triton": "3.8.0"}, shift=4, files=KERNELS),
    "transformers 5.18": Set("3.11", NEWEST | {"transformers": "5.18.0"}, shift=5, files=MODELS),
    "transformers 5.19": Set("3.11", NEWEST | {"transformers": "5.19.0"}, shift=6, files=MODELS),
    "transformers 5.21": Set("3.11", NEWEST | {"transformers": "5.21.1"}, shift=7, files=MODELS),
    "transformers 5.22": Set("3.11", NEWEST | {"transformers": "5.22.2"}, shift=8, files=MODELS),
    "transformers 5.23": Set("3.11", NEWEST | {"transformers": "5.23.0"}, shift=12, files=MODELS),
}
INSTRUCTIONS = ("default", "avx2", "avx512")
EXTRAS = "data,plots,dev"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/releases.py", description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"default: all of {', '.join(SETS)}")
    parser.add_argument("--workers", default="2", help="processes that run tests (default: 2)")
    parser.add_argument("--files", nargs="+", default=[], help="only these files or folders of tests")
    parser.add_argument("-k", default="", help="only tests that match, as for pytest")
    parser.add_argument(
        "--with",
        nargs="+",
        default=[],
        dest="other",
        metavar="PACKAGE=RELEASE",
        help="instead of a set's release",
    )
    parser.add_argument("--keep", action="store_true", help="leave the environments for the next time")
    given = parser.parse_args()
    if wrong := [one for one in given.other if not re.fullmatch(r"[\w.-]+=[\w.+-]+", one)]:
        parser.error(f"--with must be PACKAGE=RELEASE, as transformers=5.24.0, got {', '.join(wrong)}")
    for name in given.sets:
        if name not in SETS:
            parser.error(f"there is no set {name!r}; sets are {', '.join(SETS)}")
    failed = False
    for name in given.sets or SETS:
        chosen = SETS[name]
        chosen = chosen._replace(releases=chosen.releases | dict(one.split("=") for one in given.other))
        began = time.perf_counter()
        selected = [*(given.files or chosen.files), *(["-k", given.k] if given.k else [])]
        folder = ROOT / ".releases" / "-".join([*name.split(), *given.other]).replace("=", "-")
        instructions, verdict, fine = run(folder, chosen, given.workers, selected)
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
        failed |= not fine
        minutes = (time.perf_counter() - began) / 60
        listed = ", ".join(f"{package} {release}" for package, release in chosen.releases.items())
        listed += f"; threads {chosen.threads}, {instructions}, seeds +{chosen.shift}"
        verdict += " of a part of the suite" if selected else ""
        print(f"{name:<17} Python {chosen.python}, {listed:<96} {verdict} ({minutes:.0f} min)", flush=True)
    return int(failed)


def run(folder: Path, chosen: Set, workers: str, selected: list[str]) -> tuple[str, str, bool]:
    """Install one set and run its tests: the instruction set used, what to say of it, and whether that is fine."""
    interpreter = shutil.which(f"python{chosen.python}")
    if interpreter is None or subprocess.run([interpreter, "-c", ""], capture_output=True).returncode:
        return "-", f"left out: python{chosen.python} is not installed", True
    log = folder.with_name(f"{folder.name}.log")
    folder.parent.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        if not install(interpreter, folder, chosen.releases, output):
            return "-", f"could not be installed, see {log.relative_to(ROOT)}", False
        python = folder / "bin" / "python"
        environment = os.environ | {
            "CI": "1",
            "OMP_NUM_THREADS": str(chosen.threads),
            "OMP_WAIT_POLICY": "passive",  # there may be more threads than cores
            "REFINE_TEST_SEED_SHIFT": str(chosen.shift),
        }
        instructions = capability(python, chosen.instructions)
        environment.pop("ATEN_CPU_CAPABILITY", None)
        if chosen.instructions:
            environment["ATEN_CPU_CAPABILITY"] = instructions
        command = [python, "-m", "pytest", "-n", workers, "--dist", "worksteal", "-m", "not slow"]
        command += ["--benchmark-disable", "-p", "no:cacheprovider", "-v", *selected]
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, env=environment)
    summary = re.findall(r"^=* ?(.*(?:passed|failed|error).*?) in [\d.]+s.*$", log.read_text(), re.M)
    verdict = summary[-1] if summary else f"no result, see {log.relative_to(ROOT)}"
    return instructions, verdict, done.returncode == 0


def install(interpreter: str, folder: Path, releases: dict[str, str], output: IO[str]) -> bool:
    """Make the environment ``folder`` unless it is there; what pip says goes to ``output``."""
    if (folder / ".installed").is_file():
        return True
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([interpreter, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    listed = {package: f"{package}=={release}" for package, release in releases.items()}
    triton = listed.pop("triton")  # last and alone: torch asks for one release of it
    pins = folder / "constraints.txt"
    pins.write_text("\n".join(listed.values()) + "\n", encoding="utf-8")
    for step in (["--constraint", pins, "-e", f"{ROOT}[{EXTRAS}]"], ["--no-deps", triton]):
        if subprocess.run([*pip, *step], stdout=output, stderr=output).returncode:
            return False
    (folder / ".installed").touch()
    return True


def capability(python: Path, wanted: str) -> str:
    """The instruction set that PyTorch shall use: what is wanted, or all that the processor has if that is less."""
    clean = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=clean)
    found = done.stdout.strip().lower()
    if wanted in INSTRUCTIONS and found in INSTRUCTIONS:
        return min(wanted, found, key=INSTRUCTIONS.index)
    return found


if __name__ == "__main__":
    sys.exit(main())
