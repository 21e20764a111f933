"""Gym-like tasks from Brax's environments: `brax:ant`, `brax:halfcheetah` and so on.

The first states, observations, rewards and ends are Brax's (`brax.envs`, none of its wrappers: its
auto-reset would put the next episode's first observation in place of the last). The physics is
MJX, Brax's backend nearest to the MuJoCo that Gymnasium's tasks run on, and the one that its
authors point to; "generalized", its default, is no longer maintained. Ant and humanoid keep the
solver settings that Brax gives them with MJX (one iteration).

A control step is `physics.advance` here too. Brax's own leaves the positions of bodies one MuJoCo
step behind the joints, so that a task can end by a height that its last observation does not show.
"""

import contextlib
import io
import warnings
from typing import Any

import jax
import jax.numpy as jnp

# MJX says on stdout that an engine it does not need is missing.
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
_EPISODE = 1000  # steps, what Brax trains with and Gymnasium's tasks have


def _as_brax(system: Any, data: Any) -> PipelineState:
    """MJX's data with the positions and velocities of bodies where Brax looks for them."""
    frame = Transform(pos=data.xpos[1:], rot=data.xquat[1:])
    # MuJoCo's linear velocity is that at the centre of mass of a body's whole tree.
    offset = frame.pos - data.subtree_com[system.body_rootid[1:]]
    angular, linear = data.cvel[1:, :3], data.cvel[1:, 3:]
    velocity = Motion(vel=linear - jnp.cross(offset, angular), ang=angular)
    return PipelineState(
        q=data.qpos, qd=data.qvel, x=frame, xd=velocity, contact=None, **vars(data)
    )


def environment(name: str) -> Any:
    """Brax's environment `name`, its control step replaced by that of `physics`."""
    with warnings.catch_warnings():
        # That it is no longer maintained.
        warnings.filterwarnings("ignore", message="Brax System")
        env: Any = brax_envs.get_environment(name, backend="mjx")

    def pipeline_init(q: Array, qd: Array, act: Any = None, ctrl: Any = None) -> PipelineState:
        first = physics.at_rest(env.sys, q)._replace(qvel=qd)
        return _as_brax(env.sys, physics.settle(env.sys, first))

    def pipeline_step(before: PipelineState, control: Array) -> PipelineState:
        data = physics.advance(env.sys, physics.state(before), control, env._n_frames)[1]
        return _as_brax(env.sys, data)

    env.pipeline_init, env.pipeline_step = pipeline_init, pipeline_step
    return env


def make(name: str) -> Task:
    """See `dynajax.envs.mjx.make`."""
    kind = name.partition(":")[2]
    env = environment(kind)
    size = jax.eval_shape(env.reset, jax.random.key(0)).obs.shape[0]
    spec = EnvSpec(
        name=name,
        obs_dim=size,
        action_dim=env.action_size,
        time_limit=_EPISODE,
        obs_names=tuple(f"obs[{i}]" for i in range(size)),
        termination=_TERMINATIONS[kind],
    )

    def reset(key: Array) -> EnvState:
        first = env.reset(key)
        return EnvState(first.obs.astype(jnp.float32), physics.state(first.pipeline_state))

    def step(before: EnvState, action: Array) -> tuple[EnvState, Array, Array]:
        data = physics.settle(env.sys, before.physics)
        nothing = jnp.zeros(())
        state = State(_as_brax(env.sys, data), before.obs, nothing, nothing)
        state = env.step(state, jnp.asarray(action, before.physics.qpos.dtype))
        after = physics.state(state.pipeline_state)
        obs, reward = physics.or_nan(after, state.obs, jnp.asarray(state.reward))
        return EnvState(obs, after), reward, state.done > 0

    return Task(spec, reset, step)
