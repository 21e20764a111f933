"""The functions of one row mapped over all rows and devices, and jitted."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dynajax.config import Config, config_of
from dynajax.mbpo import Algorithm, Proposal
from dynajax.models import training
from dynajax.runtime import distributed
from dynajax.runtime.sharding import BY_ROWS, EVERYWHERE, STATE, Placement, place
from dynajax.types import Array, EnvSpec, Metrics, Row, Shared, TrainState, Transition
from dynajax.xla import backend


class Functions(NamedTuple):
    """What happens to all rows of a device; transitions have leaves (S, ...)."""

    act: Callable[[TrainState, Any, Any], Array]  # obs (S, D), step -> (S, A)
    greedy: Callable[[TrainState, Any], Array]  # obs (S, K, D) -> (S, K, A)
    value: Callable[[TrainState, Any], Array]  # of the greedy action, obs (S, K, D) -> (S, K)
    insert: Callable[[TrainState, Transition, Any], TrainState]  # valid (S,)
    fit: Callable[[TrainState], tuple[TrainState, Metrics]]
    propose: Callable[[TrainState, Transition, Any], tuple[TrainState, Proposal]]
    learn: Callable[..., tuple[TrainState, Metrics]]  # see `Algorithm.learn`
    reset: Callable[[TrainState], TrainState]


def over_rows(algorithm: Algorithm) -> Functions:
    """Maps the functions of `Algorithm` over the rows."""

    def act(state: TrainState, obs: Array, step: Array) -> Array:
        return jax.vmap(algorithm.act, (0, 0, None))(state.rows, obs, step)

    def greedy(state: TrainState, obs: Array) -> Array:
        return jax.vmap(algorithm.greedy)(state.rows, obs)

    def value(state: TrainState, obs: Array) -> Array:
        return jax.vmap(algorithm.value)(state.rows, obs)

    def insert(state: TrainState, transition: Transition, valid: Array) -> TrainState:
        shared = state.shared
        mapped = jax.vmap(algorithm.insert, (0, None, 0, 0))
        rows = mapped(state.rows, shared, transition, valid)
        return TrainState(shared._replace(step=shared.step + 1), rows)

    def fit(state: TrainState) -> tuple[TrainState, Metrics]:
        rows, metrics = jax.vmap(algorithm.fit, (0, None))(state.rows, state.shared)
        return state._replace(rows=rows), metrics

    def propose(
        state: TrainState, transition: Transition, valid: Array
    ) -> tuple[TrainState, Proposal]:
        mapped = jax.vmap(algorithm.propose, (0, None, 0, 0))
        rows, proposals = mapped(state.rows, state.shared, transition, valid)
        return state._replace(rows=rows), proposals

    def learn(
        state: TrainState,
        transition: Transition,
        valid: Array,
        corrected: Proposal | None = None,
    ) -> tuple[TrainState, Metrics]:
        mapped = jax.vmap(algorithm.learn, (0, None, 0, 0, 0))
        rows, metrics = mapped(state.rows, state.shared, transition, valid, corrected)
        return TrainState(algorithm.count(state.shared), rows), metrics

    def reset(state: TrainState) -> TrainState:
        return state._replace(rows=jax.vmap(algorithm.reset)(state.rows))

    return Functions(act, greedy, value, insert, fit, propose, learn, reset)


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

        def train(job: training.Job, row: Row, shared: Shared) -> tuple[Any, Any]:
            # The row's own axis stays: XLA makes faster code of the same matmuls with it.
            one = jax.vmap(algorithm.train_member, (0, None, 0, 0, 0, 0))
            parts = jax.tree.map(lambda x: x[:, None], members.own(alone(job).members))
            trained = jax.lax.map(lambda member: one(row, shared, job, *member), parts)
            return jax.tree.map(lambda x: x[:, 0], trained)

        def end(state: TrainState, job: training.Job, trained: Any) -> tuple[TrainState, Metrics]:
            trained = jax.tree.map(lambda x: x[None, : members.rows], trained)
            ended = jax.vmap(algorithm.end_fit, (0, None, 0, 0, 0))
            rows, metrics = ended(state.rows, state.shared, job, *trained)
            return state._replace(rows=rows), metrics

        return cls(
            members,
            placement.mesh.devices[0],
            placement.spread(
                lambda state: jax.vmap(algorithm.begin_fit)(state.rows), (STATE,), BY_ROWS
            ),
            members.spread(train, (EVERYWHERE, EVERYWHERE, EVERYWHERE), BY_ROWS),
            placement.spread(end, (STATE, BY_ROWS, EVERYWHERE), (STATE, BY_ROWS), donate_argnums=0),
        )

    def _read(self, state: TrainState) -> Row:
        """What training reads of the row."""
        rows: Row = state.rows
        return rows._replace(agent=None, synthetic=None, model=None, trust=None)

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
    greedy: jax.stages.Wrapped
    value: jax.stages.Wrapped
    insert: jax.stages.Wrapped
    fit: Fit
    propose: jax.stages.Wrapped
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
        policies = jax.vmap(self.algorithm.policy)(state.rows)
        return self.placement.real(jax.tree.map(np.array, policies))

    def parameters(self) -> dict[str, int]:
        """How many a row's networks have, by the network's name."""
        rows = jax.eval_shape(self.init).rows
        row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)
        return {name: backend.count(net) for name, net in self.algorithm.networks(row).items()}

    def programs(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """The large programs by name, each with its arguments' shapes."""
        state = self.shapes()
        step = transition_shapes(self.placement.rows, self.spec)
        corrected: tuple[Any, ...] = ()
        if self.config.oracle != "none":
            _, proposal = jax.eval_shape(self.propose, state, *step)
            # It comes from the host, as the transition does: the rows alone, on no device.
            rows = self.placement.rows
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
    numbers = distributed.share(config.rows)
    pairs = tuple(config.row_pairs[numbers.start : numbers.stop])
    placement = place(len(pairs), devices)
    algorithm, local = Algorithm(config, spec), placement.own
    configs = [config_of(config, config.variants[index]) for index, _ in pairs]
    variants, seeds = zip(*pairs, strict=True)

    # The seeds are arguments, so that all seeds share one compiled program in the cache.
    # One row after the other, for `nets.stacked_init`'s reason.
    def init(*arguments: Any) -> TrainState:
        rows = jax.lax.map(lambda row: algorithm.init(*row), local(arguments))
        # An array with a weak type, as of Python's numbers, is another argument than the one that a
        # fit or an update puts in its place, and all is compiled again in the midst of a run.
        rows = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), rows)
        return TrainState(Shared(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)), rows)

    functions = over_rows(algorithm)
    # What the environments give is small: every device gets all of it, and takes its own rows.
    whole = EVERYWHERE
    corrected = () if config.oracle == "none" else (whole,)
    donated = functools.partial(placement.spread, donate_argnums=0)
    fit: Fit = donated(functions.fit, (STATE,), (STATE, BY_ROWS))
    if len(pairs) == 1 and config.has_model and config.model.schedule == "fixed":
        members = place(config.model.members, devices)
        if backend.small_caches() and members.mesh.size > 1:
            fit = SharedFit.of(algorithm, placement, members)
    return Program(
        algorithm=algorithm,
        placement=placement,
        numbers=numbers,
        pairs=pairs,
        init=functools.partial(
            placement.spread(init, (whole, whole, whole), STATE, jax.jit),
            jax.tree.map(lambda *leaves: np.array(leaves, np.float32), *configs),
            np.array(variants, np.int32),
            np.array(seeds, np.int32),
        ),
        act=placement.spread(
            lambda state, obs, step: functions.act(state, local(obs), step),
            (STATE, whole, whole),
            BY_ROWS,
        ),
        greedy=placement.spread(
            lambda state, obs: functions.greedy(state, local(obs)), (STATE, whole), BY_ROWS
        ),
        value=placement.spread(
            lambda state, obs: functions.value(state, local(obs)), (STATE, whole), BY_ROWS
        ),
        insert=donated(
            lambda state, *step: functions.insert(state, *local(step)), (STATE, whole, whole), STATE
        ),
        fit=fit,
        propose=donated(
            lambda state, *step: functions.propose(state, *local(step)),
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
