"""Read a study file: tasks x algorithms x agents x trust rules, each with several fixes and seeds.

Each combination is one run, whose learners are the fixes and seeds. The whole file is checked before
anything is started.

::

    tasks = ["humanoid-stand", "quadruped-walk"]
    algorithms = ["mbpo", "model-free"]  # as --algo
    agents = ["sac"]                     # as --agent; by default that of the preset
    trust = ["none"]                     # as --trust; by default that of the algorithm
    fixes = ["none", "scale,target"]     # variants of each run with a model
    seeds = 6                            # of each variant
    preset = "paper"

    [settings]                           # as --set
    model.width = 400

    [arms.half-fresh]                    # each arm is a run; it overrides the keys above
    settings = { rollout.source = "on_the_fly", rollout.real_fraction = 0.5 }

    [resources]                          # of each run
    gpus = 1
"""

import dataclasses
import difflib
import itertools
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dynajax import envs, settings
from dynajax.agents import agent_class
from dynajax.algorithms import ALGORITHMS
from dynajax.config import MODEL_GROUPS, Config
from dynajax.config.presets import PRESETS
from dynajax.envs import mjx
from dynajax.trust import trust_rule_class
from dynajax.types import UsageError


class StudyRun(NamedTuple):
    """One run of a study: a folder and a command."""

    name: str
    config: Config
    flags: tuple[str, ...]  # of experiments/run.py, without --out


class Resources(NamedTuple):
    """The resources that each run requests from a scheduler."""

    cpus: int = 1
    gpus: float = 0
    hours: float = 24
    memory_gb: float = 0  # 0: not requested


class Study(NamedTuple):
    """All runs of a study file."""

    name: str
    runs: tuple[StudyRun, ...]
    resources: Resources
    slurm: dict[str, Any]  # further options of sbatch


def _is_count(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


_STRINGS, _FIELDS = "a list of strings", "a table of fields"
#: What the values of a key can be.
_KINDS: dict[str, Callable[[Any], bool]] = {
    _STRINGS: lambda value: (
        isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
    ),
    _FIELDS: lambda value: isinstance(value, dict),
    "a whole number": lambda value: _is_count(value, 0),
    "a whole number above 0": lambda value: _is_count(value, 1),
    "a string": lambda value: isinstance(value, str),
    "a table": lambda value: isinstance(value, dict),
}
#: Every key with the kind of its value and its default (None: the key is required).
_KEYS: dict[str, tuple[str, Any]] = {
    "tasks": (_STRINGS, None),
    "algorithms": (_STRINGS, ["mbpo"]),
    "agents": (_STRINGS, [""]),
    "trust": (_STRINGS, [""]),
    "fixes": (_STRINGS, [""]),
    "seeds": ("a whole number", 1),
    "first_seed": ("a whole number", 0),
    "seeds_per_run": ("a whole number", 0),  # 0: all
    "steps": ("a whole number above 0", 0),  # 0: those of the preset
    "preset": ("a string", "quick"),
    "engine": ("a string", "host"),
    "settings": (_FIELDS, {}),
    "vary": (_FIELDS, {}),
    "arms": ("a table", {}),
    "resources": ("a table", {}),
    "slurm": ("a table", {}),
}
#: The key that sets each flag of `experiments/run.py`.
_KEY_OF_FLAG = {
    "env": "tasks",
    "algo": "algorithms",
    "agent": "agents",
    "trust": "trust",
    "fix": "fixes",
    "seeds": "seeds",
    "seed": "first_seed",
    "steps": "steps",
    "preset": "preset",
    "engine": "engine",
    "set": "settings",
    "vary": "vary",
}


def load(path: Path) -> Study:
    """Read a study file and check every run of it.

    Raises:
      UsageError: one line with the file, the key and the reason.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: the study cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: a study is a UTF-8 text file") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: {error}") from None
    try:
        return _parse(path.stem, raw)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _parse(name: str, raw: Mapping[str, Any]) -> Study:
    """Return the study called `name` of the content of its file."""
    values = _checked(raw)
    resources = _resources(values["resources"])
    for option, value in values["slurm"].items():
        if not isinstance(value, bool | int | float | str):
            raise UsageError(f"slurm.{option}: an option of sbatch takes one value")
    runs = [] if values["arms"] else list(_runs(values))
    for arm, table in values["arms"].items():
        of_arm = _arm(raw, values, arm)
        try:
            runs_of_arm = [run._replace(name=f"{run.name}-{arm}") for run in _runs(of_arm)]
            _refuse_unused(table, runs_of_arm)
        except UsageError as error:
            raise UsageError(f"arms.{arm}: {error}") from None
        runs += runs_of_arm
    _refuse_unused(raw, runs)
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"tasks: two runs would have the name {twice}")
    # First the first seeds of all arms and tasks, so that a part of the study already compares them.
    runs.sort(key=lambda run: run.config.seed)
    return Study(name, tuple(runs), resources, values["slurm"])


def _arm(raw: Mapping[str, Any], values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the values of all keys in an arm; keys that it does not have are those of the study."""
    arm = values["arms"][name]
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UsageError(
            f"arms.{name!r}: an arm's name is part of a folder's name; write it in letters, "
            "digits, -, _ and ., and do not begin with ."
        )
    if not isinstance(arm, Mapping):
        raise UsageError(f"arms.{name} = {arm!r}: it takes a table")
    for key in ("arms", "resources", "slurm"):
        if key in arm:
            raise UsageError(f"arms.{name}.{key}: it belongs to the study, not to an arm")
    try:
        merged = _checked({**raw, **arm, "arms": {}})
    except UsageError as error:
        raise UsageError(f"arms.{name}: {error}") from None
    # Another agent or trust rule has other fields, so it does not inherit the study's.
    replaced = tuple(f"{g}." for k, g in (("agents", "agent"), ("trust", "trust")) if k in arm)
    for table in ("settings", "vary"):
        kept = {p: value for p, value in values[table].items() if not p.startswith(replaced)}
        merged[table] = kept | (merged[table] if table in arm else {})
    return merged


def _refuse_unused(table: Mapping[str, Any], runs: Sequence[StudyRun]) -> None:
    """Refuse what a study or an arm sets for a model if none of its runs has one.

    Args:
      table: the keys of the study or of the arm alone.
      runs: its runs.
    """
    if any(run.config.has_model for run in runs):
        return
    unused = [
        f"{name}.{path}"
        for name in ("settings", "vary")
        for path in flatten(table.get(name, {}), name)
        if path.split(".")[0] in MODEL_GROUPS
    ]
    unused += [key for key in ("trust", "fixes") if {*table.get(key, ())} - {"", "none"}]
    if unused:
        raise UsageError(
            f"{unused[0]}: no run has a model, so it has no effect; leave it out, or add an "
            'algorithm such as "mbpo"'
        )


def _checked(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all keys, with defaults for those that are missing."""
    for key in raw:
        if key not in _KEYS:
            nearest = difflib.get_close_matches(key, _KEYS, 1, 0.0)[0]
            raise UsageError(f"{key}: there is no such key; the nearest is {nearest}")
    values = {}
    for key, (kind, default) in _KEYS.items():
        value = raw.get(key, default)
        if value is None:
            raise UsageError(f'{key} is missing, such as {key} = ["cheetah-run"]')
        if key in raw and not _KINDS[kind](value):
            raise UsageError(f"{key} = {value!r}: it takes {kind}")
        if kind == _STRINGS and len(set(value)) < len(value):
            twice = next(v for v in value if value.count(v) > 1)
            raise UsageError(f"{key}: {twice} is given twice")
        values[key] = flatten(value, key) if kind == _FIELDS else value
    return values


def _resources(raw: Mapping[str, Any]) -> Resources:
    """Return the checked table of resources."""
    for key, value in raw.items():
        if key not in Resources._fields:
            known = ", ".join(Resources._fields)
            raise UsageError(f"resources.{key}: there is no such key; choose from {known}")
        kind = int if key == "cpus" else (int, float)
        low = "above 0" if key in ("cpus", "hours") else "at least 0"
        if (
            isinstance(value, bool)
            or not isinstance(value, kind)
            or not 0 <= value < math.inf
            or (value == 0 and low == "above 0")
        ):
            number = "a whole number" if key == "cpus" else "a finite number"
            raise UsageError(f"resources.{key} = {value!r}: it takes {number} {low}")
    return Resources(**raw)


def flatten(table: Mapping[str, Any], name: str, prefix: str = "") -> dict[str, Any]:
    """Return {"learn.utd": 10} for {"learn": {"utd": 10}}; TOML reads a dotted key as tables."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        path = prefix + key
        inner = flatten(value, name, f"{path}.") if isinstance(value, Mapping) else {path: value}
        if twice := flat.keys() & inner.keys():
            raise UsageError(f"{name}.{min(twice)} is given twice")
        flat |= inner
    return flat


def _text(value: Any) -> str:
    """Return a value as a flag takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _runs(values: dict[str, Any]) -> Iterator[StudyRun]:
    """Yield the runs of a study without arms, or of an arm."""
    for task in values["tasks"]:
        try:
            # The module of a user's task may register fixes, so import it before they are parsed.
            if values["engine"] == "mjx" and task not in mjx.names():
                mjx.make(task)
            elif not task.startswith("brax:"):
                envs.spec(task)
        except UsageError as error:
            raise UsageError(f"tasks: {error}") from None
    preset = PRESETS.get(values["preset"])  # `settings.make` refuses an unknown one
    agents = [agent or (preset.agent if preset else "sac") for agent in values["agents"]]
    values = {**values, "agents": agents}
    seeds, per_run = values["seeds"], values["seeds_per_run"] or max(1, values["seeds"])
    for task, algo, agent in itertools.product(values["tasks"], values["algorithms"], agents):
        # Without a model there is no synthetic data for a trust rule.
        for trust in values["trust"] if algo != "model-free" else [""]:
            method = [algo, agent] if algo != "model-free" else [agent]
            method += [trust] if trust not in ("", "none") else []
            for first in range(0, seeds, per_run) if seeds else (0,):
                name = re.sub("[:/]", ".", "-".join([task, *method]))
                if per_run < seeds:
                    name += f"-seed-{values['first_seed'] + first}"
                count = min(per_run, seeds - first)
                try:
                    yield _run(name, task, algo, agent, trust, values, first, count)
                except UsageError as error:
                    raise UsageError(_with_key(str(error))) from None


def _with_key(error: str) -> str:
    """Return an error about a flag of `experiments/run.py` with the key of the study before it."""
    match = re.match(r"--(\w+)[ =]?([\w.]*)", error)
    key = _KEY_OF_FLAG.get(match[1]) if match else None
    if match is None or key is None:  # the message of a plug-in may name no flag
        return error
    return f"{key}.{match[2]}: {error}" if key in ("settings", "vary") else f"{key}: {error}"


def _rule(algo: str, trust: str) -> str:
    """Return the name of a trust rule, by default the algorithm's."""
    # `settings.make` refuses an unknown algorithm.
    return trust or (ALGORITHMS[algo].trust if algo in ALGORITHMS else "none")


def _other_fields(algo: str, agent: str, trust: str, values: dict[str, Any]) -> set[str]:
    """Return the paths of fields that only other agents or trust rules of the study have."""

    def paths(group: str, cls: type) -> set[str]:
        return {f"{group}.{field.name}" for field in dataclasses.fields(cls)}

    known: set[str] = set().union(
        *(paths("agent", agent_class(name).Fields) for name in values["agents"]),
        *(
            paths("trust", trust_rule_class(_rule(other, name)).Fields)
            for other, name in itertools.product(values["algorithms"], values["trust"])
        ),
    )
    return (
        known
        - paths("agent", agent_class(agent).Fields)
        - paths("trust", trust_rule_class(_rule(algo, trust)).Fields)
    )


def _run(
    name: str,
    task: str,
    algo: str,
    agent: str,
    trust: str,
    values: dict[str, Any],
    first: int,
    seeds: int,
) -> StudyRun:
    """Return one run, checked.

    Args:
      values: the values of all keys.
      first: number of the first of the run's seeds among the study's.
      seeds: number of the run's seeds.
    """
    with_model = algo != "model-free"
    others = _other_fields(algo, agent, trust, values)

    def applies(path: str) -> bool:
        """Return whether the run has the field: without a model it has none of the model's."""
        of_model = path.split(".")[0] in MODEL_GROUPS
        return path not in others and (with_model or not of_model)

    sets = {path: _text(value) for path, value in values["settings"].items() if applies(path)}
    vary = {
        path: [_text(v) for v in (column if isinstance(column, list) else [column])]
        for path, column in values["vary"].items()
        if applies(path)
    }
    fixes = [fix for fix in values["fixes"] if fix] if with_model else []
    config = settings.make(
        task,
        algo=algo,
        agent=agent,
        trust=trust or None,
        preset=values["preset"],
        engine=values["engine"],
        fixes=fixes,
        vary=vary,
        settings=sets,
        seeds=seeds,
        seed=values["first_seed"] + first,
        steps=values["steps"] or None,
    )
    flags = [
        f"--env={task}",
        f"--algo={algo}",
        f"--agent={agent}",
        *([f"--trust={trust}"] if trust else []),
        f"--preset={config.preset}",
        f"--engine={config.engine}",
        *(f"--fix={fix}" for fix in fixes),
        f"--seeds={seeds}",
        f"--seed={config.seed}",
        f"--steps={config.steps}",
        *(f"--set={path}={value}" for path, value in sets.items()),
        *(f"--vary={path}={','.join(values)}" for path, values in vary.items()),
    ]
    return StudyRun(name, config, tuple(flags))
