"""The tests. ``REFINE_TEST_SEED_SHIFT=n`` shifts every seed that ``torch.manual_seed`` sets, so that the inputs of
all tests change; in processes that a test starts, too, which is why this is done here.
"""

import os

import torch

if _shift := int(os.environ.get("REFINE_TEST_SEED_SHIFT", "0")):
    _manual_seed = torch.manual_seed
    torch.manual_seed = lambda seed: _manual_seed(int(seed) + _shift)
