"""The functions of one learner, mapped over all learners and devices, and jitted."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import plugin_checks
from dynajax.agents import agent_class
from dynajax.config import Config, EvalConfig, HostConfig, variant_config
from dynajax.mbpo import MBPO
from dynajax.models import model_class
from dynajax.models.likelihoods import likelihood_class
from dynajax.models.targets import lookup_fix
from dynajax.runtime import distributed, signals
from dynajax.runtime.member_parallel import MemberParallelFit
from dynajax.runtime.sharding import BY_LEARNERS, EVERYWHERE, STATE, Placement, place, to_host
from dynajax.synthetic import source_class
from dynajax.trust import trust_rule_class
from dynajax.types import (
    EnvSpec,
    LearnerState,
    Metrics,
    Shared,
    TrainState,
    Transition,
    UsageError,
)
from dynajax.xla import backend


class Mapped(NamedTuple):
    """How a method of `MBPO` is mapped over the learners of a device.

    The method takes a learner, the counters if `counters`, and `arguments`. It returns the learner
    if `updates`, and anything else if `output`.
    """

    method: str
    arguments: tuple[int | None, ...] = ()  # learner axis of each
    counters: bool = False
    updates: bool = False
    output: bool = True
    #: The counters after the call.
    next_counters: Callable[[MBPO, Shared], Shared] = lambda algorithm, shared: shared

    def over_learners(self, algorithm: MBPO) -> Callable[..., Any]:
        """Return the function of a `TrainState` and arguments with leaves (S, ...)."""
        axes = (0, *([None] if self.counters else []), *self.arguments)
        mapped = jax.vmap(getattr(algorithm, self.method), axes)

        def function(state: TrainState, *arguments: Any) -> Any:
            counters = [state.shared] if self.counters else []
            result = mapped(state.learners, *counters, *arguments)
            if not self.updates:
                return result
            learners, *rest = result if self.output else (result,)
            state = TrainState(self.next_counters(algorithm, state.shared), learners)
            return (state, *rest) if self.output else state

        return function

    def jit(self, algorithm: MBPO, placement: Placement) -> jax.stages.Wrapped:
        """Return the function jitted for the learners of all devices.

        What the environments return is small: every device gets all of it, and takes the part of
        its own learners.
        """
        function, local = self.over_learners(algorithm), placement.local_learners

        def with_local_arguments(state: TrainState, *arguments: Any) -> Any:
            pairs = zip(arguments, self.arguments, strict=True)
            return function(state, *(x if axis is None else local(x) for x, axis in pairs))

        outputs: Any = BY_LEARNERS
        if self.updates:
            outputs = (STATE, BY_LEARNERS) if self.output else STATE
        return placement.jit_sharded(
            with_local_arguments,
            (STATE, *[EVERYWHERE] * len(self.arguments)),
            outputs,
            donate_argnums=(0,) if self.updates else (),
            compiler_options=backend.options(self.method),
        )


#: Every function of all learners. Observations have leaves (S, ...), for evaluations (S, K, ...);
#: transitions (S, ...), and their flags (S,).
FUNCTIONS = {
    "act": Mapped("act", (0, None)),
    "deterministic_action": Mapped("deterministic_action", (0,)),
    "value": Mapped("value", (0,)),
    "count_terminations": Mapped("count_terminations", (None,)),
    "insert": Mapped(
        "insert",
        (0, 0),
        counters=True,
        updates=True,
        output=False,
        next_counters=lambda _, shared: shared._replace(step=shared.step + 1),
    ),
    "learn": Mapped("learn", (0, 0), counters=True, updates=True, next_counters=MBPO.count),
    "reset": Mapped("reset", updates=True, output=False),
}


class Functions:
    """The table's functions by name, mapped over the learners of one device and not jitted."""

    def __init__(self, algorithm: MBPO):
        self._mapped = {name: row.over_learners(algorithm) for name, row in FUNCTIONS.items()}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._mapped[name]


class Fit(Protocol):
    """A jitted fit of all learners.

    `check` is called while the fit runs, and may raise `signals.Interrupted`; the state is then as
    before.
    """

    def __call__(
        self, state: TrainState, check: Callable[[], None] | None = None
    ) -> tuple[TrainState, Metrics]: ...

    def lower(self, state: TrainState) -> jax.stages.Lowered: ...


class WholeFit:
    """A fit of all learners in one program.

    It returns only what a fit changes and takes no donation, so the state is intact until the fit
    is over, and the replay buffers are not copied.
    """

    CHANGED = ("key", "model", "trust")  # fields of `LearnerState`

    def __init__(self, algorithm: MBPO, placement: Placement):
        def fit_learner(learner: LearnerState, shared: Shared) -> tuple[dict[str, Any], Metrics]:
            fitted, metrics = algorithm.fit(learner, shared)
            kept = set(LearnerState._fields) - set(self.CHANGED)
            assert all(getattr(fitted, name) is getattr(learner, name) for name in kept)
            return {name: getattr(fitted, name) for name in self.CHANGED}, metrics

        def fit(state: TrainState) -> tuple[dict[str, Any], Metrics]:
            return jax.vmap(fit_learner, (0, None))(state.learners, state.shared)

        self.jitted = placement.jit_sharded(
            fit, (STATE,), (BY_LEARNERS, BY_LEARNERS), compiler_options=backend.options("fit")
        )

    def __call__(
        self, state: TrainState, check: Callable[[], None] | None = None
    ) -> tuple[TrainState, Metrics]:
        changed, metrics = self.jitted(state)
        if check is not None:
            signals.wait(changed, check)
        return state._replace(learners=state.learners._replace(**changed)), metrics

    def lower(self, state: TrainState) -> jax.stages.Lowered:
        """Return the program before it is compiled."""
        return self.jitted.lower(state)

    def trace(self, state: TrainState) -> Any:
        """Return the traced program."""
        return self.jitted.trace(state)


class Jitted:
    """The table's functions by name, jitted; those that return a state take theirs as a donation."""

    def __init__(self, algorithm: MBPO, learners: int, devices: Sequence[jax.Device]):
        self.algorithm, self.placement = algorithm, place(learners, devices)
        self.init = self._jit_init()
        self.fit = self._jit_fit(devices)
        self.memory: int | None = None  # of the largest program, once it is known

    def __getattr__(self, name: str) -> jax.stages.Wrapped:
        if name not in FUNCTIONS:
            raise AttributeError(name)
        function = FUNCTIONS[name].jit(self.algorithm, self.placement)
        setattr(self, name, function)
        return function

    def _jit_init(self) -> jax.stages.Wrapped:
        algorithm, local = self.algorithm, self.placement.local_learners

        def init_learner(arguments: tuple[Any, ...]) -> LearnerState:
            return check_leaves(algorithm.init(*arguments), "the initial state")

        # One learner after the other, for the reason of `networks.params.init_stacked`.
        def init(*arguments: Any) -> TrainState:
            learners = jax.lax.map(init_learner, local(arguments))
            # A weakly typed array, as of a Python number, is another argument than the array that a
            # fit or an update returns, and everything would be compiled again within the run.
            learners = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), learners)
            return TrainState(Shared(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)), learners)

        return self.placement.jit_sharded(
            init, (EVERYWHERE,) * 3, STATE, compiler_options=backend.options("init")
        )

    def _jit_fit(self, devices: Sequence[jax.Device]) -> Fit:
        """Jit the fit; a single learner's members are spread over a CPU's cores."""
        algorithm, placement = self.algorithm, self.placement
        config = algorithm.config
        if placement.num_learners == 1 and config.has_model and config.model.schedule == "fixed":
            members = place(config.model.members, devices)
            if backend.lowering().spread_members and members.mesh.size > 1:
                return MemberParallelFit.build(algorithm, placement, members)
        return WholeFit(algorithm, placement)


class Program(NamedTuple):
    """The functions of all learners of this process, jitted; `program.learn` and so on.

    Arguments have a learner axis for the process's learners, results one for `padded_size`
    learners (`Placement`).
    """

    algorithm: MBPO
    placement: Placement
    numbers: range  # the process's learners among those of the run
    pairs: tuple[tuple[int, int], ...]  # (index of the variant, seed) of each
    jitted: Jitted

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.algorithm.config

    @property
    def spec(self) -> EnvSpec:
        """The task."""
        return self.algorithm.spec

    @property
    def fit(self) -> Fit:
        """The fit of all learners."""
        return self.jitted.fit

    def __getattr__(self, name: str) -> jax.stages.Wrapped:
        return getattr(self.jitted, name)

    def init(self) -> TrainState:
        """Return new learners."""
        state: TrainState = self.jitted.init(*self._init_arguments())
        return state

    def _init_arguments(self) -> tuple[Any, ...]:
        """Return configurations, variants and seeds; as arguments, so that all seeds share a program."""
        variants, seeds = zip(*self.pairs, strict=True)
        configs = [variant_config(self.config, self.config.variants[index]) for index in variants]
        # Statics that do not shape the program must not distinguish the configurations.
        configs = [_static_key(config) for config in configs]
        stacked = jax.tree.map(lambda *leaves: np.array(leaves, np.float32), *configs)
        return stacked, np.array(variants, np.int32), np.array(seeds, np.int32)

    def shapes(self) -> TrainState:
        """Return the state's shapes, with the devices that they are on."""
        state = jax.eval_shape(self.jitted.init, *self._init_arguments())
        return self.placement.shapes(STATE, state)

    def learner_shapes(self) -> LearnerState:
        """Return the shapes of one learner's state."""
        shapes = self.shapes().learners
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)

    def acting_part(self, state: TrainState) -> TrainState:
        """Return the part of the state that `act` and `deterministic_action` read."""
        return state._replace(learners=self.algorithm.acting_part(state.learners))

    def policies(self, state: TrainState) -> Any:
        """Return what each learner acts by, copied to the host because the state may be donated."""
        policies = jax.vmap(self.algorithm.policy)(state.learners)
        return self.placement.unpad(jax.tree.map(lambda x: to_host(x).copy(), policies))

    def parameters(self) -> dict[str, int]:
        """Return the number of a learner's parameters by the network's name."""
        networks = self.algorithm.networks(self.learner_shapes())
        return {name: backend.count(params) for name, params in networks.items()}

    def programs(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Return the large programs by name, each with its arguments' shapes."""
        state = self.shapes()
        step = transition_shapes(self.placement.num_learners, self.spec)
        learn = {"learn": (self.learn, (state, *step))}
        return learn | ({"fit": (self.fit, (state,))} if self.config.has_model else {})

    def lower(self) -> list[jax.stages.Lowered]:
        """Return the large programs before they are compiled."""
        return [function.lower(*arguments) for function, arguments in self.programs().values()]


def check_leaves(tree: Any, name: str) -> Any:
    """Return a tree that an agent, a rule, a source and a model have made, if it can be saved.

    Raises:
      UsageError: a leaf is neither an array nor a number; the message begins with `name`.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array):
            continue
        try:
            jnp.asarray(leaf)
        except (TypeError, ValueError, OverflowError):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}".removeprefix("builtins.")
            raise UsageError(
                f"{name} has a leaf {where} of type {kind}, which cannot be saved; "
                "allowed are JAX and NumPy arrays of numbers, PRNG keys, numbers and None"
            ) from None
    return tree


def transition_shapes(learners: int, spec: EnvSpec) -> tuple[Transition, Any]:
    """Return the shapes of what S environments return in a step: leaves (S, ...), and valid (S,)."""

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((learners, *shape), np.float32)

    obs, scalar = floats(spec.obs_dim), floats()
    transition: Any = Transition(obs, floats(spec.action_dim), scalar, scalar, obs)
    return transition, jax.ShapeDtypeStruct((learners,), bool)


def build(config: Config, spec: EnvSpec, devices: Sequence[jax.Device] | None = None) -> Program:
    """Return the program of this process's learners, spread over devices, by default all local ones.

    Programs are kept: a second run of the same algorithm in this process traces nothing.

    Raises:
      UsageError: there are more processes than learners, or JAX has no devices.
    """
    devices = backend.local_devices() if devices is None else devices
    numbers = distributed.share(config.num_learners)
    pairs = tuple(config.variant_seed_pairs[numbers.start : numbers.stop])
    placement = place(len(pairs), devices)
    key = _static_key(config), _plugins(config), spec, len(pairs), tuple(devices)
    jitted = _jitted(*key, backend.lowering())
    return Program(MBPO(config, spec), placement, numbers, pairs, jitted)


def _static_key(config: Config) -> Config:
    """Return the configuration with what shapes no program set to defaults."""
    return dataclasses.replace(
        config,
        env="",
        preset="",
        seed=0,
        seeds=1,
        steps=1,
        eval=EvalConfig(),
        host=HostConfig(),
    )


def _plugins(config: Config) -> tuple[Any, ...]:
    """Return the classes and fixes that a configuration names, which a notebook may define again."""
    return (
        agent_class(config.agent_name),
        trust_rule_class(config.trust_name),
        source_class(config.rollout.source),
        model_class(config.model.network),
        likelihood_class(config.model.likelihood),
        *(lookup_fix(name) for variant in config.variants for name in variant.fixes),
    )


@functools.lru_cache(maxsize=16)
def _jitted(
    config: Config,
    plugins: tuple[Any, ...],
    spec: EnvSpec,
    learners: int,
    devices: tuple[jax.Device, ...],
    platform: backend.Lowering,
) -> Jitted:
    """Return the jitted functions of a configuration, the same ones for the same arguments."""
    plugin_checks.check(config, spec)
    return Jitted(MBPO(config, spec), learners, devices)
