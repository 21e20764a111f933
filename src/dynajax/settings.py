"""From what a user types to a checked `Config`, or one line that says what to type instead."""

import dataclasses
import difflib
import itertools
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

from dynajax import sizes
from dynajax.agents import agent_class
from dynajax.config import GROUPS, Config, Variant, assign, parse_variant, variant_config
from dynajax.config.presets import PRESETS
from dynajax.models import targets
from dynajax.trust import trust_rule_class
from dynajax.types import UsageError

#: Set by a flag of their own, and so not by `--set`.
_OWN_FLAG = {
    "env": "env",
    "algo": "algo",
    "agent_name": "agent",
    "trust_name": "trust",
    "preset": "preset",
    "engine": "engine",
    "oracle": "oracle",
    "variants": "fix",
    "seed": "seed",
    "seeds": "seeds",
    "steps": "steps",
}
#: A whole number beyond these is no size of anything.
_MOST = 2**31 - 1
#: What the group `sac` of older versions had for every agent.
_MOVED = ("utd", "batch", "discount", "reset_every")


class Setting(NamedTuple):
    """One field that `--set` can reach."""

    path: str
    kind: Any  # its annotation
    low: float
    high: float
    traced: bool
    empty: bool  # whether it may be an empty tuple
    about: str  # what it is

    @property
    def values(self) -> str:
        """What it takes, in words."""
        if typing.get_origin(self.kind) is Literal:
            return " or ".join(typing.get_args(self.kind))
        if self.kind is bool:
            return "true or false"
        limits = [
            f"{word} {bound:g}"
            for word, bound in (("from", self.low), ("to", self.high))
            if not math.isinf(bound)
        ]
        several = "whole numbers" if typing.get_origin(self.kind) is tuple else "a number"
        return " ".join(["a whole number" if self.kind is int else several, *limits])


def _fields(cls: type, prefix: str) -> list[Setting]:
    kinds = typing.get_type_hints(cls)
    settings = []
    for f in dataclasses.fields(cls):
        if "range" in f.metadata:
            low, high = f.metadata["range"]
            traced = bool(f.metadata.get("traced"))
            empty = f.default == ()
            about = f.metadata.get("about", "")
            settings.append(
                Setting(prefix + f.name, kinds[f.name], low, high, traced, empty, about)
            )
    return settings


def base(agent: str = "sac", trust: str = "none") -> Config:
    """The configuration of an agent and a rule of trust, all else as the preset `paper` has it.

    Raises:
      UsageError: there is no such agent or rule.
    """
    return Config(
        agent_name=agent,
        agent=agent_class(agent).Fields(),
        trust_name=trust,
        trust=trust_rule_class(trust).Fields(),
    )


def all_settings(config: Config) -> dict[str, Setting]:
    """Every field of a configuration that `--set` can reach, by path."""
    settings = [s for s in _fields(Config, "") if s.path not in _OWN_FLAG]
    for group in GROUPS:
        settings += _fields(type(getattr(config, group)), group + ".")
    return {s.path: s for s in settings}


def _lookup(flag: str, path: str, config: Config) -> Setting:
    known = all_settings(config)
    if path in known:
        return known[path]
    group, _, name = path.rpartition(".")
    own = _OWN_FLAG.get(path, path)
    if own in _OWN_FLAG.values():
        raise UsageError(f"{flag} {path}: it has a flag of its own, --{own}")
    if group == "sac":
        raise UsageError(
            f"{flag} {path}: it is {'learn' if name in _MOVED else 'agent'}.{name} now"
        )
    near = difflib.get_close_matches(path, known, 1, 0.3) or difflib.get_close_matches(
        name, [p.rsplit(".", 1)[-1] for p in known], 1, 0.0
    )
    full = next(p for p in known if near and (p == near[0] or p.rsplit(".", 1)[-1] == near[0]))
    of = {
        "agent": f" with --agent={config.agent_name}",
        "trust": f" with --trust={config.trust_name}",
    }
    raise UsageError(
        f"{flag}={path}: there is no such field{of.get(group, '')}; the nearest is {full}"
    )


def parse(flag: str, path: str, value: Any, config: Config) -> Any:
    """The value of one of the configuration's fields from its text (or from Python), checked.

    Raises:
      UsageError: unknown field, wrong type, or outside the field's range.
    """
    setting = _lookup(flag, path, config)
    kind, text = setting.kind, value if isinstance(value, str) else None
    wrong = f"{flag} {path}={value}: "
    try:
        if typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            if value not in choices:
                raise UsageError(wrong + f"choose one of {', '.join(choices)}")
            return value
        if typing.get_origin(kind) is tuple:
            parts = value.replace("(", "").replace(")", "").split(",") if text else value
            parts = parts if isinstance(parts, Iterable) else (parts,)
            parsed: Any = tuple(_integer(p) for p in parts if p != "")
            numbers = parsed
        elif kind is bool:
            names = {"true": True, "1": True, "false": False, "0": False}
            return names[str(value).lower()]
        else:
            parsed = _integer(value) if kind is int else float(value)
            numbers = (parsed,)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        name = {bool: "true or false", int: "a whole number", float: "a number"}.get(
            kind, "whole numbers with commas between"
        )
        raise UsageError(wrong + f"it takes {name}") from None
    if kind is not float and any(abs(n) > _MOST for n in numbers):
        raise UsageError(wrong + f"it must be at most {_MOST}")
    if not (numbers or setting.empty) or not all(
        math.isfinite(n) and setting.low <= n <= setting.high for n in numbers
    ):
        low, high = (
            "" if math.isinf(b) else f"{word} {b:g}"
            for word, b in (("at least", setting.low), ("at most", setting.high))
        )
        raise UsageError(
            wrong + "it must be " + (" and ".join(filter(None, [low, high])) or "finite")
        )
    return parsed


def _integer(value: Any) -> int:
    number = float(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def make(
    env: str,
    *,
    algo: str = "mbpo",
    agent: str | None = None,
    trust: str = "none",
    preset: str = "quick",
    fixes: Sequence[str] = ("",),
    vary: Mapping[str, Iterable[float | str]] = types.MappingProxyType({}),
    settings: Mapping[str, Any] = types.MappingProxyType({}),
    seeds: int = 1,
    seed: int = 0,
    steps: int | None = None,
    engine: str = "host",
    oracle: str = "none",
) -> Config:
    """A checked configuration.

    Args:
      env: a task, see `envs`.
      algo: "mbpo", or "model-free" for the agent without a model.
      agent: a name in `agents.AGENTS`, or "module:name"; the preset's if not given.
      trust: a name in `models.trust.TRUST`, or "module:name".
      preset: a name in `presets.PRESETS`.
      fixes: for each variant a comma list of names in `targets.FIXES`; "" or "none" is MBPO as
        published.
      vary: values for traced fields; all combinations, times the fixes, are the variants.
      settings: other values for fields, by path ("learn.utd").
      seeds: rows of each variant, numbered from `seed`.
      steps: environment steps of each row; the preset's if not given.
      engine: "host", or "mjx" for environments on the device.
      oracle: "reward", "state" or "both": which half of a synthetic transition is the simulator's.

    Raises:
      UsageError: with one line that names the argument, its value and what would be right.
    """
    for flag, value, choices in (
        ("preset", preset, tuple(PRESETS)),
        ("algo", algo, ("mbpo", "model-free")),
        ("engine", engine, ("host", "mjx")),
        ("oracle", oracle, ("none", "reward", "state", "both")),
    ):
        if value not in choices:
            raise UsageError(f"--{flag}={value}: choose one of {', '.join(choices)}")
    of_preset = PRESETS[preset]
    agent = of_preset.agent if agent is None else agent
    config = base(agent, trust)
    for path, value in of_preset.settings.items():
        config = assign(config, path, value)
    for name, value in of_preset.agents.get(agent, {}).items():
        config = assign(config, f"agent.{name}", value)
    config = dataclasses.replace(
        config,
        env=env,
        algo=cast(Any, algo),
        preset=preset,
        engine=cast(Any, engine),
        oracle=cast(Any, oracle),
        seeds=seeds,
        seed=seed,
        steps=config.steps if steps is None else steps,
        variants=_variants(config, algo, fixes, vary),
    )
    for path, value in settings.items():
        config = assign(config, path, parse("--set", path, value, config))
    config = sizes.following(config, set(settings))
    # The configuration itself too, for it is what a run's folder is read back as.
    for variant in (Variant(), *config.variants):
        sizes.check(variant_config(config, variant))
    return config


def _variants(
    config: Config, algo: str, fixes: Sequence[str], vary: Mapping[str, Iterable[float | str]]
) -> tuple[Variant, ...]:
    """All combinations of fixes and varied values, checked."""
    parsed_fixes = [targets.parse_fixes(text) for text in fixes or ("",)]
    if algo == "model-free" and any(parsed_fixes):
        raise UsageError(
            f"--fix={','.join(next(filter(None, parsed_fixes)))}: without a model there is "
            "nothing to fix; leave --fix out, or choose --algo=mbpo"
        )
    columns = []
    for path, values in vary.items():
        if not _lookup("--vary", path, config).traced:
            traced = ", ".join(s.path for s in all_settings(config).values() if s.traced)
            raise UsageError(
                f"--vary {path}: it shapes the program, so its values need a run each; "
                f"these can be varied: {traced}"
            )
        if algo == "model-free" and path.split(".")[0] in ("model", "trust", "rollout"):
            raise UsageError(f"--vary {path}: there is no model; choose --algo=mbpo")
        column = [(path, parse("--vary", path, value, config)) for value in values]
        if not column:
            raise UsageError(f"--vary {path}: give it at least one value")
        for _, value in column:
            if column.count((path, value)) > 1:
                raise UsageError(f"--vary {path}={value:g}: the value is given twice")
        columns.append(column)
    variants = tuple(
        Variant(fix, values) for fix in parsed_fixes for values in itertools.product(*columns)
    )
    for variant in variants:
        if variants.count(variant) > 1:
            fixes_text = ",".join(variant.fixes) or "none"
            raise UsageError(f"--fix={fixes_text}: the variant is given twice")
    return variants


def agent_from_dict(plain: Mapping[str, Any], variant: str) -> Config:
    """What a variant's agent needs of a configuration that `config.as_dict` made into JSON.

    Fixes and rules of trust are not looked up, so their modules need not be there.

    Raises:
      UsageError: it is another version's, or there is no such agent.
    """
    groups = ("learn", "agent")
    settings = {f"{g}.{name}": value for g in groups for name, value in _group(plain, g).items()}
    config = make(plain["env"], algo="model-free", agent=plain["agent_name"], settings=settings)
    for path, value in parse_variant(variant):
        config = assign(config, path, value) if path.split(".")[0] in groups else config
    return config


def _group(plain: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    if "agent_name" not in plain:
        raise UsageError(
            f"the run of {plain.get('env')} was made by an older version of dynajax: its report "
            "and its curves can be drawn, and it cannot be gone on with"
        )
    return plain[group] or {}


def from_dict(plain: Mapping[str, Any]) -> Config:
    """The configuration that `config.as_dict` made into JSON, as a run's config.json has it.

    Raises:
      UsageError: it is another version's.
    """
    settings = {f"{g}.{name}": value for g in GROUPS for name, value in _group(plain, g).items()}
    settings |= {s.path: plain[s.path] for s in _fields(Config, "") if s.path not in _OWN_FLAG}
    names = ("env", "algo", "preset", "seeds", "seed", "steps", "engine", "oracle")
    config = make(
        **{name: plain[name] for name in names},
        agent=plain["agent_name"],
        trust=plain["trust_name"],
        settings=settings,
    )
    variants = tuple(
        Variant(targets.parse_fixes(name.partition(";")[0]), parse_variant(name))
        for name in plain["variants"]
    )
    return dataclasses.replace(config, variants=variants)
