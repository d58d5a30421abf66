"""What a run leaves to look at: metrics.jsonl, rollout samples, TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from refine.training.settings import SettingsError


class Tracker:
    """Writes one line of ``metrics.jsonl`` at a time and passes it on to the reporters asked for.

    Args:
        output_dir: the run's folder.
        report_to: ``tensorboard`` and ``wandb``, any of them.
        run_name: shown by the reporters.
        settings: logged once with the reporters.
        step: lines after this step are dropped first, so that a resumed run has no line twice.

    """

    def __init__(
        self,
        output_dir: Path,
        report_to: list[str],
        run_name: str | None,
        settings: dict[str, Any],
        step: int,
    ):
        self.path = output_dir / "metrics.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_metrics(self.path) if line["step"] <= step]
        whole = self.path.with_name(self.path.name + ".partial")  # a crash here must not lose a line
        whole.write_text("".join(kept), encoding="utf-8")
        whole.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = self._wandb = None
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(output_dir / "tensorboard", purge_step=step + 1)
        if "wandb" in report_to:
            import wandb

            self._wandb = wandb.init(project="refine", name=run_name, config=settings, dir=str(output_dir))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One line; a value that is not finite is written as null, so that every line is valid JSON."""
        line = {"step": step} | {name: _plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_reporters(report_to: list[str]) -> None:
    """Whether every reporter asked for is installed.

    Raises:
        SettingsError: one is not.
    """
    for name in report_to:
        if importlib.util.find_spec(name) is None:
            raise SettingsError(f"report_to {name} needs its package: pip install {name}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order; a last line torn by a crash is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def write_samples(folder: Path, step: int, batch, output, tokenizer, context_tokens: int = 40) -> None:
    """The rollouts of a batch's first sequence beside the true continuation, best reward first.

    Args:
        folder: ``samples/`` of the run.
        step: names the file.
        batch: input_ids [B, T].
        output: a :class:`refine.RefineStepOutput`.
        tokenizer: turns ids into text.
        context_tokens: how much of the prefix to show.
    """
    folder.mkdir(exist_ok=True)
    ids, (_, c, n, k) = batch[0].tolist(), output.rollouts.shape
    order = output.rewards[0].flatten().argsort(descending=True).tolist()
    blocks = [f"step {step}: {c * n} rollouts of at most {k} tokens\n"]
    for rank in order:
        j, r = divmod(rank, n)
        p, count = int(output.positions[0, j]), int(output.rollout_lengths[0, j, r])
        blocks.append(
            f"--- position {p}  reward {output.rewards[0, j, r]:.4f}  advantage {output.advantages[0, j, r]:+.2f}\n"
            f"context : ...{tokenizer.decode(ids[max(0, p - context_tokens) : p])!r}\n"
            f"rollout : {tokenizer.decode(output.rollouts[0, j, r, :count].tolist())!r}\n"
            f"truth   : {tokenizer.decode(ids[p : p + count])!r}\n"
        )
    (folder / f"step-{step:06d}.txt").write_text("\n".join(blocks), encoding="utf-8")


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
