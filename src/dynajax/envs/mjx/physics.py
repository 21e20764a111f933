"""The physics that dm_control's tasks share on MJX: the model, a control step and random poses.

The `MjModel` is the one that dm_control.suite loads, read after a reset because some tasks change
it there. Two changes make it acceptable to MJX without changing the dynamics: the flag that
computes energies is cleared, and if contacts are disabled, no pairs of geoms are listed for them.

The state between two control steps is a `Physics`: the quantities that MuJoCo integrates, the last
acceleration (the warm start of the constraint solver), and the model parameters of the episode (a
target's position). Everything else is recomputed. dm_control ends a control step with `mj_step1`,
so positions, velocities and the sensors computed from them belong to the new state, while sensors
of forces and accelerations belong to the last substep. `mjx.step` does not do this, so
`update_derived` does.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx import contacts, kinematics, linalg
from dynajax.types import Array

_NO_ACTUATION = int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)
_NO_SENSORS = int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
_NO_CONTACT = int(mujoco.mjtDisableBit.mjDSBL_CONTACT | mujoco.mjtDisableBit.mjDSBL_CONSTRAINT)


class Physics(NamedTuple):
    """The physics state of one environment, in the precision of its model."""

    qpos: Array  # (nq,)
    qvel: Array  # (nv,)
    act: Array  # (na,)
    warmstart: Array  # (nv,) the last acceleration
    params: Array  # (P,) model parameters sampled for this episode; P is 0 for most tasks


class TaskFunctions(NamedTuple):
    """The functions of a domain that turn the physics into a task.

    `data` is an `mjx.Data` of one state. The functions only read fields that `mujoco.MjData` also
    has, so that observation and reward can be tested on data of C MuJoCo.
    """

    observation: Callable[[Any], Array]  # data -> (D,), in dm_control's order
    reward: Callable[[Any], Array]  # data -> ()
    initial: Callable[[mjx.Model, Array], "Physics"]  # model, key -> initial state
    #: (model, `Physics.params`) -> model with these parameters
    set_params: Callable[[mjx.Model, Array], mjx.Model] = lambda model, params: model
    force_sensors: bool = False  # whether sensors of forces or accelerations are read


def body_axes(data: Any) -> Array:
    """Return the axes of all bodies in world coordinates, (bodies, 3, 3), one axis per column."""
    return data.xmat.reshape(-1, 3, 3)


def prepare_model(model: mujoco.MjModel) -> mujoco.MjModel:
    """Return a copy of `model` that MJX accepts, with the same dynamics."""
    model = mujoco.MjModel.__copy__(model)
    model.opt.enableflags &= ~int(mujoco.mjtEnableBit.mjENBL_ENERGY)
    if model.opt.disableflags & _NO_CONTACT:
        model.geom_contype[:] = 0
        model.geom_conaffinity[:] = 0
    return model


def sensor_indices(model: mujoco.MjModel, *names: str) -> np.ndarray:
    """Return the indices into `sensordata` of the named sensors, in the order of the names."""
    sensors = [model.sensor(name) for name in names]
    return np.concatenate([np.arange(s.dim[0]) + s.adr[0] for s in sensors])


def _disable(model: mjx.Model, flags: int) -> mjx.Model:
    return model.replace(opt=model.opt.replace(disableflags=model.opt.disableflags | flags))


def _make_data(model: mjx.Model, physics: Physics, control: Array | None = None) -> mjx.Data:
    data = mjx.make_data(model).replace(
        qpos=physics.qpos,
        qvel=physics.qvel,
        act=physics.act,
        qacc_warmstart=physics.warmstart,
    )
    return data if control is None else data.replace(ctrl=control)


def physics_of(data: mjx.Data, params: Array | None = None) -> Physics:
    """Return the physics state of `data`; `params` (P,) is empty by default."""
    empty = jnp.zeros_like(data.qpos, shape=0)
    params = empty if params is None else params
    return Physics(data.qpos, data.qvel, data.act, data.qacc_warmstart, params)


@contextlib.contextmanager
def _patched_mjx() -> Iterator[None]:
    """Apply this package's changes to MJX while a program is traced."""
    with (
        contacts.c_mujoco_contacts(),
        linalg.sequential_cholesky(),
        kinematics.barriers_between_levels(),
    ):
        yield


def update_derived(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """Recompute positions, velocities and the sensors that depend on them from qpos and qvel."""
    with _patched_mjx():
        data = mjx.kinematics(model, data)
    data = mjx.com_pos(model, data)
    data = mjx.sensor_pos(model, data)
    data = mjx.com_vel(model, data)
    return mjx.sensor_vel(model, data)


def _step(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """Compute `mjx.step`, without its error in the constraint forces in float32.

    The Euler step uses the solver's constraint forces. With a stiff constraint they amplify the
    rounding error of the acceleration: a walker's velocity was wrong by 0.002 rad/s after one
    control step. The forces consistent with the acceleration are M qacc - (all other forces). In
    float64 the two differ only if the solver stops early, and C MuJoCo then uses the solver's.
    """
    euler = model.opt.integrator == mujoco.mjtIntegrator.mjINT_EULER
    if not euler or data.qpos.dtype == jnp.float64:
        return mjx.step(model, data)
    data = mjx.forward(model, data)
    forces = mjx.mul_m(model, data, data.qacc) - data.qfrc_smooth
    return mjx.euler(model, data.replace(qfrc_constraint=forces))


def advance(
    model: mjx.Model,
    physics: Physics,
    control: Array,
    substeps: int,
    *,
    force_sensors: bool = False,
) -> tuple[Physics, mjx.Data]:
    """Take one control step, as dm_control's `Physics.step` does.

    Args:
      model: model with the parameters of this episode.
      physics: the state before the step.
      control: (nu,) in the actuators' units.
      substeps: number of MuJoCo steps.
      force_sensors: whether sensors of forces and accelerations are read.

    Returns:
      The state after the step, and the data of that state.
    """
    # Disable sensors that are not read, because they cost compile time and run time.
    substep_model = model if force_sensors else _disable(model, _NO_SENSORS)

    # Carry only the state instead of the whole data. This copies less, and a loop cannot carry the
    # data under jax_enable_x64, because MJX then changes int32 fields to int64.
    def substep(carry: tuple[Physics, Array], _: None) -> tuple[tuple[Physics, Array], None]:
        before, _readings = carry
        with _patched_mjx():
            data = _step(substep_model, _make_data(model, before, control))
        return (physics_of(data, before.params), data.sensordata), None

    readings = jnp.zeros(model.nsensordata, physics.qpos.dtype)
    (physics, readings), _ = jax.lax.scan(substep, (physics, readings), length=substeps)
    data = _make_data(model, physics, control).replace(sensordata=readings)
    return physics, update_derived(model, data)


def initial_data(model: mjx.Model, physics: Physics, *, force_sensors: bool = False) -> mjx.Data:
    """Return the data of a state before any control, as after dm_control's reset."""
    data = _make_data(model, physics)
    if force_sensors:
        with _patched_mjx():
            data = mjx.forward(_disable(model, _NO_ACTUATION), data)
    return update_derived(model, data)


def at_rest(model: mjx.Model, qpos: Array, params: Array | None = None) -> Physics:
    """Return a state with zero velocity and acceleration; `params` is empty by default."""
    zeros = jnp.zeros_like(qpos, shape=model.nv)
    empty = jnp.zeros_like(qpos, shape=0)
    act = jnp.zeros_like(qpos, shape=model.na)
    return Physics(qpos, zeros, act, zeros, empty if params is None else params)


def nan_if_invalid(physics: Physics, obs: Array, reward: Array) -> tuple[Array, Array]:
    """Return float32 observation and reward, or NaN if MuJoCo considers the state invalid."""
    checked = jnp.concatenate([physics.qpos, physics.qvel, physics.warmstart])
    valid = jnp.all(jnp.abs(checked) <= mujoco.mjMAXVAL)
    obs, reward = (jnp.where(valid, x, jnp.nan).astype(jnp.float32) for x in (obs, reward))
    return obs, reward


def clearance(model: mjx.Model, qpos: Array) -> Array:
    """Return the smallest distance in metres of geoms that can collide; negative in a contact."""
    with _patched_mjx():
        data = mjx.kinematics(model, mjx.make_data(model).replace(qpos=qpos))
        contact: Any = mjx.collision(model, data)._impl.contact
    return jnp.min(contact.dist - contact.includemargin)


def random_pose(model: mujoco.MjModel, key: Array) -> Array:
    """Sample qpos (nq,) like dm_control's `randomize_limited_and_rotational_joints`.

    Limited joints are uniform in their range, and unlimited hinges in [-pi, pi). As in dm_control,
    the orientation of a free joint is a normalised vector of four uniform numbers in [0, 1), which
    is not uniform over orientations. All other entries are those of `qpos0`.
    """
    low, high = model.qpos0.copy(), model.qpos0.copy()
    quaternions = []
    for joint in map(model.joint, range(model.njnt)):
        kind, at = joint.type[0], joint.qposadr[0]
        if kind == mujoco.mjtJoint.mjJNT_FREE:
            quaternions.append(slice(at + 3, at + 7))
            low[quaternions[-1]], high[quaternions[-1]] = 0, 1
        elif kind == mujoco.mjtJoint.mjJNT_BALL:
            raise NotImplementedError(f"ball joints are not supported: {joint.name}")
        elif model.jnt_limited[joint.id]:
            low[at], high[at] = joint.range
        elif kind == mujoco.mjtJoint.mjJNT_HINGE:
            low[at], high[at] = -np.pi, np.pi
    uniform = jax.random.uniform(key, low.shape)
    qpos = low + uniform * (high - low)
    for part in quaternions:
        qpos = qpos.at[part].divide(jnp.linalg.norm(qpos[part]))
    return qpos


def sample_without_contacts(
    model: mjx.Model, sample: Callable[[Array], Array], key: Array, *, attempts: int = 1000
) -> Array:
    """Sample qpos (nq,) until there are no contacts, as dm_control does.

    Args:
      model: the model.
      sample: maps a key to a sample of qpos.
      key: PRNG key.
      attempts: maximum number of samples, since an endless loop would block the device; after that
        the last sample is returned.
    """

    def is_rejected(carry: tuple[Array, Array, Array, Array]) -> Array:
        count, _, _, accepted = carry
        return ~accepted & (count < attempts)

    def attempt(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        count, key, _, _ = carry
        key, sample_key = jax.random.split(key)
        qpos = sample(sample_key)
        return count + 1, key, qpos, clearance(model, qpos) >= 0

    start = (jnp.int32(0), key, jnp.zeros_like(jnp.asarray(model.qpos0)), jnp.bool_(False))
    return jax.lax.while_loop(is_rejected, attempt, start)[2]
