"""TRL's ``GRPOTrainer`` on this package's models, with every prompt read once.

TRL gives n rows of prompt + completion per prompt and reads each from its start: for the update, for old log-probs
and for the reference. Here rows that share a prompt branch from its state, in training and in generation. Losses,
gradients and metrics are TRL's own, to rounding.
"""

from __future__ import annotations

from unittest.mock import patch

import torch
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from refine.method.completions import read_prompts, score_branches
from refine.method.generation import generate_group
from refine.method.reading import check_model
from refine.method.sequences import Sequences


class PromptOnceGRPOTrainer(GRPOTrainer):
    """``trl.GRPOTrainer``, cheaper by reading shared prompts once.

    Args:
        max_branches: completions that are scored at a time; the activations of one such batch are alive.
        segment_length: prompts are read by segments of so many tokens (at least 64); None: in one pass.
        others: as ``trl.GRPOTrainer``'s.

    Raises:
        TypeError: the model is none of this package's.
    """

    def __init__(self, *args, max_branches: int | None = None, segment_length: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        check_model(self.model, type(self).__name__)
        self.max_branches, self.segment_length = max_branches, segment_length

    def _prepare_inputs(self, generation_batch):
        # TRL shuffles single completions over the micro-batches; whole groups keep their prompts together
        with patch.object(grpo_trainer, "shuffle_sequence_dict", shuffle_groups):
            return super()._prepare_inputs(generation_batch)

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        **others,
    ):
        """Log-probs [M, R], entropies [M, R] or None, and None (no auxiliary loss) of rows [M, P + R]."""
        if given := sorted(
            name for name, value in others.items() if value is not None and value is not False
        ):
            raise ValueError(f"{', '.join(given)}: {type(self).__name__} reads text alone")
        prompt = slice(None, -logits_to_keep)
        mask = attention_mask[:, prompt]
        rows, parent = torch.stack([input_ids[:, prompt] * mask, mask], 1).unique(dim=0, return_inverse=True)
        ids, mask = rows.unbind(1)
        # a completion that TRL has masked out as a whole (mask_truncated_completions) counts nowhere
        lengths = attention_mask[:, -logits_to_keep:].sum(1).clamp_min(1)
        with self.accelerator.autocast():
            prompts = read_prompts(model, Sequences.of(ids, mask), self.segment_length)
            logprobs, entropy = score_branches(
                model, prompts, parent, input_ids[:, -logits_to_keep:], lengths, self.temperature,
                entropy=compute_entropy, max_branches=self.max_branches or batch_size,
            )  # fmt: skip
        return logprobs, entropy, None

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        """One list of token ids per prompt, its stop token included, and None."""
        elsewhere = self.use_vllm or self.use_transformers_continuous_batching
        if elsewhere or multimodal_fields or self.args.generation_kwargs or self.repetition_penalty != 1.0:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
            )
        places: dict[tuple[int, ...], list[int]] = {}  # a prompt -> where its completions go
        for place, ids in enumerate(prompt_ids):
            places.setdefault(tuple(ids), []).append(place)
        width, device = max(map(len, places)), self.accelerator.device
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in places], device=device)
        lengths = torch.tensor([len(prompt) for prompt in places], device=device)
        with self.accelerator.autocast():
            drawn = generate_group(
                self.model_wrapped,
                ids,
                max(map(len, places.values())),
                prompt_mask=torch.arange(width, device=device) < lengths[:, None],
                max_new_tokens=self.max_completion_length,
                temperature=self.temperature,
                top_k=self.top_k or None,
                top_p=None if self.top_p == 1.0 else self.top_p,
                min_p=self.min_p,
                stop_ids=self.eos_token_ids,
                segment_length=self.segment_length,
            )
        completions: list[list[int]] = [[] for _ in prompt_ids]
        ends = drawn.completion_mask.sum(-1).tolist()
        for group, found, length in zip(places.values(), drawn.completion_ids.tolist(), ends):
            for place, tokens, end in zip(group, found, length):
                completions[place] = tokens[:end]
        return completions, None


def shuffle_groups(batch: dict) -> dict:
    """The rows of a batch in another order, in which runs of rows with the same prompt stay together."""
    prompts = torch.cat([batch["prompt_ids"], batch["prompt_mask"]], dim=1)
    number = prompts.unique_consecutive(dim=0, return_inverse=True)[1]
    order = torch.randperm(int(number[-1]) + 1, device=number.device)[number].argsort(stable=True)

    def permute(value):
        if value is None or (isinstance(value, torch.Tensor) and value.ndim == 0):
            return value
        return value[order] if isinstance(value, torch.Tensor) else [value[i] for i in order.tolist()]

    return {name: permute(value) for name, value in batch.items()}
