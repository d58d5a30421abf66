"""Settings: command line over file over default, and one clear sentence for whatever cannot be."""

from __future__ import annotations

import pytest

from refine.evaluation.settings import parse_settings as parse_eval
from refine.settings import SettingsError, read_file, to_yaml
from refine.training.settings import TrainSettings, parse_settings


def test_command_line_over_file_over_default(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 7\nlearning_rate: 1e-4\nreward: hybrid\nreport_to: [tensorboard]\n")
    settings = parse_settings(["--config", str(path), "--max_steps", "9", "--bf16", "--lambda_rl=0.4"])
    assert (settings.max_steps, settings.learning_rate, settings.reward) == (9, 1e-4, "hybrid")
    assert settings.bf16 is True and settings.lambda_rl == 0.4 and settings.report_to == ["tensorboard"]
    assert settings.weight_decay == TrainSettings().weight_decay


def test_defaults_are_the_papers():
    settings = TrainSettings()
    assert (settings.learning_rate, settings.adam_beta1, settings.adam_beta2) == (1e-6, 0.9, 0.999)
    assert (settings.weight_decay, settings.max_grad_norm, settings.lambda_rl) == (0.01, 0.2, 0.2)
    assert (settings.num_chunks, settings.rollout_length, settings.max_length) == (8, 5, 16384)
    assert settings.min_length == 160


def test_no_argument_is_the_default_job_and_a_named_model_is_not():
    assert parse_settings([]).output_dir == "runs/default"
    assert parse_settings(["--max_steps", "3"]).max_length == 2048
    assert parse_settings(["--model_name_or_path", "x"]).learning_rate == 1e-6


def test_the_tiny_model_reads_recall_documents_and_a_new_one_plain_text_unless_data_is_named():
    assert parse_settings([]).dataset_name_or_path == "recall"
    assert parse_settings(["--model_type", "lact"]).dataset_name_or_path == "default"
    assert parse_settings(["--model_type", "lact", "--dataset_name_or_path", "x"]).dataset_name_or_path == "x"


def test_what_is_written_reads_back(tmp_path):
    settings = parse_settings(
        ["--model_type", "delta_net", "--config_overrides", "hidden_size=64,use_gate=true"]
    )
    assert settings.config_overrides == {"hidden_size": 64, "use_gate": True}
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    assert TrainSettings(**read_file(TrainSettings, path)) == settings
    assert parse_settings(["--config", str(path)]) == settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate", "1"], "unknown setting 'lerning_rate': did you mean 'learning_rate'"),
        (["--zzz", "1"], "unknown setting 'zzz'; --help"),
        (["--max_steps", "many"], "max_steps must be a whole number, got 'many'"),
        (["--max_steps", "1.5"], "max_steps must be a whole number"),
        (["--max_steps", "0"], "max_steps must be at least 1, got 0"),
        (["--learning_rate", "fast"], "learning_rate must be a number"),
        (["--learning_rate", "nan"], "learning_rate must be over 0"),
        (["--learning_rate", "-1"], "learning_rate must be over 0"),
        (["--bf16", "maybe"], "bf16 must be true or false, got 'maybe'"),
        (["--recall_samples", "1e9"], "recall_samples must be at least 0 and at most 10000, got 1000000000"),
        (["--num_chunks", "0"], "num_chunks must be a whole number of at least 1, got 0"),
        (["--rollout_length", "0"], "rollout_length must be a whole number of at least 1"),
        (["--rollout_length", "4000"], "max_length must be at least min_length=32000"),
        (["--reward", "cosin"], "reward must be one of cosine, binary, hybrid"),
        (["--phase", "pre"], "phase must be one of mid, sft, post, grpo, got 'pre'"),
        (["--report_to", "mlflow"], "report_to takes tensorboard, wandb, got 'mlflow'"),
        (["--min_length", "50"], "min_length must be at least 160 for num_chunks=8"),
        (["--max_length", "100"], "max_length must be at least min_length=160"),
        (["--model_name_or_path", "a", "--model_type", "b"], "exclude each other"),
        (["--config_overrides", "a=1"], "need model_type"),
        (["--config_overrides", "a"], "config_overrides must be key=value"),
        (["--phase", "sft", "--num_mini_batches", "4"], "num_mini_batches is about rollouts"),
        (["--save_total_limit", "0"], "save_total_limit must be at least 1"),
        (["--recall_weight", "1"], "recall_weight must be over 0 and under 1"),
        (["--config", "no/such.yaml"], "cannot be read: No such file"),
        (
            ["stray"],
            "unknown setting 'stray': a value stands after its --name; a file of settings is --config",
        ),
        (["-lr", "3"], "'-lr': settings begin with two dashes: did you mean 'learning_rate'"),
        (["--max_steps"], "max_steps needs a value"),
        (["--lr", "1"], "unknown setting 'lr': did you mean 'learning_rate'"),
        (["--batch_size", "1"], "did you mean 'per_device_train_batch_size'"),
        (["--epochs", "1"], "unknown setting 'epochs': .* counted in updates: 'max_steps'"),
        (["--num_train_epochs", "1"], "counted in updates: 'max_steps'"),
        (["--kl_coef", "0.1"], "did you mean 'beta'"),
        (["--group_size", "4"], "did you mean 'num_rollouts'"),
        (["--max_new_tokens", "4"], "did you mean 'rollout_length'"),
        (["--reward", "../x:y"], "reward must be a name or module:function, got '../x:y'"),
        (["--reward", ":x"], "reward must be a name or module:function"),
        (["--lambda_sft", "inf"], "lambda_sft must be at least 0 and finite, got inf"),
        (["--temperature", "inf"], "temperature must be over 0 and finite"),
        (["--weight_decay", "inf"], "weight_decay must be at least 0 and finite"),
        (["--adam_epsilon", "1e-320"], "adam_epsilon must be at least 1e-37"),
        (["--learning_rate", "1e38"], "learning_rate must be over 0 and at most 1e.30"),
        (["--seed", str(2**200)], "seed must be at least 0 and at most 9223372036854775807"),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(SettingsError, match=message):
        parse_settings(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML"),
        ("- 1\n- 2\n", "must be a mapping of settings, got list"),
        ("max_step: 3\n", "did you mean 'max_steps'"),
        ("seed: [1]\n", "seed must be a whole number"),
        ("output_dir: {a: 1}\n", "output_dir must be text"),
        ("bf16: 3\n", "bf16 must be true or false"),
        ("max_steps: 3\nseed: 1\nmax_steps: 4\n", "has 'max_steps' twice, in lines 1 and 3"),
        ("optimizer: {lr: 3}\n", "group optimizer: unknown setting 'lr': did you mean 'learning_rate'"),
        ("optimizer: {learning_rate: 3}\nlearning_rate: 4\n", "learning_rate is given twice"),
        ("config_overrides: {a: 1, a: 2}\n", "has 'a' twice"),
        ("a: &a [*a]\n", "nested too deeply, or contains itself"),
        ("[" * 3000, "nested too deeply"),
        ("seed: " + "9" * 5000, "is not YAML|must be"),
        (
            "\n".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else '1'] * 9)}]" for i in range(9)),
            "has more than",
        ),
    ],
)
def test_files_that_cannot_be_are_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        parse_settings(["--config", str(path)])


def test_an_empty_file_means_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("")
    assert parse_settings(["--config", str(path)]) == parse_settings([])
    assert parse_settings(["--config", str(path), "--model", "x"]) == TrainSettings(model_name_or_path="x")


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    text = capsys.readouterr().out
    assert "--num_chunks" in text and "--resume_from_checkpoint" in text


def test_groups_and_both_names_of_the_model(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {model_name_or_path: x, bf16: true}\noptimizer: {learning_rate: 3e-4}\nnum_chunks: 4\n"
    )
    settings = parse_settings(["--config", str(path)])
    assert (settings.model_name_or_path, settings.bf16, settings.learning_rate) == ("x", True, 3e-4)
    path.write_text("model: y\n")
    assert parse_settings(["--config", str(path)]).model_name_or_path == "y"
    for parse in (parse_settings, parse_eval):
        assert (
            parse(["--model", "x"]).model_name_or_path
            == parse(["--model_name_or_path", "x"]).model_name_or_path
            == "x"
        )
    assert parse_settings(["--learning-rate", "2e-3"]).learning_rate == 2e-3


def test_evaluation_has_limits_of_its_own():
    settings = parse_eval(["--tasks", "copying", "--samples", "2", "--max_length", "100"])
    assert settings.tasks == ["copying"] and settings.max_length == 100
    with pytest.raises(SettingsError, match="max_length must be at least 160 for task held_out"):
        parse_eval(["--tasks", "held_out", "--max_length", "100"])
    with pytest.raises(SettingsError, match="unknown setting 'limit': did you mean 'samples'"):
        parse_eval(["--limit", "3"])
    assert parse_eval(["--lengths", "40,20", "30"]).lengths == [20, 30, 40]


def test_code_from_outside_is_named_before_it_runs(capsys):
    with pytest.raises(SettingsError, match="cannot be imported"):
        parse_settings(["--reward", "no.such.module:function"])
    assert "importing no.such.module, code from outside" in capsys.readouterr().err


def test_naming_only_a_data_set_changes_nothing_else(tmp_path, capsys):
    """In a file as on the command line: without a model the default job's values apply, and are told."""
    path = tmp_path / "run.yaml"
    path.write_text("dataset_name_or_path: x.jsonl\n")
    settings = parse_settings(["--config", str(path)])
    assert "learning_rate=0.0001, max_length=2048 (the default job's" in capsys.readouterr().out
    assert settings == parse_settings(["--dataset_name_or_path", "x.jsonl"])
    assert (settings.learning_rate, settings.max_length) == (1e-4, 2048)
    assert capsys.readouterr().out == ""
    path.write_text("model: y\n")
    settings = parse_settings(["--config", str(path)])
    assert (settings.learning_rate, settings.max_length) == (1e-6, 16384)
    assert "learning_rate=1e-06, max_length=16384 (the paper's" in capsys.readouterr().out
