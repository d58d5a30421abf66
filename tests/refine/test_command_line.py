"""Mistakes of the command line get one sentence that says what to do; ``--help`` takes no seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from refine import commands, reproduce, train
from refine import eval as evaluation
from refine.evaluation.settings import EvalSettings
from refine.evaluation.settings import parse_settings as parse_eval
from refine.option_help import documented
from refine.prepare import packaged_model
from refine.settings import kinds_of
from refine.training.settings import RECIPES, TrainSettings, find_config, parse_settings

MAINS = {"train": train.main, "eval": evaluation.main, "reproduce": reproduce.main, "": commands.main}

# (command, arguments, what the sentence tells to do); RUN.yaml, DATA and FULL are files and a folder of the test
MISTAKES = [
    ("train", "run.yaml", "did you mean --config run.yaml?"),
    ("train", "MODEL", "did you mean --model_name_or_path MODEL?"),
    ("train", "DATA", "did you mean --dataset_name_or_path DATA?"),
    ("train", "help", "the list of settings is --help"),
    ("train", "max_steps=10", "settings begin with two dashes: --max_steps=10"),
    ("train", "max_steps 10", "settings begin with two dashes: --max_steps"),
    ("train", "-max_steps 10", "settings begin with two dashes: --max_steps"),
    ("train", "\N{EM DASH}max_steps 10", "settings begin with two dashes: --max_steps"),
    ("train", "-lr 1e-4", "settings begin with two dashes: did you mean 'learning_rate'?"),
    ("train", "--max_steps 10 20", "max_steps takes one value, and '20' is another"),
    ("train", "--max_steps", "max_steps needs a value: --max_steps VALUE"),
    ("train", "--max-step 10", "did you mean 'max_steps'?"),
    ("train", "--no_bf16", "to turn it off, --bf16 false"),
    ("train", "--fp16", "did you mean 'bf16'?"),
    ("train", "--num_train_epochs 3", "the length of a run is counted in updates: 'max_steps'"),
    ("train", "--learning_rate 1e-4x", "learning_rate must be a number, got '1e-4x'"),
    ("train", "--learning_rate 1e-4,1e-5", "learning_rate must be a number, got '1e-4,1e-5'"),
    ("train", "--max_steps 1,000", "max_steps must be a whole number, got '1,000'"),
    ("train", "--phase pretrain", "phase must be one of mid, sft, post, grpo, got 'pretrain'"),
    ("train", "--reward cosine_similarity", "reward must be one of cosine, binary"),
    ("train", "--config pretrain_tiny", "did you mean 'pretrain_tiny_"),
    ("train", "--config no/such.yaml", "this package's recipes are pretrain_tiny_1"),
    ("train", "--config DOUBLED", "has 'max_steps' twice, in lines 1 and 3"),
    ("train", "--output_dir=", "output_dir is empty: give a value, or leave it out"),
    ("train", "--output_dir FULL", "overwrite_output_dir"),
    ("train", "--resume_from_checkpoint true", "resume_from_checkpoint must be auto"),
    ("train", "--dataset_name_or_path my_txt/ --output_dir new", "there is no such file or folder"),
    ("train", "--model_name_or_path runs/no/final --output_dir new", "runs/no/final"),
    ("train", "--device gpu --output_dir new", "device 'gpu' cannot be used"),
    ("train", "--report_to mlflow", "report_to takes tensorboard, wandb, got 'mlflow'"),
    ("eval", "--task niah", "did you mean 'tasks'?"),
    ("eval", "--tasks nia", "there is no task 'nia': did you mean 'niah'?"),
    ("eval", "--tasks longbench", "needs longbench_files"),
    ("eval", "--resume_from_checkpoint auto", "did you mean 'resume'?"),
    ("reproduce", "", "name the rows to run"),
    ("reproduce", "table3_lact_refin", "did you mean 'table3_lact_refine"),
    ("reproduce", "table3_lact_refine", "these rows need --"),
    ("", "evaluate", "did you mean 'eval'?"),
    ("", "trian", "did you mean 'train'?"),
    ("", "--max_steps 3", "a command stands first, as in refine train --max_steps"),
]


@pytest.mark.parametrize(("command", "line", "told"), MISTAKES, ids=lambda value: str(value)[:30])
def test_a_mistake_gets_one_sentence(command, line, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("max_steps: 3\n")
    (tmp_path / "DOUBLED").write_text("max_steps: 3\nseed: 1\nmax_steps: 4\n")
    (tmp_path / "DATA").write_text("a text\n")
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "notes.txt").write_text("mine\n")
    (tmp_path / "MODEL").symlink_to(packaged_model())
    assert MAINS[command](line.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert told in said[0]
    assert not (tmp_path / "new").exists() and not (tmp_path / "runs").exists()


def test_both_commands_know_both_names_of_the_model():
    for parse in (parse_settings, parse_eval):
        assert parse(["--model", "x"]) == parse(["--model_name_or_path", "x"])
    assert parse_eval(["--per_device_eval_batch_size", "3"]).batch_size == 3
    assert parse_settings(["--max_steps", "1e3"]).max_steps == 1000


def test_recipes_are_found_by_name():
    assert find_config("pretrain_tiny_1") == find_config("pretrain_tiny_1.yaml")
    for recipe in RECIPES.iterdir():
        assert parse_settings(["--config", recipe.name]).phase == "sft"


@pytest.mark.parametrize(("parse", "cls"), [(parse_settings, TrainSettings), (parse_eval, EvalSettings)])
def test_help_says_what_every_setting_means(parse, cls, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    entries = dict(entry.split(maxsplit=1) for entry in text.split("\n  --")[1:])
    assert {f"{name}" for name in kinds_of(cls)} <= {name.rstrip(",") for name in entries}
    assert set(documented(cls)) <= set(kinds_of(cls)) and "--help" in text and "examples:" in text
    grouped = {name for group in cls.GROUPS.values() for name in kinds_of(group)}
    assert grouped == set(kinds_of(cls)), "every setting has its group"


def test_help_shows_the_defaults_that_apply(capsys):
    for parse, told in (
        (parse_settings, "(default: 1e-06; 0.0001 where no model is named)"),
        (parse_eval, "for one of your own (default: binary)"),
    ):
        with pytest.raises(SystemExit):
            parse(["--help"])
        assert told in " ".join(capsys.readouterr().out.split())


def test_help_needs_no_models():
    """``--help`` and the choice of a command import no transformers; the latter not even torch."""
    code = "import sys; sys.argv = ['/bin/refine']; from refine import commands\n"
    code += "print('torch' in sys.modules)\n"
    code += "try: commands.main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "print('\\ntransformers' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("False", "False"), done.stderr
