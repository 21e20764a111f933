"""Floating-point operations of each stage of one row, counted from the matmuls' shapes.

A matmul of (m, k) and (k, n) counts 2 m k n. Activations, losses and optimisers are left out: they
are a few per cent, as a comparison with XLA's own count shows (tests/test_flops.py).
"""

from collections.abc import Sequence
from itertools import pairwise

from dynajax.config import Config
from dynajax.types import EnvSpec


def _forward(batch: int, widths: Sequence[int]) -> int:
    return sum(2 * batch * inputs * outputs for inputs, outputs in pairwise(widths))


def _backward(batch: int, widths: Sequence[int], *, to_weights: bool, to_inputs: bool) -> int:
    """The gradient's matmuls: as many operations as forward for the weights of all layers, and
    again for the inputs of all layers; those of the first are needed only for `to_inputs`.
    """
    forward, first = _forward(batch, widths), _forward(batch, widths[:2])
    return to_weights * forward + forward - (not to_inputs) * first


def act(config: Config, spec: EnvSpec, batch: int = 1) -> int:
    """The policy's network on `batch` observations."""
    return _forward(batch, (spec.obs_dim, *config.sac.hidden, 2 * spec.action_dim))


def sac_update(config: Config, spec: EnvSpec) -> int:
    """One gradient update of actor, twins and temperature (`sac.update`)."""
    batch = config.sac.batch
    actor = (spec.obs_dim, *config.sac.hidden, 2 * spec.action_dim)
    critic = (spec.obs_dim + spec.action_dim, *config.sac.hidden, 1)
    target = _forward(batch, actor) + 2 * _forward(batch, critic)
    critic_loss = 2 * _forward(batch, critic) + 2 * _backward(
        batch, critic, to_weights=True, to_inputs=False
    )
    actor_loss = (
        _forward(batch, actor)
        + 2 * _forward(batch, critic)
        + 2 * _backward(batch, critic, to_weights=False, to_inputs=True)
        + _backward(batch, actor, to_weights=True, to_inputs=False)
    )
    return target + critic_loss + actor_loss


def _member(config: Config, spec: EnvSpec) -> tuple[int, ...]:
    inputs, outputs = spec.obs_dim + spec.action_dim, spec.obs_dim + 1
    return (inputs, *(config.model.width,) * config.model.depth, 2 * outputs)


def fit_step(config: Config, spec: EnvSpec) -> int:
    """One gradient step of all members of the ensemble."""
    batch, widths = config.model.batch, _member(config, spec)
    one = _forward(batch, widths) + _backward(batch, widths, to_weights=True, to_inputs=False)
    return config.model.members * one


def rollout(config: Config, spec: EnvSpec) -> int:
    """One step of an environment step's rollouts: the policy, and each elite on its share."""
    batch = config.rollout.batch
    return act(config, spec, batch) + _forward(batch, _member(config, spec))


def environment_step(config: Config, spec: EnvSpec, horizon: int = 1) -> int:
    """All that one environment step costs, with its share of the fit (`fixed` schedule)."""
    total = act(config, spec) + config.sac.utd * sac_update(config, spec)
    if config.algo == "mbpo":
        total += horizon * rollout(config, spec)
        total += config.model.fit_steps * fit_step(config, spec) // config.model.fit_every
    return total
