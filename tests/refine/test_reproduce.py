"""The paper's rows: every file is valid, stages are shared and run once, failures do not stop the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import refine
from refine import reproduce
from refine.reproduce import PUBLISHED as PAPER_NUMBERS
from refine.reproduce import Stage, expand_names, load_published, load_row, make_tables, row_names
from refine.settings import SettingsError

TINY = Path(refine.__file__).parent / "assets" / "tiny-delta-net"
BASE = """
table: needles
family: delta_net
stages:
  mid: {train: {phase: mid, dataset_name_or_path: $text, max_length: 256, max_steps: 9, eval_samples: 0}}
  test: {eval: {tasks: [niah_single_1], lengths: [1024], samples: 9}}
"""
PUBLISHED = """
tables:
  needles: {title: Needles, columns: {S: [niah_single_1]}, rows: {REFINE: [96.3]}}
"""
SCALE = ["--set", "max_steps=2", "lengths=400", "samples=2"]


def write_rows(folder: Path, **rows: str) -> list[str]:
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "base.yaml").write_text(BASE)
    (folder / "published.yaml").write_text(PUBLISHED)
    for name, text in rows.items():
        (folder / f"{name}.yaml").write_text(f"extends: base/base.yaml\n{text}")
    return [str(folder / f"{name}.yaml") for name in rows]


def test_every_row_of_the_paper_is_valid_and_has_its_table():
    """Labels that the paper's numbers are known of are exactly labels of rows."""
    rows = [load_row(name) for name in row_names()]
    published = load_published(PAPER_NUMBERS)
    assert len({(row.table, row.label) for row in rows}) == len(rows) == 60
    labels = {(row.table, row.label) for row in rows}
    known = {(table, label) for table, about in published.items() for label in about.get("rows") or {}}
    assert known <= labels
    record, _ = make_tables(rows, Path("nowhere"), published)
    assert set(record) == set(published)


def test_rows_share_stages():
    """The ablations' default is the row of Table 3; post-training starts from the same mid-training."""
    named = {name: [stage.name for stage in load_row(name).stages] for name in row_names()}
    assert named["ablation_c_lact_8"] == named["ablation_k_lact_5"] == named["table3_lact_refine"]
    assert named["table4_lact_refine_nested_refine"][0] == named["table5_lact_refine_ttt_refine"][0]
    assert named["table3_lact_refine"][0] != named["table3_lact_sft"][0]
    assert len(named["table3_lact_none"]) == 1


def test_rows_are_named_as_their_files_once_were():
    assert expand_names("table3_lact_refine") == expand_names("configs/paper/table3_lact_refine.yaml")
    assert len(expand_names("configs/paper/table4_lact_*.yaml")) == 7
    with pytest.raises(SettingsError, match="'table3_lact_refin': did you mean 'table3_lact_refine'"):
        expand_names("table3_lact_refin")


def test_processes_keep_the_batch():
    stage = load_row("table3_lact_refine", processes=8).stages[0]
    assert (stage.settings["gradient_accumulation_steps"], stage.settings["parallel"]) == (4, "ddp")
    assert stage.name == load_row("table3_lact_refine").stages[0].name
    with pytest.raises(
        SettingsError, match="nproc_per_node must divide gradient_accumulation_steps=32, got 5"
    ):
        load_row("table3_lact_refine", processes=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {mid: {train: {reward_: binary}}}", "unknown setting 'reward_': did you mean 'reward'"),
        ("stages: {mid: {train: {selection: best}}}", "selection must be one of"),
        ("stages: {test: null}", "the last stage must be an evaluation"),
        ("stages: {mid: {train: {dataset_name_or_path: $tex}}}", "unknown placeholder '\\$tex'.*'text'"),
        ("tabel: 3", "unknown key 'tabel': did you mean 'table'"),
        ("stages: [1]", "stages must be a mapping, got list"),
        ("family: mamba", "family must be one of lact, delta_net, got 'mamba'"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_sentence(tmp_path, text, message):
    (path,) = write_rows(tmp_path, row=f"row: x\n{text}\n")
    with pytest.raises(SettingsError, match=message):
        load_row(Path(path))


def test_bad_commands_are_one_sentence(tmp_path, capsys):
    rows = write_rows(tmp_path, row="row: x\n")
    out = ["--output_dir", str(tmp_path / "out")]
    assert reproduce.main([*rows, *out]) == 2
    assert "these rows need --model, --text" in capsys.readouterr().err
    assert reproduce.main([*rows, *out, "--set", "max_step=2"]) == 2
    assert "unknown setting 'max_step': did you mean 'max_steps'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_table_end_to_end(tmp_path, capsys, monkeypatch):
    """A shared stage runs once, a failing row does not stop the others, a second call runs what is missing."""
    rows = write_rows(
        tmp_path,
        broken="row: broken\nstages: {mid: {train: {dataset_name_or_path: /no/such/text}}}\n",
        refine="row: REFINE\n",
        ttt="row: REFINE + test-time SFT\nstages: {test: {eval: {ttt: sft}}}\n",
    )
    out = tmp_path / "out"
    command = [*rows, "--output_dir", str(out), "--model", str(TINY), "--text", "default", *SCALE]
    started: list[str] = []
    original = Stage.command

    def counted(stage, *given):
        started.append(stage.name)
        return original(stage, *given)

    monkeypatch.setattr(Stage, "command", counted)
    assert reproduce.main(command) == 1
    shown = capsys.readouterr()
    assert "table needles, broken: train-" in shown.err and "/no/such/text" in shown.err
    assert len(started) == 4 and len(set(started)) == 4  # the broken one, mid once, two evaluations
    record = json.loads((out / "tables.json").read_text())["needles"]["rows"]
    assert record["broken"]["ours"] == [None]
    assert record["REFINE"]["ours"][0] is not None and record["REFINE"]["paper"] == [96.3]
    assert "| broken | - / - |" in (out / "tables.md").read_text()

    started.clear()
    evaluation = next(stage for stage in (out / "stages").glob("eval-*") if stage.is_dir())
    (evaluation / "results.json").unlink()  # as if stopped before the end
    assert reproduce.main([*rows[1:], *command[3:]]) == 0
    assert started == [evaluation.name]
    assert "going on: 2 of 2" in (out / "stages" / f"{evaluation.name}.log").read_text()
    started.clear()
    assert reproduce.main([*rows[1:], *command[3:]]) == 0
    assert started == []
    assert reproduce.main([*command, "--print_tables"]) == 0
