"""Model-based policy optimization (Janner et al., 2019, Algorithm 2), for one learner.

::

    for each agent step:
        every `model.fit_every` steps: fit the ensemble to D_env               fit
        act in the environment                                                 act
        add the transition to D_env                                            learn, insert
        roll out the policy in the model from states of D_env, into D_model    learn, source.prepare
        for each of U gradient updates:
            update the agent on real and synthetic transitions                 learn, update

U is `learn.utd`; a rollout has `rollout.horizon` steps. Where synthetic transitions come from is the
source's business (`synthetic`), how the agent learns from a minibatch is the agent's (`agents`).
Without a model this is the model-free agent. `schedule` decides when each function is called, and
`runtime.program` maps them over the learners.
"""

import functools
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynajax import exploration, replay, schedule
from dynajax.agents import Agent, make_agent
from dynajax.config import Config
from dynajax.models import DynamicsModel, ensemble, evaluation, make_model, training
from dynajax.models.fit_data import DataSplit
from dynajax.models.model_env import Critic, ModelEnv, Policy
from dynajax.models.training import FitInputs, MemberState
from dynajax.networks.dense import matmul_precision
from dynajax.replay import Request
from dynajax.synthetic import (
    Source,
    SourceKeys,
    UpdateInputs,
    expand_targets,
    make_source,
    reward_means,
)
from dynajax.trust import TrustRule, make_rule
from dynajax.types import (
    EXPLORE,
    HOLD,
    HOLDOUT,
    EnvSpec,
    LearnerState,
    Metrics,
    Minibatch,
    ModelState,
    PackedTransitions,
    Params,
    ReplayBuffer,
    Shared,
    Transition,
)
from dynajax.xla.barriers import materialize
from dynajax.xla.scan import scan_mean


class StepKeys(NamedTuple):
    """PRNG keys of one agent step's learning."""

    next: Array  # for later agent steps
    real: Array
    source: SourceKeys
    update: Array
    expansion: Array


@dataclass(frozen=True)
class MBPO:
    """The algorithm as pure functions of a `LearnerState`.

    Attributes:
      config: the run's configuration; a learner carries its own, whose traced fields are arrays.
      spec: the task.
    """

    config: Config
    spec: EnvSpec

    # The parts of a learner, bound to its own configuration.

    def agent(self, learner: LearnerState) -> Agent:
        """Return the agent."""
        return make_agent(learner.config, self.spec)

    def trust_rule(self, learner: LearnerState) -> TrustRule:
        """Return the trust rule."""
        return make_rule(learner.config, self.spec)

    def source(self, learner: LearnerState) -> Source:
        """Return the source of synthetic data."""
        return make_source(learner.config, self.spec, self.trust_rule(learner))

    def dynamics(self, learner: LearnerState) -> DynamicsModel:
        """Return the dynamics model."""
        return make_model(learner.config.model, self.spec)

    def model_env(self, learner: LearnerState) -> ModelEnv:
        """Return the model, in which the agent acts, as a batch of environments."""
        agent = self.agent(learner)
        return ModelEnv(
            learner.config,
            self.spec,
            self.trust_rule(learner),
            self.dynamics(learner),
            learner.model,
            *_actor_critic(agent, learner.agent),
            agent.action_noise,
        )

    # The algorithm.

    def init(self, config: Config, variant: Int[Array, ""], seed: Int[Array, ""]) -> LearnerState:
        """Return a new learner.

        Its keys come from its seed alone, so a learner does not depend on the others of the run.

        Args:
          config: the learner's own.
          variant: index into the run's variants.
        """
        seed_key, agent_key, model_key, key = jax.random.split(jax.random.PRNGKey(seed), 4)
        sizes, spec = self.config.replay, self.spec
        learner = LearnerState(
            config=config,
            variant=variant,
            key=key,
            seed_key=seed_key,
            agent=make_agent(config, spec).init(agent_key),
            real_buffer=replay.init(sizes.real, spec.obs_dim, spec.action_dim),
            model=cast(ModelState, None),
            synthetic=None,
            trust=None,
        )
        if not self.config.has_model:
            return learner
        return learner._replace(
            model=ensemble.init(self.dynamics(learner), model_key),
            trust=self.trust_rule(learner).init(),
            synthetic=self.source(learner).init(),
        )

    def act(
        self, learner: LearnerState, obs: Float[Array, " D"], step: Int[Array, ""]
    ) -> Float[Array, " A"]:
        """Return the exploring action at an agent step: random at first, then the policy's."""
        chex.assert_shape(obs, (self.spec.obs_dim,))
        explore_key = jax.random.fold_in(learner.seed_key, EXPLORE)
        random_key, policy_key = jax.random.split(jax.random.fold_in(explore_key, step))
        if (longest := self.config.learn.hold_noise) > 1:
            hold_key = jax.random.fold_in(learner.seed_key, HOLD)
            held = exploration.held_since(hold_key, step, longest)
            _, policy_key = jax.random.split(jax.random.fold_in(explore_key, held))
        random = jax.random.uniform(random_key, (self.spec.action_dim,), minval=-1, maxval=1)
        agent = self.agent(learner)
        policy, _ = agent.act(learner.agent, obs, agent.action_noise(policy_key, ()))
        return jnp.where(schedule.due(self.config, step).random, random, policy)

    def acting_part(self, learner: LearnerState) -> LearnerState:
        """Return the part of a learner that `act` and `deterministic_action` read, None for the rest.

        A call of a jitted function takes some microseconds for each array that it is passed.
        """
        empty = LearnerState(*cast(Any, [None] * len(LearnerState._fields)))
        return empty._replace(
            config=learner.config,
            seed_key=learner.seed_key,
            agent=self.agent(learner).acting_part(learner.agent),
        )

    def insert(
        self, learner: LearnerState, shared: Shared, transition: Transition, valid: Bool[Array, ""]
    ) -> LearnerState:
        """Add a real transition, leaves (...), to D_env if it is valid."""
        block = jax.tree.map(lambda x: x[None], replay.pack(transition, valid))
        agent = self.agent(learner)
        return learner._replace(
            real_buffer=replay.insert(learner.real_buffer, block, shared.step),
            agent=agent.update_obs_statistics(learner.agent, transition.obs, valid),
        )

    def learn(
        self, learner: LearnerState, shared: Shared, transition: Transition, valid: Bool[Array, ""]
    ) -> tuple[LearnerState, Metrics]:
        """Learn from one agent step (Algorithm 2, lines 5 to 10).

        Args:
          shared: the counters before this agent step.
          transition, valid: the real transition, leaves (...).
        """
        # Line 5: add to D_env.
        learner = self.insert(learner, shared, transition, valid)
        # Lines 6 to 8: roll out the policy in the model from states of D_env.
        source = self.source(learner)
        keys = self._split_keys(learner, source)
        real, starts = self._sample_real(learner, shared, source, keys)
        model_env = self.model_env(learner)
        learner, inputs, metrics = source.prepare(
            learner, shared, model_env, real, starts, keys.source
        )
        # Lines 9 and 10: U gradient updates on D_env and D_model.
        return self.update(learner, source, inputs, metrics, keys)

    def update(
        self,
        learner: LearnerState,
        source: Source,
        inputs: UpdateInputs,
        metrics: Metrics,
        keys: StepKeys,
    ) -> tuple[LearnerState, Metrics]:
        """Take the U gradient updates of one agent step (Algorithm 2, lines 9 and 10).

        An update is one gradient step, or two if real and synthetic minibatches are separate.

        Args:
          inputs: what `source` has prepared for the updates, leaves (U, ...).
          metrics: of the preparation.
        """
        inputs = materialize(inputs)
        metrics = metrics | reward_means(inputs, self.config.real_batch)
        expansion_keys = self._expansion_keys(keys)
        agent, noise = self.agent(learner), self._noise(learner, keys)
        model_env = self.model_env(learner)
        if self.config.has_model:
            model_env = model_env.select_members()

        def one_update(carry: tuple[Any, Any], x: Any) -> tuple[tuple[Any, Any], Metrics]:
            (state, trust), (inputs, noise, key) = carry, x
            env = model_env.with_policy(*_actor_critic(agent, state))
            trust, minibatches, metrics = source.minibatches(env, trust, inputs)
            losses = []
            for index, (batch, draws) in enumerate(zip(minibatches, noise, strict=True)):
                reach: Metrics = {}
                if key is not None:
                    env = model_env.with_policy(*_actor_critic(agent, state))
                    trust, batch, reach = self._expand(
                        learner, state, env, trust, batch, jax.random.fold_in(key, index)
                    )
                may_be_empty = index > 0 or not self.config.real_batch
                state, loss = _gradient_step(agent, state, batch, draws, may_be_empty)
                losses.append(loss | reach)
            mean = jax.tree.map(lambda *x: functools.reduce(operator.add, x) / len(x), *losses)
            return (state, trust), {**mean, **metrics}

        with matmul_precision(self.config.precision):
            (state, trust), losses = scan_mean(
                one_update, (learner.agent, learner.trust), (inputs, noise, expansion_keys)
            )
        learner = learner._replace(key=keys.next, agent=state, trust=trust)
        return learner, {**losses, **metrics}

    def fit(self, learner: LearnerState, shared: Shared) -> tuple[LearnerState, Metrics]:
        """Fit the ensemble to D_env (Algorithm 2, line 3), and calibrate the trust rule."""
        key, fit_key = jax.random.split(learner.key)
        state, metrics, data = training.fit(
            self.dynamics(learner),
            self._fixes(),
            learner.variant,
            learner.model,
            learner.real_buffer,
            self._holdout_key(learner),
            fit_key,
            self._fit_steps(shared),
            self.config.precision,
        )
        return self._calibrate(learner._replace(key=key), state, data), metrics

    def count_terminations(
        self, learner: LearnerState, slots: Int[Array, " W"]
    ) -> tuple[Int[Array, ""], ...]:
        """Compare the task's termination function with real transitions.

        Args:
          slots: numbers of transitions in the order of insertion; negative ones do not count.

        Returns:
          The numbers of transitions, terminations, predicted terminations, and those in both.
        """
        block = replay.gather(learner.real_buffer, slots % learner.real_buffer.capacity)
        data, valid = block.unpack(), block.valid & (slots >= 0)
        terminated, predicted = data.discount == 0, jnp.zeros_like(valid)
        if self.spec.termination is not None:
            ended = jax.vmap(self.spec.termination)(data.obs, data.action, data.next_obs)
            predicted = ended.astype(bool)
        counted = jnp.ones_like(valid), terminated, predicted, predicted & terminated
        return tuple((x & valid).sum() for x in counted)

    def reset(self, learner: LearnerState) -> LearnerState:
        """Return a learner with a new agent; data and model stay (Nikishin et al., 2022)."""
        key, reset_key = jax.random.split(learner.key)
        return learner._replace(key=key, agent=self.agent(learner).reset(learner.agent, reset_key))

    def count(self, shared: Shared) -> Shared:
        """Return the counters after an agent step that learned."""
        source = make_source(self.config, self.spec, make_rule(self.config, self.spec))
        blocks = source.blocks_after(shared)
        return Shared(shared.step + 1, blocks)

    # For evaluation, logs and export.

    def deterministic_action(
        self, learner: LearnerState, obs: Float[Array, "*B D"]
    ) -> Float[Array, "*B A"]:
        """Return the actions that evaluations take."""
        return self.agent(learner).deterministic_action(learner.agent, obs)

    def value(self, learner: LearnerState, obs: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Return the critics' mean value of the deterministic action."""
        return _actor_critic(self.agent(learner), learner.agent)[1].v(obs)

    def policy(self, learner: LearnerState) -> Any:
        """Return the part of the agent's state that `deterministic_action` reads."""
        return self.agent(learner).policy(learner.agent)

    def networks(self, learner: LearnerState) -> dict[str, Params]:
        """Return parameters by the network's name, the model's too."""
        networks = self.agent(learner).networks(learner.agent)
        return networks if learner.model is None else {**networks, "model": learner.model.params}

    # A fit in three parts, whose members may be trained on several devices.

    def begin_fit(self, learner: LearnerState) -> FitInputs:
        """Return what the members are trained with, in a fit of fixed length."""
        _, fit_key = jax.random.split(learner.key)
        state, data = training.prepare(
            self.dynamics(learner),
            self._fixes(),
            learner.variant,
            learner.model,
            learner.real_buffer,
            self._holdout_key(learner),
        )
        keys = jax.random.split(fit_key, self.config.model.members)
        return FitInputs(state.stats, data, MemberState(state.params, state.opt_state), keys)

    def train_member(
        self,
        config: Config,
        shared: Shared,
        inputs: FitInputs,
        buffer: ReplayBuffer,
        member: MemberState,
        key: Array,
    ) -> MemberState:
        """Train one of `inputs.members`.

        Args:
          config, buffer: the learner's own configuration and D_env.
        """
        dynamics = make_model(config.model, self.spec)
        steps = self._fit_steps(shared)
        return training.train_member(
            dynamics, inputs.stats, member, key, buffer, inputs.data, steps, self.config.precision
        )

    def end_fit(
        self, learner: LearnerState, shared: Shared, inputs: FitInputs, members: MemberState
    ) -> tuple[LearnerState, Metrics]:
        """Return the learner with its trained members, leaves (E, ...), and the fit's metrics."""
        model = learner.model
        key, _ = jax.random.split(learner.key)
        state = ModelState(*members, inputs.stats, model.elites, model.num_fits + 1)
        dynamics, steps = self.dynamics(learner), self._fit_steps(shared)
        state, metrics = training.finish(dynamics, state, inputs.data, steps)
        return self._calibrate(learner._replace(key=key), state, inputs.data), metrics

    # Details.

    def _split_keys(self, learner: LearnerState, source: Source) -> StepKeys:
        """Return the keys of one agent step's learning."""
        after, rollout, real, sample, update, expansion = jax.random.split(learner.key, 6)
        return StepKeys(after, real, source.split_keys(rollout, sample), update, expansion)

    def _sample_real(
        self, learner: LearnerState, shared: Shared, source: Source, keys: StepKeys
    ) -> tuple[PackedTransitions, Int[Array, "*shape"] | None]:
        """Sample the real part of U minibatches, and the slots where rollouts start."""
        buffer, count = learner.real_buffer, shared.step + 1
        sizes = self.config.learn.utd, self.config.real_batch
        of_updates = Request(keys.real, sizes, self.config.replay.age_decay)
        shape, window = source.start_shape(), self.config.rollout.start_window
        of_starts = [] if shape is None else [Request(keys.source.starts, shape)]
        if of_starts and window:
            (indices,) = replay.sample_indices(buffer, count, [of_updates])
            starts = replay.sample_indices(buffer, count, of_starts, window=window)
        else:
            indices, *starts = replay.sample_indices(buffer, count, [of_updates, *of_starts])
        return replay.gather(buffer, indices), starts[0] if starts else None

    def _noise(self, learner: LearnerState, keys: StepKeys) -> tuple[Any, ...]:
        """Draw the agent's noise for every minibatch of an update, leaves (U, ...)."""
        parts = 2 if self.config.separate else 1
        noise = self.agent(learner).noise(keys.update, self.config.learn.utd * parts)
        return tuple(
            jax.tree.map(operator.itemgetter(slice(i, None, parts)), noise) for i in range(parts)
        )

    def _expansion_keys(self, keys: StepKeys) -> Array | None:
        """Return a key for the value expansion of each update, None without expansion."""
        if not (self.config.has_model and self.config.rollout.value_expansion_steps):
            return None
        return jax.random.split(keys.expansion, self.config.learn.utd)

    def _expand(
        self,
        learner: LearnerState,
        state: Any,
        model_env: ModelEnv,
        trust: Any,
        batch: Minibatch,
        key: Array,
    ) -> tuple[Any, Minibatch, Metrics]:
        """Expand the critic's targets of a minibatch by model steps of the agent in `state`."""
        return expand_targets(
            model_env,
            trust,
            batch,
            self.config.rollout.value_expansion_steps,
            key=key,
            discount=learner.config.learn.discount,
            temperature=self.agent(learner).temperature(state),
        )

    def _fixes(self) -> list[tuple[str, ...]]:
        return [variant.fixes for variant in self.config.variants]

    def _holdout_key(self, learner: LearnerState) -> Array:
        return jax.random.fold_in(learner.seed_key, HOLDOUT)

    def _fit_steps(self, shared: Shared) -> Array | int:
        transitions = jnp.minimum(shared.step, self.config.replay.real)
        return training.num_steps(self.config.model, transitions)

    def _calibrate(self, learner: LearnerState, state: ModelState, data: DataSplit) -> LearnerState:
        """Return the learner with a new model, its trust rule calibrated on the holdout."""
        learner = learner._replace(model=state)
        rule = self.trust_rule(learner)
        if not rule.needs_all_members:
            return learner
        # A TD target has both reward and next state of one member.
        predictions = evaluation.holdout_predictions(
            self.dynamics(learner), state, data, given_next_obs=not rule.needs_values
        )
        if rule.needs_values:
            values = self.model_env(learner).values(data.holdout.obs, data.holdout.action)
            predictions = predictions._replace(values=values)
        trust = rule.calibrate(learner.trust, predictions, data.holdout_mask)
        return learner._replace(trust=trust)


def _actor_critic(agent: Agent, state: Any) -> tuple[Policy, Critic]:
    """Return an agent's policy, and the mean of its critics' values."""

    def q(obs: Array, action: Array) -> Array:
        return agent.value(state, obs, action).mean(0)

    def v(obs: Array) -> Array:
        return q(obs, agent.deterministic_action(state, obs))

    return functools.partial(agent.act, state), Critic(q, v)


def _gradient_step(
    agent: Agent, state: Any, batch: Minibatch, noise: Any, may_be_empty: bool
) -> tuple[Any, Metrics]:
    """Take one gradient step of the agent on a minibatch.

    Args:
      may_be_empty: the minibatch may have no transition that counts; the state then stays as it is.
    """
    # Invalid transitions get weight 0; select instead of multiplying, because the stored weight
    # may be NaN.
    mask = batch.valid.astype(jnp.float32)
    weight = mask if batch.weight is None else jnp.where(batch.valid, batch.weight, 0.0)
    updated, metrics = agent.update(state, batch.data, weight, mask, noise)
    if may_be_empty:
        # Otherwise Adam's momentum would still move the parameters, and without valid transitions
        # the temperature would be updated with entropy 0.
        some = (weight > 0).any()
        updated = jax.tree.map(functools.partial(jnp.where, some), updated, state)
    return updated, metrics
