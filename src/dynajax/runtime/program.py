"""The functions of one row mapped over all rows and devices, and jitted."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dynajax.config import Config, variant_config
from dynajax.mbpo import Algorithm, ModelTransitions
from dynajax.models import training
from dynajax.runtime import distributed
from dynajax.runtime.sharding import BY_ROWS, EVERYWHERE, STATE, Placement, place
from dynajax.types import Array, EnvSpec, LearnerState, Metrics, Shared, TrainState, Transition
from dynajax.xla import backend


class Functions(NamedTuple):
    """What happens to all rows of a device; transitions have leaves (S, ...)."""

    act: Callable[[TrainState, Any, Any], Array]  # obs (S, D), step -> (S, A)
    deterministic_action: Callable[[TrainState, Any], Array]  # obs (S, K, D) -> (S, K, A)
    value: Callable[[TrainState, Any], Array]  # of the greedy action, obs (S, K, D) -> (S, K)
    insert: Callable[[TrainState, Transition, Any], TrainState]  # valid (S,)
    fit: Callable[[TrainState], tuple[TrainState, Metrics]]
    propose_transitions: Callable[
        [TrainState, Transition, Any], tuple[TrainState, ModelTransitions]
    ]
    learn: Callable[..., tuple[TrainState, Metrics]]  # see `Algorithm.learn`
    reset: Callable[[TrainState], TrainState]


def vmap_learners(algorithm: Algorithm) -> Functions:
    """Maps the functions of `Algorithm` over the rows."""

    def act(state: TrainState, obs: Array, step: Array) -> Array:
        return jax.vmap(algorithm.act, (0, 0, None))(state.learners, obs, step)

    def deterministic_action(state: TrainState, obs: Array) -> Array:
        return jax.vmap(algorithm.deterministic_action)(state.learners, obs)

    def value(state: TrainState, obs: Array) -> Array:
        return jax.vmap(algorithm.value)(state.learners, obs)

    def insert(state: TrainState, transition: Transition, valid: Array) -> TrainState:
        shared = state.shared
        mapped = jax.vmap(algorithm.insert, (0, None, 0, 0))
        rows = mapped(state.learners, shared, transition, valid)
        return TrainState(shared._replace(step=shared.step + 1), rows)

    def fit(state: TrainState) -> tuple[TrainState, Metrics]:
        rows, metrics = jax.vmap(algorithm.fit, (0, None))(state.learners, state.shared)
        return state._replace(learners=rows), metrics

    def propose_transitions(
        state: TrainState, transition: Transition, valid: Array
    ) -> tuple[TrainState, ModelTransitions]:
        mapped = jax.vmap(algorithm.propose_transitions, (0, None, 0, 0))
        rows, proposals = mapped(state.learners, state.shared, transition, valid)
        return state._replace(learners=rows), proposals

    def learn(
        state: TrainState,
        transition: Transition,
        valid: Array,
        corrected: ModelTransitions | None = None,
    ) -> tuple[TrainState, Metrics]:
        mapped = jax.vmap(algorithm.learn, (0, None, 0, 0, 0))
        rows, metrics = mapped(state.learners, state.shared, transition, valid, corrected)
        return TrainState(algorithm.count(state.shared), rows), metrics

    def reset(state: TrainState) -> TrainState:
        return state._replace(learners=jax.vmap(algorithm.reset)(state.learners))

    return Functions(
        act, deterministic_action, value, insert, fit, propose_transitions, learn, reset
    )


class Fit(Protocol):
    """A jitted fit of all rows."""

    def __call__(self, state: TrainState) -> tuple[TrainState, Metrics]: ...

    def lower(self, state: TrainState) -> jax.stages.Lowered: ...


class SharedFit(NamedTuple):
    """The fit of a row that is alone: its members lie on the devices as rows do.

    Each device gets what a fit reads, trains its members, and gives them back. None waits for
    another on the way, because XLA ends a process in which a device waits for 40 seconds.
    """

    members: Placement
    device: jax.Device  # the row's own
    begin: jax.stages.Wrapped
    train: jax.stages.Wrapped
    end: jax.stages.Wrapped

    @classmethod
    def of(cls, algorithm: Algorithm, placement: Placement, members: Placement) -> "SharedFit":
        def alone(rows: Any) -> Any:
            return jax.tree.map(lambda x: x[0], rows)

        def train(job: training.FitInputs, row: LearnerState, shared: Shared) -> tuple[Any, Any]:
            # The row's own axis stays: XLA makes faster code of the same matmuls with it.
            one = jax.vmap(algorithm.train_member, (0, None, 0, 0, 0, 0))
            parts = jax.tree.map(lambda x: x[:, None], members.local_learners(alone(job).members))
            trained = jax.lax.map(lambda member: one(row, shared, job, *member), parts)
            return jax.tree.map(lambda x: x[:, 0], trained)

        def end(
            state: TrainState, job: training.FitInputs, trained: Any
        ) -> tuple[TrainState, Metrics]:
            trained = jax.tree.map(lambda x: x[None, : members.num_learners], trained)
            ended = jax.vmap(algorithm.end_fit, (0, None, 0, 0, 0))
            rows, metrics = ended(state.learners, state.shared, job, *trained)
            return state._replace(learners=rows), metrics

        return cls(
            members,
            placement.mesh.devices[0],
            placement.jit_sharded(
                lambda state: jax.vmap(algorithm.begin_fit)(state.learners), (STATE,), BY_ROWS
            ),
            members.jit_sharded(train, (EVERYWHERE, EVERYWHERE, EVERYWHERE), BY_ROWS),
            placement.jit_sharded(
                end, (STATE, BY_ROWS, EVERYWHERE), (STATE, BY_ROWS), donate_argnums=0
            ),
        )

    def _read(self, state: TrainState) -> LearnerState:
        """What training reads of the row."""
        rows: LearnerState = state.learners
        return rows._replace(agent=None, synthetic_buffer=None, model=None, trust=None)

    def lower(self, state: TrainState) -> jax.stages.Lowered:
        """The largest of the programs."""
        read = jax.eval_shape(self.begin, state), self._read(state), state.shared
        return self.train.lower(*self.members.shapes(EVERYWHERE, read))

    def __call__(self, state: TrainState) -> tuple[TrainState, Metrics]:
        job = self.begin(state)
        trained = self.train(*self.members.send((job, self._read(state), state.shared)))
        return self.end(state, job, jax.device_put(trained, self.device))


class Program(NamedTuple):
    """The same for all rows of this process, jitted: arguments have a row for each of its rows,
    and results a place for each (`Placement`). Those that return a state take theirs as a donation.
    """

    algorithm: Algorithm
    placement: Placement
    numbers: range  # which of the run's rows are this process's
    pairs: tuple[tuple[int, int], ...]  # (index of the variant, seed) of each
    init: Callable[[], TrainState]
    act: jax.stages.Wrapped
    deterministic_action: jax.stages.Wrapped
    value: jax.stages.Wrapped
    insert: jax.stages.Wrapped
    fit: Fit
    propose_transitions: jax.stages.Wrapped
    learn: jax.stages.Wrapped
    reset: jax.stages.Wrapped

    @property
    def config(self) -> Config:
        return self.algorithm.config

    @property
    def spec(self) -> EnvSpec:
        return self.algorithm.spec

    def shapes(self) -> TrainState:
        """The state's shapes, which know the devices that they are on."""
        return self.placement.shapes(STATE, jax.eval_shape(self.init))

    def policies(self, state: TrainState) -> Any:
        """What each row acts by, leaves (S, ...), copied to the host: the state may be donated."""
        policies = jax.vmap(self.algorithm.policy)(state.learners)
        return self.placement.unpad(jax.tree.map(np.array, policies))

    def parameters(self) -> dict[str, int]:
        """How many a row's networks have, by the network's name."""
        rows = jax.eval_shape(self.init).learners
        row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)
        return {name: backend.count(net) for name, net in self.algorithm.networks(row).items()}

    def programs(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """The large programs by name, each with its arguments' shapes."""
        state = self.shapes()
        step = transition_shapes(self.placement.num_learners, self.spec)
        corrected: tuple[Any, ...] = ()
        if self.config.oracle != "none":
            _, proposal = jax.eval_shape(self.propose_transitions, state, *step)
            # It comes from the host, as the transition does: the rows alone, on no device.
            rows = self.placement.num_learners
            corrected = (
                jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), proposal
                ),
            )
        learn = {"learn": (self.learn, (state, *step, *corrected))}
        return learn | ({"fit": (self.fit, (state,))} if self.config.has_model else {})

    def lower(self) -> list[jax.stages.Lowered]:
        """The same, before they are compiled."""
        return [function.lower(*arguments) for function, arguments in self.programs().values()]


def transition_shapes(rows: int, spec: EnvSpec) -> tuple[Transition, Any]:
    """What the environments of S = `rows` give in a step: leaves (S, ...), and valid (S,)."""

    def real(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), np.float32)

    obs, scalar = real(spec.obs_dim), real()
    transition = Transition(obs, real(spec.action_dim), scalar, scalar, obs)
    return transition, jax.ShapeDtypeStruct((rows,), bool)


def build(config: Config, spec: EnvSpec, devices: Sequence[jax.Device] | None = None) -> Program:
    """Jits the functions of this process's rows, spread over devices, by default all local ones.

    Raises:
      UsageError: there are more processes than rows, or JAX has no devices.
    """
    devices = backend.local_devices() if devices is None else devices
    numbers = distributed.share(config.num_learners)
    pairs = tuple(config.variant_seed_pairs[numbers.start : numbers.stop])
    placement = place(len(pairs), devices)
    algorithm, local = Algorithm(config, spec), placement.local_learners
    configs = [variant_config(config, config.variants[index]) for index, _ in pairs]
    variants, seeds = zip(*pairs, strict=True)

    # The seeds are arguments, so that all seeds share one compiled program in the cache.
    # One row after the other, for `nets.stacked_init`'s reason.
    def init(*arguments: Any) -> TrainState:
        rows = jax.lax.map(lambda row: algorithm.init(*row), local(arguments))
        # An array with a weak type, as of Python's numbers, is another argument than the one that a
        # fit or an update puts in its place, and all is compiled again in the midst of a run.
        rows = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), rows)
        return TrainState(Shared(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)), rows)

    functions = vmap_learners(algorithm)
    # What the environments give is small: every device gets all of it, and takes its own rows.
    whole = EVERYWHERE
    corrected = () if config.oracle == "none" else (whole,)
    donated = functools.partial(placement.jit_sharded, donate_argnums=0)
    fit: Fit = donated(functions.fit, (STATE,), (STATE, BY_ROWS))
    if len(pairs) == 1 and config.has_model and config.model.schedule == "fixed":
        members = place(config.model.members, devices)
        if backend.target_is_cpu() and members.mesh.size > 1:
            fit = SharedFit.of(algorithm, placement, members)
    return Program(
        algorithm=algorithm,
        placement=placement,
        numbers=numbers,
        pairs=pairs,
        init=functools.partial(
            placement.jit_sharded(init, (whole, whole, whole), STATE, jax.jit),
            jax.tree.map(lambda *leaves: np.array(leaves, np.float32), *configs),
            np.array(variants, np.int32),
            np.array(seeds, np.int32),
        ),
        act=placement.jit_sharded(
            lambda state, obs, step: functions.act(state, local(obs), step),
            (STATE, whole, whole),
            BY_ROWS,
        ),
        deterministic_action=placement.jit_sharded(
            lambda state, obs: functions.deterministic_action(state, local(obs)),
            (STATE, whole),
            BY_ROWS,
        ),
        value=placement.jit_sharded(
            lambda state, obs: functions.value(state, local(obs)), (STATE, whole), BY_ROWS
        ),
        insert=donated(
            lambda state, *step: functions.insert(state, *local(step)), (STATE, whole, whole), STATE
        ),
        fit=fit,
        propose_transitions=donated(
            lambda state, *step: functions.propose_transitions(state, *local(step)),
            (STATE, whole, whole),
            (STATE, BY_ROWS),
        ),
        learn=donated(
            lambda state, *step: functions.learn(state, *local(step)),
            (STATE, whole, whole, *corrected),
            (STATE, BY_ROWS),
        ),
        reset=donated(functions.reset, (STATE,), STATE),
    )
