"""Read the arguments of `make_config` from a run's config.json or a TOML file.

A TOML file has the names of the flags of `dynajax train`, and a table for --vary and one for --set:

  env = "cheetah-run"
  fix = ["none", "scale,target"]
  seeds = 5

  [settings]
  learn.utd = 4
"""

import json
import operator
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynajax import envs, settings
from dynajax.config import GROUPS, MODEL_GROUPS, parse_variant
from dynajax.launch.study import flatten
from dynajax.runs.directory import reading_config
from dynajax.types import UsageError

#: Flags of one value that a file may have, and the argument of `make_config` that each sets.
VALUES = ("env", "algo", "agent", "trust", "preset", "seeds", "seed", "steps", "engine", "oracle")
#: The other names of a TOML file.
_OTHERS = ("fix", "vary", "settings")


def read(path: Path) -> dict[str, Any]:
    """Return the arguments of `make_config` that a file has.

    Args:
      path: a TOML file, a run's config.json, or a run directory.

    Raises:
      UsageError: the file cannot be read, or it has a name that is not known.
    """
    if path.is_dir():
        path = path / "config.json"
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"--config={path}: the file cannot be read ({reason})") from None
    if path.suffix == ".json":
        with reading_config(path.parent, f"--config={path}"):
            return from_config(json.loads(text)["config"])
    return _from_toml(path, text)


def _from_toml(path: Path, text: str) -> dict[str, Any]:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"--config={path}: neither a TOML file nor a run's config.json ({error})"
        ) from None
    for name in content:
        if name not in (*VALUES, *_OTHERS):
            raise UsageError(
                f"--config={path}: {name} is not known; a file may have "
                f"{', '.join((*VALUES, *_OTHERS))}"
            )
    for name in ("vary", "settings"):
        if not isinstance(content.get(name, {}), dict):
            raise UsageError(f"--config={path}: {name} must be a table of fields and values")
    fixes = content.get("fix", [])
    fixes = [fixes] if isinstance(fixes, str) else fixes
    if not isinstance(fixes, list) or not all(isinstance(fix, str) for fix in fixes):
        raise UsageError(f'--config={path}: fix must be text, such as "scale,target", or a list')
    return {
        **{name: content[name] for name in VALUES if name in content},
        "fixes": fixes,
        "vary": flatten(content.get("vary", {}), "vary"),
        "settings": flatten(content.get("settings", {}), "settings"),
    }


def without_model(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `make_config` without those that have no effect without a model."""
    kept = {n: value for n, value in arguments.items() if n not in ("trust", "fixes", "oracle")}
    for name in ("vary", "settings"):
        fields = arguments[name].items()
        kept[name] = {p: value for p, value in fields if p.split(".")[0] not in MODEL_GROUPS}
    return kept


def from_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `make_config` that make a configuration again, with few settings.

    Only what differs from the defaults of the algorithm, agent and preset is an argument, so that
    another algorithm, agent or preset can be chosen in their place.

    Args:
      plain: a configuration, from `config.as_dict`.

    Raises:
      UsageError: a field is unknown.
    """
    # The module of a user's task may register fixes, so import it before they are parsed.
    envs.check_name(plain["env"])
    arguments: dict[str, Any] = {
        name: plain[f"{name}_name" if name in ("agent", "trust") else name] for name in VALUES
    }
    arguments["fixes"] = list(dict.fromkeys(v.partition(";")[0] for v in plain["variants"]))
    default = settings.make(plain["env"], algo=plain["algo"], preset=plain["preset"])
    defaults = {
        "agent": default.agent_name,
        "trust": default.trust_name,
        "steps": default.steps,
        "fixes": [v.name for v in default.variants],
    }
    arguments = {name: v for name, v in arguments.items() if v != defaults.get(name)}
    wanted = {f"{g}.{name}": v for g in GROUPS for name, v in (plain.get(g) or {}).items()}
    chosen: dict[str, Any] = {}
    while True:
        config = settings.make(**arguments, settings=chosen)
        known = settings.all_settings(config)
        wanted |= {path: plain[path] for path in known if path in plain}
        values = {path: operator.attrgetter(path)(config) for path in known if path in wanted}
        different = {path: wanted[path] for path, v in values.items() if _plain(v) != wanted[path]}
        if not different:
            break
        if different.keys() <= chosen.keys():
            path, value = next(iter(different.items()))
            raise UsageError(
                f"--config: the configuration has {path}={json.dumps(value)}, which a run has as "
                f"{json.dumps(_plain(values[path]))}; write it so in the file"
            )
        chosen |= different
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise UsageError(
            f"--config: the configuration has the field {unknown[0]}, which this version does not "
            'know; remove it, or use the commit that config.json names under "git_commits"'
        )
    varied: dict[str, list[Any]] = {}
    for variant in plain["variants"]:
        for path, value in parse_variant(variant):
            column = varied.setdefault(path, [])
            column += [value] * (value not in column)
    # What has settings of its own stays, because another one would not know them.
    paths = [*chosen, *varied]
    for name in ("agent", "trust"):
        if any(path.startswith(f"{name}.") for path in paths):
            arguments[name] = plain[f"{name}_name"]
    if any(path.startswith("source.") for path in paths):
        chosen["rollout.source"] = plain["rollout"]["source"]
    return arguments | {"vary": varied, "settings": chosen}


def _plain(value: Any) -> Any:
    """Return a field's value as JSON reads it back."""
    return list(value) if isinstance(value, tuple) else value
