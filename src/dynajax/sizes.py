"""Which sizes of a configuration go together: some follow others, and the rest is checked."""

from dynajax.agents import agent_class
from dynajax.config import Config, assign
from dynajax.trust import trust_rule_class
from dynajax.types import UsageError


def following(config: Config, explicit: set[str]) -> Config:
    """The configuration with sizes that nobody asked for made to go with those that were."""

    def follow(path: str, value: int | bool) -> None:
        nonlocal config
        if path not in explicit:
            config = assign(config, path, value)

    follow("replay.real", max(config.replay.real, config.random_steps + 1))
    follow("random_steps", min(config.random_steps, config.replay.real - 1))
    if not config.has_model:
        return config
    if config.oracle != "none" or len(config.rollout.horizon) > 1:
        follow("rollout.fresh", False)
    follow("model.members", max(config.model.members, config.model.elites))
    follow("model.elites", min(config.model.elites, config.model.members))
    batch, synthetic = config.rollout.batch, config.replay.synthetic
    if "replay.synthetic" in explicit:
        most = min(batch, synthetic)
        good = [b for b in range(-(-most // 2), most + 1) if synthetic % b == 0]
        follow("rollout.batch", max(good, default=batch))
    batch = config.rollout.batch
    least = max(config.rollout.horizon[-2:]) * batch
    follow("replay.synthetic", max(synthetic // batch * batch, least))
    if config.model.schedule == "early_stop":
        steps, each = config.model.fit_steps, config.model.round_steps
        follow("model.round_steps", max(k for k in range(1, each + 1) if steps % k == 0))
        each = config.model.round_steps
        follow("model.fit_steps", -(-steps // each) * each)
    return config


def check(c: Config) -> None:
    """Refuses sizes that cannot work together.

    Raises:
      UsageError: with one line that names the field and what would be right.
    """

    def need(good: bool, text: str) -> None:
        if not good:
            raise UsageError(text)

    need(c.seeds >= 1, f"--seeds={c.seeds}: it must be at least 1")
    need(0 <= c.seed < 2**31 - c.seeds, f"--seed={c.seed}: it must be from 0 to 2^31 - seeds")
    need(c.steps >= 1, f"--steps={c.steps}: it must be at least 1")
    if c.oracle != "none":
        asked = f"--oracle={c.oracle}: "
        need(c.has_model, asked + "without a model nothing is synthetic; choose --algo=mbpo")
        need(c.engine == "host", asked + "the simulator is on the host; choose --engine=host")
        need(
            c.rollout.horizon == (1,),
            asked + "the simulator knows the first step of a rollout only; "
            "choose --set rollout.horizon=1",
        )
    need(
        c.random_steps < c.replay.real,
        f"--set random_steps={c.random_steps}: it must be under replay.real={c.replay.real}",
    )
    for at in c.learn.reset_at:
        need(
            at > c.random_steps,
            f"--set learn.reset_at={','.join(map(str, c.learn.reset_at))}: {at} is before the agent "
            f"learns; each must be above random_steps={c.random_steps}",
        )
    agent_class(c.agent_name).check(c)
    if not c.has_model:
        need(
            c.trust_name == "none",
            f"--trust={c.trust_name}: without a model nothing is synthetic; choose --algo=mbpo",
        )
        return
    rule = trust_rule_class(c.trust_name)
    rule.check(c)
    need(
        rule.needs_all_members or not rule.uses_weights,
        f"--trust={c.trust_name}: it weighs without asking; its class must say asks = True",
    )
    if rule.needs_all_members:
        asked = f"--trust={c.trust_name}: "
        need(c.model.members > 1, asked + "it asks several members; choose model.members above 1")
        need(c.oracle == "none", asked + "a rule judges the model, and an oracle replaces it")
    if c.rollout.fresh:
        asked = "--set rollout.fresh=true: "
        need(c.oracle == "none", asked + "an oracle corrects stored transitions only")
        need(len(c.rollout.horizon) == 1, asked + "rollout.horizon must be one number")
    if c.rollout.value_expansion_steps:
        asked = f"--set rollout.value_expansion_steps={c.rollout.value_expansion_steps}: "
        need(c.oracle == "none", asked + "an oracle corrects stored transitions only")
        need(
            not c.rollout.random_action_fraction,
            asked
            + "a target expects the policy's actions; choose --set rollout.random_action_fraction=0",
        )
        need(
            not rule.per_rollout_state,
            asked + f"--trust={c.trust_name} keeps account of each rollout, and targets are others",
        )
    # Fewer might leave the holdout empty.
    need(
        c.random_steps >= 50,
        f"--set random_steps={c.random_steps}: a model needs at least 50 to be fitted to",
    )
    m, r = c.model, c.rollout
    need(
        m.elites <= m.members,
        f"--set model.elites={m.elites}: it must be at most model.members={m.members}",
    )
    need(
        c.replay.synthetic % r.batch == 0,
        f"--set replay.synthetic={c.replay.synthetic}: it must be a multiple of "
        f"rollout.batch={r.batch}",
    )
    h = r.horizon
    need(
        (len(h) == 1 and h[0] >= 1) or (len(h) == 4 and 0 <= h[0] < h[1] and min(h[2:]) >= 1),
        f"--set rollout.horizon={','.join(map(str, h))}: it must be one number from 1, or "
        "first_step,last_step,first_horizon,last_horizon",
    )
    need(
        max(h[-2:]) * r.batch <= c.replay.synthetic,
        f"--set rollout.horizon={','.join(map(str, h))}: rollout.batch x horizon must be at most "
        f"replay.synthetic={c.replay.synthetic}",
    )
    need(
        len(h) == 1 or (h[1] - h[0]) * abs(h[3] - h[2]) < 2**31,
        f"--set rollout.horizon={','.join(map(str, h))}: the steps from first to last times the "
        "change of the horizon must be below 2^31",
    )
    need(
        m.log_variance_min < m.log_variance_max,
        f"--set model.log_variance_min={m.log_variance_min}: it must be under "
        f"model.log_variance_max={m.log_variance_max}",
    )
    need(
        m.schedule == "fixed" or not m.epochs,
        f"--set model.epochs={m.epochs:g}: early_stop ends a fit by its score; choose "
        "--set model.schedule=fixed",
    )
    need(
        m.schedule == "fixed" or m.fit_steps % m.round_steps == 0,
        f"--set model.fit_steps={m.fit_steps}: with early_stop it must be a multiple of "
        f"model.round_steps={m.round_steps}",
    )
