"""From a user's input to a checked `Config`, or one line that says what to change."""

import dataclasses
import difflib
import itertools
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax

from dynajax import registry
from dynajax.agents import agent_class
from dynajax.algorithms import ALGORITHMS
from dynajax.config import (
    GROUPS,
    MODEL_GROUPS,
    Config,
    Variant,
    assign,
    parse_variant,
    variant_config,
)
from dynajax.config.dependent import adjust_dependent
from dynajax.config.presets import PRESETS
from dynajax.config.schema import require
from dynajax.models import DynamicsModel, likelihoods, model_class, predicts_variance, targets
from dynajax.synthetic import source_class
from dynajax.trust import trust_rule_class
from dynajax.types import UsageError
from dynajax.user_code import call, describe

#: Fields with a flag of their own, which `--set` does not take.
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
#: Largest whole number of a setting.
_MAX_INTEGER = 2**31 - 1


class Setting(NamedTuple):
    """One field that `--set` can reach."""

    path: str
    kind: Any  # its annotation
    low: float
    high: float
    traced: bool
    may_be_empty: bool  # whether it may be an empty tuple
    about: str

    @property
    def values(self) -> str:
        """The values that it takes, in words."""
        if typing.get_origin(self.kind) is Literal:
            return " or ".join(typing.get_args(self.kind))
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return "a name"
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
            is_traced = bool(f.metadata.get("traced"))
            about = f.metadata.get("about", "")
            settings.append(
                Setting(
                    prefix + f.name, kinds[f.name], low, high, is_traced, f.default == (), about
                )
            )
    return settings


def base(agent: str = "sac", trust: str = "none", source: str = "buffered") -> Config:
    """Return the configuration of an agent, a trust rule and a source with all defaults.

    Raises:
      UsageError: there is no such agent, rule or source.
    """
    return assign(
        Config(
            agent_name=agent,
            agent=_default_fields(f"--agent={agent}", agent_class(agent)),
            trust_name=trust,
            trust=_default_fields(f"--trust={trust}", trust_rule_class(trust)),
            source=_default_fields(f"--set rollout.source={source}", source_class(source)),
        ),
        "rollout.source",
        source,
    )


def _default_fields(owner: str, cls: Any) -> Any:
    """Return the settings that an agent, trust rule or source declares, with their defaults.

    Raises:
      UsageError: its class `Fields` is not one that `dynajax.fields` has made, or lacks a default.
    """
    declared = call(owner, cls.Fields)
    if not dataclasses.is_dataclass(declared) or jax.tree_util.all_leaves([declared]):
        raise UsageError(
            f"{owner}: its Fields is {describe(cls.Fields)}; decorate it with @dynajax.fields"
        )
    return declared


def all_settings(config: Config) -> dict[str, Setting]:
    """Return every field of a configuration that `--set` can reach, by path."""
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
    near = difflib.get_close_matches(path, known, 1, 0.3) or difflib.get_close_matches(
        name, [p.rsplit(".", 1)[-1] for p in known], 1, 0.0
    )
    full = next(p for p in known if near and (p == near[0] or p.rsplit(".", 1)[-1] == near[0]))
    of = {
        "agent": f" with --agent={config.agent_name}",
        "trust": f" with --trust={config.trust_name}",
        "source": f" with --set rollout.source={config.rollout.source}",
    }
    raise UsageError(
        f"{flag}={path}: there is no such field{of.get(group, '')}; the nearest is {full}"
    )


def parse(flag: str, path: str, value: Any, config: Config) -> Any:
    """Return the checked value of a field from its text, or from a Python value.

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
        elif kind is str:
            if text is None or not text:
                raise ValueError
            return text
        elif kind is bool:
            names = {"true": True, "1": True, "false": False, "0": False}
            return names[str(value).lower()]
        else:
            parsed = _integer(value) if kind is int else float(value)
            numbers = (parsed,)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        name = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            str: "a name",
        }.get(kind, "whole numbers with commas between")
        raise UsageError(wrong + f"it takes {name}") from None
    if kind is not float and any(abs(n) > _MAX_INTEGER for n in numbers):
        raise UsageError(wrong + f"it must be at most {_MAX_INTEGER}")
    if not (numbers or setting.may_be_empty) or not all(
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


def format_value(value: Any) -> str:
    """Return the value of a setting as `--set` takes it."""
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return shown.lower() if isinstance(value, bool) else shown


def make(
    env: str,
    *,
    algo: str = "mbpo",
    agent: str | None = None,
    trust: str | None = None,
    preset: str = "quick",
    fixes: str | Sequence[str] | None = (),
    vary: Mapping[str, float | str | Iterable[float | str]] | None = None,
    settings: Mapping[str, Any] | None = None,
    seeds: int = 1,
    seed: int = 0,
    steps: int | None = None,
    engine: str = "host",
    oracle: str = "none",
) -> Config:
    """Return a checked configuration.

    Args:
      env: a task, see `envs`.
      algo: a name in `algorithms.ALGORITHMS`.
      agent: a name in `agents.AGENTS`, or "module:name"; by default the preset's.
      trust: a name in `trust.TRUST`, or "module:name"; by default the algorithm's.
      preset: a name in `config.presets.PRESETS`.
      fixes: for each variant a comma list of names in `targets.FIXES` or "module:name", "" or
        "none" for none; one text is one variant, and the default is one with the algorithm's.
      vary: values for traced fields; all combinations, times the fixes, are the variants.
      settings: other values for fields, by path ("learn.utd").
      seeds: learners of each variant, numbered from `seed`.
      steps: agent steps of each learner; by default the preset's.
      engine: "host", or "mjx" for environments on the device.
      oracle: "reward", "state" or "both": the part of a synthetic transition that comes from the
        simulator.

    Raises:
      UsageError: one line that names the argument, its value and the remedy.
    """
    for flag, name in (("env", env), ("agent", agent), ("trust", trust)):
        if not isinstance(name, str) and (name is not None or flag == "env"):
            raise UsageError(
                f"--{flag}={_shown(name)}: it must be a name, or module:NAME, as a string"
            )
    fixes = [fixes] if isinstance(fixes, str) else () if fixes is None else fixes
    if not isinstance(fixes, Iterable) or not all(isinstance(fix, str) for fix in fixes):
        raise UsageError(
            f"--fix={_shown(fixes)}: it must be a string such as 'scale,target', or a list with "
            "one string for each variant"
        )
    settings, vary = _by_path("--set", settings), _by_path("--vary", vary)
    seeds, seed = _count("seeds", seeds), _count("seed", seed)
    steps = None if steps is None else _count("steps", steps)
    for flag, value, choices in (
        ("preset", preset, tuple(PRESETS)),
        ("algo", algo, tuple(ALGORITHMS)),
        ("engine", engine, ("host", "mjx")),
        ("oracle", oracle, ("none", "reward", "state", "both")),
    ):
        if value not in choices:
            raise UsageError(
                f"--{flag}={value}: choose one of {', '.join(choices)}; the nearest is "
                f"{registry.nearest(str(value), choices)}"
            )
    sizes, row = PRESETS[preset], ALGORITHMS[algo]
    agent = sizes.agent if agent is None else agent
    trust = row.trust if trust is None else trust
    source = _source(row.settings, settings, oracle)
    config = base(agent, trust, source)
    of_agent = {f"agent.{k}": v for k, v in sizes.agents.get(agent, {}).items()}
    of_source = {"rollout.source": source}
    if source != row.settings["rollout.source"]:
        # Another source has fields of its own.
        kept = {k: v for k, v in row.settings.items() if not k.startswith("source.")}
    else:
        kept = dict(row.settings)
    for path, value in {**sizes.settings, **of_agent, **kept, **of_source}.items():
        config = assign(config, path, value)
    config = dataclasses.replace(
        config,
        env=env,
        algo=algo,
        preset=preset,
        engine=cast(Any, engine),
        oracle=cast(Any, oracle),
        seeds=seeds,
        seed=seed,
        steps=config.steps if steps is None else steps,
    )
    config = dataclasses.replace(config, variants=_variants(config, fixes or (row.fix,), vary))
    for path, value in settings.items():
        config = assign(config, path, parse("--set", path, value, config))
    config = adjust_dependent(config, set(settings))
    # The configuration itself too, because that is how a run directory is read back.
    for variant in (Variant(), *config.variants):
        _check(variant_config(config, variant))
    return config


def _shown(value: Any) -> str:
    """Return the beginning of a value's text, in one line."""
    return " ".join(repr(value).split())[:100]


def _by_path(flag: str, values: Any) -> Mapping[str, Any]:
    """Return values by the path of their field; None is no value.

    Raises:
      UsageError: it is no dictionary, or has keys that are no text.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping) or not all(isinstance(path, str) for path in values):
        raise UsageError(
            f"{flag} {_shown(values)}: it must be a dictionary of values by field, such as "
            "{'learn.utd': 10}"
        )
    return values


def _count(flag: str, value: Any) -> int:
    """Return a whole number that was given as a number or as text.

    Raises:
      UsageError: it is no whole number.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = _integer(value)
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f"--{flag}={value}: it must be a whole number") from None
    if abs(number) > _MAX_INTEGER:
        raise UsageError(f"--{flag}={value}: it must be at most {_MAX_INTEGER}")
    return number


def _source(row: Mapping[str, Any], settings: Mapping[str, Any], oracle: str) -> str:
    """Return the source's name: the user's, or the algorithm's.

    An oracle and a growing horizon need buffered rollouts.
    """
    if "rollout.source" in settings:
        return str(settings["rollout.source"])
    growing = "," in str(settings.get("rollout.horizon", "")).rstrip(",)")
    if row["rollout.source"] == "on_the_fly" and (growing or oracle != "none"):
        return "buffered"
    return str(row["rollout.source"])


def _check(config: Config) -> None:
    """Refuse a configuration whose parts do not work together.

    Raises:
      UsageError: one line that names the setting and the remedy.
    """
    config.check()
    call(f"--agent={config.agent_name}", agent_class(config.agent_name).check, config)
    if not config.has_model:
        require(
            config.rollout.source == "none",
            f"--set rollout.source={config.rollout.source}: without a model there is no synthetic "
            "data; choose --algo=mbpo",
        )
        return
    source = config.rollout.source
    call(f"--set rollout.source={source}", source_class(source).check, config)
    _check_model(config)
    _check_trust(config)


def _check_model(config: Config) -> None:
    """Refuse a reward model, or fixes, that the dynamics model does not support."""
    model = model_class(config.model.network)
    call(f"--set model.network={config.model.network}", model.check, config.model)
    require(
        config.model.reward_from == "inputs"
        or model.predict_reward is not DynamicsModel.predict_reward,
        f"--set model.reward_from={config.model.reward_from}: model.network={config.model.network} "
        "has no method predict_reward; choose --set model.reward_from=inputs",
    )
    likelihoods.likelihood_class(config.model.likelihood)
    if predicts_variance(config.model):
        return
    reason, remedy = _no_variance(config)
    for variant in config.variants:
        for name in variant.fixes:
            require(
                targets.lookup_fix(name).exponent is None,
                f"--fix={','.join(variant.fixes)}: {name} weights by the predicted variance, and "
                f"{reason}; leave it out, or choose {remedy}",
            )


def _no_variance(config: Config) -> tuple[str, str]:
    """Return why the model predicts no variance, and the remedy."""
    network, likelihood = config.model.network, config.model.likelihood
    if not likelihoods.likelihood_class(likelihood).has_variance:
        return f"model.likelihood={likelihood} predicts none", "--set model.likelihood=gaussian"
    return f"model.network={network} predicts none", "--set model.network=mlp"


def _check_trust(config: Config) -> None:
    """Refuse a trust rule that does not go with the model, the source or value expansion."""
    flag, rule = f"--trust={config.trust_name}: ", trust_rule_class(config.trust_name)
    call(f"--trust={config.trust_name}", rule.check, config)
    require(
        rule.needs_all_members or not rule.uses_weights,
        flag + "uses_weights=True requires needs_all_members=True; set it in the rule's class",
    )
    require(
        rule.needs_all_members or not rule.needs_values,
        flag + "needs_values=True requires needs_all_members=True; set it in the rule's class",
    )
    require(
        not rule.needs_all_members or config.model.members > 1,
        flag + "it compares members of the ensemble; choose model.members above 1",
    )
    reason, remedy = _no_variance(config)
    reads_variance = call(f"--trust={config.trust_name}", rule.reads_variance, config)
    require(
        not reads_variance or predicts_variance(config.model),
        flag + f"it reads predicted variances, and {reason}; choose {remedy}",
    )
    steps = config.rollout.value_expansion_steps
    require(
        not steps or not rule.per_rollout_state,
        f"--set rollout.value_expansion_steps={steps}: --trust={config.trust_name} keeps a state "
        "for each rollout, and value expansion has others; choose another rule",
    )
    require(
        not steps or not rule.uses_weights,
        f"--set rollout.value_expansion_steps={steps}: --trust={config.trust_name} weights synthetic "
        "transitions, and value expansion makes none; choose another rule",
    )


def _variants(
    config: Config,
    fixes: Sequence[str],
    vary: Mapping[str, float | str | Iterable[float | str]],
) -> tuple[Variant, ...]:
    """Return all combinations of fixes and varied values, checked."""
    parsed_fixes = [targets.parse_fixes(text) for text in fixes]
    if not config.has_model and any(parsed_fixes):
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
        if not config.has_model and path.split(".")[0] in MODEL_GROUPS:
            raise UsageError(f"--vary {path}: there is no model; choose --algo=mbpo")
        several = values.split(",") if isinstance(values, str) else values
        several = several if isinstance(several, Iterable) else [several]
        column = [(path, parse("--vary", path, value, config)) for value in several]
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
    """Return what a variant's agent needs of a configuration that `config.as_dict` wrote.

    Fixes, trust rules and sources are not looked up, so their modules need not be installed.

    Raises:
      UsageError: a field is unknown, or there is no such agent.
    """
    groups = ("learn", "agent")
    settings = {
        f"{g}.{name}": value for g in groups for name, value in (plain.get(g) or {}).items()
    }
    # The resets are checked against the random steps, and these against the size of the buffer.
    settings |= {"random_steps": plain["random_steps"], "replay.real": plain["replay"]["real"]}
    config = make(plain["env"], algo="model-free", agent=plain["agent_name"], settings=settings)
    for path, value in parse_variant(variant):
        config = assign(config, path, value) if path.split(".")[0] in groups else config
    return config


def from_dict(plain: Mapping[str, Any]) -> Config:
    """Return the configuration that `config.as_dict` wrote, as in a run's config.json.

    Raises:
      UsageError: a field is unknown.
    """
    settings = {
        f"{g}.{name}": value for g in GROUPS for name, value in (plain.get(g) or {}).items()
    }
    settings |= {s.path: plain[s.path] for s in _fields(Config, "") if s.path not in _OWN_FLAG}
    names = ("env", "algo", "preset", "seeds", "seed", "steps", "engine", "oracle")
    config = make(
        **{name: plain[name] for name in names},
        agent=plain["agent_name"],
        trust=plain["trust_name"],
        fixes=[name.partition(";")[0] for name in plain["variants"][:1]],
        settings=settings,
    )
    variants = tuple(
        Variant(targets.parse_fixes(name.partition(";")[0]), parse_variant(name))
        for name in plain["variants"]
    )
    return dataclasses.replace(config, variants=variants)
