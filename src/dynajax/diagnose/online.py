"""The diagnosis of a run: where its critic and its model are wrong, by the simulator's word.

From physics states of a run's replay the real simulator takes the current policy's actions. What
comes of it is compared with what the critic expects, what the model says, and what the critic was
trained on.
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
from dynajax.diagnose.offline import step_ahead
from dynajax.diagnose.policy_rollouts import Paths, can_restore, follow, soft_returns
from dynajax.envs.training_envs import all_finite
from dynajax.models import ensemble, make_model
from dynajax.models.base import DynamicsModel
from dynajax.types import Array, LearnerState, ModelState, ReplayBuffer, Transition

#: States that the policy starts from, and synthetic transitions that are checked.
STARTS, SYNTHETIC = 64, 400
#: Real transitions that may be taken again to come to physics states.
REPEATED = 6000
#: A return is followed until what is left of it weighs this little; the critic says the rest.
_REST = 0.01


@functools.partial(jax.jit, static_argnums=0)
def _act(agent: Agent, state: Any, obs: Array, key: Array) -> tuple[Array, Array]:
    return agent.act(state, obs, key)


@functools.partial(jax.jit, static_argnums=0)
def _value(agent: Agent, state: Any, obs: Array, action: Array) -> Array:
    return agent.value(state, obs, action)


class Findings(NamedTuple):
    """What was measured of one row at one checkpoint. None where it could not be asked for."""

    variant: str
    seed: int
    step: int
    numbers: dict[str, float]
    channels: dict[str, np.ndarray]  # (D,), see `measures.scores`
    chain: measures.Named | None  # see `measures.open_loop`
    strip: "Strip | None"
    refused: str | None = None  # why states that a restore gives are not used


class Strip(NamedTuple):
    """One path, real and imagined with the same actions: (T, D) each, and the physics states."""

    real: np.ndarray
    imagined: np.ndarray
    states: np.ndarray | None  # (T, L)


def inspect(
    loaded: loaded_run.Loaded, index: int, *, steps: int = 20, starts: int = STARTS
) -> Findings:
    """Everything about one row at one checkpoint."""
    config, spec, row = loaded.config, loaded.spec, loaded.row(index)
    variant, seed = config.variant_seed_pairs[index]
    row_config = variant_config(config, config.variants[variant])
    rng = np.random.default_rng((seed, loaded.step))
    data, valid = loaded_run.in_order(row.real_buffer, loaded.stored)
    make = functools.partial(envs.make, config.env, **config.stepping, seed=seed)
    real_env = make()
    agent = make_agent(row_config, spec)
    act = functools.partial(_act, agent, row.agent)
    length = (
        math.ceil(math.log(_REST) / math.log(agent.learn.discount))
        if agent.learn.discount < 1
        else spec.time_limit
    )

    restored = _restored(loaded, index, real_env, data, valid, starts, rng)
    places, states, refused = restored.places, restored.states, restored.refused
    numbers = {**restored.numbers}
    settable = len(places) > 0 and refused is None

    def begin(env: Any, i: int) -> np.ndarray:
        if not settable:
            return env.reset(seed=int(rng.integers(2**31)))[0]
        env.reset(seed=0)
        env.restore(states[int(places[i])], steps=0)
        return data.obs[places[i]]

    count = len(places) if settable else min(starts, 16)
    paths = follow(make, begin, count, act, min(length, spec.time_limit * 10), seed)
    numbers |= critic_bias(agent, row.agent, paths)
    name = config.variants[variant].name
    findings = Findings(name, seed, loaded.step, numbers, {}, None, None, refused)
    if row.model is None:
        real_env.close()
        return findings
    dynamics = make_model(row_config.model, spec)
    model = ensemble.select_elites(row.model)
    recent = np.flatnonzero(valid)
    recent = rng.choice(recent, min(2000, len(recent)), replace=False)
    replayed = step_ahead(dynamics, model, Transition(*(x[recent] for x in data)))
    visited = step_ahead(dynamics, model, transitions(paths, slice(1, None), rng))
    _note(numbers, "replay", replayed)
    _note(numbers, "policy", visited)
    if settable:
        counter = step_ahead(dynamics, model, transitions(paths, slice(0, 1), rng))
        _note(numbers, "counterfactual", counter)
        if restored.synthetic:
            numbers |= _synthetic(make, states, row, restored.synthetic)
    chain, strip = _chain(dynamics, model, paths, min(steps, len(paths.reward)))
    if settable:
        strip = strip._replace(states=_states_along(real_env, begin, paths, strip))
    real_env.close()
    channels = {name: visited[name] for name in ("skill", "rmse", "noise", "spread")}
    return findings._replace(channels=channels, chain=chain, strip=strip)


class _Restored(NamedTuple):
    """Physics states of a row's replay, by their place in its order."""

    places: np.ndarray  # (M,) where the policy is to start
    states: dict[int, np.ndarray]  # (L,) each, of more places than these
    synthetic: tuple[np.ndarray, np.ndarray] | None  # see `_matches`
    refused: str | None  # why the states are not to be used
    numbers: dict[str, float]


def _restored(
    loaded: loaded_run.Loaded,
    index: int,
    env: Any,
    data: Transition,
    valid: np.ndarray,
    starts: int,
    rng: np.random.Generator,
) -> _Restored:
    """States of random places of the replay, verified; none where there is no way to them."""
    if loaded.config.engine != "host" or not can_restore(env):
        reason = env.unrestorable if loaded.config.engine == "host" else None
        return _Restored(np.zeros(0, int), {}, None, reason, {})
    row = loaded.row(index)
    chosen = _some_episodes(loaded, index, data, valid, rng)
    inside = np.concatenate([np.zeros(0, int), *(np.arange(e.start, e.stop) for e in chosen)])
    inside = inside[valid[inside]]
    places = np.sort(rng.choice(inside, min(starts, len(inside)), replace=False))
    synthetic = (
        _matches(row, data, inside, rng) if isinstance(row.synthetic, ReplayBuffer) else None
    )
    both = np.union1d(places, synthetic[0] if synthetic else places)
    rebuilt = loaded_run.rebuild(loaded, index, chosen, both, data)
    states = dict(zip(rebuilt.places.tolist(), rebuilt.states, strict=True))
    places = np.array([p for p in places if p in states], int)
    refused = loaded_run.restore_differs(env, places, states, data)
    numbers = {"repeated": float(rebuilt.steps), "not_repeated": float(rebuilt.differ)}
    return _Restored(places, states, synthetic, refused, numbers)


def critic_bias(agent: Agent, state: Any, paths: Paths) -> dict[str, float]:
    """What the critic expects less what came, from the paths' first states and actions.

    Returns:
      "critic_value", "critic_return" (means over the paths); "critic_bias", their difference over
      the mean absolute return, of the twins' mean: negative is underestimation; "critic_bias_min"
      of the smaller twin; "critic_bias_error", the standard error; "critic_correlation".
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
    unit = max(float(np.abs(returns).mean()), 1e-12)
    gap = value - returns
    spread = value.std() * returns.std()
    return {
        "critic_value": float(value.mean()),
        "critic_return": float(returns.mean()),
        "critic_bias": float(gap.mean() / unit),
        "critic_bias_error": float(gap.std() / math.sqrt(len(gap)) / unit),
        "critic_bias_min": float((low - returns).mean() / unit),
        "critic_correlation": float(
            ((value - value.mean()) * (returns - returns.mean())).mean() / max(spread, 1e-12)
        ),
    }


def transitions(
    paths: Paths, part: slice, rng: np.random.Generator, most: int = 2000
) -> Transition:
    """Some of the steps of paths as transitions (B, ...)."""
    reward = paths.reward[part]
    there = (paths.alive[:-1] & paths.valid)[part]
    where = np.flatnonzero(there.ravel())
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


def _note(numbers: dict[str, float], where: str, scores: measures.Named) -> None:
    """Adds the scalars of `measures.scores` under names that say of which transitions."""
    numbers |= {
        f"{where}_reward_r2": float(scores["reward_r2"]),
        f"{where}_reward_bias": float(scores["reward_bias"]),
        f"{where}_reward_noise": float(scores["reward_noise"]),
        f"{where}_state_skill": float(measures.median(scores["skill"])),
        f"{where}_inside_80": float(scores["inside"][1]),
    }


def _some_episodes(
    loaded: loaded_run.Loaded, index: int, data: Transition, valid: np.ndarray, rng: Any
) -> list[loaded_run.Episode]:
    """Episodes at random, as many as may be taken again; one that the ring has cut is left out."""
    episodes = loaded_run.episodes(data, valid, loaded.spec.time_limit, loaded.host, index)
    if loaded.stored > len(valid):
        episodes = episodes[1:]
    chosen: list[loaded_run.Episode] = []
    steps = 0
    for i in rng.permutation(len(episodes)):
        if chosen and steps + episodes[i].stop - episodes[i].start > REPEATED:
            break
        chosen.append(episodes[i])
        steps += episodes[i].stop - episodes[i].start
    return sorted(chosen)


def _matches(
    row: LearnerState, data: Transition, inside: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Places of real states, and the synthetic transitions that began in them."""
    place_of = {data.obs[p].tobytes(): int(p) for p in inside}
    slots = rng.permutation(np.flatnonzero(row.synthetic.valid))
    pairs: list[tuple[int, int]] = []
    for slot in slots:
        place = place_of.get(np.asarray(row.synthetic.unpack().obs[slot]).tobytes())
        if place is not None:
            pairs.append((place, int(slot)))
            if len(pairs) == SYNTHETIC:
                break
    if not pairs:
        return None
    return np.array([p for p, _ in pairs]), np.array([s for _, s in pairs])


def _synthetic(
    make: Callable[[], Any],
    state_of: dict[int, np.ndarray],
    row: LearnerState,
    synthetic: tuple[np.ndarray, np.ndarray],
) -> dict[str, float]:
    """What the critic was trained on, against what really comes of the same states and actions."""
    env, real, imagined = make(), [], []
    env.reset(seed=0)
    for place, slot in zip(*synthetic, strict=True):
        if place not in state_of:
            continue
        t = Transition(*(x[slot] for x in row.synthetic.unpack()))
        env.restore(state_of[place], steps=0)
        new, reward, *_ = env.step(t.action)
        if all_finite(new, reward):
            real.append(np.append(new, np.float32(reward)))
            imagined.append((t.obs, np.append(t.next_obs, t.reward)))
    env.close()
    if len(real) < 2:
        return {}
    true, obs = np.array(real), np.array([o for o, _ in imagined])
    predicted = np.array([x for _, x in imagined])
    reward_std = true[:, -1].std()
    return {
        "synthetic_checked": len(true),
        "synthetic_reward_r2": float(measures.r2(predicted[:, -1], true[:, -1])),
        "synthetic_reward_bias": float(measures.shift(predicted[:, -1], true[:, -1], reward_std)),
        "synthetic_state_skill": float(
            measures.median(measures.skill(predicted[:, :-1], obs, true[:, :-1]))
        ),
    }


def _chain(
    dynamics: DynamicsModel, model: ModelState, paths: Paths, steps: int
) -> tuple[measures.Named, Strip]:
    """Open-loop predictions along the policy's actions, from the paths' first states."""
    actions = np.swapaxes(paths.action[:steps], 0, 1)
    predicted = fits.open_loop(dynamics, model, paths.obs[0], actions)
    true = np.concatenate([paths.obs[1 : steps + 1], paths.reward[:steps, :, None]], -1)
    there = paths.alive[:steps] & paths.valid
    holds = measures.open_loop(predicted, paths.obs[0], true, there)
    # The strip is of a path that lasts.
    which = int(there.sum(0).argmax())
    last = int(there[:, which].sum())
    begin = paths.obs[:1, which]
    imagined = np.concatenate([begin, predicted[:last, :, which, :-1].mean(1)])
    return holds, Strip(np.concatenate([begin, true[:last, which, :-1]]), imagined, None)


def _states_along(
    env: Any, begin: Callable[[Any, int], np.ndarray], paths: Paths, strip: Strip
) -> np.ndarray:
    """The physics states of the strip's path: (T, L)."""
    which = int(np.flatnonzero((paths.obs[0] == strip.real[0]).all(-1))[0])
    begin(env, which)
    states = [env.snapshot()]
    for k in range(len(strip.real) - 1):
        env.step(paths.action[k, which])
        states.append(env.snapshot())
    return np.array(states)
