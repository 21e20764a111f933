"""What a run is: frozen dataclasses, and the checks that refuse an impossible one.

A `Config` is a pytree. Fields marked `traced` only scale arithmetic: they are its leaves, so rows
of one program can differ in them. All others are static and shape the program. An agent and a rule
of trust bring dataclasses of their own fields, made like those here.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, cast

import jax

_T = TypeVar("_T")


def traced(default: float, low: float = -math.inf, high: float = math.inf, about: str = "") -> Any:
    """A field that only scales arithmetic, from `low` to `high`: rows may differ in it.

    `about` is what `dynajax train --fields` says of it.
    """
    return field(default=default, metadata={"traced": True, "range": (low, high), "about": about})


def static(default: Any, low: float = -math.inf, high: float = math.inf, about: str = "") -> Any:
    """A field that shapes the program, each of its numbers from `low` to `high`; see `traced`."""
    return field(default=default, metadata={"range": (low, high), "about": about})


def fields(cls: type[_T]) -> type[_T]:
    """Makes of a class of fields a frozen dataclass, and a pytree whose leaves are the traced ones."""
    # One that only inherits from a dataclass has fields of its own still to be found.
    if "__dataclass_fields__" not in vars(cls):
        cls = dataclass(frozen=True)(cls)
    leaves = {f.name: bool(f.metadata.get("traced")) for f in dataclasses.fields(cast(Any, cls))}
    return jax.tree_util.register_dataclass(
        cls,
        [name for name, leaf in leaves.items() if leaf],
        [name for name, leaf in leaves.items() if not leaf],
    )


@fields
@dataclass(frozen=True)
class NoFields:
    """Of an agent, or a rule of trust, that has nothing to set."""


@fields
@dataclass(frozen=True)
class LearnConfig:
    """What every agent is told: how often it learns, and from how much."""

    utd: int = static(20, 1, about="gradient updates per environment step")
    batch: int = static(256, 1, about="transitions of an update")
    reset_every: int = static(0, 0, about="environment steps between fresh agents; 0: never")
    reset_at: tuple[int, ...] = static((), 1, about="environment steps of fresh agents")
    discount: float = traced(0.99, 0, 1, about="of a step")


@fields
@dataclass(frozen=True)
class ModelConfig:
    """The probabilistic ensemble (Chua et al., 2018; Janner et al., 2019)."""

    members: int = static(7, 1, about="networks of the ensemble")
    elites: int = static(5, 1, about="members with the best holdout scores, which alone imagine")
    width: int = static(200, 1, about="of a hidden layer")
    depth: int = static(4, 1, about="hidden layers")
    batch: int = static(256, 1, about="transitions of a gradient step")
    fit_every: int = static(250, 1, about="environment steps between fits")
    schedule: Literal["fixed", "early_stop"] = static(
        "fixed", about="fits of a fixed length, or until the holdout score stays"
    )
    fit_steps: int = static(5000, 1, about="gradient steps of a fit; early_stop: at most")
    round_steps: int = static(250, 1, about="early_stop: steps between two holdout scores")
    patience: int = static(5, 1, about="early_stop: rounds without a gain before it ends")
    weight_averaging_steps: int = static(
        1, 1, about="a fit's weights are a mean over about so many; 1: its last"
    )
    max_holdout: int = static(5000, 1, about="holdout transitions scored, at most")
    learned_bounds: bool = static(False, about="log-variance bounds learned as in Chua et al.")
    reward_from: Literal["inputs", "next_state"] = static(
        "inputs", about="what the reward is predicted from: state and action, or the next state too"
    )
    epochs: float = static(
        0.0, 0, about="fixed: passes over the data, up to fit_steps; 0: fit_steps"
    )
    holdout: float = traced(0.2, 0.001, 0.9, about="share of the transitions that no fit sees")
    min_gain: float = traced(
        0.01, 0, 0.99, about="early_stop: relative gain of the score that counts"
    )
    learning_rate: float = traced(3e-4, 0, about="Adam's")
    weight_decay: float = traced(1.0, 0, about="multiplies every layer's decay")
    log_variance_min: float = traced(-10.0, about="least predicted log-variance")
    log_variance_max: float = traced(0.5, about="largest predicted log-variance")
    bound_penalty: float = traced(0.01, 0, about="price of the width of learned bounds")


@fields
@dataclass(frozen=True)
class RolloutConfig:
    """Synthetic rollouts from real states."""

    batch: int = static(400, 1, about="starts per environment step")
    horizon: tuple[int, ...] = static(
        (1,), 0, about="steps; or first step, last step, first horizon, last horizon"
    )
    real_fraction: float = static(0.05, 0, 1, about="share of an agent's minibatch that is real")
    fresh: bool = static(
        False, about="imagined by the current policy inside each update, never stored"
    )
    on_top: bool = static(
        False, about="as many synthetic updates as real ones, in place of a mixture"
    )
    value_expansion_steps: int = static(
        0, 0, about="imagined steps that a critic's target reaches further: value expansion"
    )
    random_action_fraction: float = static(
        0.0, 0, 1, about="share of imagined actions that are uniform"
    )
    state_noise: float = traced(
        1.0, 0, about="of the predicted standard deviation of the state; 0: the mean"
    )
    reward_noise: float = traced(
        1.0, 0, about="of the predicted standard deviation of the reward; 0: the mean"
    )


@fields
@dataclass(frozen=True)
class ReplayConfig:
    """Capacities in transitions."""

    real: int = static(500_000, 1, about="transitions of the task that are kept")
    synthetic: int = static(1_000_000, 1, about="imagined transitions that are kept")


@fields
@dataclass(frozen=True)
class EvalConfig:
    """Evaluation with the deterministic policy."""

    every: int = static(5000, 1, about="environment steps between evaluations")
    episodes: int = static(10, 1, about="episodes of an evaluation")
    checkpoints: int = static(
        2, 1, about="checkpoints that stay, the newest; a diagnosis reads all"
    )


@fields
@dataclass(frozen=True)
class HostConfig:
    """The host engine."""

    workers: int = static(
        -1, -1, about="processes that step environments; 0: none, -1: as measured"
    )
    time_limit: int = static(
        1000, 1, about="simulator steps of an episode, for a task without a limit of its own"
    )


@fields
@dataclass(frozen=True)
class TaskConfig:
    """How the task is stepped."""

    repeat: int = static(
        1, 1, about="simulator steps of one environment step, their rewards summed"
    )


class Variant(NamedTuple):
    """One column of a study: a set of fixes, and values of traced fields."""

    fixes: tuple[str, ...] = ()
    values: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        fixes = ",".join(self.fixes) or "none"
        return ";".join([fixes, *(f"{path}={format_float(value)}" for path, value in self.values)])


def parse_variant(name: str) -> tuple[tuple[str, float], ...]:
    """The values that a variant's name says, by path; back from `Variant.name`."""
    pairs = (item.partition("=") for item in name.split(";")[1:])
    return tuple((path, float(value)) for path, _, value in pairs)


def format_float(value: float) -> str:
    """A number in the fewest digits that give it back."""
    return text if float(text := f"{value:g}") == value else repr(value)


class Stepping(TypedDict):
    """Arguments of `envs.make` that a configuration decides."""

    time_limit: int
    repeat: int


#: The fields of `Config` that hold others.
GROUPS = ("learn", "agent", "model", "rollout", "trust", "replay", "eval", "host", "task")


@dataclass(frozen=True)
class Config:
    """A whole run. `settings.make` makes one from what a user types, with every check."""

    env: str = static("cheetah-run")
    algo: Literal["mbpo", "model-free"] = static("mbpo")  # with a model, or without one
    agent_name: str = static("sac")  # an entry of AGENTS, or module:name
    trust_name: str = static("none")  # an entry of TRUST, or module:name
    preset: str = static("paper")
    engine: Literal["host", "mjx"] = static("host")
    oracle: Literal["none", "reward", "state", "both"] = static("none")  # what is the simulator's
    variants: tuple[Variant, ...] = (Variant(),)
    seed: int = static(0, 0, 2**31 - 1)
    seeds: int = static(1, 1)
    steps: int = static(500_000, 1)
    random_steps: int = static(10_000, 2, about="environment steps with uniform actions at first")
    precision: Literal["float32", "bfloat16"] = static(
        "float32",
        about="of what products in updates and fits' steps are made; they are summed in float32",
    )
    learn: LearnConfig = LearnConfig()
    agent: Any = None  # the agent's own fields
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    trust: Any = None  # the rule's own fields
    replay: ReplayConfig = ReplayConfig()
    eval: EvalConfig = EvalConfig()
    host: HostConfig = HostConfig()
    task: TaskConfig = TaskConfig()

    @property
    def has_model(self) -> bool:
        return self.algo == "mbpo"

    @property
    def stepping(self) -> "Stepping":
        """How the task is stepped: arguments of `envs.make` and `envs.spec`."""
        return {"time_limit": self.host.time_limit, "repeat": self.task.repeat}

    @property
    def num_learners(self) -> int:
        return len(self.variants) * self.seeds

    @property
    def variant_seed_pairs(self) -> list[tuple[int, int]]:
        """(index of the variant, seed) of each of the S rows."""
        seeds = range(self.seed, self.seed + self.seeds)
        return [(index, seed) for index in range(len(self.variants)) for seed in seeds]

    @property
    def real_batch(self) -> int:
        """Real transitions in an agent's minibatch."""
        if not self.has_model or self.rollout.on_top:
            return self.learn.batch
        return round(self.rollout.real_fraction * self.learn.batch)

    @property
    def synthetic_batch(self) -> int:
        """Synthetic transitions in an agent's minibatch, or in one of its own."""
        if not self.has_model:
            return 0
        return self.learn.batch if self.rollout.on_top else self.learn.batch - self.real_batch

    @property
    def num_parallel_rollouts(self) -> int:
        """Rollouts that are made at once."""
        if not self.rollout.fresh:
            return self.rollout.batch
        return -(-self.synthetic_batch // self.rollout.horizon[0])


jax.tree_util.register_dataclass(
    Config, GROUPS, [f.name for f in dataclasses.fields(Config) if f.name not in GROUPS]
)


def assign(config: Config, path: str, value: Any) -> Config:
    """`config` with one field replaced, for example "model.width"."""
    if "." not in path:
        return dataclasses.replace(config, **{path: value})
    group, name = path.split(".")
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **{name: value})}
    )


def variant_config(config: Config, variant: Variant) -> Config:
    """`config` with the values of one of its variants."""
    return functools.reduce(lambda c, item: assign(c, *item), variant.values, config)


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON has it."""
    plain = dataclasses.asdict(config)
    plain["variants"] = [v.name for v in config.variants]
    return json.loads(json.dumps(plain))


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines "path: old -> new" for two `as_dict`; `steps` may differ, for a run can go on."""
    if not prefix and "agent_name" in new and "agent_name" not in old:
        return ["made by an older version of dynajax, whose runs can be shown and not gone on with"]
    lines = []
    for name in sorted({*old, *new} - ({"steps"} if not prefix else set())):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += difference(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a} -> {b}")
    return lines


def run_name(config: Config) -> str:
    """A folder's name: readable, and different for every different configuration."""
    plain = {k: v for k, v in as_dict(config).items() if k != "steps"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:6]
    parts = [config.env]
    if config.has_model:
        parts += ["mbpo", config.agent_name]
        parts.append("_".join("+".join(v.fixes) or "none" for v in config.variants[:4]))
        parts += [config.trust_name] if config.trust_name != "none" else []
    else:
        parts.append(config.agent_name)
    parts.append(config.preset)
    parts += [f"oracle-{config.oracle}"] if config.oracle != "none" else []
    return "-".join([*parts, digest]).replace(":", ".").replace("/", ".")
