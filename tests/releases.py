"""``python -m tests.releases``: the suite under the oldest and the newest release of everything, one line per set.

Makes a throw-away environment per set (under ``.releases/``, kept for the next time), installs the set beside this
checkout and runs the tests that are not slow. Takes up to 20 minutes and up to 6 GB of downloads per set, so it is
not part of the suite. A Python that is not installed, or a release without a wheel for it, is said and left out.
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

ROOT = Path(__file__).resolve().parents[1]
# triton 3.6's interpreter takes numbers out of arrays in a way that numpy 2.4 refuses
OLDEST = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "numpy": "2.3.5"}
NEWEST = {"torch": "2.13.0", "triton": "3.9.0", "transformers": "5.24.0"}
SETS: dict[str, tuple[str, dict[str, str]]] = {  # name -> (Python, releases)
    "oldest": ("3.11", OLDEST),
    "newest": ("3.11", NEWEST),
    "transformers 5.17": ("3.11", NEWEST | {"transformers": "5.17.0"}),
    "transformers 5.20": ("3.11", NEWEST | {"transformers": "5.20.2"}),
    "triton 3.6": ("3.11", NEWEST | {"triton": "3.6.0", "numpy": "2.3.5"}),
    "triton 3.7": ("3.11", NEWEST | {"triton": "3.7.1"}),
    "triton 3.8": ("3.11", NEWEST | {"triton": "3.8.0"}),
    "torch 2.14": ("3.11", NEWEST | {"torch": "2.14.1"}),
    "Python 3.12": ("3.12", NEWEST),
    "Python 3.13": ("3.13", NEWEST),
    "Python 3.14": ("3.14", NEWEST),
}
EXTRAS = "data,plots,dev"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.releases", description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"default: all of {', '.join(SETS)}")
    parser.add_argument("--workers", default="2", help="processes that run tests (default: 2)")
    parser.add_argument("-k", default="", help="only tests that match, as for pytest")
    given = parser.parse_args()
    for name in given.sets:
        if name not in SETS:
            parser.error(f"there is no set {name!r}; sets are {', '.join(SETS)}")
    failed = False
    for name in given.sets or SETS:
        python, releases = SETS[name]
        listed = ", ".join(f"{package} {release}" for package, release in releases.items())
        began = time.perf_counter()
        verdict, fine = run(name, python, releases, given.workers, given.k)
        failed |= not fine
        minutes = (time.perf_counter() - began) / 60
        print(f"{name:<18} Python {python}, {listed:<52} {verdict} ({minutes:.0f} min)", flush=True)
    return int(failed)


def run(name: str, python: str, releases: dict[str, str], workers: str, match: str) -> tuple[str, bool]:
    """Install one set and run the suite: what to say of it, and whether that is fine."""
    interpreter = shutil.which(f"python{python}")
    if interpreter is None or subprocess.run([interpreter, "-c", ""], capture_output=True).returncode:
        return f"left out: python{python} is not installed", True
    folder = ROOT / ".releases" / name.replace(" ", "-")
    log = folder.with_suffix(".log")
    folder.parent.mkdir(exist_ok=True)
    binaries = folder / "bin"
    with log.open("w", encoding="utf-8") as output:
        if not (folder / ".installed").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([interpreter, "-m", "venv", folder], check=True)
            pip = [binaries / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            torch, *others = (f"{package}=={release}" for package, release in releases.items())
            pins = folder / "constraints.txt"
            pins.write_text("\n".join([torch, *others]) + "\n", encoding="utf-8")
            for step in ([torch], ["--no-deps", *others], ["--constraint", pins, "-e", f"{ROOT}[{EXTRAS}]"]):
                if subprocess.run([*pip, *step], stdout=output, stderr=output).returncode:
                    return f"could not be installed, see {log.relative_to(ROOT)}", False
            (folder / ".installed").touch()
        command = [
            binaries / "python",
            "-m",
            "pytest",
            "-n",
            workers,
            "--dist",
            "worksteal",
            "-m",
            "not slow",
        ]
        command += ["--benchmark-disable", "-p", "no:cacheprovider", "-q", *(["-k", match] if match else [])]
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, env=os.environ | {"CI": "1"})
    summary = re.findall(r"^=* ?(.*(?:passed|failed|error).*?) in [\d.]+s.*$", log.read_text(), re.M)
    return (summary[-1] if summary else f"no result, see {log.relative_to(ROOT)}"), done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
