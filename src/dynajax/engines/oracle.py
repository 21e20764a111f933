"""Oracles: a part of each synthetic transition comes from the simulator, to find which part does harm.

For every rollout start, which is a state of the real replay buffer, the simulator is set to that
physics state and takes the policy's action. `reward` keeps the model's next state and takes the
simulator's reward; `state` takes the simulator's next state and keeps the model's reward; `both`
takes both, so that nothing of the model is left. Rollouts have one step.
"""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dynajax import envs, replay
from dynajax.config import Config
from dynajax.mbpo import MBPO
from dynajax.runtime.program import Mapped, Program
from dynajax.synthetic.buffered import Buffered
from dynajax.types import LearnerState, Metrics, Shared, Transition, UsageError


class ModelTransitions(NamedTuple):
    """The synthetic transitions of one agent step, from B states of the real replay buffer."""

    slots: Any  # (B,) int, of the real buffer, where the rollouts start
    transition: Transition  # leaves (B, ...)
    keep: Any  # (B,) bool, may be learned from


class OracleMBPO(MBPO):
    """MBPO whose synthetic transitions pass through the host before they are learned from."""

    def propose_transitions(
        self, learner: LearnerState, shared: Shared, transition: Transition, valid: Bool[Array, ""]
    ) -> tuple[LearnerState, ModelTransitions]:
        """Insert a real transition, and return the model transitions that `learn` would make."""
        learner = self.insert(learner, shared, transition, valid)
        source = self.source(learner)
        keys = self._split_keys(learner, source)
        request = replay.Request(keys.source.starts, (self.config.rollout.batch,))
        (slots,) = replay.sample_indices(
            learner.real_buffer,
            shared.step + 1,
            [request],
            window=self.config.rollout.start_window,
        )
        obs = replay.gather(learner.real_buffer, slots).unpack().obs
        active = jnp.ones(self.config.rollout.batch, bool)
        model_env = self.model_env(learner).select_members()
        key = jax.random.fold_in(keys.source.rollout, 0)
        _, step = model_env.step(learner.trust, obs, active, 0, 1, key)
        return learner, ModelTransitions(slots, step.transition, step.keep_mask)

    def learn_corrected(
        self, learner: LearnerState, shared: Shared, corrected: ModelTransitions
    ) -> tuple[LearnerState, Metrics]:
        """Learn as `learn` does, from transitions that `propose_transitions` made, corrected."""
        source = self.source(learner)
        assert isinstance(source, Buffered)
        keys = self._split_keys(learner, source)
        real, _ = self._sample_real(learner, shared, source, keys)
        block = replay.pack(corrected.transition, corrected.keep)
        buffer = replay.insert(learner.synthetic, block, source.position(shared))
        learner = learner._replace(synthetic=buffer)
        metrics = {"valid_fraction": corrected.keep.mean()}
        inputs = source.sample(learner, shared, real, keys.source.sample)
        return self.update(learner, source, inputs, metrics, keys)


class OracleProgram:
    """The oracle's two functions, jitted for the learners of a program."""

    def __init__(self, program: Program):
        algorithm = OracleMBPO(program.config, program.spec)
        jit = functools.partial(Mapped.jit, algorithm=algorithm, placement=program.placement)
        propose = Mapped("propose_transitions", (0, 0), counters=True, updates=True)
        learn = Mapped(
            "learn_corrected", (0,), counters=True, updates=True, next_counters=MBPO.count
        )
        self._program = program
        self.propose, self.learn = jit(propose), jit(learn)

    def lower(self) -> list[jax.stages.Lowered]:
        """Return the large programs before they are compiled."""
        program = self._program
        (_, (state, *step)), *others = program.programs().values()
        _, proposed = jax.eval_shape(self.propose, state, *step)
        # It comes from the host, as transitions do: without padding, on no device.
        size = program.placement.num_learners
        corrected = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), proposed
        )
        lowered = [self.propose.lower(state, *step), self.learn.lower(state, corrected)]
        return lowered + [function.lower(*arguments) for function, arguments in others]


class Oracle:
    """The simulators, and the physics state of every real transition.

    Args:
      config: a run's configuration, with an oracle.
      seeds: S seeds, those of the training environments.

    Raises:
      UsageError: the task's simulator cannot be set to a state.
    """

    def __init__(self, config: Config, seeds: Sequence[int]):
        self._which = config.oracle
        self._envs: list[Any] = []
        with contextlib.ExitStack() as opened:
            for seed in seeds:
                env = envs.make(config.env, **config.stepping, seed=seed)
                self._envs.append(opened.enter_context(contextlib.closing(env)))
            if (obstacle := self._envs[0].unrestorable) is not None:
                raise UsageError(
                    f"--oracle={config.oracle}: {config.env} cannot be set to a stored state: "
                    f"{obstacle}, or leave --oracle out"
                )
            for env in self._envs:
                env.reset(seed=0)
            self._opened = opened.pop_all()
        self._capacity = min(config.replay.real, config.steps)
        self._states = np.zeros((len(self._envs), 0, 0))
        self._count = 0

    def record(self, states: np.ndarray) -> None:
        """Keep the states (S, L) in which all learners' next transitions begin."""
        if not self._states.size:
            self._states = np.zeros((len(states), self._capacity, states.shape[1]))
        self._states[:, self._count % self._capacity] = states
        self._count += 1

    def correct(self, proposed: ModelTransitions) -> ModelTransitions:
        """Replace parts of synthetic transitions, leaves (S, B, ...), by the simulator's.

        A transition is not kept if the simulator, or the model alone, gives no finite number.
        """
        slots = np.asarray(proposed.slots)
        changed = Transition(*(np.array(x) for x in proposed.transition))
        keep = np.array(proposed.keep)
        for learner, env in enumerate(self._envs):
            for i, slot in enumerate(slots[learner]):
                env.restore(self._states[learner, slot], steps=0)
                next_obs, reward, terminated, _, _ = env.step(changed.action[learner, i])
                if not (np.isfinite(next_obs).all() and np.isfinite(reward)):
                    keep[learner, i] = False
                    continue
                if self._which != "state":
                    changed.reward[learner, i] = reward
                if self._which != "reward":
                    changed.next_obs[learner, i] = next_obs
                    changed.discount[learner, i] = 1.0 - terminated
                    # The model may have left the finite numbers where the simulator has not.
                    keep[learner, i] |= self._which == "both"
        return ModelTransitions(slots, changed, keep)

    def progress(self) -> dict[str, np.ndarray]:
        """Return everything that a resume needs."""
        filled = min(self._count, self._capacity)
        return {
            "oracle.states": self._states[:, :filled].copy(),
            "oracle.count": np.array([self._count]),
        }

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Return to an earlier `progress`."""
        states = progress["oracle.states"]
        self._count = int(progress["oracle.count"][0])
        # A complete run that is started again with fewer steps has recorded more than fit.
        self._capacity = max(self._capacity, states.shape[1])
        self._states = np.zeros((len(states), self._capacity, states.shape[2]))
        self._states[:, : states.shape[1]] = states

    def close(self) -> None:
        """Close the simulators."""
        self._opened.close()
