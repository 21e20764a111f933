"""Model-based policy optimisation (Janner et al., 2019): what happens to one row.

`learn` is one environment step's learning; `fit` refits the model. Plain SAC is the same `learn`
without a model. `train` maps these over rows and says when each happens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dynajax import replay
from dynajax.agents import sac
from dynajax.config import Config
from dynajax.models import ensemble, rollouts
from dynajax.types import Array, EnvSpec, Metrics, Model, Replay, Row, Shared, Transition

#: What is folded into a row's `seed_key`.
_EXPLORE, _HOLDOUT = 0, 1


def init(config: Config, spec: EnvSpec, variant: Array, seed: Array) -> Row:
    """A new row. Its keys come from its seed alone, so rows do not depend on their neighbours."""
    seed_key, agent_key, model_key, key = jax.random.split(jax.random.PRNGKey(seed), 4)
    with_model = config.algo == "mbpo"
    return Row(
        config=config,
        variant=variant,
        key=key,
        seed_key=seed_key,
        agent=sac.init(config.sac, spec, agent_key),
        real=replay.init(config.replay.real, spec.obs_dim, spec.action_dim),
        model=ensemble.init(config.model, spec, model_key) if with_model else None,
        synthetic=replay.init(config.replay.synthetic, spec.obs_dim, spec.action_dim)
        if with_model
        else None,
    )


def act(row: Row, spec: EnvSpec, obs: Array, step: Array) -> Array:
    """The exploring action at an environment step: (D,) -> (A,); uniform at first."""
    key = jax.random.fold_in(jax.random.fold_in(row.seed_key, _EXPLORE), step)
    uniform_key, policy_key = jax.random.split(key)
    uniform = jax.random.uniform(uniform_key, (spec.action_dim,), minval=-1, maxval=1)
    policy, _ = sac.sample(row.config.sac, row.agent.actor, obs, policy_key, spec.action_dim)
    return jnp.where(step < row.config.random_steps, uniform, policy)


def insert(row: Row, shared: Shared, transition: Transition, valid: Array) -> Row:
    """Stores one real transition; leaves (...) of one step."""
    block = jax.tree.map(lambda x: x[None], transition)
    return row._replace(real=replay.add(row.real, block, valid[None], shared.step))


def _fixes(row: Row) -> list[tuple[str, ...]]:
    return [variant.fixes for variant in row.config.variants]


def _holdout_key(row: Row) -> Array:
    return jax.random.fold_in(row.seed_key, _HOLDOUT)


def fit(row: Row) -> tuple[Row, Metrics]:
    """Refits the row's model to its real transitions."""
    assert row.model is not None
    key, now = jax.random.split(row.key)
    model, metrics = ensemble.fit(
        row.config.model, _fixes(row), row.variant, row.model, row.real, _holdout_key(row), now
    )
    return row._replace(key=key, model=model), metrics


def fit_share(row: Row, over_members: ensemble.Map) -> Model:
    """The first part of `fit` on the fixed schedule: the model with those members trained that
    `over_members` keeps, and these alone.
    """
    assert row.model is not None
    config = row.config.model
    _, now = jax.random.split(row.key)
    model, data = ensemble.prepare(
        config, _fixes(row), row.variant, row.model, row.real, _holdout_key(row)
    )
    return ensemble.train_steps(config, model, row.real, data, now, config.fit_steps, over_members)


def conclude_fit(row: Row, model: Model) -> tuple[Row, Metrics]:
    """The rest of `fit`, from the model with all members trained."""
    config = row.config.model
    key, _ = jax.random.split(row.key)
    data = ensemble.split(config, row.real, _holdout_key(row))
    model, metrics = ensemble.conclude(config, model, data, jnp.asarray(config.fit_steps))
    return row._replace(key=key, model=model), metrics


class _Keys(NamedTuple):
    """What one environment step's learning draws with."""

    after: Array  # for the steps that follow
    rollout: Array
    real: Array
    synthetic: Array
    update: Array


def _keys(row: Row) -> _Keys:
    return _Keys(*jax.random.split(row.key, len(_Keys._fields)))


def _starts(row: Row, shared: Shared, key: Array) -> tuple[Array, Array]:
    """Slots (B,) of the real ring where rollouts begin, and the key for the rollouts."""
    start_key, key = jax.random.split(key)
    size = (row.config.rollout.batch,)
    return replay.draw(start_key, row.real, shared.step + 1, size), key


def imagine(row: Row, shared: Shared, spec: EnvSpec, length: Array | int, key: Array) -> Replay:
    """The synthetic ring after this step's rollouts of `length` from states of the real ring.

    A rollout stops at a termination, or where the model leaves the finite numbers; its later
    slots are holes.
    """
    assert row.model is not None and row.synthetic is not None
    config, agent, model = row.config, row.agent, row.model
    size = config.rollout.batch
    blocks = config.replay.synthetic // size
    slots, key = _starts(row, shared, key)
    starts = replay.take(row.real, slots)

    def extend(i: Array, carry: tuple[Replay, Array, Array]) -> tuple[Replay, Array, Array]:
        ring, obs, alive = carry
        transition, finite = rollouts.imagine(
            config, spec, agent, model, obs, jax.random.fold_in(key, i)
        )
        alive = alive & finite
        # The remainder first: in all there can be more transitions than an int32 holds.
        ring = replay.add(ring, transition, alive, (shared.blocks + i) % blocks * size)
        alive = alive & (transition.discount > 0)
        return ring, jnp.where(alive[:, None], transition.next_obs, obs), alive

    carry = (row.synthetic, starts.obs, jnp.ones(size, bool))
    return jax.lax.fori_loop(0, length, extend, carry)[0]


def propose(
    row: Row, shared: Shared, spec: EnvSpec, transition: Transition, valid: Array
) -> tuple[Row, tuple[Array, Transition, Array]]:
    """Inserts, and makes the synthetic transitions that `learn` would make, for an oracle.

    Returns:
      The row, and of rollouts of one step the starts' slots (B,), the transitions, leaves (B, ...),
      and which are finite (B,).
    """
    config, model = row.config, row.model
    assert model is not None
    row = insert(row, shared, transition, valid)
    slots, key = _starts(row, shared, _keys(row).rollout)
    starts = replay.take(row.real, slots)
    key = jax.random.fold_in(key, 0)
    imagined = rollouts.imagine(config, spec, row.agent, model, starts.obs, key)
    return row, (slots, *imagined)


def learn(
    row: Row,
    shared: Shared,
    spec: EnvSpec,
    transition: Transition,
    valid: Array,
    told: tuple[Transition, Array] | None = None,
) -> tuple[Row, Metrics]:
    """One environment step's learning: insert, rollouts, and U updates on mixed minibatches.

    Args:
      shared: the counters before this step.
      transition, valid: one real step, leaves (...).
      told: an oracle's synthetic transitions, leaves (B, ...), and which count (B,), in place of
        the rollouts.
    """
    config = row.config
    row = insert(row, shared, transition, valid)
    keys = _keys(row)
    updates, real_size = config.sac.utd, config.real_batch
    batches = replay.take(
        row.real, replay.draw(keys.real, row.real, shared.step + 1, (updates, real_size))
    )
    rewards = {"real_reward_mean": batches.reward.mean()}
    if config.algo == "mbpo":
        length = rollouts.horizon(config, shared.step)
        blocks = config.replay.synthetic // config.rollout.batch
        if told is None:
            ring = imagine(row, shared, spec, length, keys.rollout)
        else:
            assert row.synthetic is not None
            start = shared.blocks % blocks * config.rollout.batch
            ring = replay.add(row.synthetic, *told, start)
        row = row._replace(synthetic=ring)
        filled = jnp.minimum(shared.blocks + length, blocks) * config.rollout.batch
        shape = (updates, config.sac.batch - real_size)
        imagined = replay.take(ring, replay.draw(keys.synthetic, ring, filled, shape))
        rewards["synthetic_reward_mean"] = imagined.reward.mean()
        batches = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), batches, imagined)

    def update(agent, inputs):  # type: ignore[no-untyped-def]
        return sac.update(config.sac, agent, *inputs)

    # One draw for all updates, for many small ones take longer than the arithmetic around them.
    noise = jax.random.normal(keys.update, (updates, 2, *batches.action.shape[1:]))
    agent, metrics = jax.lax.scan(update, row.agent, (batches, noise))
    metrics = {name: values.mean() for name, values in metrics.items()}
    return row._replace(key=keys.after, agent=agent), {**metrics, **rewards}


def reset_agent(row: Row, spec: EnvSpec) -> Row:
    """A fresh agent from fresh keys; data and model stay (Nikishin et al., 2022)."""
    key, now = jax.random.split(row.key)
    return row._replace(key=key, agent=sac.init(row.config.sac, spec, now))
