"""A study file: tasks x algorithms x agents x rules of trust, with fixes and seeds as rows of each
run, checked as a whole.

::

    tasks = ["humanoid-stand", "quadruped-walk"]
    algorithms = ["mbpo", "model-free"]        # with a model, and the agent alone
    agents = ["sac"]                    # as --agent; the preset's if left out
    trust = ["none"]                    # as --trust, of the mbpo runs
    fixes = ["none", "scale,target"]    # rows of the mbpo runs
    seeds = 6                           # rows too
    preset = "paper"

    [settings]                          # as --set
    model.width = 400

    [arms.half-fresh]                   # a run of its own for each arm, other keys as above
    settings = { rollout.fresh = true, rollout.real_fraction = 0.5 }

    [resources]                         # of each run
    gpus = 1
"""

import dataclasses
import difflib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dynajax import envs, settings
from dynajax.agents import agent_class
from dynajax.config import Config
from dynajax.config.presets import PRESETS
from dynajax.envs import mjx
from dynajax.trust import trust_rule_class
from dynajax.types import UsageError


class StudyRun(NamedTuple):
    """One run of a study: a folder, and a command."""

    name: str
    config: Config
    flags: tuple[str, ...]  # of experiments/run.py, but for --out


class Resources(NamedTuple):
    """What each run asks of a scheduler."""

    cpus: int = 1
    gpus: float = 0
    hours: float = 24
    memory_gb: float = 0  # 0: not asked for


class Study(NamedTuple):
    """All runs of a study file."""

    name: str
    runs: tuple[StudyRun, ...]
    resources: Resources
    slurm: dict[str, Any]  # further options of sbatch


_STRINGS, _FIELDS = "a list of texts", "a table of fields"
#: Every key with what it takes, and what it is if left out (None: it has to be there).
_KEYS: dict[str, tuple[str, Any]] = {
    "tasks": (_STRINGS, None),
    "algorithms": (_STRINGS, ["mbpo"]),
    "agents": (_STRINGS, [""]),
    "trust": (_STRINGS, ["none"]),
    "fixes": (_STRINGS, ["none"]),
    "seeds": ("a whole number", 1),
    "first_seed": ("a whole number", 0),
    "seeds_per_run": ("a whole number", 0),
    "steps": ("a whole number above 0", 0),  # 0: the preset's
    "preset": ("a text", "quick"),
    "engine": ("a text", "host"),
    "settings": (_FIELDS, {}),
    "vary": (_FIELDS, {}),
    "arms": ("a table", {}),
    "resources": ("a table", {}),
    "slurm": ("a table", {}),
}
#: The key that a flag of `experiments/run.py` is made from.
_FLAGS = {
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


class _Source:
    """The text of a study file, to say where in it a fault is."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text.splitlines()
        self.arm = ""  # that faults are looked for in first
        key = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
        self._lines: dict[str, int] = {}
        table = ""
        for number, line in enumerate(self._text, 1):
            if match := re.match(rf"\s*\[\s*({key}(?:\s*\.\s*{key})*)\s*\]", line):
                table = self._plain(match[1])
                self._lines.setdefault(table, number)
            elif match := re.match(rf"\s*({key}(?:\s*\.\s*{key})*)\s*=", line):
                name = self._plain(match[1])
                self._lines.setdefault(f"{table}.{name}" if table else name, number)

    @staticmethod
    def _plain(key: str) -> str:
        return re.sub(r"""[\s"']""", "", key)

    def fault(self, reason: str, key: str = "", value: str | None = None) -> UsageError:
        """The error for `key`, or for one of its `value`s, with the line where it is."""
        key = self._nearest(f"arms.{self.arm}.{key}", "arms") or self._nearest(key)
        line = self._lines.get(key)
        if line is not None and value is not None:
            ends = min((n for n in self._lines.values() if n > line), default=len(self._text) + 1)
            quoted = (json.dumps(value), f"'{value}'")
            holds = (n for n in range(line, ends) if any(q in self._text[n - 1] for q in quoted))
            line = next(holds, line)
        place = str(self._path) if line is None else f"{self._path}, line {line}"
        return UsageError(f"{place}: {reason}")

    def _nearest(self, key: str, least: str = "") -> str:
        """The innermost key of the text that `key` is in, inside `least`; empty without one."""
        key = self._plain(key)
        while key not in ("", least) and key not in self._lines:
            key = key.rpartition(".")[0]
        return "" if key == least else key

    def of_flag(self, error: UsageError) -> UsageError:
        """A fault of a run's flags, as one of the study's."""
        match = re.match(r"--(\w+)[ =]?([\w.]*)=?([^:]*)", str(error))
        flag, path, value = match.groups() if match else ("", "", "")  # a plug-in's own words
        key = _FLAGS.get(flag, "")
        if key in ("settings", "vary"):
            return self.fault(str(error), f"{key}.{path}")
        if key not in self._lines:
            # A setting may be what a default of the preset does not go with.
            named = (k for k in self._lines if k.removeprefix("settings.") in str(error))
            return self.fault(str(error), next(named, key))
        return self.fault(str(error), key, path + value)


def load(path: Path) -> Study:
    """Reads a study file and checks every run that it makes.

    Raises:
      UsageError: with the file, the line, and the reason.
    """
    try:
        text = path.read_text()
        raw = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: the study cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: a study is a text in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", str(error))
        if place is None:
            raise UsageError(f"{path}: {error}") from None
        raise UsageError(f"{path}, line {place[2]}, column {place[3]}: {place[1]}") from None
    source = _Source(path, text)
    values = _checked(raw, _KEYS, source)
    resources = _resources(values["resources"], source)
    for name, value in values["slurm"].items():
        if not isinstance(value, bool | int | float | str):
            raise source.fault(f"slurm.{name}: an option of sbatch is one value", f"slurm.{name}")
    runs: tuple[StudyRun, ...] = ()
    for source.arm in values["arms"] or [""]:
        of_arm = _arm(raw, values, source) if values["arms"] else values
        named = (
            run._replace(name="-".join(filter(None, [run.name, source.arm])))
            for run in _runs(of_arm, source)
        )
        runs += tuple(named)
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise source.fault(f"two runs would have the name {twice}", "tasks")
    return Study(path.stem, runs, resources, values["slurm"])


def _arm(raw: Mapping[str, Any], values: dict[str, Any], source: _Source) -> dict[str, Any]:
    """The values of all keys in the arm `source.arm`, what it does not name being the study's."""
    name, arm = source.arm, values["arms"][source.arm]
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise source.fault(
            f"arms.{name!r}: an arm's name is part of its folders' names; write it in letters, "
            "digits, -, _ and ., which is not the first",
            f"arms.{name}",
        )
    if not isinstance(arm, Mapping):
        raise source.fault(f"arms.{name} = {arm!r}: it takes a table", f"arms.{name}")
    if "arms" in arm or "resources" in arm or "slurm" in arm:
        raise source.fault(f"arms.{name}: it takes what a run is made of", f"arms.{name}")
    merged = _checked({**raw, **arm, "arms": {}}, _KEYS, source)
    # Another agent, or another rule, has fields of its own.
    others = [f"{group}." for key, group in (("agents", "agent"), ("trust", "trust")) if key in arm]
    for table in ("settings", "vary"):
        inherited = values[table].items()
        kept = {path: v for path, v in inherited if not path.startswith(tuple(others))}
        merged[table] = kept | (merged[table] if table in arm else {})
    return merged


def _checked(
    raw: Mapping[str, Any], keys: Mapping[str, tuple[str, Any]], source: _Source
) -> dict[str, Any]:
    """The values of all `keys`, defaults for what is missing."""
    for key in raw:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1, 0.0)[0]
            raise source.fault(f"{key}: there is no such key; the nearest is {near}", key)
    values = {}
    for key, (kind, default) in keys.items():
        value = raw.get(key, default)
        if value is None:
            raise source.fault(f'{key} is missing, such as {key} = ["cheetah-run"]')
        number = isinstance(value, int) and not isinstance(value, bool)
        good = {
            _STRINGS: isinstance(value, list) and all(isinstance(v, str) for v in value) and value,
            _FIELDS: isinstance(value, dict),
            "a whole number": number and value >= 0,
            "a whole number above 0": number and value > 0,
            "a text": isinstance(value, str),
            "a table": isinstance(value, dict),
        }[kind]
        if key in raw and not good:
            raise source.fault(f"{key} = {value!r}: it takes {kind}", key)
        if kind == _STRINGS and len(set(value)) < len(value):
            twice = next(v for v in value if value.count(v) > 1)
            raise source.fault(f"{key}: {twice} is given twice", key, twice)
        values[key] = _flat(value, key, source) if kind == _FIELDS else value
    return values


def _resources(raw: Mapping[str, Any], source: _Source) -> Resources:
    for key, value in raw.items():
        if key not in Resources._fields:
            known = ", ".join(Resources._fields)
            raise source.fault(
                f"resources.{key}: there is no such key; choose from {known}", f"resources.{key}"
            )
        kind = int if key == "cpus" else (int, float)
        least = "above 0" if key in ("cpus", "hours") else "at least 0"
        if (
            isinstance(value, bool)
            or not isinstance(value, kind)
            or not 0 <= value < math.inf
            or (value == 0 and least == "above 0")
        ):
            name = "a whole number" if key == "cpus" else "a finite number"
            raise source.fault(
                f"resources.{key} = {value!r}: it takes {name} {least}", f"resources.{key}"
            )
    return Resources(**raw)


def _flat(table: Mapping[str, Any], name: str, source: _Source, prefix: str = "") -> dict[str, Any]:
    """{"learn.utd": 10} from {"learn": {"utd": 10}}, for TOML reads a dotted key as tables."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        path = prefix + key
        is_table = isinstance(value, Mapping)
        inner = _flat(value, name, source, f"{path}.") if is_table else {path: value}
        if twice := flat.keys() & inner.keys():
            path = f"{name}.{min(twice)}"
            raise source.fault(f"{path} is given twice", path)
        flat |= inner
    return flat


def _text(value: Any) -> str:
    """A value as a flag has it."""
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _runs(values: dict[str, Any], source: _Source) -> Iterator[StudyRun]:
    for task in values["tasks"]:
        try:
            # A user's module may register fixes, so it is imported before they are read.
            if values["engine"] == "mjx" and task not in mjx.names():
                mjx.make(task)
            elif not task.startswith("brax:"):
                envs.spec(task)
        except UsageError as error:
            raise source.fault(str(error), "tasks", task) from None
    preset = PRESETS.get(values["preset"])  # an unknown one is refused with the first run
    agents = [agent or (preset.agent if preset else "sac") for agent in values["agents"]]
    values = {**values, "agents": agents}
    seeds, each = values["seeds"], values["seeds_per_run"] or max(1, values["seeds"])
    for task, algo, agent in itertools.product(values["tasks"], values["algorithms"], agents):
        # Without a model nothing is synthetic that could be trusted.
        for trust in values["trust"] if algo == "mbpo" else ["none"]:
            kind = [algo, agent] if algo == "mbpo" else [agent]
            kind += [trust] if trust != "none" else []
            for first in range(0, seeds, each) if seeds else (0,):
                name = re.sub("[:/]", ".", "-".join([task, *kind]))
                if each < seeds:
                    name += f"-seed-{values['first_seed'] + first}"
                try:
                    count = min(each, seeds - first)
                    yield _run(name, task, algo, agent, trust, values, first, count)
                except UsageError as error:
                    raise source.of_flag(error) from None


def _others(agent: str, trust: str, values: dict[str, Any]) -> set[str]:
    """Paths of the fields that only other agents, or other rules, of the study have."""

    def paths(group: str, cls: type) -> set[str]:
        return {f"{group}.{field.name}" for field in dataclasses.fields(cls)}

    every: set[str] = set().union(
        *(paths("agent", agent_class(name).Fields) for name in values["agents"]),
        *(paths("trust", trust_rule_class(name).Fields) for name in values["trust"]),
    )
    return (
        every
        - paths("agent", agent_class(agent).Fields)
        - paths("trust", trust_rule_class(trust).Fields)
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
    with_model = algo != "model-free"
    others = _others(agent, trust, values)
    sets = {path: _text(value) for path, value in values["settings"].items() if path not in others}
    # Without a model there is nothing of it that could vary, and nothing to fix.
    vary = {
        path: [_text(v) for v in (column if isinstance(column, list) else [column])]
        for path, column in values["vary"].items()
        if path not in others
        and (with_model or path.split(".")[0] not in ("model", "rollout", "trust"))
    }
    fixes = values["fixes"] if with_model else []
    config = settings.make(
        task,
        algo=algo,
        agent=agent,
        trust=trust,
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
        f"--trust={trust}",
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
