"""The rows of the paper's tables and its figures by name (assets/paper_rows.yaml), and rows from files.

A row has a ``table`` and a label that it fills, the model's ``family``, and its ``stages`` in order: each holds
the settings of one command and is checked by that command's settings class. A stage's name is a hash of its
settings and of the stages before: rows that share a stage share it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from refine.paper.stages import KINDS, Stage
from refine.settings import SettingsError, build, kinds_of, nearest, read_mapping, read_yaml

FAMILIES = ("lact", "delta_net")
ROW_KEYS = ("extends", "table", "row", "family", "stages", "each", "paper")
PLACEHOLDERS = ("model", "text", "validation", "qa_train", "qa_test", "longbench")
PAPER = resources.files("refine") / "assets" / "paper_rows.yaml"
# How and where a stage runs; nothing that its result is named by.
_FREE = ("output_dir", "overwrite_output_dir", "resume", "resume_from_checkpoint", "device")


@dataclass(frozen=True)
class Row:
    """A row of a table: its label, and its stages; the last of each chain is an evaluation."""

    name: str  # of the paper's row, or of the file
    table: str
    label: str
    family: str
    chains: list[list[Stage]]  # one, or one for each value of `each`

    @property
    def stages(self) -> list[Stage]:
        """Every stage once, in the order in which they run."""
        return list({stage.name: stage for chain in self.chains for stage in chain}.values())

    @property
    def tests(self) -> list[Stage]:
        """The evaluations."""
        return [chain[-1] for chain in self.chains]

    @property
    def training(self) -> list[Stage]:
        """The training stages."""
        return [stage for stage in self.stages if stage.kind == "train"]


@dataclass(frozen=True)
class Figure:
    """A figure of the paper, or a table of examples, drawn from the files of rows' stages."""

    name: str
    draw: str  # which function of refine.paper.figures
    measure: str | None
    rows: list[str]
    training_only: bool


def row_names() -> list[str]:
    """The names of the paper's rows."""
    return list(_paper_rows())


def figures() -> dict[str, Figure]:
    """The paper's figures by name, one for each family."""
    found = {}
    for name, about in _paper()["figures"].items():
        for family in FAMILIES:
            wanted = [text.replace("FAMILY", family) for text in about["rows"]]
            rows = [row for text in wanted for row in _paper_rows() if fnmatchcase(row, text)]
            found[f"{name}_{family}"] = Figure(
                f"{name}_{family}", about["draw"], about.get("measure"), rows, about["runs"] == "train"
            )
    return found


def expand_names(given: str) -> list[str]:
    """The rows and figures that a name means: a file's, one of the paper, or all that fit where it has a ``*``.

    Raises:
        SettingsError: there is none; the nearest is suggested.
    """
    if Path(given).is_file():
        return [] if Path(given).name == "published.yaml" else [given]
    name, known = Path(given).name.removesuffix(".yaml"), [*_paper_rows(), *figures()]
    found = [row for row in known if fnmatchcase(row, name)]
    if not found:
        end = nearest(name, known, "; --list '*' shows all")
        raise SettingsError(f"there is no file and no row or figure of the paper {given!r}{end}")
    return found


def model_name(family: str) -> str:
    """What the paper calls its model of a family."""
    return _paper()["families"][family]["name"]


def is_papers_model(family: str, model_type: str | None, parameters: int | None) -> bool:
    """Whether a model is the paper's of that family, by its type and number of parameters."""
    wanted = _paper()["families"][family]
    return model_type == wanted["model_type"] and parameters in wanted["parameters"]


def load_row(
    name: str | Path,
    values: dict[str, str] | None = None,
    overrides: dict[str, Any] | None = None,
    processes: int = 1,
    protocol: str = "ours",
) -> Row:
    """A row by its name or from its file, every stage checked by the settings class of its command.

    Args:
        name: of a row of the paper, or a YAML file's path.
        values: for the placeholders ``$model``, ``$text``, ...; what is not given stays as it is. A model may be
            given for one family, as ``model.lact``.
        overrides: settings that replace those of every stage that knows them; ``train.``, ``eval.`` or
            ``lm_eval.`` before a name limits it to that kind, a stage's name (``mid.``) to that stage.
        processes: of a training stage; its accumulation steps are divided by them, so the batch stays.
        protocol: ``ours`` or ``paper``.

    Raises:
        SettingsError: names the row and what is wrong in it.
    """
    values, overrides = values or {}, overrides or {}
    try:
        merged = _read(name)
        for key in ("table", "row", "family", "stages"):
            if not merged.get(key):
                raise SettingsError(f"{key} is missing")
        if merged["family"] not in FAMILIES:
            raise SettingsError(f"family must be one of {', '.join(FAMILIES)}, got {merged['family']!r}")
        if not isinstance(merged["stages"], dict):
            raise SettingsError(f"stages must be a mapping, got {type(merged['stages']).__name__}")
        given = {name: values[name] for name in PLACEHOLDERS if name in values}
        if f"model.{merged['family']}" in values:
            given["model"] = values[f"model.{merged['family']}"]
        stages = merged["stages"]
        if protocol == "paper":
            over = {key: value for key, value in (merged.get("paper") or {}).items() if stages.get(key)}
            stages = _merge(stages, over)
        _check_overrides(overrides, stages)
        each = merged.get("each") or {"": [""]}
        ((variable, items),) = each.items()
        chains = [
            _chain(
                stages, given | ({variable: str(item)} if variable else {}), overrides, processes, protocol
            )
            for item in items
        ]
    except SettingsError as error:
        raise SettingsError(f"{name}: {error}") from error
    return Row(Path(name).stem, str(merged["table"]), str(merged["row"]), merged["family"], chains)


def _chain(stages: dict[str, Any], values, overrides, processes: int, protocol: str) -> list[Stage]:
    """The stages of a row, one after the other."""
    chain: list[Stage] = []
    for stage, content in stages.items():
        if content is None:
            continue
        if not isinstance(content, dict) or len(content) != 1 or next(iter(content)) not in KINDS:
            raise SettingsError(
                f"stage {stage!r} must hold one of {', '.join(KINDS)} settings, got {content!r}"
            )
        ((kind, settings),) = content.items()
        if not isinstance(settings, dict | None):
            raise SettingsError(
                f"stage {stage!r} must be a mapping of settings, got {type(settings).__name__}"
            )
        if chain and chain[-1].kind != "train":
            raise SettingsError(f"stage {stage!r} comes after an evaluation, which must be the last")
        chain.append(_stage(stage, kind, settings or {}, chain, values, overrides, processes, protocol))
    if not chain or chain[-1].kind == "train":
        raise SettingsError("the last stage must be an evaluation")
    return chain


def _stage(place, kind, settings, before, values, overrides, processes, protocol) -> Stage:
    """One stage: placeholders filled, overrides laid over, checked, and named."""
    cls = KINDS[kind]
    settings = _fill(settings, values)
    if kind == "train" and settings.get("eval_dataset_name_or_path") == "$validation?":
        settings = {k: v for k, v in settings.items() if k not in ("eval_dataset_name_or_path", "eval_steps")}
        settings["eval_samples"] = 0  # nothing to measure on
    settings = read_mapping(cls, settings)
    if kind == "eval" and protocol != "ours":
        settings.setdefault("protocol", protocol)
    for name, value in overrides.items():
        wanted, _, bare = name.rpartition(".")
        if wanted in ("", kind, place) and bare in kinds_of(cls):
            settings |= read_mapping(cls, {bare: value})
    if before:
        settings["model_name_or_path"] = f"stage:{before[-1].name}"
    else:
        settings.setdefault("model_name_or_path", _fill("$model", values))
    resolved = dataclasses.asdict(build(cls, settings))
    if kind == "train" and processes > 1:
        if resolved["gradient_accumulation_steps"] % processes:
            raise SettingsError(
                f"nproc_per_node must divide gradient_accumulation_steps="
                f"{resolved['gradient_accumulation_steps']}, got {processes}"
            )
        settings["gradient_accumulation_steps"] = resolved["gradient_accumulation_steps"] // processes
        if settings.get("parallel", "none") == "none":
            settings["parallel"] = "ddp"
        build(cls, settings)
    identity = json.dumps({name: resolved[name] for name in sorted(resolved) if name not in _FREE})
    digest = hashlib.sha256(f"{kind} {identity}".encode()).hexdigest()[:12]
    return Stage(f"{kind}-{digest}", kind, settings, before[-1] if before else None)


@cache
def _paper() -> dict[str, Any]:
    return read_yaml(PAPER)


@cache
def _paper_rows() -> dict[str, dict[str, Any]]:
    """name -> the keys of each row of the paper."""
    found = {}
    for table, about in _paper()["tables"].items():
        if "vary" in about:
            ((stage, inside),) = about["vary"].items()
            ((kind, name),) = inside.items()
            rows = {
                str(value): {
                    "label": f", {about['as']} = {value}",
                    "stages": {stage: {kind: {name: value}}},
                }
                for value in about["values"]
            }
        else:
            rows = about["rows"]
        for family, model in _paper()["families"].items():
            for name, row in rows.items():
                found["_".join(filter(None, (table, family, name)))] = {
                    "extends": row.get("extends", about["extends"]), "table": about["table"],
                    "row": model["name"] + row["label"], "family": family, "stages": row.get("stages", {}),
                    "paper": row.get("paper", {}),
                }  # fmt: skip
    return found


def _read(name: str | Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """A row's keys over what it extends: mappings are merged, all else is replaced."""
    if str(name) in seen:
        raise SettingsError(f"extends goes in a circle at {Path(name).name}")
    if Path(name).is_file():
        loaded = read_yaml(name, "row")
    elif str(name) in _paper_rows():
        loaded = _paper_rows()[str(name)]
    elif str(name) in _paper()["bases"]:
        loaded = _paper()["bases"][str(name)]
    else:
        raise SettingsError(f"there is no file, row or base {str(name)!r}")
    if not isinstance(loaded, dict):
        raise SettingsError(f"must be a mapping, got {type(loaded).__name__}")
    for key in loaded:
        if key not in ROW_KEYS:
            raise SettingsError(f"unknown key {key!r}{nearest(str(key), ROW_KEYS)}")
    own = {key: value for key, value in loaded.items() if key != "extends"}
    base = loaded.get("extends")
    if base is None:
        return own
    beside = Path(name).parent / str(base)
    return _merge(_read(beside if beside.is_file() else str(base), (*seen, str(name))), own)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _fill(value: Any, values: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _fill(own, values) for key, own in value.items()}
    if isinstance(value, list):
        return [_fill(own, values) for own in value]
    if isinstance(value, str) and value.startswith("$"):
        name = value[1:].removesuffix("?")
        if name not in PLACEHOLDERS and name not in values:
            raise SettingsError(f"unknown placeholder {value!r}{nearest(name, PLACEHOLDERS)}")
        return values.get(name, value)
    return value


def unfilled(settings: Any) -> set[str]:
    """The placeholders that no value was given for."""
    if isinstance(settings, dict | list):
        parts = settings.values() if isinstance(settings, dict) else settings
        return set().union(*(unfilled(part) for part in parts)) if parts else set()
    return {settings[1:]} if isinstance(settings, str) and settings.startswith("$") else set()


def _check_overrides(overrides: dict[str, Any], stages: dict[str, Any]) -> None:
    known = list(dict.fromkeys(name for cls in KINDS.values() for name in kinds_of(cls)))
    for name in overrides:
        kind, _, bare = name.rpartition(".")
        if kind in KINDS:
            right = bare in kinds_of(KINDS[kind])
        else:
            right = bare in known and (not kind or kind in _STAGES | stages.keys())
        if not right:
            raise SettingsError(f"set: unknown setting {name!r}{nearest(bare, known)}")


_STAGES = {"mid", "post", "test"}
