"""Check the functions of plug-ins once, before a run: agent, trust rule, model, source and fixes.

Each function is called while JAX traces it, on arrays of a run's shapes, and what it returns is
compared with what its base class documents. Nothing is compiled or computed, and what this package
defines itself is not checked.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynajax import replay
from dynajax.agents import Agent, agent_class
from dynajax.agents.sac import SAC
from dynajax.config import Config
from dynajax.mbpo import MBPO
from dynajax.models import (
    DynamicsModel,
    Gaussian,
    NeuralModel,
    OutputHead,
    ensemble,
    likelihoods,
    model_class,
    predicts_variance,
    targets,
)
from dynajax.models.likelihoods import Likelihood
from dynajax.replay import ReplayBuffer
from dynajax.synthetic import Source, SourceKeys, UpdateInputs, source_class
from dynajax.trust import Predictions, TrustOutput, TrustRule, Values, make_rule, trust_rule_class
from dynajax.types import (
    Array,
    EnvSpec,
    Minibatch,
    PackedTransitions,
    Shared,
    Transition,
    UsageError,
)
from dynajax.user_code import (
    Expected,
    Fault,
    array,
    arrays,
    attribute,
    call,
    describe,
    expected,
    instance,
    is_users,
    like,
    listed,
    optional,
    scalars,
    several,
)

_FLOAT, _INT, _BOOL = jnp.floating, jnp.integer, bool


def check(config: Config, spec: EnvSpec) -> None:
    """Check the functions of every plug-in that a configuration names.

    Raises:
      UsageError: one of them raises, or returns something else than it must; see `user_code.call`.
    """
    checks: list[tuple[Any, Callable[[Config, EnvSpec], None]]] = [
        (agent_class(config.agent_name), _check_agent)
    ]
    if config.has_model:
        check_fixes(spec, [variant.fixes for variant in config.variants])
        checks += [
            (likelihoods.likelihood_class(config.model.likelihood), _check_likelihood),
            (model_class(config.model.network), _check_model),
            (trust_rule_class(config.trust_name), _check_trust_rule),
            (source_class(config.rollout.source), _check_source),
        ]
    for cls, function in checks:
        if is_users(cls):
            _trace(_with_traced_fields, function, config, spec)


def check_fixes(spec: EnvSpec, variants: Sequence[tuple[str, ...]]) -> None:
    """Check the rules of the fixes that variants name.

    Raises:
      UsageError: see `check`.
    """
    for name in sorted(set(itertools.chain(*variants))):
        fix = targets.lookup_fix(name)
        if any(is_users(rule) for rule in (fix.skip, fix.affine) if rule is not None):
            _trace(_check_fix, f"--fix={name}", fix, spec)


def _trace(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function while JAX traces it, so that all of its arrays are abstract."""
    # A new function each time: JAX would not call the same one again.
    jax.eval_shape(lambda: function(*arguments))


def _with_traced_fields(
    function: Callable[[Config, EnvSpec], None], config: Config, spec: EnvSpec
) -> None:
    """Call a check with the traced fields of a configuration as arrays, as in a program."""
    function(jax.tree.map(lambda _: jnp.zeros(()), config), spec)


def _key() -> Array:
    return jax.random.PRNGKey(0)


def _transitions(spec: EnvSpec, *shape: int) -> Transition:
    obs, scalar = jnp.zeros((*shape, spec.obs_dim)), jnp.zeros(shape)
    return Transition(obs, jnp.zeros((*shape, spec.action_dim)), scalar, scalar, obs)


def _check_network(
    owner: str, part: Any, name: str, arguments: tuple[int, ...], inputs: int, outputs: int | None
) -> None:
    """Check a network, (inputs,) -> (outputs,), that a property or method of `part` returns.

    Args:
      arguments: of the method; none for a property.
      outputs: None if any number will do.
    """
    returns = instance(nn.Module, "flax.linen.Module")
    if arguments:
        network = call(owner, getattr(part, name), *arguments, returns=returns)
    else:
        network = attribute(owner, part, name, returns=returns)
    if not is_users(getattr(type(part), name)):
        return
    output = arrays("float (X,)", kind=_FLOAT) if outputs is None else array(_FLOAT, outputs)
    params_only = expected(
        "parameters only",
        lambda variables: None if set(variables) <= {"params"} else describe(dict(variables)),
    )
    call(
        owner,
        network.init_with_output,
        _key(),
        jnp.zeros(inputs),
        returns=several(output=output, variables=params_only),
        role=f"the network of {type(part).__qualname__}.{name}",
    )


def _check_fix(owner: str, fix: targets.Fix, spec: EnvSpec) -> None:
    slots, size = 1000, spec.obs_dim + 1
    obs, weights = jnp.zeros((slots, spec.obs_dim)), jnp.zeros(slots)
    if fix.skip is not None:
        returns = array(_FLOAT, spec.obs_dim)
        call(owner, fix.skip, obs, obs, weights, returns=returns, role="the rule skip")
    if fix.affine is not None:
        raw, returns = jnp.zeros((slots, size)), array(_FLOAT, size)
        returns = several(shift=returns, scale=returns)
        call(owner, fix.affine, raw, weights, returns=returns, role="the rule affine")


def _check_agent(config: Config, spec: EnvSpec) -> None:
    owner, cls = f"--agent={config.agent_name}", agent_class(config.agent_name)
    size, key = config.learn.batch, _key()
    agent: Agent = call(owner, cls, config.learn, config.agent, spec)
    if isinstance(agent, SAC):
        _check_networks_of_sac(owner, agent)
    state = call(owner, agent.init, key, returns=arrays("a pytree of arrays"))
    state = jax.tree.map(jnp.asarray, state)
    same = like(state, "the state, with the shapes and dtypes of init")

    def check_own(method: Callable[..., Any], *arguments: Any, returns: Expected) -> None:
        """Check a method unless the class inherits it from this package."""
        if is_users(method):
            call(owner, method, *arguments, returns=returns)

    policy = call(owner, agent.policy, state, returns=arrays("a pytree of arrays"))
    for shape in ((), (size,)):  # one observation and several
        obs, action, *_ = _transitions(spec, *shape)
        actions = array(_FLOAT, *shape, spec.action_dim)
        pair = several(action=actions, log_density=array(_FLOAT, *shape))
        noise = call(owner, agent.action_noise, key, shape, returns=arrays("a pytree of arrays"))
        check_own(agent.act, state, obs, noise, returns=pair)
        check_own(agent.deterministic_action, policy, obs, returns=actions)
        check_own(agent.value, state, obs, action, returns=_values(*shape))
    updates = config.learn.utd * (2 if config.separate else 1)
    stacked = arrays(f"arrays ({updates}, ...)", (updates,))
    noise = call(owner, agent.noise, key, updates, returns=stacked)
    if isinstance(agent, SAC):
        _check_losses_of_sac(owner, agent, state)
    batch, weight = _transitions(spec, size), jnp.zeros(size)
    if is_users(agent.update) or is_users(agent.init):
        one = jax.tree.map(lambda x: x[0], noise)
        returns = several(state=same, metrics=scalars())
        call(owner, agent.update, state, batch, weight, weight, one, returns=returns)
    valid = jnp.zeros((), bool)
    check_own(agent.update_obs_statistics, state, batch.obs[0], valid, returns=same)
    check_own(agent.reset, state, key, returns=same)
    check_own(agent.temperature, state, returns=array(_FLOAT))
    check_own(agent.networks, state, returns=instance(dict, "dict of parameters"))


def _values(*shape: int) -> Expected:
    """Expect values of any number of critics, float (C, *shape)."""

    def wrong(value: Any) -> str | None:
        is_right = (
            isinstance(value, jax.Array)
            and value.shape[1:] == shape
            and value.ndim == 1 + len(shape)
            and jnp.issubdtype(value.dtype, _FLOAT)
        )
        return None if is_right else describe(value)

    return expected(f"float ({', '.join(['C', *map(str, shape)])})", wrong)


def _check_networks_of_sac(owner: str, agent: SAC) -> None:
    """Check the networks of an agent that changes SAC."""
    inputs, outputs = agent.spec.obs_dim, agent.spec.action_dim
    _check_network(owner, agent, "actor_network", (), inputs, 2 * outputs)
    _check_network(owner, agent, "critic_network", (), inputs + outputs, None)
    returns = instance(tuple, "optax.GradientTransformation")
    for name in ("optimizer", "temperature_optimizer"):
        attribute(owner, agent, name, returns=returns)


def _check_losses_of_sac(owner: str, agent: SAC, state: Any) -> None:
    """Check the methods that change critics, targets and losses of SAC."""
    changed = ("normalize_obs", "critic_network", "q_values", "aggregate_critics", "target")
    if not any(is_users(getattr(type(agent), name)) for name in (*changed, "critic_loss")):
        return
    size = agent.learn.batch
    batch, scalar = _transitions(agent.spec, size), jnp.zeros(())
    returns = array(_FLOAT, size, agent.spec.obs_dim)
    call(owner, agent.normalize_obs, state, batch.obs, returns=returns)
    inputs = jnp.zeros(agent.spec.obs_dim + agent.spec.action_dim)
    q = jax.eval_shape(agent.critic_network.init_with_output, _key(), inputs)[0]
    q = jnp.zeros((agent.config.critics, size, *q.shape))
    call(owner, agent.q_values, q, returns=array(_FLOAT, *q.shape[:-1]))
    next_q = call(owner, agent.aggregate_critics, q, returns=array(_FLOAT, *q.shape[1:]))
    target = call(owner, agent.target, batch, next_q, scalar, batch.reward)
    weights = batch.reward, batch.reward
    call(owner, agent.critic_loss, q, target, *weights, returns=array(_FLOAT))


def _check_trust_rule(config: Config, spec: EnvSpec) -> None:
    owner, cls = f"--trust={config.trust_name}", trust_rule_class(config.trust_name)
    size, held_out = config.num_parallel_rollouts, min(config.model.max_holdout, config.replay.real)
    if not cls.needs_all_members:
        for name in ("calibrate", "sample", "apply"):
            if getattr(cls, name) is not getattr(TrustRule, name):
                raise UsageError(
                    f"{owner}: {cls.__module__}:{cls.__qualname__}.{name} is never called; set "
                    "needs_all_members = True in its class"
                )
    rule: TrustRule = call(owner, cls, config.trust, spec, size)
    state = call(owner, rule.init, returns=arrays("a pytree of arrays"))
    if not cls.needs_all_members:
        return
    state = jax.tree.map(jnp.asarray, state)
    same = like(state, "the state, with the shapes and dtypes of init")

    def predictions(batch: int) -> Predictions:
        mean = jnp.zeros((config.model.members, batch, spec.obs_dim + 1))
        variance = jnp.ones_like(mean) if predicts_variance(config.model) else None
        active = jnp.ones(batch, bool)
        values = (
            Values(lambda sample: sample[:, -1], jnp.zeros(batch)) if cls.needs_values else None
        )
        return Predictions(mean, variance, jnp.zeros(batch, jnp.int32), mean[0], active, values)

    ones, h = jnp.ones(held_out), jnp.zeros((), jnp.int32)
    call(owner, rule.calibrate, state, predictions(held_out), ones, returns=same)
    sample = optional(array(_FLOAT, size, spec.obs_dim + 1))
    call(owner, rule.sample, predictions(size), h, _key(), returns=sample)
    mask, number = optional(array(_BOOL, size)), optional(array(_FLOAT, size))
    nothing = expected("None (or set uses_weights = True in its class)", _unless_none)
    output = instance(
        TrustOutput,
        continue_mask=mask,
        keep_mask=mask,
        reward_penalty=number,
        weight=number if cls.uses_weights else nothing,
    )
    arguments = state, predictions(size), h, config.rollout.horizon[0], _key()
    call(owner, rule.apply, *arguments, returns=several(state=same, output=output))


def _unless_none(value: Any) -> str | None:
    return None if value is None else describe(value)


def _prediction(shape: tuple[int, ...], has_variance: bool) -> Expected:
    """Expect a Gaussian."""
    part = array(_FLOAT, *shape)
    variance = part if has_variance else expected("None", _unless_none)
    return instance(Gaussian, mean=part, log_variance=variance)


def _check_likelihood(config: Config, spec: EnvSpec) -> None:
    owner = f"--set model.likelihood={config.model.likelihood}"
    cls = likelihoods.likelihood_class(config.model.likelihood)
    likelihood: Likelihood = call(owner, cls, config.model)
    targets_, size, members = spec.obs_dim + 1, config.model.batch, config.model.members
    has_variance = attribute(owner, likelihood, "has_variance", returns=array(_BOOL))
    per_target = attribute(owner, likelihood, "outputs_per_target", returns=_one_or_two())
    bounds = call(
        owner,
        likelihood.init_bounds,
        (members, targets_),
        returns=optional(arrays(f"arrays {(members, targets_)}", (members, targets_), _FLOAT)),
    )
    bounds = jax.tree.map(lambda x: x[0], bounds)
    prediction = call(
        owner,
        likelihood.read,
        jnp.zeros((size, per_target * targets_)),
        bounds,
        returns=_prediction((size, targets_), has_variance),
    )
    z, exponent = jnp.zeros((size, targets_)), jnp.zeros(())
    call(owner, likelihood.loss, prediction, z, exponent, returns=array(_FLOAT))
    call(owner, likelihood.bounds_cost, bounds, returns=optional(array(_FLOAT)))


def _one_or_two() -> Expected:
    return expected("1 or 2", lambda value: None if value in (1, 2) else repr(value))


def _check_model(config: Config, spec: EnvSpec) -> None:
    owner = f"--set model.network={config.model.network}"
    cls, members, size = model_class(config.model.network), config.model.members, config.model.batch
    dynamics: DynamicsModel = call(owner, cls, config.model, spec)
    has_variance = attribute(owner, dynamics, "has_variance", returns=array(_BOOL))
    if isinstance(dynamics, NeuralModel):
        outputs = dynamics.likelihood.outputs_per_target * (spec.obs_dim + 1)
        sizes = config.model.depth, outputs
        inputs = spec.obs_dim + spec.action_dim
        _check_network(owner, dynamics, "make_network", sizes, inputs, outputs)
    returns = arrays(f"float arrays ({members}, ...)", (members,), _FLOAT)
    stacked = call(owner, dynamics.init, _key(), members, returns=returns)
    params, stats = jax.tree.map(lambda x: x[0], stacked), ensemble.init_stats(spec)
    if isinstance(dynamics, NeuralModel):
        call(owner, dynamics.decay, params["network"], returns=array(_FLOAT))
    batch = _transitions(spec, size)
    returns = _prediction((size, spec.obs_dim + 1), has_variance)
    call(owner, dynamics.predict_joint, params, stats, *batch[:2], returns=returns)
    if dynamics.reward_from_next_state:
        reward_arguments = params, stats, *batch[:2], batch.next_obs
        returns = _prediction((size, 1), has_variance)
        call(owner, dynamics.predict_reward, *reward_arguments, returns=returns)

    loss_arguments = params, stats, batch
    call(owner, _gradient(owner, dynamics.loss), *loss_arguments, returns=like(params, "gradients"))
    heads = _heads(params, spec.obs_dim + 1)
    for head in call(owner, dynamics.output_heads, returns=heads):
        shape = head.get(params)["kernel"].shape
        returns, role = array(_FLOAT, *shape), "the init of an output head"
        call(owner, head.init, _key(), shape, returns=returns, role=role)


def _gradient(owner: str, loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the gradient of a model's loss, which must be a scalar."""

    def scalar_loss(*arguments: Any) -> Any:
        return call(owner, loss, *arguments, returns=array(_FLOAT))

    return functools.wraps(loss)(jax.grad(scalar_loss))


def _heads(params: Any, size: int) -> Expected:
    """Expect output layers of `size` targets that are in a model's parameters."""

    def fault(heads: Any) -> str | None:
        if not isinstance(heads, tuple | list):
            return describe(heads)
        for head in heads:
            if not isinstance(head, OutputHead) or not isinstance(head.dims, slice):
                return describe(head)
            try:
                layer = head.get(params)
                kernel, bias = layer["kernel"].shape, layer["bias"].shape
            except (KeyError, TypeError, IndexError, AttributeError):
                known = jax.tree.map(jnp.shape, params)
                return f"the path {head.path}, but the parameters are {known}"
            dims = len(range(size)[head.dims])
            if bias not in ((dims,), (2 * dims,)) or kernel[1:] != bias:
                return f"a layer with kernel {kernel} and bias {bias} for {dims} targets"
        return None

    layer = '{"kernel": (X, O), "bias": (O,)}'
    text = f"OutputHeads of layers {layer} with one or two outputs O for each target"
    return expected(text, fault)


def _check_source(config: Config, spec: EnvSpec) -> None:
    owner = f"--set rollout.source={config.rollout.source}"
    algorithm, cls = MBPO(config, spec), source_class(config.rollout.source)
    zero, key, updates = jnp.zeros((), jnp.int32), _key(), config.learn.utd
    shared = Shared(zero, zero)
    source: Source = call(owner, cls, config, spec, make_rule(config, spec))
    call(owner, source.init, returns=arrays("a pytree of arrays"))
    learner = jax.tree.map(jnp.asarray, algorithm.init(config, zero, zero))
    call(owner, source.blocks_after, shared, returns=array(_INT))
    keys = call(owner, source.split_keys, key, key, returns=instance(SourceKeys))
    shape = call(owner, source.start_shape, returns=_shape())
    slots = jnp.zeros((updates, config.real_batch), jnp.int32)
    real = replay.gather(learner.real_buffer, slots)
    starts = None if shape is None else jnp.zeros(shape, jnp.int32)
    env = algorithm.model_env(learner)
    before = like(learner, "the learner, with the shapes and dtypes of before")
    inputs = _inputs(learner.real_buffer, updates, config.real_batch)
    arguments = learner, shared, env, real, starts, keys
    _, prepared, _ = call(
        owner,
        source.prepare,
        *arguments,
        returns=several(learner=before, inputs=inputs, metrics=scalars()),
    )
    count = 2 if config.separate else 1
    trust = like(learner.trust, "the trust rule's state")
    batches = listed(_minibatch(spec, config.learn.batch), count)
    of_one = env.select_members(), learner.trust, jax.tree.map(lambda x: x[0], prepared)
    call(
        owner,
        source.minibatches,
        *of_one,
        returns=several(trust=trust, minibatches=batches, metrics=scalars()),
    )


def _shape() -> Expected:
    """Expect the shape of an array."""

    def fault(value: Any) -> str | None:
        is_shape = isinstance(value, tuple) and all(isinstance(n, int) and n > 0 for n in value)
        return None if value is None or is_shape else describe(value)

    return expected("a tuple of positive integers or None", fault)


def _inputs(buffer: ReplayBuffer, updates: int, real_batch: int) -> Expected:
    """Expect what `updates` updates learn from, see `UpdateInputs`."""
    text = f"UpdateInputs with leaves ({updates}, B, ...) and {real_batch} or more real transitions"
    leading = arrays(text, (updates,))

    def packed(part: Any) -> str | None:
        if not isinstance(part, PackedTransitions):
            return describe(part)
        shape = updates, *part.valid.shape[-1:]
        of_weight = shape if part.weight is None else part.weight.shape
        shapes = part.packed.shape, part.valid.shape, of_weight
        if shapes == ((*shape, buffer.packed.shape[-1]), shape, shape):
            return None
        return f".packed = {describe(part.packed)}, valid = {describe(part.valid)}"

    transitions = expected(text, packed)
    inputs = instance(UpdateInputs, real=transitions, synthetic=optional(transitions))

    def fault(value: Any) -> Fault | None:
        found = inputs.fault(value) or leading.fault(value)
        if found is None and value.real.valid.shape[1] < real_batch:
            return Fault(f"{value.real.valid.shape[1]} real transitions", text)
        return found

    return Expected(text, fault)


def _minibatch(spec: EnvSpec, size: int) -> Expected:
    """Expect a minibatch of `size` transitions."""
    scalar, obs = array(_FLOAT, size), array(_FLOAT, size, spec.obs_dim)
    action = array(_FLOAT, size, spec.action_dim)
    data = instance(
        Transition, obs=obs, action=action, reward=scalar, discount=scalar, next_obs=obs
    )
    minibatch = instance(Minibatch, data=data, valid=array(_BOOL, size), weight=optional(scalar))
    return Expected(f"Minibatch of {size} transitions", minibatch.fault)
