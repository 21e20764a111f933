"""Rewrite settings and metrics of older versions to the current names.

    python results/scripts/convert.py results launch/studies experiments/notebooks

Reports and plots read current names only, so the results of an older version pass through this
script once. It converts the files that it is given and those in the folders that it is given:

    config.json, metrics.jsonl, *.csv    of runs, comparisons, diagnoses and benchmarks
    *.toml                               studies (other TOML files stay as they are)
    *.ipynb, *.md                        the sources of cells; commands and settings in the text

The tables of a diagnosis get current file names too. A second run changes nothing. Formatting, the
order of keys, unknown keys and numbers stay as they are. Nothing is written if one of the files is
damaged.
"""

import argparse
import csv
import io
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

#: Settings: old path -> new path. Flags, studies, notebooks and config.json name them.
SETTINGS = {
    "rollout.fresh": "rollout.source",
    "rollout.on_top": "rollout.mixing",
    "rollout.expand": "rollout.value_expansion_steps",
    "rollout.uniform": "rollout.random_action_fraction",
    "model.score_size": "model.max_holdout",
    "model.average_steps": "model.weight_averaging_steps",
    # The group `sac` of the first version was split into settings of every agent and of one.
    "sac.utd": "learn.utd",
    "sac.batch": "learn.batch",
    "sac.discount": "learn.discount",
    "sac.reset_every": "learn.reset_every",
    "sac.reset_at": "learn.reset_at",
    "sac.hidden": "agent.hidden",
    "sac.critic_layer_norm": "agent.critic_layer_norm",
    "sac.learning_rate": "agent.learning_rate",
    "sac.polyak": "agent.polyak",
    "sac.initial_temperature": "agent.initial_temperature",
    "sac.target_entropy": "agent.target_entropy",
}
#: Values: new path -> old value -> new value. The source of a model-free run is "none".
VALUES = {
    "rollout.source": {"true": "on_the_fly", "false": "buffered"},
    "rollout.mixing": {"true": "separate", "false": "mixed"},
    "trust.kind": {"noise": "aleatoric", "spread": "epistemic"},
    "algo": {"sac": "model-free"},
    "trust_name": {"weight": "uncertainty_weight"},
}
#: Fields that older configurations lack, with the values that describe their runs.
MISSING: dict[str, dict[str, Any]] = {
    "": {
        "agent_name": "sac",
        "trust_name": "none",
        "engine": "host",
        "oracle": "none",
        "precision": "float32",
        "trust": None,
    },
    "learn": {"utd": 20, "batch": 256, "reset_every": 0, "reset_at": [], "discount": 0.99},
    "model": {
        "weight_averaging_steps": 1,
        "reward_from": "inputs",
        "epochs": 0.0,
        "network": "mlp",
        "likelihood": "gaussian",
    },
    "rollout": {
        "source": "buffered",
        "mixing": "mixed",
        "value_expansion_steps": 0,
        "random_action_fraction": 0.0,
        "state_noise": 1.0,
        "reward_noise": 1.0,
        "start_window": 0,
    },
    "task": {"repeat": 1},
}
#: The presets that set the method as well as sizes, and what they set.
METHOD_PRESETS = ("quick", "modern")
METHOD = {
    "rollout.source": "on_the_fly",
    "rollout.real_fraction": 0.5,
    "model.reward_from": "next_state",
}
#: The values of the same settings where neither a preset nor a flag sets them.
PUBLISHED = {
    "rollout.source": "buffered",
    "rollout.real_fraction": 0.05,
    "model.reward_from": "inputs",
}
#: The transitions that a diagnosis of a run measures the model on.
_MEASURED = "(replay|policy|counterfactual)"
#: Metrics by the kind of their line in metrics.jsonl: old name -> new name.
METRICS = {
    "learn": {r"kept_(\d+)": r"accepted_fraction_\1", "synthetic_valid": "valid_fraction"},
    "fit": {
        "score": "holdout_mse",
        "inside_80": "coverage_80",
        "spread": "epistemic_std",
        "noise": "aleatoric_std",
        "r2_channels": "r2_state_dims",
        "scale_ratio": "target_variance_ratio",
    },
    "diagnosis": {
        "repeated": "resimulated",
        "not_repeated": "not_reproduced",
        rf"{_MEASURED}_reward_noise": r"\1_reward_aleatoric_std",
        rf"{_MEASURED}_state_skill": r"\1_state_r2",
        rf"{_MEASURED}_inside_80": r"\1_coverage_80",
        "synthetic_state_skill": "synthetic_state_r2",
    },
}
#: Columns of CSV files: old name -> new name; those of a metric have the metric's name too.
COLUMNS = {
    **METRICS["learn"],
    **METRICS["fit"],
    **METRICS["diagnosis"],
    "rows": "learners",
    "sac_100": "model_free_100",
    r"improves(_low|_high)?": r"probability_of_improvement\1",
    r"efficiency(_low|_high)?": r"sample_efficiency\1",
}
#: The tables of a diagnosis: old file name -> new file name, columns. Some columns have two old
#: names, because an earlier version of this script renamed them otherwise.
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "codes.csv": (
        "fixes.csv",
        {
            "code": "fix",
            r"(new_)?state_skill(_worst5)?": r"\1state_r2\2",
            "reward_noise": "reward_aleatoric_std",
            r"(reward_|new_)?inside_(50|80|95)": r"\1coverage_\2",
            r"open_(?:skill|r2)_(\d+)": r"open_loop_state_r2_\1",
            r"open_reward_r2_(\d+)": r"open_loop_reward_r2_\1",
            "open_(?:spread|epistemic_std)": "open_loop_epistemic_std",
        },
    ),
    "channels.csv": (
        "dims.csv",
        {
            "channel|dimension": "dim",
            r"skill (\S+)": r"r2 \1",  # of a set of fixes, as "skill scale,target"
            r"noise (\S+)": r"aleatoric_std \1",
            r"spread (\S+)": r"epistemic_std \1",
        },
    ),
    "chains.csv": (
        "open_loop.csv",
        {"code": "fix", "skill|r2": "state_r2", "spread": "epistemic_std"},
    ),
    "run-channels.csv": (
        "run-dims.csv",
        {
            "channel|dimension": "dim",
            "skill": "r2",
            "noise": "aleatoric_std",
            "spread": "epistemic_std",
        },
    ),
}
#: Text of the Markdown table of a comparison: old -> new.
COMPARISON = {
    "SAC = 100": "model-free = 100",
    "beats it with P": "P(improvement)",
    "no SAC run, so raw": "there is no run of SAC (model-free), so raw",
    "SAC's return is not positive": "the return of SAC (model-free) is not positive",
    "the largest that all runs have": "the largest number that all runs have",
    "One seed has no interval.": "A single seed has no interval.",
    "With fewer than 5 seeds bootstrap intervals come out too narrow.": "With fewer than 5 seeds, "
    "bootstrap intervals are too narrow.",
    '"It" is the same agent without a model. P: probability that a seed has the higher final '
    "return. Sample efficiency: frames in which it first comes to its last mean return, over those "
    "in which this method does; 0 where this one does not.": "The baseline of a method is the same "
    "agent, model-free. P(improvement): probability that a seed of the method has a higher final "
    "return than a seed of the baseline. Sample efficiency: frames in which the baseline first "
    "reaches its last mean return, divided by the frames in which the method reaches it; 0 if it "
    "never does.",
}
#: Display names of agents in the labels of comparisons.
AGENTS = {"sac": "SAC", "simba": "SimBa", "bro": "BRO"}
#: Names in the tables over many diagnoses, in their headers and in their first column.
PROPERTIES = {
    "state skill, published targets": "state R², published targets",
    "state skill, best code": "state R², best fix",
    "reward R², best code": "reward R², best fix",
    "reward noise, published targets": "reward aleatoric std, published targets",
    "skill after 20 steps, published targets": "state R² after 20 steps, published targets",
    "inside 80 %, new episodes, published": "coverage at 80 %, new episodes, published",
    "share of direct channels": "share of direct dimensions",
}


class ConversionError(Exception):
    """A file that cannot be converted; the text names it."""


def renamed(name: str, table: Mapping[str, str]) -> str:
    """Return the new name of a metric or column by a table of patterns."""
    for old, new in table.items():
        if match := re.fullmatch(old, name):
            return match.expand(new)
    return name


def new_value(path: str, value: Any) -> Any:
    """Return the current value of the setting `path` (its new name)."""
    old = str(value).lower() if isinstance(value, bool) else value
    return VALUES.get(path, {}).get(old, value) if isinstance(old, str) else value


# Settings in text: flags, studies and notebooks.

_PATHS = "|".join(re.escape(path) for path in [*SETTINGS, *(p for p in VALUES if "." in p)])
_SETTING = re.compile(
    rf"(?<![\w./-])(?P<path>{_PATHS})(?!\w)"
    r"((?P<sep>[\"']?\s*[=:]\s*)(?P<value>\"[^\"\n]*\"|'[^'\n]*'|\w+)?)?"
)
_ALGO = re.compile(r"""(--algo[= ]|\balgo\s*=\s*["'])sac\b""")
_TRUST = re.compile(r"""(--trust[= ]|\btrust\s*=\s*["'])weight\b""")


def convert_text(text: str) -> str:
    """Return a text with current names of the settings and flags in it."""

    def setting(match: re.Match[str]) -> str:
        # Flags have bare values; Python and TOML, which write spaces or quotes, have strings.
        return _renamed_setting(match, quoted='"' in match[0] or match["sep"] != "=")

    text = _SETTING.sub(setting, text)
    text = _ALGO.sub(r"\1model-free", text)
    return _TRUST.sub(r"\1uncertainty_weight", text)


def _renamed_setting(match: re.Match[str], quoted: bool) -> str:
    """Return a match of `_SETTING` with current names; a new value is quoted where asked for."""
    path = SETTINGS.get(match["path"], match["path"])
    sep, value = match["sep"] or "", match["value"] or ""
    old = value.strip("\"'")
    new = new_value(path, old.lower() if old in ("True", "False") else old)
    if new in (old, old.lower()):
        return path + sep + value
    return path + sep + (f'"{new}"' if quoted else new)


def with_settings(command: str, settings: Mapping[str, Any]) -> str:
    """Return a command that names each of `settings`, unless it sets it already."""
    missing = [
        f" --set={path}={value}"
        for path, value in settings.items()
        if not re.search(rf"--set[= ]{re.escape(path)}=", command)
    ]
    return command + "".join(missing)


# config.json


def convert_config(text: str) -> str:
    """Return the text of a run's config.json with current names and all groups."""
    info = json.loads(text)
    if not isinstance(info, dict) or not isinstance(info.get("config"), dict):
        raise ValueError("it has no configuration of a run")
    old = info["config"]
    config = _renamed_config(old)
    explicit: dict[str, Any] = {}
    if "source" not in old:
        _add_missing(config)
    if "source" not in {*old, *(old.get("rollout") or {})} and config.get("algo") == "mbpo":
        # The commands relied on the preset; the configuration has the values of that time.
        values = {path: _get(config, path) for path in METHOD}
        explicit = {path: v for path, v in values.items() if v != PUBLISHED[path]}
    new = {"dims" if name == "channels" else name: value for name, value in info.items()}
    new["config"] = config
    if "command" in new:
        new["command"] = with_settings(convert_text(new["command"]), explicit)
    if "commands" in new:
        new["commands"] = [with_settings(convert_text(c), explicit) for c in new["commands"]]
    return _json(new, text) if new != info else text


def _renamed_config(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with current names and values."""
    new: dict[str, Any] = {}
    for name, value in old.items():
        if name == "variants":
            new[name] = [convert_text(variant) for variant in value]
        elif not isinstance(value, dict):
            new[name] = new_value(name, value)
        else:
            groups = ("learn", "agent") if name == "sac" else (name,)
            for group in groups:
                new.setdefault(group, {})
            for key, inner in value.items():
                path = SETTINGS.get(f"{name}.{key}", f"{groups[-1]}.{key}")
                group, _, field = path.partition(".")
                new[group][field] = new_value(path, inner)
    return new


def _add_missing(config: dict[str, Any]) -> None:
    """Add the fields that a configuration of an older version lacks."""
    for group, fields in MISSING.items():
        there = config.setdefault(group, {}) if group else config
        for name, value in fields.items() if there is not None else ():
            there.setdefault(name, value)
    rollout = config["rollout"]
    if rollout is not None:
        if config.get("algo") == "model-free":
            rollout["source"] = "none"
        # An earlier version of this script wrote it into the wrong group.
        rollout.pop("regenerate_every", None)
    buffered = rollout is not None and rollout["source"] == "buffered"
    config["source"] = {"regenerate_every": 0} if buffered else {}


def _get(config: Mapping[str, Any], path: str) -> Any:
    group, _, name = path.partition(".")
    return (config.get(group) or {}).get(name, PUBLISHED[path])


def _json(value: Any, like: str) -> str:
    """Return JSON text with the indentation, escapes and last line end of another."""
    indent = re.match(r"\s*[{\[]\s*\n( *)", like)
    text = json.dumps(value, indent=len(indent[1]) if indent else None, ensure_ascii=like.isascii())
    return text + like[len(like.rstrip()) :]


# Metrics and tables


def convert_metrics(text: str) -> str:
    """Return the text of a metrics.jsonl with current names of metrics."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            kind = json.loads(line)["kind"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines) - 1:  # a run that was killed leaves a part of a line
                continue
            raise ValueError(f"line {number + 1} is not a JSON object with a kind") from None
        lines[number] = _metric_names(line, METRICS.get(kind, {}))
    return "\n".join(lines)


def _metric_names(line: str, table: Mapping[str, str]) -> str:
    line = re.sub(r'"(\w+)"(?=\s*:)', lambda m: f'"{renamed(m[1], table)}"', line)
    # Variants are named by values of settings, as "none;agent.polyak=0.1".
    return re.sub(r'("variant"\s*:\s*)("[^"]*")', lambda m: m[1] + convert_text(m[2]), line)


def convert_csv(text: str, columns: Mapping[str, str] = COLUMNS) -> str:
    """Return the text of a CSV file with current names of columns, variants and methods."""
    header, end, body = text.partition("\n")
    returned = header.endswith("\r")
    names = next(csv.reader([header.rstrip("\r")], strict=True), [])
    new = [renamed(PROPERTIES.get(name, name), columns) for name in names]
    if "property" in names:
        body = _properties(body)
    if "variant" in names:
        body = convert_text(body)
        if {"final_iqm", "iqm"} & set(names):  # a comparison, whose variants are labels
            body = _label_cells(body, names.index("variant"))
    if new != names:
        header = _csv_line(new, "\r" * returned)
    return header + end + body


def _csv_line(cells: Sequence[str], end: str) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator=end).writerow(cells)
    return out.getvalue()


def _label_cells(text: str, column: int) -> str:
    """Return lines of a CSV file with current labels in a column."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        cells = next(csv.reader([line.rstrip("\r\n")], strict=True), [])
        if cells and (label := new_label(cells[column])) != cells[column]:
            cells[column] = label
            lines[number] = _csv_line(cells, line[len(line.rstrip("\r\n")) :])
    return "".join(lines)


def new_label(label: str) -> str:
    """Return the current name of a method in comparisons, as "SAC (model-free)"."""
    label = re.sub(r"\btrust=weight\b", "trust=uncertainty_weight", label)
    agent, _, rest = label.partition(" ")
    if agent == "MBPO":
        agent, space, rest = rest.partition(" ")
        return f"MBPO {AGENTS.get(agent, agent)}{space}{rest}".rstrip()
    if rest.startswith("(model-free") or agent == "dynajax":
        return label
    agent = AGENTS.get(agent, agent)
    if rest.startswith("("):  # what distinguishes two curves of a method
        return f"{agent} (model-free, {rest[1:]}"
    return f"{agent} (model-free) {rest}".rstrip()


def _properties(text: str) -> str:
    for old, new in PROPERTIES.items():
        text = text.replace(old, new)
    return text


# Studies


def convert_study(text: str) -> str:
    """Return the text of a study file; a TOML file that is no study stays as it is."""
    if "tasks" not in tomllib.loads(text):
        return text
    new = _SETTING.sub(lambda match: _renamed_setting(match, quoted=True), text)
    for key, values in (("algorithms", VALUES["algo"]), ("trust", VALUES["trust_name"])):
        new = re.sub(rf"(?<![\w.])({key}\s*=\s*)(\[[^\]]*\])", _listed(values), new)
    study = tomllib.loads(new)
    if left := sorted(set(_flat(study)) & set(SETTINGS)):
        raise ValueError(f"write {left[0]} as one dotted key")
    if new == text:
        return text  # nothing in it is old, so its presets are sizes only
    arms = study.get("arms", {})
    for arm in arms or [""]:
        merged = {**study, **arms.get(arm, {})}
        own = arms[arm].get("settings", {}) if arm else {}
        known = {*_paths(study.get("settings", {})), *_paths(own)}
        uses_preset = merged.get("preset", "quick") in METHOD_PRESETS
        if uses_preset and "mbpo" in merged.get("algorithms", ["mbpo"]):
            missing = {path: value for path, value in METHOD.items() if path not in known}
            new = _add_settings(new, arm, missing)
    tomllib.loads(new)
    return new


def _listed(values: Mapping[str, str]) -> Callable[[re.Match[str]], str]:
    def replace(match: re.Match[str]) -> str:
        names = re.sub(r'"([^"]*)"', lambda m: f'"{values.get(m[1], m[1])}"', match[2])
        return match[1] + names

    return replace


def _paths(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of all values of nested tables."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _flat(study: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paths of all settings of a study and of its arms."""
    for table in (study, *study.get("arms", {}).values()):
        for name in ("settings", "vary"):
            yield from _paths(table.get(name, {}))


def _add_settings(text: str, arm: str, settings: Mapping[str, Any]) -> str:
    """Return a study's text with further settings of an arm, or of all runs (`arm` is "")."""
    if not settings:
        return text
    pairs = [f"{path} = {json.dumps(value)}" for path, value in settings.items()]
    lines = text.split("\n")
    table = f"arms.{arm}.settings" if arm else "settings"
    if (place := _header(lines, table)) is not None:
        lines[place + 1 : place + 1] = pairs
        return "\n".join(lines)
    place = _header(lines, f"arms.{arm}") if arm else -1
    if place is None:
        raise ValueError(f"the arm {arm} has no separate line [arms.{arm}]")
    end = place + 1
    while end < len(lines) and not lines[end].lstrip().startswith("["):
        if re.match(r"\s*settings\s*=\s*\{", lines[end]):
            before, _, after = lines[end].rpartition("}")
            comma = "" if before.rstrip().endswith("{") else ","
            lines[end] = f"{before.rstrip()}{comma} {', '.join(pairs)} }}{after}"
            return "\n".join(lines)
        end += 1
    while end > place + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1
    lines.insert(end, f"settings = {{ {', '.join(pairs)} }}")
    return "\n".join(lines)


def _header(lines: Sequence[str], table: str) -> int | None:
    """Return the number of the line that opens a TOML table, or None."""
    pattern = re.compile(rf"\s*\[\s*{re.escape(table)}\s*\]")
    return next((n for n, line in enumerate(lines) if pattern.match(line)), None)


# Notebooks and pages


def convert_notebook(text: str) -> str:
    """Return the text of a notebook whose cells use current names; outputs stay as they are."""
    notebook = json.loads(text)
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise ValueError("it has no cells")
    cells = notebook["cells"]
    old = [cell["source"] for cell in cells]
    for cell in cells:
        source = cell["source"]
        lines = [source] if isinstance(source, str) else source
        lines = [convert_text(line) for line in lines]
        cell["source"] = lines[0] if isinstance(source, str) else lines
    return _json(notebook, text) if [cell["source"] for cell in cells] != old else text


_COMMAND = re.compile(
    r"(?m)^.*(?:experiments/(?:run|ahead)\.py|dynajax (?:train|ahead)) .*[^\\\s]$"
)


_COMPARISON = re.compile(r"^\| task +\| variant +\|.*\n\|[-:|]+\|\n(?:\|.*\n)+", re.MULTILINE)


def convert_page(text: str) -> str:
    """Return the text of a Markdown page with current names in its commands and tables."""
    new = convert_text(_properties(text))
    if _COMPARISON.search(new):
        for old, now in COMPARISON.items():
            new = new.replace(old, now)
        new = _COMPARISON.sub(lambda match: _aligned(match[0]), new)
    return _COMMAND.sub(_explicit, new) if new != text else text


def _aligned(table: str) -> str:
    """Return the table of a comparison with current labels and aligned columns."""
    header, rule, *lines = [
        [cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()
    ]
    rows = [header, *([task, new_label(label), *cells] for task, label, *cells in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [cell.endswith(":") for cell in rule]
    text = [
        " | ".join(
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(row, widths, right, strict=True)
        )
        for row in rows
    ]
    dashes = [
        "-" * (width + 1) + (":" if at_right else "-")
        for width, at_right in zip(widths, right, strict=True)
    ]
    first, *others = (f"| {line} |\n" for line in text)
    return "".join([first, f"|{'|'.join(dashes)}|\n", *others])


def _explicit(match: re.Match[str]) -> str:
    """Name the method in a command that relied on a preset for it.

    A command with shell variables may set it in one of them, so it stays as it is.
    """
    command = match[0]
    preset = re.search(r"--preset[= ](\w+)", command)
    algo = re.search(r"--algo[= ]([\w-]+)", command)
    relied = (preset[1] if preset else "quick") in METHOD_PRESETS
    if "$" in command or "`" in command or not relied or (algo and algo[1] != "mbpo"):
        return command
    return with_settings(command, METHOD)


# Files

#: How a file is converted, by its name.
KINDS: dict[str, Callable[[str], str]] = {
    "config.json": convert_config,
    "metrics.jsonl": convert_metrics,
    **{name: partial(convert_csv, columns=columns) for name, (_, columns) in TABLES.items()},
    "*.csv": convert_csv,
    "*.toml": convert_study,
    "*.ipynb": convert_notebook,
    "*.md": convert_page,
}


def converter(path: Path) -> Callable[[str], str] | None:
    """Return the function that converts a file, or None for a file that has no settings."""
    return next((convert for name, convert in KINDS.items() if path.match(name)), None)


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files to convert: those named, and those in folders that are not hidden.

    Raises:
      ConversionError: a path does not exist, or a named file is of no known kind.
    """
    for path in paths:
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.is_file() and converter(p))
            yield from (
                p for p in inside if not any(s.startswith(".") for s in p.relative_to(path).parts)
            )
        elif not path.is_file():
            raise ConversionError(f"{path}: there is no such file or folder")
        elif converter(path) is None:
            raise ConversionError(f"{path}: its name must be one of {', '.join(KINDS)}")
        else:
            yield path


def convert(path: Path) -> tuple[str, str]:
    """Return a file's text before and after the conversion.

    Raises:
      ConversionError: the file is damaged.
    """
    function = converter(path)
    assert function is not None
    try:
        text = path.read_bytes().decode()
        return text, function(text)
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"{path}: it cannot be converted ({reason})") from None


def new_path(path: Path, text: str) -> Path:
    """Return the path of a file whose converted text is given.

    Raises:
      ConversionError: there is another file of that name.
    """
    if path.name not in TABLES:
        return path
    names = next(csv.reader(text.splitlines()[:1]), [])
    if not {"fix", "dim"} & set(names):
        return path  # not the table of a diagnosis
    new = path.with_name(TABLES[path.name][0])
    if new.exists():
        raise ConversionError(f"{path}: its new name {new.name} is taken; remove one of the files")
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """Convert the files named on the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a file or folder")
    arguments = parser.parse_args(argv)
    try:
        texts = {path: convert(path) for path in files(arguments.paths)}
        paths = {path: new_path(path, new) for path, (_, new) in texts.items()}
    except ConversionError as error:
        print(error, file=sys.stderr)
        return 2
    changed = {p: new for p, (old, new) in texts.items() if new != old or paths[p] != p}
    for path, new in changed.items():
        # A rename is atomic: after an interruption every file is either old or converted, and a
        # converted one that still has its old name gets its new name from the next run.
        other = path.with_name(f".{path.name}.new")
        other.write_bytes(new.encode())
        os.replace(other, path)
        if paths[path] != path:
            os.rename(path, paths[path])
    print(f"{len(changed)} of {len(texts)} files converted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
