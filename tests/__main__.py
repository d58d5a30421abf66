"""``python -m tests refine.train ...``: a module as a command, its seeds shifted as the tests' are."""

import runpy
import sys

sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
