"""The order of things: dyna-style training of all rows, on the host engine."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import compiler, envs, mbpo, rollouts, sac
from dynajax.config import Config, config_of, run_name
from dynajax.envs.host import HostEnvs
from dynajax.evaluate import Evaluator
from dynajax.journal import Journal, interruptions
from dynajax.loggers import row_names
from dynajax.types import Array, EnvSpec, Metrics, Row, Shared, TrainState, Transition


class Program(NamedTuple):
    """The jitted functions of a run. Those that return a state take theirs as a donation."""

    init: Callable[[], TrainState]
    act: Callable[[TrainState, Any, int], Array]  # obs (S, D) -> (S, A)
    greedy: Callable[[TrainState, Any], Array]  # obs (S, K, D) -> (S, K, A)
    insert: Callable[[TrainState, Transition, Any], TrainState]
    fit: jax.stages.Wrapped  # TrainState -> TrainState, Metrics
    learn: jax.stages.Wrapped  # TrainState, Transition, valid (S,) -> TrainState, Metrics
    reset_agent: Callable[[TrainState], TrainState]

    def lower(self, config: Config, spec: EnvSpec) -> list[jax.stages.Lowered]:
        """The large programs, before they are compiled."""
        state = jax.eval_shape(self.init)

        def real(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((config.rows, *shape), np.float32)

        obs, scalar = real(spec.obs_dim), real()
        transition = Transition(obs, real(spec.action_dim), scalar, scalar, obs)
        valid = jax.ShapeDtypeStruct((config.rows,), bool)
        learn = self.learn.lower(state, transition, valid)
        return [learn, self.fit.lower(state)] if config.algo == "mbpo" else [learn]


def build(config: Config, spec: EnvSpec) -> Program:
    """Maps one row's functions over the rows, and jits them. Transitions have leaves (S, ...)."""

    configs: list[Config] = []
    variants: list[int] = []
    seeds: list[int] = []
    for index, variant in enumerate(config.variants):
        configs += [config_of(config, variant)] * config.seeds
        variants += [index] * config.seeds
        seeds += range(config.seed, config.seed + config.seeds)

    # The seeds are arguments, so that all seeds share one compiled program in the cache.
    @jax.jit
    def init(configs: Config, variants: Array, seeds: Array) -> TrainState:
        rows = jax.vmap(lambda c, v, s: mbpo.init(c, spec, v, s))(configs, variants, seeds)
        return TrainState(Shared(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)), rows)

    def act(state: TrainState, obs: Array, step: Array) -> Array:
        return jax.vmap(lambda row, o: mbpo.act(row, spec, o, step))(state.rows, obs)

    def greedy(state: TrainState, obs: Array) -> Array:
        def one(row: Row, o: Array) -> Array:
            return sac.greedy(row.config.sac, row.agent.actor, o, spec.action_dim)

        return jax.vmap(one)(state.rows, obs)

    def insert(state: TrainState, transition: Transition, valid: Array) -> TrainState:
        shared = state.shared
        rows = jax.vmap(lambda row, t, v: mbpo.insert(row, shared, t, v))(
            state.rows, transition, valid
        )
        return TrainState(shared._replace(step=shared.step + 1), rows)

    def fit(state: TrainState) -> tuple[TrainState, Metrics]:
        rows, metrics = jax.vmap(mbpo.fit)(state.rows)
        return state._replace(rows=rows), metrics

    def learn(
        state: TrainState, transition: Transition, valid: Array
    ) -> tuple[TrainState, Metrics]:
        shared = state.shared
        rows, metrics = jax.vmap(lambda row, t, v: mbpo.learn(row, shared, spec, t, v))(
            state.rows, transition, valid
        )
        blocks = rollouts.horizon(config, shared.step) if config.algo == "mbpo" else 0
        return TrainState(Shared(shared.step + 1, shared.blocks + blocks), rows), metrics

    def reset_agent(state: TrainState) -> TrainState:
        return state._replace(rows=jax.vmap(lambda row: mbpo.reset_agent(row, spec))(state.rows))

    donated = functools.partial(compiler.jit, donate_argnums=0)
    return Program(
        init=functools.partial(
            init,
            jax.tree.map(lambda *leaves: np.array(leaves, np.float32), *configs),
            np.array(variants, np.int32),
            np.array(seeds, np.int32),
        ),
        act=compiler.jit(act),
        greedy=compiler.jit(greedy),
        insert=donated(insert),
        fit=donated(fit),
        learn=donated(learn),
        reset_agent=donated(reset_agent),
    )


class Result(NamedTuple):
    """What `train` gives back; `report.read_run(folder)` has the curves as arrays."""

    config: Config
    folder: Path
    state: TrainState
    finished: bool  # False after an interruption


def train(
    config: Config,
    out: str | Path | None = None,
    *,
    command: str = "dynajax.train",
    quiet: bool = False,
    wandb: bool = False,
) -> Result:
    """Trains all rows of `config`, or goes on where an earlier call in the same folder stopped.

    Args:
      out: the run's folder; runs/<name of the configuration> if not given.
      command: what is written into config.json as the way to repeat the run.
      quiet: prints nothing.
      wandb: logs to Weights & Biases too.

    Raises:
      UsageError: with one line that says what to change.
    """
    folder = Path(out) if out is not None else Path("runs") / run_name(config)
    spec = envs.spec(config.env, time_limit=config.host.time_limit)
    program = build(config, spec)
    shapes = jax.eval_shape(program.init)
    seeds = [seed for _, seed in row_names(config)]
    with (
        interruptions() as interrupted,
        Journal(folder, config, shapes, command, quiet, wandb) as journal,
        contextlib.closing(HostEnvs(config, spec, seeds)) as env,
        contextlib.closing(Evaluator(config, spec, seeds)) as evaluate,
    ):
        journal.compile(lambda: program.lower(config, spec))
        state, pending, step = journal.restore(program.init, env)
        for t in range(step, config.steps):
            chosen = program.act(state, env.obs, t)

            # The device learns from the last transition while the environment takes this action.
            learning = t - config.random_steps
            if pending is None:
                pass
            elif learning < 0:
                state = program.insert(state, *pending)
            else:
                if learning and config.sac.reset_every and t % config.sac.reset_every == 0:
                    state = program.reset_agent(state)
                if config.algo == "mbpo" and learning % config.model.fit_every == 0:
                    state = journal.fit(t, program.fit, state)
                state, metrics = program.learn(state, *pending)
                journal.learned(metrics)

            with journal.clock("update"):
                action = np.asarray(chosen)
            with journal.clock("environment"):
                pending = env.step(action)
            step = t + 1
            journal.stepped(step)

            due = step % config.eval.every == 0
            if due:
                with journal.clock("evaluate"):
                    result = evaluate(functools.partial(program.greedy, state), step)
                journal.evaluated(step, result, env)
            stop = interrupted()
            if due or stop:
                journal.save(step, state, env, pending)
            if stop:
                break
    return Result(config, folder, state, finished=step >= config.steps)
