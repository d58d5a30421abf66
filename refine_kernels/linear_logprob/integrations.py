"""The fused head under the names by which RL trainers call theirs. Neither trainer is imported here.

verl::

    import verl.utils.kernel.linear_cross_entropy as verl_kernel
    from refine_kernels.linear_logprob import integrations

    verl_kernel.linear_cross_entropy = integrations.verl_linear_cross_entropy

TRL, before a trainer is made::

    import trl.trainer.utils as trl_utils

    trl_utils._ChunkedLogProbFunction = integrations.ChunkedLogProbFunction

and likewise in the modules that have imported either name already.
"""

from __future__ import annotations

import torch

from refine_kernels.linear_logprob.op import linear_logprob


def verl_linear_cross_entropy(
    hidden: torch.Tensor,  # [..., D]
    weight: torch.Tensor,  # [V, D], or this rank's slice
    labels: torch.Tensor,  # [...]
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's ``linear_cross_entropy``: log-probs and entropies, one per token, float32, both with gradients.

    Args:
        hidden: hidden states; every leading dimension is flattened, as verl does.
        weight: the head; with ``dist_process_group`` this rank's slice of it.
        labels: tokens of the whole vocabulary.
        temperature: divides the logits; ``None`` is 1.
        reduction: ``"none"`` or ``None``.
        dist_process_group: the ranks that share the vocabulary.

    Returns:
        ``(logprobs [N], entropy [N])``.

    Raises:
        ValueError: another reduction, or what ``linear_logprob`` refuses.
    """
    if reduction not in (None, "none"):
        raise ValueError(f"reduction must be 'none' or None, got {reduction!r}")
    out = linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), return_entropy=True,
        temperature=1.0 if temperature is None else temperature, process_group=dist_process_group,
    )  # fmt: skip
    return out.logprob, out.entropy


class ChunkedLogProbFunction:
    """What stands in ``trl.trainer.utils._ChunkedLogProbFunction``'s place: log-probs and entropies."""

    @staticmethod
    def apply(
        last_hidden: torch.Tensor,  # [N, D]
        weight: torch.Tensor,  # [V, D]
        *arguments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both of TRL's argument orders are known, by where the integer tensor of targets stands.

        Args:
            last_hidden: hidden states.
            weight: the head.
            arguments: ``bias, targets, temperature, chunk_size[, softcap[, scale]]``, or as in earlier versions
                ``targets, temperature, chunk_size[, scale]``. The chunk size is not looked at. ``scale``
                multiplies the logits, before they are capped.

        Returns:
            ``(logprobs [N], entropy [N])``, float32, both with gradients.

        Raises:
            ValueError: neither order fits, or what ``linear_logprob`` refuses.
        """
        places = [
            i
            for i, a in enumerate(arguments[:2])
            if isinstance(a, torch.Tensor) and not a.dtype.is_floating_point
        ]
        if not places or len(arguments) < places[0] + 3:
            raise ValueError(
                "arguments must be (bias, targets, temperature, chunk_size, ...) or (targets, temperature, "
                f"chunk_size, ...), got {[type(a).__name__ for a in arguments]}"
            )
        at = places[0]
        bias = arguments[0] if at else None
        targets, temperature, _, *rest = arguments[at:]
        softcap, scale = ([*rest, None, None] if at else [None, *rest, None])[:2]
        scale = 1.0 if scale is None else scale
        if not scale > 0:
            raise ValueError(f"scale must be a positive number or None, got {scale!r}")
        # cap tanh(scale z / cap) / temperature, with the scale moved into the other two
        out = linear_logprob(
            last_hidden, weight, targets, bias=bias, temperature=temperature / scale, return_entropy=True,
            logit_softcap=None if softcap is None else softcap / scale,
        )  # fmt: skip
        return out.logprob, out.entropy
