"""Model-based policy optimisation (Janner et al., 2019): what happens to one row.

`learn` is one environment step's learning, `fit` refits the model; without a model `learn` is the
model-free agent alone. `schedule` says when each happens, and `runtime.program` maps them over
the rows.
"""

import functools
import operator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dynajax import nets, replay, schedule
from dynajax.agents import make_agent
from dynajax.config import Config
from dynajax.models import ensemble, rollouts
from dynajax.refit import Refits
from dynajax.types import EXPLORE, Array, LearnerState, Metrics, Params, Replay, Shared, Transition


class ModelTransitions(NamedTuple):
    """The synthetic transitions of one environment step, from B states of the real ring."""

    slots: Any  # (B,) of the real ring, where the rollouts begin
    transition: Transition  # leaves (B, ...)
    store: Any  # (B,) bool: may be learned from


class _Keys(NamedTuple):
    """What one environment step's learning draws with."""

    after: Array  # for the steps that follow
    starts: Array
    rollout: Array
    real: Array
    synthetic: Array
    update: Array
    expand: Array


class _Fresh(NamedTuple):
    """Where rollouts begin that an update imagines afresh."""

    obs: Array  # (B, D)
    key: Array


class Algorithm(Refits):
    """The algorithm, bound to a run's static configuration and its task."""

    def init(self, config: Config, variant: Array, seed: Array) -> LearnerState:
        """A new row. Its keys come from its seed alone, so rows do not depend on their neighbours.

        Args:
          config: the row's own.
          variant, seed: () int.
        """
        seed_key, agent_key, model_key, key = jax.random.split(jax.random.PRNGKey(seed), 4)
        sizes, spec = self.config.replay, self.spec
        row = LearnerState(
            config=config,
            variant=variant,
            key=key,
            seed_key=seed_key,
            agent=make_agent(config, spec).init(agent_key),
            real_buffer=replay.init(sizes.real, spec.obs_dim, spec.action_dim),
            model=None,
            synthetic_buffer=None,
            trust=None,
        )
        if not self.config.has_model:
            return row
        rule = self._rule(row)
        row = row._replace(model=ensemble.init(config.model, spec, model_key), trust=rule.init())
        if self.config.rollout.fresh:
            return row
        ring = replay.init(
            sizes.synthetic, spec.obs_dim, spec.action_dim, uses_weights=rule.uses_weights
        )
        return row._replace(synthetic_buffer=ring)

    def act(self, row: LearnerState, obs: Array, step: Array) -> Array:
        """The exploring action at an environment step: (D,) -> (A,); uniform at first."""
        chex.assert_shape(obs, (self.spec.obs_dim,))
        key = jax.random.fold_in(jax.random.fold_in(row.seed_key, EXPLORE), step)
        uniform_key, policy_key = jax.random.split(key)
        uniform = jax.random.uniform(uniform_key, (self.spec.action_dim,), minval=-1, maxval=1)
        policy, _ = self.agent(row).act(row.agent, obs, policy_key)
        return jnp.where(schedule.due(self.config, step).random, uniform, policy)

    def policy(self, row: LearnerState) -> Any:
        """What `greedy` reads of the agent, as it is kept for use elsewhere."""
        return self.agent(row).policy(row.agent)

    def networks(self, row: LearnerState) -> dict[str, Params]:
        """Parameters by the network's name, the model's too."""
        networks = self.agent(row).networks(row.agent)
        return networks if row.model is None else {**networks, "model": row.model.params}

    def deterministic_action(self, row: LearnerState, obs: Array) -> Array:
        """The deterministic action: (..., D) -> (..., A)."""
        return self.agent(row).deterministic_action(row.agent, obs)

    def value(self, row: LearnerState, obs: Array) -> Array:
        """What the critics expect of the deterministic action, on average: (..., D) -> (...)."""
        agent = self.agent(row)
        return agent.value(row.agent, obs, agent.deterministic_action(row.agent, obs)).mean(0)

    def insert(
        self, row: LearnerState, shared: Shared, transition: Transition, valid: Array
    ) -> LearnerState:
        """Stores one real transition, leaves (...) of one step, if it is `valid` ()."""
        block = jax.tree.map(lambda x: x[None], replay.pack(transition, valid))
        return row._replace(
            real_buffer=replay.add(row.real_buffer, block, shared.step),
            agent=self.agent(row).update_obs_statistics(row.agent, transition.obs, valid),
        )

    def _keys(self, row: LearnerState) -> _Keys:
        after, rollout, real, synthetic, update, expand = jax.random.split(row.key, 6)
        # Fresh transitions are not drawn, but the states where they begin.
        starts = synthetic
        if not self.config.rollout.fresh:
            starts, rollout = jax.random.split(rollout)
        return _Keys(after, starts, rollout, real, synthetic, update, expand)

    def _slots(self, row: LearnerState, shared: Shared, keys: _Keys) -> tuple[Array, Array | None]:
        """Slots of the real ring: of U minibatches' real part (U, B), and where rollouts begin: (B,) of
        those that are stored, (U, B) of fresh ones, None without.
        """
        config, updates = self.config, self.config.learn.utd
        wanted: list[tuple[Array, tuple[int, ...]]] = [(keys.real, (updates, config.real_batch))]
        if config.has_model and not config.rollout.fresh:
            wanted.append((keys.starts, (config.rollout.batch,)))
        elif config.has_model and config.synthetic_batch:
            wanted.append((keys.starts, (updates, config.num_parallel_rollouts)))
        real, *starts = replay.sample_indices(row.real_buffer, shared.step + 1, *wanted)
        return real, starts[0] if starts else None

    def _imagine(
        self,
        row: LearnerState,
        length: Array | int,
        key: Array,
        trusted: Any,
        obs: Array,
        alive: Array,
        h: Array | int,
    ) -> tuple[Any, rollouts.ModelStep]:
        """Step `h` of rollouts of `length` from obs (B, D), see `rollouts.imagine`.

        Args:
          row: with what is `_asked` of its model.
        """
        assert row.model is not None
        return rollouts.model_step(
            row.config,
            self.spec,
            self._rule(row),
            functools.partial(self.agent(row).act, row.agent),
            row.model,
            trusted,
            obs,
            alive,
            h,
            length,
            jax.random.fold_in(key, h),
        )

    def _asked(self, row: LearnerState) -> LearnerState:
        """The row with that of its model which rollouts ask."""
        if row.model is None:
            return row
        return row._replace(model=rollouts.asked(self._rule(row), row.model))

    def _step(self, row: LearnerState, state: Any, length: int, key: Array) -> rollouts.Step:
        """The steps of rollouts of `length` by the agent in `state`."""
        return functools.partial(self._imagine, row._replace(agent=state), length, key)

    def roll_out(
        self, row: LearnerState, shared: Shared, length: Array | int, slots: Array, key: Array
    ) -> tuple[LearnerState, Metrics]:
        """The row once rollouts of `length` are in its synthetic ring, and their figures.

        A rollout stops at a termination, where the model leaves the finite numbers, or where the
        rule of trust ends it; its later slots are holes.

        Args:
          slots: (B,) of the real ring, where they begin.
        """
        assert row.synthetic_buffer is not None
        size, longest = self.config.rollout.batch, max(self.config.rollout.horizon[-2:])
        blocks = self.config.replay.synthetic // size
        starts = replay.take(row.real_buffer, slots).data
        asked = self._asked(row)

        def extend(h: Array, carry: Any) -> Any:
            ring, trusted, obs, alive, figures = carry
            trusted, imagined = self._imagine(asked, length, key, trusted, obs, alive, h)
            # The remainder first: in all there can be more transitions than an int32 holds.
            at = (shared.blocks + h) % blocks * size
            store, alive, obs = rollouts.update_masks(alive, obs, imagined)
            ring = replay.add(ring, replay.pack(imagined.transition, store, imagined.weight), at)
            figures = rollouts.accumulate_metrics(figures, h, store, imagined)
            return ring, trusted, obs, alive, figures

        figures = rollouts.init_metrics(self._rule(row), longest)
        carry = (row.synthetic_buffer, row.trust, starts.obs, jnp.ones(size, bool), figures)
        ring, trusted, _, _, figures = jax.lax.fori_loop(0, length, extend, carry)
        metrics = rollouts.figures(self._rule(row), figures, size, length)
        return row._replace(synthetic_buffer=ring, trust=trusted), metrics

    def propose_transitions(
        self, row: LearnerState, shared: Shared, transition: Transition, valid: Array
    ) -> tuple[LearnerState, ModelTransitions]:
        """Inserts, and makes the synthetic transitions that `learn` would make, for an oracle.

        Rollouts have one step here. Arguments as for `learn`.
        """
        row = self.insert(row, shared, transition, valid)
        keys = self._keys(row)
        size = (self.config.rollout.batch,)
        slots = replay.draw(keys.starts, row.real_buffer, shared.step + 1, size)
        starts, alive = replay.take(row.real_buffer, slots).data, jnp.ones(size, bool)
        asked = self._asked(row)
        _, imagined = self._imagine(asked, 1, keys.rollout, row.trust, starts.obs, alive, 0)
        return row, ModelTransitions(slots, imagined.transition, imagined.keep_mask)

    def learn(
        self,
        row: LearnerState,
        shared: Shared,
        transition: Transition,
        valid: Array,
        corrected: ModelTransitions | None = None,
    ) -> tuple[LearnerState, Metrics]:
        """One environment step's learning: insert, rollouts, and U updates on mixed minibatches.

        Args:
          shared: the counters before this step.
          transition, valid: one real step, leaves (...).
          corrected: an oracle's word on what `propose` made of the same step, in place of the
            rollouts.
        """
        config, updates = self.config, self.config.learn.utd
        if corrected is None:
            row = self.insert(row, shared, transition, valid)
        keys = self._keys(row)
        slots, starts = self._slots(row, shared, keys)
        real = replay.take(row.real_buffer, slots)
        row, synthetic, figures = self._synthetic(row, shared, keys, starts, corrected)
        if isinstance(synthetic, Replay) and not config.rollout.on_top:
            real, synthetic = jax.vmap(replay.beside)(real, synthetic), None
        # Or XLA takes the minibatches out of the rings inside the loop, and copies the rings for it.
        real, synthetic = jax.lax.optimization_barrier((real, synthetic))
        blocks = [x.data.reward for x in (real, synthetic) if isinstance(x, Replay)]
        figures |= _rewards(jnp.concatenate(blocks, 1), config.real_batch)
        each = jax.random.split(keys.expand, updates) if self._expands else None
        parts = 2 if config.has_model and config.rollout.on_top else 1
        noise = self.agent(row).noise(keys.update, updates * parts)
        noises = tuple(
            jax.tree.map(operator.itemgetter(slice(i, None, parts)), noise) for i in range(parts)
        )

        names: list[str] = []
        asked = self._asked(row)

        def update(carry: tuple[Any, Any], inputs: Any) -> tuple[tuple[Any, Any], Array]:
            state, trusted, metrics = self._update(asked, *carry, *inputs)
            names[:] = metrics
            # As one array, for each figure alone is a kernel of a GPU.
            return (state, trusted), jnp.stack(list(metrics.values()))

        carry = row.agent, row.trust
        with nets.matmul_precision(config.precision):
            (state, trusted), values = jax.lax.scan(update, carry, (real, synthetic, noises, each))
        metrics = dict(zip(names, values.mean(0), strict=True))
        row = row._replace(key=keys.after, agent=state, trust=trusted)
        return row, {**metrics, **figures}

    @property
    def _expands(self) -> bool:
        return self.config.has_model and self.config.rollout.value_expansion_steps > 0

    def _update(
        self,
        row: LearnerState,
        state: Any,
        trusted: Any,
        packed: Replay,
        synthetic: Any,
        noises: tuple[Any, ...],
        key: Array | None,
    ) -> tuple[Any, Any, Metrics]:
        """One update: on real and synthetic transitions mixed, or on those of each by itself.

        Args:
          state: the agent's; trusted: that of the rule of trust.
          packed: the real ones, leaves (B, ...).
          synthetic: of `_synthetic`, for this update.
          noises: what each minibatch's learning draws with.
          key: for targets that reach further.
        """
        config, agent = self.config, self.agent(row)
        real = replay.minibatch(packed)
        metrics: Metrics = {}
        if isinstance(synthetic, _Fresh):
            length = config.rollout.horizon[0]
            trusted, synthetic, metrics = rollouts.fresh(
                self._step(row, state, length, synthetic.key),
                self._rule(row),
                trusted,
                synthetic.obs,
                length,
                config.synthetic_batch,
            )
        elif synthetic is not None:
            synthetic = replay.minibatch(synthetic)
        alone = len(noises) == 2
        batches = (real, synthetic) if alone else (replay.beside(real, synthetic),)
        learned: list[Metrics] = []
        for part, (batch, noise) in enumerate(zip(batches, noises, strict=True)):
            reached: Metrics = {}
            if self._expands:
                assert key is not None
                length = config.rollout.value_expansion_steps
                trusted, batch, reached = rollouts.expand(
                    self._step(row, state, length, jax.random.fold_in(key, part)),
                    trusted,
                    batch,
                    length,
                    row.config.learn.discount,
                    agent.temperature(state),
                )
            # A hole counts for nothing, and what would weigh it may be no number.
            counts = batch.valid.astype(jnp.float32)
            weight = counts if batch.weight is None else jnp.where(batch.valid, batch.weight, 0.0)
            updated, of_update = agent.update(state, batch.data, weight, counts, noise)
            if part or not config.real_batch:
                # Of nothing but holes the temperature would learn an entropy of 0, and Adam coast on.
                some = batch.valid.any()
                updated = jax.tree.map(functools.partial(jnp.where, some), updated, state)
            state = updated
            learned.append({**of_update, **reached})
        mean = jax.tree.map(lambda *x: functools.reduce(operator.add, x) / len(x), *learned)
        return state, trusted, {**mean, **metrics}

    def _synthetic(
        self,
        row: LearnerState,
        shared: Shared,
        keys: _Keys,
        slots: Array | None,
        corrected: ModelTransitions | None,
    ) -> tuple[LearnerState, Any, Metrics]:
        """The synthetic part of U minibatches: stored transitions (U, B, ...), or where those of each
        update begin, or None; with the row once its rollouts from `slots` are stored, and figures.
        """
        if slots is None:
            return row, None, {}
        if not self.config.rollout.fresh:
            return self._stored(row, shared, keys, slots, corrected)
        obs = replay.take(row.real_buffer, slots).data.obs
        return row, _Fresh(obs, jax.random.split(keys.rollout, self.config.learn.utd)), {}

    def _stored(
        self,
        row: LearnerState,
        shared: Shared,
        keys: _Keys,
        slots: Array,
        corrected: ModelTransitions | None,
    ) -> tuple[LearnerState, Replay, Metrics]:
        """The row with this step's rollouts, transitions of U minibatches, and figures."""
        config = self.config
        size, length = config.rollout.batch, rollouts.horizon(config, shared.step)
        blocks = config.replay.synthetic // size
        if corrected is None:
            row, figures = self.roll_out(row, shared, length, slots, keys.rollout)
        else:
            assert row.synthetic_buffer is not None
            at = shared.blocks % blocks * size
            block = replay.pack(corrected.transition, corrected.store)
            row = row._replace(synthetic_buffer=replay.add(row.synthetic_buffer, block, at))
            figures = {"valid_fraction": corrected.store.mean()}
        ring = row.synthetic_buffer
        assert ring is not None
        filled = jnp.minimum(shared.blocks + length, blocks) * size
        shape = (config.learn.utd, config.synthetic_batch)
        synthetic = replay.take(ring, replay.draw(keys.synthetic, ring, filled, shape))
        return row, synthetic, figures

    def count(self, shared: Shared) -> Shared:
        """The counters after an environment step that learned."""
        config = self.config
        stored = config.has_model and not config.rollout.fresh
        blocks = rollouts.horizon(config, shared.step) if stored else 0
        return Shared(shared.step + 1, shared.blocks + blocks)

    def reset(self, row: LearnerState) -> LearnerState:
        """A fresh agent from fresh keys; data and model stay (Nikishin et al., 2022)."""
        key, reset_key = jax.random.split(row.key)
        return row._replace(key=key, agent=self.agent(row).reset(row.agent, reset_key))


def _rewards(rewards: Array, real: int) -> Metrics:
    """Means of rewards (U, B), of the `real` first of each minibatch and of those that are stored; both at
    once, for each alone is two kernels of a GPU.
    """
    counts = np.array([real, rewards.shape[1] - real])
    of = (np.arange(rewards.shape[1]) < real) == np.array([[[True]], [[False]]])
    means = jnp.where(of, rewards, 0.0).sum((1, 2)) / (len(rewards) * counts)
    names = "real_reward_mean", "synthetic_reward_mean"
    return {name: mean for name, mean, some in zip(names, means, counts, strict=True) if some}
