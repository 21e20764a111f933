"""The configuration of a run: frozen dataclasses, each with the checks of its own fields.

A `Config` is a pytree. Fields marked `traced` only scale arithmetic: they are its leaves, so the
learners of one program can differ in them. All others are static and shape the program. An agent, a
trust rule and a source have dataclasses of their own fields, made like those here.
"""

import dataclasses
import functools
import hashlib
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, cast

import jax

from dynajax.types import UsageError

_T = TypeVar("_T")


def traced(default: float, low: float = -math.inf, high: float = math.inf, about: str = "") -> Any:
    """Return a field that only scales arithmetic, from `low` to `high`; learners may differ in it.

    `about` is its description in `dynajax train --fields`.
    """
    return field(default=default, metadata={"traced": True, "range": (low, high), "about": about})


def static(default: Any, low: float = -math.inf, high: float = math.inf, about: str = "") -> Any:
    """Return a field that shapes the program, its numbers from `low` to `high`; see `traced`."""
    return field(default=default, metadata={"range": (low, high), "about": about})


def fields(cls: type[_T]) -> type[_T]:
    """Make a class of fields a frozen dataclass, and a pytree whose leaves are the traced ones."""
    # A class that inherits from a dataclass has fields of its own that are still to be found.
    if "__dataclass_fields__" not in vars(cls):
        cls = dataclass(frozen=True)(cls)
    leaves = {f.name: bool(f.metadata.get("traced")) for f in dataclasses.fields(cast(Any, cls))}
    return jax.tree_util.register_dataclass(
        cls,
        [name for name, leaf in leaves.items() if leaf],
        [name for name, leaf in leaves.items() if not leaf],
    )


def require(condition: bool, text: str) -> None:
    """Refuse a configuration with one line.

    Raises:
      UsageError: the condition does not hold.
    """
    if not condition:
        raise UsageError(text)


def _joined(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


@fields
@dataclass(frozen=True)
class NoFields:
    """Settings of an agent, trust rule or source that has none."""


@fields
@dataclass(frozen=True)
class LearnConfig:
    """Settings that all agents share."""

    utd: int = static(20, 1, about="gradient updates per agent step")
    batch: int = static(256, 1, about="transitions in a minibatch of the agent")
    reset_every: int = static(0, 0, about="agent steps between resets of the agent; 0: never")
    reset_at: tuple[int, ...] = static((), 1, about="agent steps at which the agent is reset")
    discount: float = traced(0.99, 0, 1, about="discount per agent step")
    hold_noise: int = static(
        1, 1, 1000, about="longest time in agent steps for which exploration noise is held"
    )

    def check(self, config: "Config") -> None:
        """Refuse resets before the agent learns."""
        for at in self.reset_at:
            require(
                at > config.random_steps,
                f"--set learn.reset_at={_joined(self.reset_at)}: {at} is before the agent learns; "
                f"each must be above random_steps={config.random_steps}",
            )


@fields
@dataclass(frozen=True)
class ModelConfig:
    """The dynamics ensemble (Chua et al., 2018; Janner et al., 2019)."""

    network: str = static("mlp", about="network of a member: mlp, resnet, or module:name")
    likelihood: str = static(
        "gaussian", about="predictive distribution: gaussian, deterministic, or module:name"
    )
    members: int = static(7, 1, about="members of the ensemble")
    elites: int = static(5, 1, about="members with the lowest holdout error, used in rollouts")
    width: int = static(200, 1, about="width of the hidden layers")
    depth: int = static(4, 1, about="number of hidden layers")
    batch: int = static(256, 1, about="transitions in a minibatch of the model")
    fit_every: int = static(250, 1, about="agent steps between fits")
    schedule: Literal["fixed", "early_stop"] = static(
        "fixed", about="length of a fit: fixed, or until the holdout error stops improving"
    )
    fit_steps: int = static(5000, 1, about="gradient steps of a fit; the limit with early_stop")
    round_steps: int = static(250, 1, about="early_stop: gradient steps between evaluations")
    patience: int = static(5, 1, about="early_stop: evaluations without improvement before the end")
    weight_averaging_steps: int = static(
        1, 1, about="gradient steps that a fit's weights are averaged over; 1: no averaging"
    )
    max_holdout: int = static(
        5000, 1, 46_340, about="largest number of holdout transitions evaluated"
    )
    learned_bounds: bool = static(False, about="learn the bounds of the log-variance, as in PETS")
    reward_from: Literal["inputs", "next_state"] = static(
        "inputs", about="inputs of the reward model: state and action, or the next state too"
    )
    epochs: float = static(
        0.0, 0, about="fixed: passes over all transitions, at most fit_steps; 0: always fit_steps"
    )
    holdout: float = traced(0.2, 0.001, 0.9, about="share of the transitions in the holdout")
    min_gain: float = traced(
        0.01, 0, 0.99, about="early_stop: smallest relative improvement that counts"
    )
    learning_rate: float = traced(3e-4, 0, about="learning rate of Adam")
    weight_decay: float = traced(1.0, 0, about="factor on the weight decay of every layer")
    log_variance_min: float = traced(-10.0, about="smallest predicted log-variance")
    log_variance_max: float = traced(0.5, about="largest predicted log-variance")
    bound_penalty: float = traced(0.01, 0, about="cost of the width of learned bounds")

    def check(self, config: "Config") -> None:
        """Refuse an ensemble or a fit schedule that does not work."""
        require(
            self.elites <= self.members,
            f"--set model.elites={self.elites}: it must be at most model.members={self.members}",
        )
        require(
            self.log_variance_min < self.log_variance_max,
            f"--set model.log_variance_min={self.log_variance_min}: it must be under "
            f"model.log_variance_max={self.log_variance_max}",
        )
        require(
            self.schedule == "fixed" or not self.epochs,
            f"--set model.epochs={self.epochs:g}: early_stop ends a fit by its holdout error; "
            "choose --set model.schedule=fixed",
        )
        require(
            self.schedule == "fixed" or self.fit_steps % self.round_steps == 0,
            f"--set model.fit_steps={self.fit_steps}: with early_stop it must be a multiple of "
            f"model.round_steps={self.round_steps}",
        )


@fields
@dataclass(frozen=True)
class RolloutConfig:
    """Synthetic rollouts from real states, and how the agent uses them."""

    source: str = static(
        "buffered",
        about="where synthetic transitions come from: none, buffered, on_the_fly, or module:name",
    )
    mixing: Literal["mixed", "separate"] = static(
        "mixed", about="one minibatch of real and synthetic transitions, or a gradient step on each"
    )
    batch: int = static(400, 1, about="buffered: rollouts per agent step")
    horizon: tuple[int, ...] = static(
        (1,), 0, about="rollout length; or first step, last step, first length, last length"
    )
    real_fraction: float = static(0.05, 0, 1, about="share of real transitions in a minibatch")
    start_window: int = static(
        0, 0, about="newest real transitions that rollouts start from; 0: all in the replay buffer"
    )
    value_expansion_steps: int = static(
        0, 0, about="model steps by which critic targets are extended (value expansion)"
    )
    random_action_fraction: float = static(
        0.0, 0, 1, about="share of uniform random actions in rollouts"
    )
    state_noise: float = traced(
        1.0, 0, about="factor on the predicted standard deviation of the state"
    )
    reward_noise: float = traced(
        1.0, 0, about="factor on the predicted standard deviation of the reward"
    )

    def check(self, config: "Config") -> None:
        """Refuse a horizon that is no schedule, and value expansion with random actions."""
        h, shown = self.horizon, _joined(self.horizon)
        require(
            (len(h) == 1 and h[0] >= 1) or (len(h) == 4 and 0 <= h[0] < h[1] and min(h[2:]) >= 1),
            f"--set rollout.horizon={shown}: it must be one number from 1, or "
            "first_step,last_step,first_horizon,last_horizon",
        )
        require(
            len(h) == 1 or (h[1] - h[0]) * abs(h[3] - h[2]) < 2**31,
            f"--set rollout.horizon={shown}: the steps from first to last times the change of the "
            "horizon must be below 2^31",
        )
        steps = self.value_expansion_steps
        require(
            not steps or config.oracle == "none",
            f"--set rollout.value_expansion_steps={steps}: an oracle corrects buffered transitions "
            "only; choose --oracle=none",
        )
        require(
            not steps or not self.random_action_fraction,
            f"--set rollout.value_expansion_steps={steps}: critic targets need the policy's "
            "actions; choose --set rollout.random_action_fraction=0",
        )


@fields
@dataclass(frozen=True)
class ReplayConfig:
    """Capacities of the replay buffers, in transitions."""

    real: int = static(500_000, 1, about="capacity of the replay buffer of real transitions")
    synthetic: int = static(1_000_000, 1, about="capacity of the buffer of synthetic transitions")
    age_decay: float = static(
        1.0, 0.5, 1, about="factor of a real transition's probability per agent step of age, to 0.1"
    )

    def check(self, config: "Config") -> None:
        """Refuse a buffer that the random steps overwrite."""
        require(
            config.random_steps < self.real,
            f"--set random_steps={config.random_steps}: it must be under replay.real={self.real}",
        )


@fields
@dataclass(frozen=True)
class EvalConfig:
    """Evaluation with the deterministic policy."""

    every: int = static(5000, 1, about="agent steps between evaluations")
    episodes: int = static(10, 1, about="episodes of an evaluation")
    checkpoints: int = static(2, 1, about="newest checkpoints to keep; a diagnosis reads all")


@fields
@dataclass(frozen=True)
class HostConfig:
    """The host engine."""

    workers: int = static(
        -1, -1, about="processes that step environments; 0: none, -1: chosen automatically"
    )
    time_limit: int = static(
        1000, 1, about="frames of an episode, for a task without a limit of its own"
    )
    evaluate_on: Literal["copies", "training"] = static(
        "copies",
        about="environments of an evaluation: copies for it alone, or the training environments, "
        "whose episodes end there",
    )

    def check(self, config: "Config") -> None:
        """Refuse what needs further instances of a task that can exist only once."""
        if self.evaluate_on == "copies":
            return
        flag = f"--set host.evaluate_on={self.evaluate_on}: "
        require(
            self.workers <= 0,
            flag + f"this process steps the task, but host.workers={self.workers}; choose "
            "--set host.workers=0",
        )
        require(
            config.engine == "host",
            flag + f"--engine={config.engine} evaluates on the device; choose --engine=host",
        )
        require(
            config.oracle == "none",
            flag + "an oracle needs a copy of the task; choose --oracle=none",
        )


@fields
@dataclass(frozen=True)
class TaskConfig:
    """How the task is stepped."""

    repeat: int = static(1, 1, about="frames per agent step, their rewards summed")


class Variant(NamedTuple):
    """One column of a study: a set of fixes, and values of traced fields."""

    fixes: tuple[str, ...] = ()
    values: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """The fixes, followed by the values: "scale,target;learn.discount=0.9"."""
        fixes = ",".join(self.fixes) or "none"
        return ";".join([fixes, *(f"{path}={format_float(value)}" for path, value in self.values)])


def parse_variant(name: str) -> tuple[tuple[str, float], ...]:
    """Return the values in a variant's name by path, the inverse of `Variant.name`."""
    pairs = (item.partition("=") for item in name.split(";")[1:])
    return tuple((path, float(value)) for path, _, value in pairs)


def format_float(value: float) -> str:
    """Return a number in the fewest digits that reproduce it."""
    return text if float(text := f"{value:g}") == value else repr(value)


class Stepping(TypedDict):
    """Arguments of `envs.make` that a configuration decides."""

    time_limit: int
    repeat: int


#: The fields of `Config` that hold other fields.
GROUPS = (
    "learn",
    "agent",
    "model",
    "rollout",
    "source",
    "trust",
    "replay",
    "eval",
    "host",
    "task",
)
#: Those that have no effect without a model.
MODEL_GROUPS = ("model", "rollout", "source", "trust")


@dataclass(frozen=True)
class Config:
    """A whole run. `settings.make` makes one from a user's input, with every check."""

    env: str = static("cheetah-run")
    algo: str = static("mbpo")  # an entry of ALGORITHMS
    agent_name: str = static("sac")  # an entry of AGENTS, or module:name
    trust_name: str = static("none")  # an entry of TRUST, or module:name
    preset: str = static("paper")
    engine: Literal["host", "mjx"] = static("host")
    oracle: Literal["none", "reward", "state", "both"] = static("none")  # the simulator's part
    variants: tuple[Variant, ...] = (Variant(),)
    seed: int = static(0, 0, 2**31 - 1)
    seeds: int = static(1, 1)
    steps: int = static(500_000, 1)
    random_steps: int = static(10_000, 2, about="agent steps with uniform random actions at first")
    precision: Literal["float32", "bfloat16"] = static(
        "float32", about="precision of matmuls in updates and fits; they are summed in float32"
    )
    learn: LearnConfig = LearnConfig()
    agent: Any = None  # the agent's own settings
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    source: Any = None  # the source's own settings
    trust: Any = None  # the trust rule's own settings
    replay: ReplayConfig = ReplayConfig()
    eval: EvalConfig = EvalConfig()
    host: HostConfig = HostConfig()
    task: TaskConfig = TaskConfig()

    @property
    def has_model(self) -> bool:
        """Whether there is a dynamics model."""
        return self.algo != "model-free"

    @property
    def has_rollouts(self) -> bool:
        """Whether the agent learns from synthetic transitions."""
        return self.has_model and self.rollout.source != "none"

    @property
    def is_buffered(self) -> bool:
        """Whether each agent step rolls out `rollout.batch` states, as `Buffered` does."""
        return bool(getattr(self.source, "buffered", self.rollout.source == "buffered"))

    @property
    def separate(self) -> bool:
        """Whether synthetic transitions have updates of their own."""
        return self.has_rollouts and self.rollout.mixing == "separate"

    @property
    def stepping(self) -> "Stepping":
        """How the task is stepped: arguments of `envs.make` and `envs.spec`."""
        return {"time_limit": self.host.time_limit, "repeat": self.task.repeat}

    @property
    def num_learners(self) -> int:
        """S, the number of learners."""
        return len(self.variants) * self.seeds

    @property
    def variant_seed_pairs(self) -> list[tuple[int, int]]:
        """(index of the variant, seed) of each of the S learners."""
        seeds = range(self.seed, self.seed + self.seeds)
        return [(index, seed) for index in range(len(self.variants)) for seed in seeds]

    @property
    def real_batch(self) -> int:
        """Real transitions in a minibatch of the agent."""
        if not self.has_rollouts or self.separate:
            return self.learn.batch
        return round(self.rollout.real_fraction * self.learn.batch)

    @property
    def synthetic_batch(self) -> int:
        """Synthetic transitions in a minibatch of the agent, or in one of their own."""
        if not self.has_rollouts:
            return 0
        return self.learn.batch if self.separate else self.learn.batch - self.real_batch

    @property
    def num_parallel_rollouts(self) -> int:
        """B, the number of rollouts that run in parallel.

        Without synthetic transitions these are the model steps that expand a minibatch's targets.
        """
        if self.is_buffered:
            return self.rollout.batch
        if not self.synthetic_batch:
            return self.learn.batch
        return -(-self.synthetic_batch // self.rollout.horizon[0])

    def check(self) -> None:
        """Refuse settings that do not work together, whatever agent, rule and source.

        Raises:
          UsageError: one line that names the setting and the remedy.
        """
        require(self.seeds >= 1, f"--seeds={self.seeds}: it must be at least 1")
        require(
            0 <= self.seed < 2**31 - self.seeds,
            f"--seed={self.seed}: it must be at least 0 and below 2^31 - seeds",
        )
        require(self.steps >= 1, f"--steps={self.steps}: it must be at least 1")
        self._check_oracle()
        self.host.check(self)
        self.replay.check(self)
        self.learn.check(self)
        if not self.has_model:
            require(
                self.trust_name == "none",
                f"--trust={self.trust_name}: without a model there is no synthetic data; choose "
                "--algo=mbpo",
            )
            return
        # With fewer transitions the holdout could be empty.
        require(
            self.random_steps >= 50,
            f"--set random_steps={self.random_steps}: a model needs at least 50 transitions",
        )
        self.model.check(self)
        self.rollout.check(self)

    def _check_oracle(self) -> None:
        if self.oracle == "none":
            return
        flag = f"--oracle={self.oracle}: "
        require(
            self.has_model, flag + "without a model there is no synthetic data; choose --algo=mbpo"
        )
        require(
            self.engine == "host", flag + "the simulator runs on the host; choose --engine=host"
        )
        require(
            self.is_buffered,
            flag + "an oracle corrects buffered transitions only; choose "
            "--set rollout.source=buffered",
        )
        require(
            self.rollout.horizon == (1,),
            flag + "the simulator knows only the first step of a rollout; choose "
            "--set rollout.horizon=1",
        )
        require(
            self.trust_name == "none",
            flag + f"--trust={self.trust_name} judges the model, and an oracle replaces it; "
            "choose --trust=none",
        )


jax.tree_util.register_dataclass(
    Config, GROUPS, [f.name for f in dataclasses.fields(Config) if f.name not in GROUPS]
)


def assign(config: Config, path: str, value: Any) -> Config:
    """Return `config` with one field replaced, for example "model.width"."""
    if "." not in path:
        return dataclasses.replace(config, **{path: value})
    group, name = path.split(".")
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **{name: value})}
    )


def variant_config(config: Config, variant: Variant) -> Config:
    """Return `config` with the values of one of its variants."""
    return functools.reduce(lambda c, item: assign(c, *item), variant.values, config)


#: Fields that `as_dict` leaves out at these defaults, so that a run which was started before such a
#: field existed keeps its name and can be resumed.
_LEFT_OUT = {
    path: operator.attrgetter(path)(Config)
    for path in ("host.evaluate_on", "learn.hold_noise", "replay.age_decay")
}


def as_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain JSON values."""
    plain = dataclasses.asdict(config)
    plain["variants"] = [v.name for v in config.variants]
    for path, default in _LEFT_OUT.items():
        group, name = path.split(".")
        if plain[group][name] == default:
            del plain[group][name]
    return json.loads(json.dumps(plain))


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return lines "path: old -> new" for two `as_dict`; `steps` may differ, for a longer run."""
    lines = []
    for name in sorted({*old, *new} - ({"steps"} if not prefix else set())):
        missing = _LEFT_OUT.get(f"{prefix}{name}")
        a, b = old.get(name, missing), new.get(name, missing)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += difference(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a} -> {b}")
    return lines


def run_name(config: Config) -> str:
    """Return a directory name, readable and different for every different configuration."""
    plain = {k: v for k, v in as_dict(config).items() if k != "steps"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:6]
    parts = [config.env]
    if config.has_model:
        parts += [config.algo, config.agent_name]
        parts.append("_".join("+".join(v.fixes) or "none" for v in config.variants[:4]))
        parts += [config.trust_name] if config.trust_name not in ("none", config.algo) else []
    else:
        parts.append(config.agent_name)
    parts.append(config.preset)
    parts += [f"oracle-{config.oracle}"] if config.oracle != "none" else []
    return "-".join([*parts, digest]).replace(":", ".").replace("/", ".")
