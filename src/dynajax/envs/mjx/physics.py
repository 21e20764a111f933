"""What the tasks of dm_control share on MJX: the model, a control step, and random poses.

The `MjModel` is the one that dm_control.suite itself loads, taken after a reset because some tasks
change it there. Two changes let MJX take it, and neither changes the dynamics: the flag that asks
for energies is cleared, and where contacts are disabled no pair of geoms is listed for them.

A state between two control steps is a `Physics`: what MuJoCo integrates, the last acceleration
(where the constraint solver starts), and what an episode draws for its model (a target's
position). All else is recomputed. MJX does not treat a control step as dm_control does, which ends
it with `mj_step1`: positions, velocities and the sensors made of them belong to the new state,
while sensors of forces and accelerations are those of the last substep. So does `observe` here.
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

_MOTOR_OFF = int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)
_SENSOR_OFF = int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
_NO_CONTACT = int(mujoco.mjtDisableBit.mjDSBL_CONTACT | mujoco.mjtDisableBit.mjDSBL_CONSTRAINT)


class Physics(NamedTuple):
    """The state of one environment, in the precision of its model."""

    qpos: Array  # (nq,)
    qvel: Array  # (nv,)
    act: Array  # (na,)
    warmstart: Array  # (nv,) the last acceleration
    drawn: Array  # (P,) what this episode drew for its model; P is 0 for most tasks


class Rules(NamedTuple):
    """What a domain adds to the physics to make a task of it.

    `data` is an `mjx.Data` of one state; only fields that `mujoco.MjData` has too are read, so
    that observation and reward can also be tested on C MuJoCo's data.
    """

    observation: Callable[[Any], Array]  # data -> (D,), in dm_control's order
    reward: Callable[[Any], Array]  # data -> ()
    initial: Callable[[mjx.Model, Array], "Physics"]  # model, key -> the first state
    #: Puts what the episode drew, `Physics.drawn`, into the model.
    put: Callable[[mjx.Model, Array], mjx.Model] = lambda model, drawn: model
    forces: bool = False  # whether sensors of forces or accelerations are read


def frames(data: Any) -> Array:
    """The axes of all bodies in the world's frame, (bodies, 3, 3), one axis a column."""
    return data.xmat.reshape(-1, 3, 3)


def prepare(model: mujoco.MjModel) -> mujoco.MjModel:
    """A copy of `model` that MJX accepts and that moves as the original does."""
    model = mujoco.MjModel.__copy__(model)
    model.opt.enableflags &= ~int(mujoco.mjtEnableBit.mjENBL_ENERGY)
    if model.opt.disableflags & _NO_CONTACT:
        model.geom_contype[:] = 0
        model.geom_conaffinity[:] = 0
    return model


def sensors(model: mujoco.MjModel, *names: str) -> np.ndarray:
    """Indices into `sensordata` of the sensors of these names, in this order."""
    named = [model.sensor(name) for name in names]
    return np.concatenate([np.arange(s.dim[0]) + s.adr[0] for s in named])


def _without(model: mjx.Model, flags: int) -> mjx.Model:
    return model.replace(opt=model.opt.replace(disableflags=model.opt.disableflags | flags))


def _data(model: mjx.Model, physics: Physics, control: Array | None = None) -> mjx.Data:
    data = mjx.make_data(model).replace(
        qpos=physics.qpos,
        qvel=physics.qvel,
        act=physics.act,
        qacc_warmstart=physics.warmstart,
    )
    return data if control is None else data.replace(ctrl=control)


def state(data: mjx.Data, drawn: Array | None = None) -> Physics:
    """The state that `data` belongs to; `drawn` (P,) defaults to nothing."""
    nothing = jnp.zeros_like(data.qpos, shape=0)
    drawn = nothing if drawn is None else drawn
    return Physics(data.qpos, data.qvel, data.act, data.qacc_warmstart, drawn)


@contextlib.contextmanager
def _our_mjx() -> Iterator[None]:
    """What is traced inside uses MJX with all that this package puts in its place."""
    with contacts.as_in_c(), linalg.in_turn(), kinematics.by_levels():
        yield


def observe(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """Brings positions, velocities and the sensors made of them up to qpos and qvel."""
    with _our_mjx():
        data = mjx.kinematics(model, data)
    data = mjx.com_pos(model, data)
    data = mjx.sensor_pos(model, data)
    data = mjx.com_vel(model, data)
    return mjx.sensor_vel(model, data)


def _step(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """`mjx.step`, in float32 exact to its rounding in contacts too.

    Euler's step takes the forces of the constraints, of which a stiff one multiplies the rounding
    of the acceleration that it was found with: a walker's velocity was wrong by 0.002 rad/s after
    one control step. The forces that belong to that acceleration are M qacc - (all others). In
    float64 the two differ only where the solver ends before it is done, and C MuJoCo's is theirs.
    """
    euler = model.opt.integrator == mujoco.mjtIntegrator.mjINT_EULER
    if not euler or data.qpos.dtype == jnp.float64:
        return mjx.step(model, data)
    data = mjx.forward(model, data)
    forces = mjx.mul_m(model, data, data.qacc) - data.qfrc_smooth
    return mjx.euler(model, data.replace(qfrc_constraint=forces))


def advance(
    model: mjx.Model, physics: Physics, control: Array, substeps: int, *, forces: bool = False
) -> tuple[Physics, mjx.Data]:
    """One control step, as dm_control's `Physics.step` takes it.

    Args:
      model: with this episode's own values put in.
      physics: the state before the step.
      control: (nu,) in the actuators' units.
      substeps: MuJoCo steps.
      forces: whether sensors of forces and accelerations are read.

    Returns:
      The state after the step, and the data of that state.
    """
    # A sensor that nobody reads costs compilation and time.
    stepped = model if forces else _without(model, _SENSOR_OFF)

    # The carry is the state alone rather than the whole data: less to copy, and MJX turns int32
    # fields into int64 under jax_enable_x64, which no carry may do.
    def substep(carry: tuple[Physics, Array], _: None) -> tuple[tuple[Physics, Array], None]:
        before, _readings = carry
        with _our_mjx():
            data = _step(stepped, _data(model, before, control))
        return (state(data, before.drawn), data.sensordata), None

    readings = jnp.zeros(model.nsensordata, physics.qpos.dtype)
    (physics, readings), _ = jax.lax.scan(substep, (physics, readings), length=substeps)
    data = _data(model, physics, control).replace(sensordata=readings)
    return physics, observe(model, data)


def settle(model: mjx.Model, physics: Physics, *, forces: bool = False) -> mjx.Data:
    """The data of a state that no control has acted on yet, as dm_control's reset leaves it."""
    data = _data(model, physics)
    if forces:
        with _our_mjx():
            data = mjx.forward(_without(model, _MOTOR_OFF), data)
    return observe(model, data)


def at_rest(model: mjx.Model, qpos: Array, drawn: Array | None = None) -> Physics:
    """A state without motion, activation or history; `drawn` (P,) defaults to nothing."""
    zeros = jnp.zeros_like(qpos, shape=model.nv)
    nothing = jnp.zeros_like(qpos, shape=0)
    act = jnp.zeros_like(qpos, shape=model.na)
    return Physics(qpos, zeros, act, zeros, nothing if drawn is None else drawn)


def or_nan(physics: Physics, obs: Array, reward: Array) -> tuple[Array, Array]:
    """Observation and reward in float32, NaN where MuJoCo would call the state invalid."""
    moved = jnp.concatenate([physics.qpos, physics.qvel, physics.warmstart])
    valid = jnp.all(jnp.abs(moved) <= mujoco.mjMAXVAL)
    obs, reward = (jnp.where(valid, x, jnp.nan).astype(jnp.float32) for x in (obs, reward))
    return obs, reward


def clearance(model: mjx.Model, qpos: Array) -> Array:
    """The least distance in metres of any pair of geoms that may touch; negative in a contact."""
    with _our_mjx():
        data = mjx.kinematics(model, mjx.make_data(model).replace(qpos=qpos))
        contact: Any = mjx.collision(model, data)._impl.contact
    return jnp.min(contact.dist - contact.includemargin)


def random_pose(model: mujoco.MjModel, key: Array) -> Array:
    """qpos (nq,) as dm_control's `randomize_limited_and_rotational_joints` draws it.

    Limited joints are uniform in their range, unlimited hinges uniform in all directions. The
    orientation of a free joint is four uniform numbers in [0, 1), normalised, as in dm_control:
    not uniform among orientations. Everything else stays at `qpos0`.
    """
    low, high = model.qpos0.copy(), model.qpos0.copy()
    free = []
    for joint in map(model.joint, range(model.njnt)):
        kind, at = joint.type[0], joint.qposadr[0]
        if kind == mujoco.mjtJoint.mjJNT_FREE:
            free.append(slice(at + 3, at + 7))
            low[free[-1]], high[free[-1]] = 0, 1
        elif kind == mujoco.mjtJoint.mjJNT_BALL:
            raise NotImplementedError(f"the ball joint {joint.name}")
        elif model.jnt_limited[joint.id]:
            low[at], high[at] = joint.range
        elif kind == mujoco.mjtJoint.mjJNT_HINGE:
            low[at], high[at] = -np.pi, np.pi
    uniform = jax.random.uniform(key, low.shape)
    qpos = low + uniform * (high - low)
    for part in free:
        qpos = qpos.at[part].divide(jnp.linalg.norm(qpos[part]))
    return qpos


def first_free(model: mjx.Model, draw: Any, key: Array, *, attempts: int = 1000) -> Array:
    """The first qpos of `draw(key)` without contacts: dm_control's rejection sampling.

    Bounded, since a loop that never ends would hang a device; after that many attempts the last
    draw is returned.
    """

    def missed(carry: tuple[Array, Array, Array, Array]) -> Array:
        tried, _, _, clear = carry
        return ~clear & (tried < attempts)

    def attempt(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        tried, key, _, _ = carry
        key, ours = jax.random.split(key)
        qpos = draw(ours)
        return tried + 1, key, qpos, clearance(model, qpos) >= 0

    start = (jnp.int32(0), key, jnp.zeros_like(jnp.asarray(model.qpos0)), jnp.bool_(False))
    return jax.lax.while_loop(missed, attempt, start)[2]
