"""The fit of a single learner on a CPU: its members are trained on all cores."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dynajax.config import Config
from dynajax.mbpo import MBPO
from dynajax.models.training import FitInputs, MemberState
from dynajax.runtime import signals
from dynajax.runtime.sharding import BY_LEARNERS, EVERYWHERE, STATE, Placement
from dynajax.types import Metrics, ReplayBuffer, Shared, TrainState
from dynajax.xla import backend


class MemberParallelFit(NamedTuple):
    """A fit whose members lie on the devices as learners do.

    Each device receives what a fit reads, trains its members, and returns them. No device waits for
    another in between, because XLA ends a process in which a device waits for 40 seconds.
    """

    members: Placement
    device: jax.Device  # the learner's own
    begin: jax.stages.Wrapped
    train: jax.stages.Wrapped
    end: jax.stages.Wrapped

    @classmethod
    def build(
        cls, algorithm: MBPO, placement: Placement, members: Placement
    ) -> "MemberParallelFit":
        """Jit the three parts of the fit.

        Args:
          placement: of the learner; `members`: of its members.
        """

        def begin(state: TrainState) -> FitInputs:
            return jax.vmap(algorithm.begin_fit)(state.learners)

        def train(
            inputs: FitInputs, config: Config, buffer: ReplayBuffer, shared: Shared
        ) -> MemberState:
            # The learner's own axis stays: XLA makes faster code of the same matmuls with it.
            one = jax.vmap(algorithm.train_member, (0, None, 0, 0, 0, 0))
            own = members.local_learners(
                jax.tree.map(lambda x: x[0], (inputs.members, inputs.keys))
            )
            parts = jax.tree.map(lambda x: x[:, None], own)
            trained = jax.lax.map(
                lambda member: one(config, shared, inputs, buffer, *member), parts
            )
            return jax.tree.map(lambda x: x[:, 0], trained)

        def end(
            state: TrainState, inputs: FitInputs, trained: MemberState
        ) -> tuple[TrainState, Metrics]:
            trained = jax.tree.map(lambda x: x[None, : members.num_learners], trained)
            ended = jax.vmap(algorithm.end_fit, (0, None, 0, 0))
            learners, metrics = ended(state.learners, state.shared, inputs, trained)
            return state._replace(learners=learners), metrics

        options = {"compiler_options": backend.options("fit")}
        return cls(
            members,
            placement.mesh.devices[0],
            placement.jit_sharded(begin, (STATE,), BY_LEARNERS, **options),
            members.jit_sharded(train, (EVERYWHERE,) * 4, BY_LEARNERS, **options),
            placement.jit_sharded(
                end,
                (STATE, BY_LEARNERS, EVERYWHERE),
                (STATE, BY_LEARNERS),
                donate_argnums=0,
                **options,
            ),
        )

    def training_arguments(self, state: TrainState, inputs: Any) -> tuple[Any, ...]:
        """Return the arguments of `train`."""
        learner = state.learners
        return inputs, learner.config, learner.real_buffer, state.shared

    def lower(self, state: TrainState) -> jax.stages.Lowered:
        """Return the largest of the programs before it is compiled."""
        arguments = self.training_arguments(state, jax.eval_shape(self.begin, state))
        return self.train.lower(*self.members.shapes(EVERYWHERE, arguments))

    def __call__(
        self, state: TrainState, check: Callable[[], None] | None = None
    ) -> tuple[TrainState, Metrics]:
        inputs = self.begin(state)
        trained = self.train(*self.members.send(self.training_arguments(state, inputs)))
        if check is not None:
            signals.wait(trained, check)  # `end` takes the state as a donation
        return self.end(state, inputs, jax.device_put(trained, self.device))
