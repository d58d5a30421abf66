"""A model's configuration: what cannot be is refused by the name of its setting, before any tensor is made."""

from __future__ import annotations

import math

import pytest
import torch

from refine.models import MODELS
from tests.refine.hybrids import FAMILIES as HYBRIDS
from tests.refine.hybrids import config_of
from tests.refine.tiny import FAMILIES, tiny_model

NOT_OURS = {"num_labels"}  # of every transformers configuration, used by none of these models


def make_config(family: str, **settings):
    return (
        config_of(family, **settings)
        if family in HYBRIDS
        else tiny_model(family, torch.float32, **settings).config
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", [0, -1, 0.5, math.nan, "x"])
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_a_number_that_cannot_be_is_refused_by_its_name_or_makes_a_model_that_runs(family, wrong):
    config, ids = make_config(family), torch.arange(1, 13)[None]
    numbers = [
        name
        for name, value in config.to_dict().items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in NOT_OURS
        and name in config.settings()
    ]  # fmt: skip
    # of the rotary positions, which releases of transformers keep in different places
    numbers += sorted({"partial_rotary_factor", "rope_theta"} & config.settings() - set(numbers))
    assert {"vocab_size", "hidden_size", "num_hidden_layers"} <= set(numbers)
    refused = []
    for name in numbers:
        try:
            model_class = MODELS[config.model_type]
            model = model_class(make_config(family, **{name: wrong}))
            model(ids, labels=ids).loss.backward()
        except ValueError as error:
            assert name in str(error), f"{name}={wrong!r}: {error}"
            refused.append(name)
    assert {"vocab_size", "hidden_size", "num_hidden_layers"} <= set(refused)
