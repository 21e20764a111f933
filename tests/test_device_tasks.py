"""Device tasks compared with dm_control, one control step from each of its states.

The first tier tests two tasks, the slow tier a few cheap ones and FTFL's seven. To test every task,
from other states, run

    pytest tests/test_device_tasks.py --all-tasks --states=7
"""

import re
import sys

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from dm_control.utils import rewards as dm_rewards
from mujoco import mjx

import device_parity as parity
from dynajax.envs import mjx as tasks
from dynajax.envs.mjx import contacts, physics, rewards
from dynajax.types import UsageError
from dynajax.xla import backend
from jaxprs import equations

TASKS = [name for name in tasks.names() if not name.startswith("brax:")]
#: Domains tested by default: those of the paper, and some that compile in seconds.
DEFAULT = ("cartpole", "cheetah", "hopper", "humanoid", "pendulum", "quadruped")
#: Domains tested by default in float64 too, for which each domain is compiled once more.
DEFAULT_DOUBLE = ("cartpole", "hopper", "humanoid", "pendulum")
#: Factors on the tolerances of a task. The mass matrix of swimmer15 has a condition number of 2e5:
#: rounding only its entries to float32 changes qpos by 3e-5 to 8e-4 in a control step, and the
#: difference at which a float64 solver stops is amplified in the same way.
TOLERANCE_FACTORS = {"swimmer-swimmer15": 20}
#: The axis about which one of two capsules is rotated.
AXIS = np.array([0.6, 0.8, 0])


@pytest.fixture
def seed(request):
    return request.config.getoption("--states")


def _task_params(domains):
    """Return a parameter for every task; tasks outside `domains` need --all-tasks."""
    marks = [() if n.partition("-")[0] in domains else pytest.mark.all_tasks for n in TASKS]
    return [pytest.param(name, marks=mark) for name, mark in zip(TASKS, marks, strict=True)]


@pytest.mark.parametrize("name", TASKS)
def test_observation_and_reward_from_data_of_dm_control(name, seed):
    given = parity.steps(name, seed=seed)
    obs, reward = parity.observations_and_rewards(name, given.fields)
    np.testing.assert_allclose(obs, given.obs, rtol=1e-5, atol=1e-5)
    steady = parity.is_reward_stable(name, given)
    np.testing.assert_allclose(reward[steady], given.reward[steady], rtol=1e-5, atol=2e-6)
    assert steady.mean() > 0.9


@pytest.mark.parametrize("name", _task_params(DEFAULT))
def test_one_control_step_in_float32(name, seed):
    given = parity.steps(name, seed=seed)
    after, read = parity.device(name, given)
    obs, reward = parity.observations_and_rewards(name, read)
    max_error = np.array([1e-5, 1e-3]) * TOLERANCE_FACTORS.get(name, 1)
    differs = ~(
        parity.close(after.qpos, given.after.qpos, max_error[0])
        & parity.close(obs, given.obs, max_error[1])
    )
    # Allow differences only where rounding changes the step of C MuJoCo by as much.
    failed = jax.tree.map(lambda x: x[differs], given)
    assert not differs.any() or (
        differs.mean() <= 0.02 and parity.is_sensitive(name, failed, *max_error).all()
    )
    steady = ~differs & parity.is_reward_stable(name, given)
    np.testing.assert_allclose(reward[steady], given.reward[steady], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["finger-spin", "reacher-easy", "quadruped-walk"])
def test_dm_control_repeats_a_step_from_a_restored_state(name):
    given = parity.steps(name)
    repeated = parity.repeat_steps(name, given.before, given.action)
    for actual, desired in zip(*map(jax.tree.leaves, (repeated, given)), strict=True):
        np.testing.assert_array_equal(actual, desired)


def test_only_states_at_the_edge_of_a_contact_are_sensitive():
    name, max_error = "finger-spin", (1e-5, 1e-3)
    given = parity.steps(name)
    assert not parity.is_sensitive(name, given, *max_error, draws=1).any()

    def edge(free, touching):
        """Return two almost equal states, without and with a contact, found by bisection."""

        def interpolate(fraction):
            weights = np.array([1 - fraction, fraction])
            before = jax.tree.map(lambda x: (weights @ x[[free, touching]])[None], given.before)
            return parity.repeat_steps(name, before, given.action[[free]])

        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if interpolate(middle).contacts.any() else (middle, high)
        return interpolate(low), interpolate(high)

    free, touching = (np.flatnonzero(given.contacts == n)[:10] for n in (0, 1))
    edges = [edge(*pair) for pair in zip(free, touching, strict=True)]
    jumps = [np.abs(a.after.qpos - b.after.qpos).max() for a, b in edges]
    assert max(jumps) > max_error[0]
    assert parity.is_sensitive(name, edges[np.argmax(jumps)][0], *max_error).all()


def test_cholesky_is_not_batched():
    """A batched factorization can deadlock XLA's worker threads (`envs.mjx.linalg`)."""
    task = tasks.make("cartpole-balance")
    keys = jax.random.split(jax.random.PRNGKey(0), 6).reshape(3, 2, 2)
    reset = jax.jit(jax.vmap(jax.vmap(task.reset)))
    step = jax.jit(jax.vmap(jax.vmap(task.step)))
    text = step.lower(jax.eval_shape(reset, keys), jnp.zeros((3, 2, 1))).as_text()
    shapes = re.findall(r"@lapack_\w+\(.*\) \{.*\} : \(tensor<([\dx]+)xf32>", text)
    assert shapes and set(shapes) == {"2x2"}


def test_cholesky_is_batched_in_programs_for_a_gpu():
    task = tasks.make("cartpole-balance")
    states = jax.eval_shape(jax.vmap(task.reset), jax.random.split(jax.random.PRNGKey(0), 6))
    with backend.compiling_for("gpu"):
        program = jax.make_jaxpr(jax.vmap(task.step))(states, jnp.zeros((6, 1)))
    factored = [e for e in equations(program.jaxpr) if e.primitive.name == "cholesky"]
    assert {e.invars[0].aval.shape for e in factored} == {(6, 2, 2)}


@pytest.mark.parametrize("angle", [5e-4, 2e-3, 0.01, 1])
def test_contact_of_almost_parallel_capsules_in_float32(angle):
    """Compare with C MuJoCo, with the axes rounded to float32 for both."""
    body = '<body pos="{}"><freejoint/><geom type="capsule" size=".03 .2"/></body>'
    bodies = [body.format(at) for at in ("0 0 0", "0.05 0.01 0.02")]
    model = mujoco.MjModel.from_xml_string(
        f"<mujoco><worldbody>{''.join(bodies)}</worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    data.qpos[10:14] = np.float32(np.cos(angle / 2)), *np.float32(np.sin(angle / 2) * AXIS)
    data.qpos[:] = np.float32(data.qpos)
    mujoco.mj_kinematics(model, data)
    data.geom_xmat[:], data.geom_xpos[:] = np.float32(data.geom_xmat), np.float32(data.geom_xpos)
    mujoco.mj_collision(model, data)
    assert data.ncon == 1
    geoms = [
        (data.geom_xpos[i], data.geom_xmat[i].reshape(3, 3), model.geom_size[i]) for i in (0, 1)
    ]
    geoms = jax.tree.map(np.float32, geoms)
    distance, position, frame = jax.jit(contacts._capsule_capsule)(*geoms)
    np.testing.assert_allclose(distance, data.contact.dist[0], atol=1e-7)
    np.testing.assert_allclose(position, data.contact.pos[0], atol=2e-6)
    np.testing.assert_allclose(frame[0], data.contact.frame[0, :3], atol=1e-5)


def test_work_per_link_does_not_grow_with_the_chain():
    """Without barriers XLA would recompute the parents of every link (`envs.mjx.kinematics`)."""
    flops = []
    for name in ("swimmer-swimmer6", "swimmer-swimmer15"):
        model = parity.parts(name).model

        def sites(qpos, model=model):
            data = mjx.make_data(model).replace(qpos=qpos)
            return physics.update_derived(model, data).site_xpos

        compiled = jax.jit(sites).lower(jnp.zeros(model.nq)).compile()
        flops.append(compiled.cost_analysis()["flops"])
    assert flops[1] < 3.5 * flops[0]


@pytest.mark.parametrize("name", _task_params(DEFAULT_DOUBLE))
def test_one_control_step_in_float64(name, seed):
    """Use a smaller solver tolerance than dm_control's.

    With dm_control's tolerance the solvers may stop one iteration apart, and then differ by up to
    4e-8 in one state of 200.
    """
    given = parity.steps(name, seed=seed, tolerance=1e-13)
    after, _ = parity.device(name, given, double=True, tolerance=1e-13)
    max_error = TOLERANCE_FACTORS.get(name, 1) * 1e-9
    for field in ("qpos", "qvel", "act"):
        actual, desired = getattr(after, field), getattr(given.after, field)
        np.testing.assert_allclose(actual, desired, rtol=max_error, atol=max_error)


@pytest.mark.parametrize("sigmoid", rewards._SIGMOIDS)
def test_tolerance_equals_dm_controls(sigmoid):
    x = np.linspace(-4, 4, 401)
    for bounds, margin, value in [((0, 0), 1, 0.1), ((-0.5, 1), 2, 0.5), ((1, np.inf), 0, 0.1)]:
        actual = rewards.tolerance(x, bounds, margin, sigmoid, value)
        desired = dm_rewards.tolerance(x, bounds, margin, sigmoid, value)
        np.testing.assert_allclose(actual, desired, atol=2e-6)


@pytest.mark.parametrize("name", ["dog-run", "quadruped-escape", "stacker-stack_2", "Hopper-v5"])
def test_unavailable_task_raises_one_line(name):
    with pytest.raises(UsageError, match=f"^--env={name}: .*--engine=host$"):
        tasks.make(name)


def test_importing_tasks_does_not_import_mjx_or_brax():
    import subprocess

    code = "import sys, dynajax, dynajax.envs.mjx; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "dynajax.envs.mjx" in loaded.split()
    assert not {"mujoco.mjx", "brax"} & set(loaded.split())
