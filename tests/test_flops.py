"""Compare the count of floating-point operations with a count by hand and with XLA's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dynajax import make_config
from dynajax.agents import make_agent
from dynajax.mbpo import MBPO
from dynajax.models import make_model
from dynajax.profiling import flops
from dynajax.types import EnvSpec, Shared, Transition
from dynajax.xla import backend

PAPER = make_config("cheetah-run", preset="paper", fixes=["scale,target"])
CHEETAH = EnvSpec("cheetah-run", 17, 6, 1000, (), None)
A, B = jnp.ones((2, 3)), jnp.ones((3, 5))
MATMUL = 2 * 2 * 3 * 5  # operations of A @ B


def real(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def minibatch(size, spec):
    obs = real(size, spec.obs_dim)
    return Transition(obs, real(size, spec.action_dim), real(size), real(size), obs)


def states(config, spec):
    """Return the algorithm, and the shapes of a learner and of the counters."""
    algorithm, number = MBPO(config, spec), jax.ShapeDtypeStruct((), jnp.int32)
    learner = jax.eval_shape(lambda n: algorithm.init(config, n, n), number)
    return algorithm, learner, Shared(number, number)


def update_operations(config, spec, count=flops.count):
    agent = make_agent(config, spec)
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    noise = jax.eval_shape(lambda k: jax.tree.map(lambda x: x[0], agent.noise(k, 1)), key)
    batch = minibatch(config.learn.batch, spec)
    return count(
        lambda state, batch, mask, noise: agent.update(state, batch, mask, mask, noise),
        jax.eval_shape(agent.init, key),
        batch,
        real(config.learn.batch),
        noise,
    )


def fit_step_operations(config, spec, count=flops.count):
    """Count the gradients of all members, each on its own minibatch."""
    _, learner, _ = states(config, spec)
    members, batch = config.model.members, config.model.batch
    dynamics = make_model(config.model, spec)
    gradient = jax.vmap(jax.grad(dynamics.loss), (0, None, 0))
    obs, scalar = real(members, batch, spec.obs_dim), real(members, batch)
    batches = Transition(obs, real(members, batch, spec.action_dim), scalar, scalar, obs)
    return count(
        lambda params, stats, batch: gradient(params, stats, batch),
        learner.model.params,
        learner.model.stats,
        batches,
    )


def xla_count(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def test_count_of_matmuls_and_convolutions():
    assert flops.count(jnp.matmul, A, B) == MATMUL
    assert flops.count(jnp.dot, real(4), real(4)) == 2 * 4
    assert flops.count(jax.vmap(jnp.matmul), real(7, 2, 3), real(7, 3, 5)) == 7 * MATMUL
    assert flops.count(lambda a: jnp.tanh(a).sum(), A) == 0

    convolution = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(2, 2),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    for groups in (1, 2):
        # 4 x 4 outputs with 8 features, each from 3 x 3 inputs with 6 features.
        grouped = functools.partial(convolution, feature_group_count=groups)
        count = flops.count(grouped, real(1, 9, 9, 6), real(3, 3, 6 // groups, 8))
        assert count == 2 * (4 * 4 * 8) * (3 * 3 * 6 // groups)


def test_count_of_functions_that_contain_matmuls():
    def body(carry, _):
        return carry @ jnp.eye(3), None

    @jax.custom_vjp
    def with_vjp(a):
        return a @ B

    with_vjp.defvjp(lambda a: (a @ B, None), lambda _, g: (g @ B.T,))

    @jax.custom_jvp
    def with_jvp(a):
        return a @ B

    with_jvp.defjvp(lambda a, t: (a[0] @ B, t[0] @ B))

    def branches(a):
        return jax.lax.cond(a.sum() > 0, lambda a: a @ B @ B.T, lambda a: a, a)

    cube = 2 * 2 * 3 * 3
    mesh = jax.make_mesh((1,), ("learners",))
    sharded = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    for function, expected in (
        (lambda a: jax.lax.scan(body, a, None, length=11)[0], 11 * cube),
        (lambda a: jax.lax.fori_loop(0, 4, lambda _, a: body(a, 0)[0], a), 4 * cube),
        (lambda a: jax.lax.map(lambda a: a @ B, a[:, None]), MATMUL),
        (branches, 2 * MATMUL),
        (jax.jit(lambda a: a @ B), MATMUL),
        (backend.jit(lambda a: a @ B), MATMUL),
        (with_vjp, MATMUL),
        (jax.value_and_grad(lambda a: with_vjp(a).sum()), 2 * MATMUL),
        (jax.grad(lambda a: with_vjp(a).sum()), MATMUL),  # the value is unused
        (with_jvp, MATMUL),
        (jax.checkpoint(lambda a: a @ B), MATMUL),
        (lambda a: sharded(a, B), MATMUL),
        (lambda a: jax.jit(branches)(a) @ B, 3 * MATMUL),
    ):
        assert flops.count(function, A) == expected


def test_loop_of_unknown_length_needs_a_trip_count():
    def loop(a, n):
        return jax.lax.fori_loop(0, n, lambda _, a: a @ jnp.eye(3), a)

    with pytest.raises(ValueError, match="trips"):
        flops.count(loop, A, 4)
    assert flops.count(loop, A, 4, trips=4) == 4 * 2 * 2 * 3 * 3
    # The length does not matter if the loop contains no matmul.
    assert flops.count(lambda n: jax.lax.fori_loop(0, n, lambda i, a: a + i, 0), 4) == 0


def test_count_of_an_update():
    settings = {"agent.hidden": (2,), "learn.batch": 5}
    config = make_config("cheetah-run", preset="paper", settings=settings)
    # Networks 3-2-2 and 4-2-1; an operation is a multiplication or an addition.
    actor, critic = 2 * 5 * (3 * 2 + 2 * 2), 2 * 5 * (4 * 2 + 2 * 1)
    actor_first, critic_first = 2 * 5 * 3 * 2, 2 * 5 * 4 * 2
    expected = (
        (actor + 2 * critic)  # the target
        + 2 * (3 * critic - critic_first)  # the critics' loss
        + (3 * actor - actor_first)  # the actor's loss, the actor
        + 2 * 2 * critic  # the actor's loss, through the critics to the action
    )
    count = update_operations(config, EnvSpec("x", 3, 1, 10, (), None))
    assert isinstance(count, int)
    assert count == expected


def test_count_of_a_fit_step():
    member = 2 * 256 * (23 * 200 + 3 * 200 * 200 + 200 * 36)
    first = 2 * 256 * 23 * 200
    assert fit_step_operations(PAPER, CHEETAH) == 7 * (3 * member - first)
    assert np.isclose(fit_step_operations(PAPER, CHEETAH), 1.4e9, rtol=0.01)


@pytest.mark.parametrize("sizes", ["paper", "small"])
def test_counts_are_close_to_those_of_xla(sizes):
    """XLA also counts elementwise work: a few per cent, more for small networks."""
    settings = {"agent.hidden": (64, 64), "learn.batch": 128, "model.width": 128}
    config = (
        PAPER if sizes == "paper" else make_config("cheetah-run", agent="sac", settings=settings)
    )
    most = 1.06 if sizes == "paper" else 1.2
    for stage in (update_operations, fit_step_operations):
        assert 1 < stage(config, CHEETAH, xla_count) / stage(config, CHEETAH) < most


def test_count_of_learning_is_the_sum_of_its_parts():
    algorithm, learner, shared = states(PAPER, CHEETAH)
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    transition = jax.tree.map(lambda x: real(*x.shape[1:]), minibatch(1, CHEETAH))
    learn = flops.count(algorithm.learn, learner, shared, transition, jnp.ones((), bool))

    def roll_out(learner, shared, key):
        source, model_env = algorithm.source(learner), algorithm.model_env(learner)
        keys = source.split_keys(key, key)
        return source.add_rollouts(learner, shared, model_env, jnp.zeros(400, int), 1, keys)

    rollout = flops.count(roll_out, learner, shared, key)
    policy = 2 * (17 * 256 + 256 * 256 + 256 * 12)
    member = 2 * (23 * 200 + 3 * 200 * 200 + 200 * 36)
    assert rollout == 400 * (policy + member)
    assert learn == rollout + 20 * update_operations(PAPER, CHEETAH)
    assert flops.count(algorithm.act, learner, real(17), 0) == policy

    inputs = jax.eval_shape(algorithm.begin_fit, learner)
    members = inputs.members, inputs.keys
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), members)
    arguments = learner.config, shared, inputs, learner.real_buffer, *one
    fit = 7 * flops.count(algorithm.train_member, *arguments)
    assert fit == 5000 * fit_step_operations(PAPER, CHEETAH)
    assert 35e9 < learn + policy + fit / 250 < 45e9  # about 40 GFLOP per environment step
