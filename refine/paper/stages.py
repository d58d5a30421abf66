"""A stage: one call of ``refine.train``, ``refine.eval`` or lm-eval, in a process and a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from refine.evaluation.lm_eval import LmEvalSettings
from refine.evaluation.settings import EvalSettings
from refine.files import write_whole
from refine.training.settings import TrainSettings

KINDS = {"train": TrainSettings, "eval": EvalSettings, "lm_eval": LmEvalSettings}
_MODULES = {"train": "refine.train", "eval": "refine.eval", "lm_eval": "refine.evaluation.lm_eval"}


@dataclass(frozen=True)
class Stage:
    """One call of a command.

    Attributes:
        name: ``train-0123456789ab``: the kind, and a hash of the resolved settings and of the stage before.
        kind: of :data:`KINDS`.
        settings: for its YAML file; the model of a stage with a parent is filled in when it runs.
        parent: the training stage whose model it starts from.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    parent: Stage | None

    def folder(self, root: Path) -> Path:
        """Where it writes."""
        return root / "stages" / self.name

    def done(self, root: Path) -> bool:
        """Whether its last file is there; every command writes it whole or not at all."""
        last = "final/config.json" if self.kind == "train" else "results.json"
        return (self.folder(root) / last).is_file()

    def command(self, root: Path, processes: int) -> list[str]:
        """The process to run, going on where an earlier one stopped."""
        folder = self.folder(root)
        launcher = [sys.executable, "-m"]
        if processes > 1 and self.kind == "train":
            launcher += ["torch.distributed.run", "--nproc_per_node", str(processes), "-m"]
        command = [*launcher, _MODULES[self.kind], "--config", str(folder) + ".yaml"]
        command += ["--output_dir", str(folder)]
        if self.kind == "train":
            return [*command, "--resume_from_checkpoint", "auto"]
        return [*command, "--resume"] if self.kind == "eval" else command

    def write_config(self, root: Path) -> None:
        """Its settings as a file beside its folder, with the model of the stage before."""
        settings = dict(self.settings)
        if self.parent is not None:
            settings["model_name_or_path"] = str(self.parent.folder(root) / "final")
        (root / "stages").mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        write_whole(root / "stages" / f"{self.name}.yaml", text)


def run_stages(stages: list[Stage], root: Path, processes: int, broken: set[str]) -> str | None:
    """Run the stages that are not done; what went wrong, or None. ``broken`` are stages that failed already."""
    for stage in stages:
        if stage.done(root):
            print(f"  {stage.name}: done before", flush=True)
            continue
        log = root / "stages" / f"{stage.name}.log"
        if stage.name not in broken:
            stage.write_config(root)
            print(f"  {stage.name}: running", flush=True)
            with log.open("a", encoding="utf-8") as file:
                command = stage.command(root, processes)
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
                try:
                    code = process.wait()
                except KeyboardInterrupt:  # the stage got it too: it saves and ends by itself
                    process.wait()
                    raise
            if code == 0 and stage.done(root):
                continue
            broken.add(stage.name)
        lines = [
            line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        return f"{stage.name} did not end well ({lines[-1].strip() if lines else 'no output'}); see {log}"
    return None
