"""The paper's rows: every file is valid, stages are shared and run once, failures do not stop the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import refine
from refine import reproduce
from refine.evaluation.report import Score, average_scores
from refine.models.lact import LaCTConfig, LaCTForCausalLM
from refine.paper.rows import is_papers_model
from refine.paper.tables import columns_of
from refine.reproduce import PUBLISHED as PAPER_NUMBERS
from refine.reproduce import Stage, expand_names, load_published, load_row, make_tables, row_names
from refine.settings import SettingsError, build
from refine.training.settings import TrainSettings

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


@pytest.mark.parametrize("protocol", ["ours", "paper"])
def test_every_row_of_the_paper_is_valid_and_has_its_table(protocol):
    """Every number that the paper prints has a row that makes it, and every row its table."""
    rows = [load_row(name, protocol=protocol) for name in row_names()]
    published = load_published(PAPER_NUMBERS)
    assert (
        len({(row.table, row.label) for row in rows})
        == len(rows)
        == 2 * (3 + 8 + 5 + 3 + 4 + 4 + 4 + 2 + 4 + 1)
    )
    labels = {(row.table, row.label) for row in rows}
    known = {(table, label) for table, about in published.items() for label in about.get("rows") or {}}
    assert known <= labels
    assert {row.table for row in rows} == {*published, "-"}
    record, text = make_tables(rows, Path("nowhere"), published)
    assert set(record) == set(published)
    assert text.count(", paper |") == len(rows) - 2 == text.count("not run here")
    for about in record.values():  # the paper's order
        known = [label for label, row in about["rows"].items() if row["paper"]]
        wanted = list(
            published[next(t for t in published if published[t]["title"] == about["title"])].get("rows", {})
        )
        assert known == wanted


def test_all_numbers_of_the_paper_are_there():
    """300 of the tables, and the columns that they belong to."""
    published = load_published(PAPER_NUMBERS)
    counts = {table: sum(map(len, (about.get("rows") or {}).values())) for table, about in published.items()}
    assert counts == {"3": 96, "4": 128, "5": 130, "6": 4, "7": 8, "5c": 4, "5k": 0, "E.1": 66, "E.2": 8}
    for table in ("3", "4"):  # the mean of three lengths, printed with one decimal
        for label, numbers in published[table]["rows"].items():
            for i in range(0, len(numbers), 4):
                mean = 0.25 if (table, label, i) == ("3", "LaCT-760M", 4) else 0.101
                assert abs(sum(numbers[i : i + 3]) / 3 - numbers[i + 3]) < mean, (label, i)
    for label, numbers in published["5"]["rows"].items():
        assert abs(sum(numbers[:12]) / 12 - numbers[12]) < 0.101, label
    columns = [column.label for column in columns_of(published["3"])]
    assert columns[:4] == ["S-NIAH 4K", "S-NIAH 8K", "S-NIAH 16K", "S-NIAH mean"]
    assert columns_of(published["3"])[4].tasks == ("niah_multikey_1",)
    assert len(columns_of(published["6"])[0].tasks) == 12


def test_the_numbers_are_those_of_the_reference(paper_numbers):
    """Where the collected numbers are at hand."""
    published, flat = load_published(PAPER_NUMBERS), []

    def numbers(value) -> list[float]:
        if isinstance(value, dict | list):
            values = value.values() if isinstance(value, dict) else value
            return [x for one in values for x in numbers(one)]
        return [] if isinstance(value, str) else [float(value)]

    for about in published.values():
        flat += numbers(list((about.get("rows") or {}).values()))
    assert sorted(flat) == sorted(numbers(paper_numbers))
    for model, row in paper_numbers["table3"].items():
        assert published["3"]["rows"][model] == [x for name in ("S", "MK", "MQ", "MV") for x in row[name]]
    for table, key in (("4", "table4"), ("5", "table5"), ("E.1", "tableE1")):
        for model, rows in paper_numbers[key].items():
            for name, row in rows.items():
                label = model + ("" if name == "none" else f" + {name.replace('ttt', 'test-time')}")
                assert published[table]["rows"][label] == numbers(row)


@pytest.fixture
def paper_numbers():
    root = Path(__file__).resolve().parents[2]
    for folder in (root, root.parent, root.parents[1]):
        if (path := folder / "shared" / "spec" / "paper_numbers.yaml").is_file():
            return yaml.safe_load(path.read_text())
    pytest.skip("the collected numbers of the paper are not here")


def scores(*places: tuple[str, int | None], value: float = 0.5) -> list[dict]:
    interval = [value - 0.1, value + 0.1]
    return [
        {"task": task, "length": length, "score": value, "interval": interval, "samples": 500}
        for task, length in places
    ]


def test_a_mean_over_fewer_lengths_or_tasks_is_no_number():
    published = load_published(PAPER_NUMBERS)
    needles = scores(("niah_multikey_1", 4096), ("niah_multikey_1", 8192), ("niah_multikey_2", 16384))
    found = [column.of(needles) for column in columns_of(published["3"])[4:8]]
    assert [one and one["value"] for one in found] == [50.0, 50.0, None, None]
    needles += scores(("niah_multikey_1", 16384), ("niah_multikey_1", 1024), value=0.2)
    found = columns_of(published["3"])[7].of(needles)
    assert found["value"] == pytest.approx(40) and found["samples"] == 1500  # 1,024 tokens are not in it
    column = columns_of(published["6"])[0]
    tasks = [(task, None) for task in column.tasks]
    assert column.of(scores(*tasks[1:])) is None
    assert column.of(scores(*tasks, ("longbench_musique", None)))["value"] == pytest.approx(50)
    means = [Score(task, None, 0.5, (0.4, 0.6), 9) for task, _ in tasks]
    assert [one.task for one in average_scores(means)] == ["longbench_mean"]
    assert average_scores(means[1:]) == []


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("rank", [32, -1])
def test_the_lact_of_the_paper_may_have_two_heads(heads, rank):
    """Its scripts load ``lact-muon-nope-postnorm-nheads2-chunk2048-760m``; LaCT's own 760M has four."""
    with torch.device("meta"):
        model = LaCTForCausalLM(LaCTConfig(num_lact_heads=heads, w0_w2_low_rank=rank, ttt_nope=True))
    assert is_papers_model("lact", "lact_swiglu", sum(x.numel() for x in model.parameters()))


@pytest.mark.parametrize(
    ("parameters", "label"),
    [
        (797_625_312, "| LaCT-760M + SFT, ours (1) |"),
        (811_421_424, "| LaCT-760M + SFT, ours (1) |"),  # with two heads
        (9, "| **not LaCT-760M**: lact + SFT (1) |"),
    ],
)
def test_numbers_of_the_papers_model_are_told_from_those_of_others(tmp_path, parameters, label):
    """By its type and number of parameters, as the evaluation found them."""
    row = load_row("table3_lact_sft", {"model": "somewhere/lact"})
    folder = row.tests[0].folder(tmp_path)
    folder.mkdir(parents=True)
    tasks = ("niah_single_1", "niah_multikey_1", "niah_multiquery", "niah_multivalue")
    found = scores(*((task, length) for task in tasks for length in (4096, 8192, 16384)))
    about = {"model_type": "lact_swiglu", "parameters": parameters}
    results = {"model": "x/final", "about_model": about, "scores": found}
    (folder / "results.json").write_text(json.dumps(results))
    record, text = make_tables([row], tmp_path, load_published(PAPER_NUMBERS), {"protocol": "paper"})
    assert f"{label} 50.0 [40.0, 60.0] |" in text
    assert ("not the paper's model" in text) == (parameters == 9)
    assert "protocol paper" in text and "500 samples of" in text and "at 16,384 tokens" in text
    assert record["3"]["rows"]["LaCT-760M + SFT"]["is_papers_model"] == (parameters != 9)


def test_rows_share_stages():
    """The ablations' default is the row of Table 5; post-training starts from the same mid-training."""
    named = {name: [stage.name for stage in load_row(name).stages] for name in row_names()}
    assert named["ablation_c_lact_8"] == named["ablation_k_lact_5"] == named["table5_lact_refine"]
    assert named["ablation_reward_lact_cosine"] == named["ablation_selection_lact_entropy"]
    assert named["tableE2_lact_ttt_binary"] == named["table5_lact_refine_ttt_refine"]
    assert named["table4_lact_refine_nested_refine"][0] == named["table3_lact_refine"][0]
    assert named["table3_lact_refine"][0] != named["table3_lact_sft"][0]
    assert len(named["table3_lact_none"]) == 1


def test_post_training_reads_1600_pairs_of_each_task_at_every_length():
    row = load_row("table4_delta_net_refine_nested_refine")
    posts = [stage.settings for stage in row.training[1:]]
    assert [post["pair_lengths"] for post in posts] == [[4096], [8192], [16384]]
    for post, test in zip(posts, row.tests):
        assert post["gradient_accumulation_steps"] * post["max_steps"] == 2 * 1600
        assert post["eval_fraction"] == 0  # nothing of them is held out
        assert test.settings["qa_lengths"] == post["pair_lengths"]


def test_the_papers_protocol_changes_what_it_says():
    """One SFT update on 128 sequences, answers after a whole batch of 64, no BOS, no end, all of AdamW decayed."""
    for protocol, sft, post in (("ours", (32, 400), (16, 200)), ("paper", (128, 100), (64, 50))):
        (mid, test) = load_row("table3_lact_sft", protocol=protocol).stages
        assert (mid.settings["gradient_accumulation_steps"], mid.settings["max_steps"]) == sft
        stage = load_row("table4_lact_refine_sft", protocol=protocol).training[1]
        assert (stage.settings["gradient_accumulation_steps"], stage.settings["max_steps"]) == post
        built = build(TrainSettings, stage.settings | {"model_name_or_path": "x"})
        ours = protocol == "ours"
        assert (built.add_bos_token, built.answer_eos, built.decay_vectors) == (ours, ours, not ours)
        refine = load_row("table4_lact_refine_nested_refine", protocol=protocol).training[1].settings
        assert refine.get("answer_updates", "each") == ("each" if ours else "draw")
        assert (refine["gradient_accumulation_steps"], refine["num_mini_batches"]) == (16, 4)
        assert test.settings.get("protocol", "ours") == protocol
        (whole,) = load_row("table5_lact_none", protocol=protocol).stages
        assert len(load_row("table5_lact_none", protocol=protocol).stages) == 1 and whole.kind == "eval"


def test_rows_are_found_by_name():
    assert expand_names("table3_lact_refine") == expand_names("configs/paper/table3_lact_refine.yaml")
    assert len(expand_names("configs/paper/table4_lact_*.yaml")) == 8
    assert expand_names("figure4_*") == ["figure4_lact", "figure4_delta_net"]
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


def test_a_table_end_to_end(tmp_path, text_file, capsys, monkeypatch, stages_in_this_process):
    """A shared stage runs once, a failing row does not stop the others, a second call runs what is missing."""
    rows = write_rows(
        tmp_path,
        broken="row: broken\nstages: {mid: {train: {dataset_name_or_path: /no/such/text}}}\n",
        refine="row: REFINE\n",
        ttt="row: REFINE + test-time SFT\nstages: {test: {eval: {ttt: sft}}}\n",
    )
    out = tmp_path / "out"
    command = [*rows, "--output_dir", str(out), "--model", str(TINY), "--text", str(text_file), *SCALE]
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
    assert record["broken"]["ours"] == [None] and record["broken"]["state"] == "not run"
    own, changed = record["REFINE"], "max_steps=2, lengths=400, samples=2"
    assert own["ours"][0] is not None and own["paper"] == [96.3] and own["is_papers_model"] is False
    assert own["cells"][0]["samples"] == 2 and own["changed settings"] == changed
    text = (out / "tables.md").read_text()
    assert "| broken, not run here (2) | - |" in text and "| REFINE, paper | 96.3 |" in text
    assert "| **not DeltaNet-1.3B**: tiny-delta-net, REFINE (1) | " in text
    assert (
        "not the paper's model, DeltaNet-1.3B" in text and "2 samples of niah_single_1 at 400 tokens" in text
    )

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
