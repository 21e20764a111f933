"""Sizes that follow others: what the user has not set is adjusted to what the user has set."""

from dynajax.config.schema import Config, assign


def adjust_dependent(config: Config, explicit: set[str]) -> Config:
    """Return the configuration with dependent sizes adjusted.

    Args:
      explicit: paths of the fields that the user has set, which stay as they are.
    """

    def follow(path: str, value: int | str) -> None:
        nonlocal config
        if path not in explicit:
            config = assign(config, path, value)

    follow("replay.real", max(config.replay.real, config.random_steps + 1))
    follow("random_steps", min(config.random_steps, config.replay.real - 1))
    if not config.has_model:
        return config
    follow("model.members", max(config.model.members, config.model.elites))
    follow("model.elites", min(config.model.elites, config.model.members))
    batch, capacity = config.rollout.batch, config.replay.synthetic
    if "replay.synthetic" in explicit:
        most = min(batch, capacity)
        divisors = [b for b in range(-(-most // 2), most + 1) if capacity % b == 0]
        follow("rollout.batch", max(divisors, default=batch))
    batch = config.rollout.batch
    least = max(config.rollout.horizon[-2:]) * batch
    follow("replay.synthetic", max(capacity // batch * batch, least))
    if config.model.schedule == "early_stop":
        steps, most = config.model.fit_steps, config.model.round_steps
        follow("model.round_steps", max(k for k in range(1, most + 1) if steps % k == 0))
        most = config.model.round_steps
        follow("model.fit_steps", -(-steps // most) * most)
    return config
