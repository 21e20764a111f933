"""Make tasks from Brax's environments: `brax:ant`, `brax:halfcheetah` and so on.

Initial states, observations, rewards and terminations are those of `brax.envs`, without its
wrappers, since its autoreset replaces the last observation of an episode. The physics is MJX, the
backend of Brax that is closest to the MuJoCo of Gymnasium's tasks and that its authors recommend;
the default backend, "generalized", is no longer maintained. Ant and humanoid keep the solver
settings that Brax uses with MJX (one iteration).

A control step is `physics.advance`, as for dm_control's tasks. In Brax's own control step the
positions of bodies lag one MuJoCo step behind the joints, so that a task can terminate because of a
height that its last observation does not contain.
"""

import contextlib
import io
import warnings
from typing import Any

import jax
import jax.numpy as jnp

# MJX prints to stdout that an optional engine is missing.
with contextlib.redirect_stdout(io.StringIO()):
    from brax import envs as brax_envs
    from brax.base import Motion, Transform
    from brax.envs.base import State
    from brax.mjx.base import State as PipelineState

from dynajax.envs import terminations
from dynajax.envs.mjx import EnvState, Task, physics
from dynajax.types import Array, EnvSpec

_TERMINATIONS = {
    "ant": terminations.ant,
    "halfcheetah": terminations.never,
    "hopper": terminations.hopper,
    "humanoid": terminations.humanoid,
    "inverted_pendulum": terminations.inverted_pendulum,
    "walker2d": terminations.walker2d,
}
_TIME_LIMIT = 1000  # steps, as in Brax's training and in Gymnasium's tasks


def _as_brax(system: Any, data: Any) -> PipelineState:
    """Convert MJX's data to Brax's state, with the positions and velocities of bodies."""
    frame = Transform(pos=data.xpos[1:], rot=data.xquat[1:])
    # MuJoCo's linear velocity refers to the center of mass of the body's whole tree.
    offset = frame.pos - data.subtree_com[system.body_rootid[1:]]
    angular, linear = data.cvel[1:, :3], data.cvel[1:, 3:]
    velocity = Motion(vel=linear - jnp.cross(offset, angular), ang=angular)
    return PipelineState(
        q=data.qpos, qd=data.qvel, x=frame, xd=velocity, contact=None, **vars(data)
    )


def environment(name: str) -> Any:
    """Return Brax's environment `name` with the reset and control step of `physics`."""
    with warnings.catch_warnings():
        # Brax warns that it is no longer maintained.
        warnings.filterwarnings("ignore", message="Brax System")
        env: Any = brax_envs.get_environment(name, backend="mjx")

    def pipeline_init(q: Array, qd: Array, act: Any = None, ctrl: Any = None) -> PipelineState:
        first = physics.at_rest(env.sys, q)._replace(qvel=qd)
        return _as_brax(env.sys, physics.initial_data(env.sys, first))

    def pipeline_step(before: PipelineState, control: Array) -> PipelineState:
        state = physics.physics_of(before)
        data = physics.advance(env.sys, state, control, env._n_frames)[1]
        return _as_brax(env.sys, data)

    env.pipeline_init, env.pipeline_step = pipeline_init, pipeline_step
    return env


def make(name: str) -> Task:
    """Make a task of Brax; see `dynajax.envs.mjx.make`."""
    base_name = name.partition(":")[2]
    env = environment(base_name)
    obs_dim = jax.eval_shape(env.reset, jax.random.key(0)).obs.shape[0]
    spec = EnvSpec(
        name=name,
        obs_dim=obs_dim,
        action_dim=env.action_size,
        time_limit=_TIME_LIMIT,
        obs_names=tuple(f"obs[{i}]" for i in range(obs_dim)),
        termination=_TERMINATIONS[base_name],
    )

    def reset(key: Array) -> EnvState:
        first = env.reset(key)
        return EnvState(first.obs.astype(jnp.float32), physics.physics_of(first.pipeline_state))

    def step(before: EnvState, action: Array) -> tuple[EnvState, Array, Array]:
        data = physics.initial_data(env.sys, before.physics)
        zero = jnp.zeros(())
        state = State(_as_brax(env.sys, data), before.obs, zero, zero)
        state = env.step(state, jnp.asarray(action, before.physics.qpos.dtype))
        after = physics.physics_of(state.pipeline_state)
        obs, reward = physics.nan_if_invalid(after, state.obs, jnp.asarray(state.reward))
        return EnvState(obs, after), reward, state.done > 0

    return Task(spec, reset, step)
