"""What a forward pass returns, under the name that the installed ``transformers`` gives a cache.

Up to 5.23 an output's cache is called ``past_key_values``; from 5.24 on it is ``cache``, and ``transformers``
renames the old name wherever an output is written. Both can be read here, under any release.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, fields

import torch
from packaging.version import Version
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from refine.models.state import FastWeightState, StateTrace

OLDEST, BEYOND = (5, 17), (6, 0)  # releases of transformers that states pass through unharmed

INSTALLED = importlib.metadata.version("transformers")

if not OLDEST <= Version(INSTALLED).release[:2] < BEYOND:
    raise ImportError(
        f"refine needs transformers 5.17 or newer and older than 6, found {INSTALLED}: "
        "pip install 'transformers>=5.17,<6'"
    )

CACHE_NAME = (
    "cache" if any(f.name == "cache" for f in fields(GenerateDecoderOnlyOutput)) else "past_key_values"
)

if CACHE_NAME == "cache":

    @dataclass
    class _OutputWithState(ModelOutput):
        loss: torch.Tensor | None = None
        logits: torch.Tensor | None = None
        cache: FastWeightState | None = None

        @property
        def past_key_values(self) -> FastWeightState | None:
            """The state after the last token, by its older name."""
            return self.cache
else:

    @dataclass
    class _OutputWithState(ModelOutput):
        loss: torch.Tensor | None = None
        logits: torch.Tensor | None = None
        past_key_values: FastWeightState | None = None

        @property
        def cache(self) -> FastWeightState | None:
            """The state after the last token, by its newer name."""
            return self.past_key_values


@dataclass
class FastWeightOutput(_OutputWithState):
    """What a forward pass returns; fields that were not asked for are None.

    Attributes:
        loss: scalar float32, from ``labels`` or a :class:`~refine.models.head.NextTokenLoss` request.
        logits: [B, T, V], or of the positions in ``logits_to_keep``.
        past_key_values: the state after the last token, with ``use_cache``; ``cache`` is the same.
        last_hidden_state: [B, T, hidden], after the final norm, before the head.
        hidden_states: with ``output_hidden_states``, one [B, T, hidden] for the embeddings and each layer.
        entropy, logprob: [B, T] float32; token: [B, T] int64; as the head request says.
        trace: with ``state_stride``, gives the state at any position.
        document_ends: [B, T] bool, True for the last token of each document of a packed batch.
    """

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    entropy: torch.Tensor | None = None
    logprob: torch.Tensor | None = None
    token: torch.Tensor | None = None
    trace: StateTrace | None = None
    document_ends: torch.Tensor | None = None
