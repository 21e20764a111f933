"""Diagnose a run: measure its critic and its model against the simulator.

The simulator is set to physics states of the run's replay buffer and runs the current policy from
there. The returns are compared with the critic's values, the transitions with the model's predictions
and with the synthetic transitions that the critic was trained on.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dynajax import envs
from dynajax.agents import Agent, make_agent
from dynajax.config import variant_config
from dynajax.diagnose import fits, loaded_run, measures
from dynajax.diagnose.measures import Measures
from dynajax.diagnose.offline import one_step
from dynajax.diagnose.policy_rollouts import Begin, Paths, can_restore, follow, soft_returns
from dynajax.envs.training_envs import all_finite
from dynajax.models import ensemble, make_model
from dynajax.models.base import DynamicsModel
from dynajax.types import Array, EnvSpec, LearnerState, ModelState, ReplayBuffer, Transition

#: States that the policy starts from, and synthetic transitions that are checked.
STARTS, SYNTHETIC = 64, 400
#: Real transitions that may be simulated again to get physics states.
RESIMULATED = 6000
#: A return is simulated until the discount falls below this; the critic's value replaces the rest.
_REST = 0.01


@functools.partial(jax.jit, static_argnums=0)
def _act(agent: Agent, state: Any, obs: Array, key: Array) -> tuple[Array, Array]:
    return agent.act(state, obs, agent.action_noise(key, obs.shape[:-1]))


@functools.partial(jax.jit, static_argnums=0)
def _value(agent: Agent, state: Any, obs: Array, action: Array) -> Array:
    return agent.value(state, obs, action)


class PredictedPath(NamedTuple):
    """One path, real and predicted with the same actions."""

    real: np.ndarray  # (T, D)
    predicted: np.ndarray  # (T, D)
    states: np.ndarray | None  # (T, L) physics states


class Findings(NamedTuple):
    """The measures of one learner at one checkpoint."""

    variant: str
    seed: int
    step: int
    numbers: dict[str, float]
    dims: Measures  # (D,) each, see `measures.one_step`; empty without a model
    open_loop: Measures | None  # see `measures.open_loop`; None without a model
    path: PredictedPath | None  # None without a model
    restore_error: str | None = None  # why restored states are not used
    frames: int = 0  # simulator steps so far


def inspect(
    loaded: loaded_run.Loaded, index: int, *, steps: int = 20, starts: int = STARTS
) -> Findings:
    """Measure one learner at one checkpoint.

    Args:
      steps: length of multi-step predictions.
      starts: number of states from which the policy runs.
    """
    learner = loaded.learner(index)
    variant, seed = loaded.config.variant_seed_pairs[index]
    config = variant_config(loaded.config, loaded.config.variants[variant])
    rng = np.random.default_rng((seed, loaded.step))
    data, valid = loaded_run.in_order(learner.real_buffer, loaded.inserted)
    make = functools.partial(envs.make, loaded.config.env, **loaded.config.stepping, seed=seed)
    env = make()
    restored = _restore(loaded, index, env, data, valid, starts, rng)
    begin, count = _starts(restored, data, starts, rng)
    agent = make_agent(config, loaded.spec)
    paths = _follow_policy(agent, learner.agent, loaded.spec, make, begin, count, seed)
    numbers = {**restored.numbers, **critic_bias(agent, learner.agent, paths)}
    name = loaded.config.variants[variant].name
    findings = Findings(
        name, seed, loaded.step, numbers, {}, None, None, restored.error, loaded.frames(index)
    )
    if learner.model is not None:
        dynamics = make_model(config.model, loaded.spec)
        model = ensemble.select_elites(learner.model)
        dims = _measure_model(numbers, dynamics, model, data, valid, paths, restored, rng)
        if restored.usable and restored.synthetic is not None:
            numbers |= _synthetic(make, restored.states, learner, restored.synthetic)
        measured, path = _open_loop(dynamics, model, paths, min(steps, len(paths.reward)))
        if restored.usable:
            path = path._replace(states=_states_along(env, begin, paths, path))
        findings = findings._replace(dims=dims, open_loop=measured, path=path)
    env.close()
    return findings


class _Restored(NamedTuple):
    """Physics states of a learner's replay buffer, by their index in the order of insertion."""

    indices: np.ndarray  # (M,) where the policy starts
    states: dict[int, np.ndarray]  # (L,) each, of these and of more indices
    synthetic: tuple[np.ndarray, np.ndarray] | None  # see `_matches`
    error: str | None  # why the states are not usable
    numbers: dict[str, float]

    @property
    def usable(self) -> bool:
        """Whether a simulator can be set to the states."""
        return len(self.indices) > 0 and self.error is None


def _restore(
    loaded: loaded_run.Loaded,
    index: int,
    env: Any,
    data: Transition,
    valid: np.ndarray,
    starts: int,
    rng: np.random.Generator,
) -> _Restored:
    """Rebuild and verify states at random indices of the replay buffer, if that is possible."""
    if loaded.config.engine != "host" or not can_restore(env):
        error = env.unrestorable if loaded.config.engine == "host" else None
        return _Restored(np.zeros(0, int), {}, None, error, {})
    learner = loaded.learner(index)
    chosen = _some_episodes(loaded, index, data, valid, rng)
    inside = np.concatenate([np.zeros(0, int), *(np.arange(e.start, e.stop) for e in chosen)])
    inside = inside[valid[inside]]
    indices = np.sort(rng.choice(inside, min(starts, len(inside)), replace=False))
    buffered = isinstance(learner.synthetic, ReplayBuffer)
    synthetic = _matches(learner, data, inside, rng) if buffered else None
    wanted = np.union1d(indices, synthetic[0] if synthetic else indices)
    rebuilt = loaded_run.rebuild(loaded, index, chosen, wanted, data)
    states = dict(zip(rebuilt.indices.tolist(), rebuilt.states, strict=True))
    indices = np.array([i for i in indices if i in states], int)
    error = loaded_run.restore_differs(env, indices, states, data)
    numbers = {"resimulated": float(rebuilt.steps), "not_reproduced": float(rebuilt.differ)}
    return _Restored(indices, states, synthetic, error, numbers)


def _starts(
    restored: _Restored, data: Transition, starts: int, rng: np.random.Generator
) -> tuple[Begin, int]:
    """Return how to set a simulator to start state i, and how many there are.

    Without usable states the policy starts from at most 16 first states of new episodes.
    """

    def reset(env: Any, i: int) -> np.ndarray:
        obs: np.ndarray = env.reset(seed=int(rng.integers(2**31)))[0]
        return obs

    def restore(env: Any, i: int) -> np.ndarray:
        index = restored.indices[i]
        env.reset(seed=0)
        env.restore(restored.states[int(index)], steps=0)
        obs: np.ndarray = data.obs[index]
        return obs

    return (restore, len(restored.indices)) if restored.usable else (reset, min(starts, 16))


def _follow_policy(
    agent: Agent,
    state: Any,
    spec: EnvSpec,
    make: Callable[[], Any],
    begin: Begin,
    count: int,
    seed: int,
) -> Paths:
    """Run the policy for as many steps as its returns need, see `_REST`."""
    discount = max(agent.learn.discount, _REST)  # the logarithm of 0 is not defined
    length = math.ceil(math.log(_REST) / math.log(discount)) if discount < 1 else spec.time_limit
    length = max(2, length)  # the measures "policy" are of the steps after the first
    act = functools.partial(_act, agent, state)
    return follow(make, begin, count, act, min(length, spec.time_limit * 10), seed)


def critic_bias(agent: Agent, state: Any, paths: Paths) -> dict[str, float]:
    """Compare the critic's value of the paths' first states and actions with their returns.

    Returns:
      "critic_value", "critic_return" (means over the paths); "critic_bias", their difference over
      the mean absolute return, for the mean of the critics: negative is underestimation;
      "critic_bias_min" for the smallest of them; "critic_bias_error", the standard error;
      "critic_correlation". Nothing if no path is valid.
    """
    valid = paths.valid
    first, last = (np.asarray(_value(agent, state, paths.obs[k], paths.action[k])) for k in (0, -1))
    temperature = float(agent.temperature(state))
    returns = soft_returns(
        paths.reward,
        paths.terminated,
        paths.log_prob,
        last.min(0),
        agent.learn.discount,
        temperature,
    )
    returns, value, low = returns[valid], first.mean(0)[valid], first.min(0)[valid]
    if not len(returns):
        return {}
    tiny = float(np.finfo(np.float32).tiny)
    unit = max(float(np.abs(returns).mean()), tiny)
    gap = value - returns
    product_of_stds = value.std() * returns.std()
    covariance = ((value - value.mean()) * (returns - returns.mean())).mean()
    return {
        "critic_value": float(value.mean()),
        "critic_return": float(returns.mean()),
        "critic_bias": float(gap.mean() / unit),
        "critic_bias_error": float(gap.std() / math.sqrt(len(gap)) / unit),
        "critic_bias_min": float((low - returns).mean() / unit),
        "critic_correlation": float(covariance / max(product_of_stds, tiny)),
    }


def _measure_model(
    numbers: dict[str, float],
    dynamics: DynamicsModel,
    model: ModelState,
    data: Transition,
    valid: np.ndarray,
    paths: Paths,
    restored: _Restored,
    rng: np.random.Generator,
) -> Measures:
    """Add one-step measures of the model to `numbers`; return those by dimension.

    The transitions are those of the replay buffer ("replay"), of the paths' first steps
    ("counterfactual") and of their other steps ("policy", by dimension too).
    """
    recent = np.flatnonzero(valid)
    recent = rng.choice(recent, min(2000, len(recent)), replace=False)
    replayed = one_step(dynamics, model, Transition(*(x[recent] for x in data)))
    visited = one_step(dynamics, model, transitions(paths, slice(1, None), rng))
    numbers |= _named("replay", replayed) | _named("policy", visited)
    if restored.usable:
        first = transitions(paths, slice(0, 1), rng)
        numbers |= _named("counterfactual", one_step(dynamics, model, first))
    others = {name: visited[name] for name in ("rmse", "aleatoric_std", "epistemic_std")}
    return {"r2": visited["state_r2"]} | others


def transitions(
    paths: Paths, part: slice, rng: np.random.Generator, most: int = 2000
) -> Transition:
    """Return random steps of paths as transitions (B, ...), at most `most`."""
    reward = paths.reward[part]
    happened = (paths.alive[:-1] & paths.valid)[part]
    where = np.flatnonzero(happened.ravel())
    where = rng.choice(where, min(most, len(where)), replace=False)

    def flat(x: np.ndarray) -> np.ndarray:
        return x[part].reshape(-1, *x.shape[2:])[where]

    return Transition(
        flat(paths.obs[:-1]),
        flat(paths.action[:-1]),
        reward.ravel()[where],
        1.0 - paths.terminated[part].ravel()[where],
        flat(paths.obs[1:]),
    )


def _named(source: str, measured: Measures) -> dict[str, float]:
    """Return the scalars of `measures.one_step`, named after the source of the transitions."""
    return {
        f"{source}_reward_r2": float(measured["reward_r2"]),
        f"{source}_reward_bias": float(measured["reward_bias"]),
        f"{source}_reward_aleatoric_std": float(measured["reward_aleatoric_std"]),
        f"{source}_state_r2": float(measures.median(measured["state_r2"])),
        f"{source}_coverage_80": float(measured["coverage"][1]),
    }


def _some_episodes(
    loaded: loaded_run.Loaded,
    index: int,
    data: Transition,
    valid: np.ndarray,
    rng: np.random.Generator,
) -> list[loaded_run.Episode]:
    """Return random episodes of at most `RESIMULATED` steps whose first steps are in the buffer."""
    episodes = loaded_run.episodes(data, valid, loaded.spec.time_limit, loaded.host, index)
    if loaded.inserted > len(valid):
        episodes = episodes[1:]
    chosen: list[loaded_run.Episode] = []
    steps = 0
    for i in rng.permutation(len(episodes)):
        if chosen and steps + episodes[i].stop - episodes[i].start > RESIMULATED:
            break
        chosen.append(episodes[i])
        steps += episodes[i].stop - episodes[i].start
    return sorted(chosen)


def _matches(
    learner: LearnerState, data: Transition, inside: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return indices of real states, and slots of synthetic transitions that start in them."""
    index_of = {data.obs[i].tobytes(): int(i) for i in inside}
    slots = rng.permutation(np.flatnonzero(learner.synthetic.valid))
    pairs: list[tuple[int, int]] = []
    for slot in slots:
        index = index_of.get(np.asarray(learner.synthetic.unpack().obs[slot]).tobytes())
        if index is not None:
            pairs.append((index, int(slot)))
            if len(pairs) == SYNTHETIC:
                break
    if not pairs:
        return None
    return np.array([i for i, _ in pairs]), np.array([s for _, s in pairs])


def _synthetic(
    make: Callable[[], Any],
    states: dict[int, np.ndarray],
    learner: LearnerState,
    matches: tuple[np.ndarray, np.ndarray],
) -> dict[str, float]:
    """Compare synthetic transitions with the simulator's, from the same states and actions."""
    env, real, synthetic = make(), [], []
    env.reset(seed=0)
    for index, slot in zip(*matches, strict=True):
        if index not in states:
            continue
        t = Transition(*(x[slot] for x in learner.synthetic.unpack()))
        env.restore(states[index], steps=0)
        next_obs, reward, *_ = env.step(t.action)
        if all_finite(next_obs, reward):
            real.append(np.append(next_obs, np.float32(reward)))
            synthetic.append((t.obs, np.append(t.next_obs, t.reward)))
    env.close()
    if len(real) < 2:
        return {}
    true, obs = np.array(real), np.array([o for o, _ in synthetic])
    predicted = np.array([x for _, x in synthetic])
    reward_std = true[:, -1].std()
    state_r2 = measures.state_r2(predicted[:, :-1], obs, true[:, :-1])
    return {
        "synthetic_checked": len(true),
        "synthetic_reward_r2": float(measures.r2(predicted[:, -1], true[:, -1])),
        "synthetic_reward_bias": float(measures.bias(predicted[:, -1], true[:, -1], reward_std)),
        "synthetic_state_r2": float(measures.median(state_r2)),
    }


def _open_loop(
    dynamics: DynamicsModel, model: ModelState, paths: Paths, steps: int
) -> tuple[Measures, PredictedPath]:
    """Measure multi-step predictions with the policy's actions, from the paths' first states.

    Returns:
      The measures, and the path that lasts longest.
    """
    actions = np.swapaxes(paths.action[:steps], 0, 1)
    predicted = fits.open_loop(dynamics, model, paths.obs[0], actions)
    true = np.concatenate([paths.obs[1 : steps + 1], paths.reward[:steps, :, None]], -1)
    valid = paths.alive[:steps] & paths.valid
    measured = measures.open_loop(predicted, paths.obs[0], true, valid)
    longest = int(valid.sum(0).argmax())
    last = int(valid[:, longest].sum())
    start = paths.obs[:1, longest]
    real = np.concatenate([start, true[:last, longest, :-1]])
    mean = np.concatenate([start, predicted[:last, :, longest, :-1].mean(1)])
    return measured, PredictedPath(real, mean, None)


def _states_along(env: Any, begin: Begin, paths: Paths, path: PredictedPath) -> np.ndarray:
    """Return the physics states of a path: (T, L)."""
    which = int(np.flatnonzero((paths.obs[0] == path.real[0]).all(-1))[0])
    begin(env, which)
    states = [env.snapshot()]
    for k in range(len(path.real) - 1):
        env.step(paths.action[k, which])
        states.append(env.snapshot())
    return np.array(states)
