"""The tests. ``REFINE_TEST_SEED_SHIFT=n`` shifts every seed that ``torch.manual_seed`` and generators are given, so
that the inputs of all tests change; in processes that a test starts, too, which is why this is done here: a command
whose results are compared is started as ``python -m tests refine.train``.
"""

import os

import torch

if _shift := int(os.environ.get("REFINE_TEST_SEED_SHIFT", "0")):
    _manual_seed = torch.manual_seed
    torch.manual_seed = lambda seed: _manual_seed(int(seed) + _shift)

    class _Shifted(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(int(seed) + _shift)

    torch.Generator = _Shifted
