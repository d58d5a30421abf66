"""The fused head under the names by which RL trainers call theirs. Neither trainer is imported here.

verl::

    import verl.utils.kernel.linear_cross_entropy as verl_kernel
    from refine_kernels.linear_logprob import integrations

    verl_kernel.linear_cross_entropy = integrations.verl_linear_cross_entropy

TRL 1.16, before a trainer is made::

    integrations.install_in_trl()
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
    """TRL 1.16's ``ChunkedLogProbFunction``: log-probs, entropies and three statistics of a head."""

    release = "1.16"

    @staticmethod
    def apply(
        hidden: torch.Tensor,  # [N, D]
        weight: torch.Tensor,  # [V, D]
        bias: torch.Tensor | None,  # [V]
        targets: torch.Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[torch.Tensor | None, ...]:
        """TRL's arguments in its order; the logits are ``z = softcap(logit_scale (x W^T + b)) / temperature``.

        Args:
            hidden, weight, bias, targets: as in :func:`~refine_kernels.linear_logprob`.
            chunk_size: not looked at.
            outputs: which of the last four results are wanted; log-probs always are.

        Returns:
            ``(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1)``, each ``[N]`` or None: log-probs of the
            targets and entropies, float32 with gradients; without gradients ``log sum_v p_v^2``, the mean of z, and
            whether the target is the first most likely token. Each of these three costs a pass, but for the mean
            without a softcap.

        Raises:
            ValueError: an unknown output, a scale that is not positive, or what ``linear_logprob`` refuses.
        """
        unknown = set(outputs) - {"log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"}
        if unknown:
            raise ValueError(
                f"outputs must be those of TRL {ChunkedLogProbFunction.release}, got {sorted(unknown)}"
            )
        if not logit_scale > 0:
            raise ValueError(f"logit_scale must be a positive number, got {logit_scale!r}")
        # cap tanh(scale z / cap) / temperature, with the scale moved into the other two
        scaled = temperature / logit_scale
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
        ask = {"bias": bias, "logit_softcap": softcap}
        squares = mean = top = None
        out = linear_logprob(
            hidden, weight, targets, temperature=scaled, return_entropy="entropy" in outputs,
            return_lse="log_sum_sq_probs" in outputs, **ask,
        )  # fmt: skip
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:  # log sum exp(2 z) - 2 log sum exp(z)
                doubled = linear_logprob(hidden, weight, temperature=scaled / 2, return_lse=True, **ask)
                squares = doubled.lse - 2 * out.lse
            if "mean_logits" in outputs:
                mean = _mean_logits(hidden, weight, bias, softcap, scaled)
            if "is_top1" in outputs:
                top = linear_logprob(hidden, weight, sample=True, temperature=0.0, **ask).token == targets
        return out.logprob, out.entropy, squares, mean, top


def install_in_trl() -> None:
    """Let TRL's trainers use :class:`ChunkedLogProbFunction`; call it before a trainer is made.

    Raises:
        ValueError: the installed TRL is not of the release that the class was written and tested for.
    """
    import trl
    import trl.trainer.utils

    if not trl.__version__.startswith(ChunkedLogProbFunction.release + "."):
        raise ValueError(
            f"ChunkedLogProbFunction takes the place of the one in TRL {ChunkedLogProbFunction.release}, "
            f"got TRL {trl.__version__}, whose arguments may be others"
        )
    trl.trainer.utils._ChunkedLogProbFunction = ChunkedLogProbFunction


def _mean_logits(
    x: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    softcap: float | None,
    temperature: float,
) -> torch.Tensor:  # [N]
    """The mean of ``softcap(x W^T + b) / temperature`` over the vocabulary; at most 256 rows of it at a time."""
    if softcap is None:
        mean = x.float() @ weight.mean(0, dtype=torch.float32)
        return (mean if bias is None else mean + bias.float().mean()) / temperature
    means = []
    for rows in x.split(256):
        z = rows.float() @ weight.float().t()
        z = z if bias is None else z + bias.float()
        means.append((z / softcap).tanh().mean(-1) * (softcap / temperature))
    return torch.cat(means)
