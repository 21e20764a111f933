"""What a run is: frozen dataclasses, presets, and the checks that refuse an impossible one.

A `Config` is a pytree. Fields marked `traced` only scale arithmetic: they are its leaves, so rows
of one program can differ in them. All others are static and shape the program.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax


def _traced(default: float, low: float = -math.inf, high: float = math.inf) -> Any:
    return field(default=default, metadata={"traced": True, "range": (low, high)})


def _static(default: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    return field(default=default, metadata={"range": (low, high)})


def _pytree(cls: type) -> type:
    names = [f.name for f in dataclasses.fields(cls)]
    data = [
        f.name
        for f in dataclasses.fields(cls)
        if f.metadata.get("traced") or f.name in ("sac", "model")
    ]
    return jax.tree_util.register_dataclass(cls, data, [n for n in names if n not in data])


@_pytree
@dataclass(frozen=True)
class SACConfig:
    """Soft Actor-Critic (Haarnoja et al., 2018); BUILD_NOTES.md has the numbers' source."""

    hidden: tuple[int, ...] = _static((256, 256), 1)
    utd: int = _static(20, 1)  # gradient updates per environment step
    batch: int = _static(256, 1)
    critic_layer_norm: bool = _static(False)
    reset_every: int = _static(0, 0)  # environment steps between fresh agents; 0: never
    learning_rate: float = _traced(3e-4, 0)
    discount: float = _traced(0.99, 0, 1)
    polyak: float = _traced(0.005, 0, 1)
    initial_temperature: float = _traced(1.0, 1e-8)
    target_entropy: float = _traced(-0.5)  # per action entry


@_pytree
@dataclass(frozen=True)
class ModelConfig:
    """The probabilistic ensemble (Chua et al., 2018; Janner et al., 2019)."""

    members: int = _static(7, 1)
    elites: int = _static(5, 1)
    width: int = _static(200, 1)
    depth: int = _static(4, 1)  # hidden layers
    batch: int = _static(256, 1)
    fit_every: int = _static(250, 1)  # environment steps
    schedule: Literal["fixed", "early_stop"] = _static("fixed")
    fit_steps: int = _static(5000, 1)  # gradient steps of a fit; early_stop: at most
    round_steps: int = _static(250, 1)  # early_stop: steps between two holdout scores
    patience: int = _static(5, 1)  # early_stop: rounds without a gain before it ends
    average_steps: int = _static(1, 1)  # a fit's weights are a mean over about so many; 1: its last
    score_size: int = _static(5000, 1)  # holdout transitions scored, at most
    learned_bounds: bool = _static(False)  # log-variance bounds learned as in Chua et al.
    holdout: float = _traced(0.2, 0.001, 0.9)
    min_gain: float = _traced(0.01, 0, 0.99)  # early_stop: relative gain that counts
    learning_rate: float = _traced(3e-4, 0)
    weight_decay: float = _traced(1.0, 0)  # multiplies the decay of each layer
    log_variance_min: float = _traced(-10.0)
    log_variance_max: float = _traced(0.5)
    bound_penalty: float = _traced(0.01, 0)


@dataclass(frozen=True)
class RolloutConfig:
    """Synthetic rollouts from real states."""

    batch: int = _static(400, 1)  # starts per environment step
    # One number, or Janner's schedule (first step, last step, first horizon, last horizon).
    horizon: tuple[int, ...] = _static((1,), 0)
    real_fraction: float = _static(0.05, 0, 1)  # of an agent's minibatch


@dataclass(frozen=True)
class ReplayConfig:
    """Capacities in transitions."""

    real: int = _static(500_000, 1)
    synthetic: int = _static(1_000_000, 1)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation with the deterministic policy."""

    every: int = _static(5000, 1)  # environment steps
    episodes: int = _static(10, 1)
    checkpoints: int = _static(2, 1)  # how many stay, the newest; a diagnosis reads all


@dataclass(frozen=True)
class HostConfig:
    """The host engine."""

    workers: int = _static(-1, -1)  # processes that step environments; 0: none, -1: as measured
    time_limit: int = _static(1000, 1)  # for a task that has none of its own


class Variant(NamedTuple):
    """One column of a study: a set of fixes, and values of traced fields."""

    fixes: tuple[str, ...] = ()
    values: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        fixes = ",".join(self.fixes) or "none"
        return ";".join([fixes, *(f"{path}={value:g}" for path, value in self.values)])


@_pytree
@dataclass(frozen=True)
class Config:
    """A whole run."""

    env: str = _static("cheetah-run")
    algo: Literal["mbpo", "sac"] = _static("mbpo")
    preset: str = _static("paper")
    engine: Literal["host", "mjx"] = _static("host")
    oracle: Literal["none", "reward", "state", "both"] = _static("none")  # what is the simulator's
    variants: tuple[Variant, ...] = (Variant(),)
    seed: int = _static(0, 0, 2**31 - 1)
    seeds: int = _static(1, 1)
    steps: int = _static(500_000, 1)
    random_steps: int = _static(10_000, 2)
    sac: SACConfig = SACConfig()
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    replay: ReplayConfig = ReplayConfig()
    eval: EvalConfig = EvalConfig()
    host: HostConfig = HostConfig()

    @property
    def rows(self) -> int:
        return len(self.variants) * self.seeds

    @property
    def row_pairs(self) -> list[tuple[int, int]]:
        """(index of the variant, seed) of each of the S rows."""
        seeds = range(self.seed, self.seed + self.seeds)
        return [(index, seed) for index in range(len(self.variants)) for seed in seeds]

    @property
    def real_batch(self) -> int:
        """Real transitions in an agent's minibatch."""
        if self.algo == "sac":
            return self.sac.batch
        return round(self.rollout.real_fraction * self.sac.batch)


PAPER = Config()
#: The same algorithm at a size for two CPU cores; chosen by measurement (BUILD_NOTES.md).
QUICK = Config(
    preset="quick",
    steps=15_000,
    random_steps=1_000,
    sac=SACConfig(hidden=(64, 64), utd=10, batch=128),
    model=ModelConfig(
        members=5,
        elites=4,
        width=128,
        depth=3,
        batch=128,
        learning_rate=3e-3,
        schedule="early_stop",
        fit_steps=500,
        round_steps=100,
        patience=3,
        score_size=1000,
    ),
    rollout=RolloutConfig(batch=200),
    replay=ReplayConfig(real=100_000, synthetic=100_000),
    eval=EvalConfig(every=1000, episodes=5),
)
#: `paper`, but for an ensemble that learns as much in a third of the gradient steps; chosen by
#: measurement (BUILD_NOTES.md, "Less arithmetic for the same learning").
FAST = dataclasses.replace(
    PAPER,
    preset="fast",
    model=dataclasses.replace(PAPER.model, learning_rate=2e-3, fit_steps=1650, average_steps=100),
)
PRESETS: dict[str, Config] = {"quick": QUICK, "paper": PAPER, "fast": FAST}


def assign(config: Config, path: str, value: Any) -> Config:
    """`config` with one field replaced, for example "model.width"."""
    if "." not in path:
        return dataclasses.replace(config, **{path: value})
    group, name = path.split(".")
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **{name: value})}
    )


def config_of(config: Config, variant: Variant) -> Config:
    """`config` with the values of one of its variants."""
    return functools.reduce(lambda c, item: assign(c, *item), variant.values, config)


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON has it."""
    plain = dataclasses.asdict(config)
    plain["variants"] = [v.name for v in config.variants]
    return json.loads(json.dumps(plain))


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines "path: old -> new" for two `as_dict`; `steps` may differ, for a run can go on."""
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
    env = config.env.replace(":", ".").replace("/", ".")
    fixes = "_".join("+".join(v.fixes) or "none" for v in config.variants[:4])
    parts = [env, config.algo, *([fixes] if config.algo == "mbpo" else []), config.preset, digest]
    if config.oracle != "none":
        parts.insert(-1, f"oracle-{config.oracle}")
    return "-".join(parts)
