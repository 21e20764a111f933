"""Which metrics the report draws, and what each of them means in general.

A chart is data: page.py draws every one that a run has values of.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dynajax.report.figures import Panel, Series

#: Values that a linear axis would flatten all others with.
_HUGE = 1e4


class Chart(NamedTuple):
    """A metric drawn along training, for every variant."""

    metric: str
    title: str
    ylabel: str
    meaning: str  # the caption: what is drawn, and what high or low values go with
    dotted: str | None = None  # another metric, drawn dotted
    scale: str = "linear"  # see `Panel`; "wide": linear, or "symlog" where values are huge
    floor: float | None = None
    include: float | None = None
    share: bool = False  # R² and the like: what lies below -1 is drawn at -1


def panels(
    charts: Sequence[Chart], series: Callable[[str], Series], repeat: int
) -> list[tuple[Panel, str]]:
    """The charts' panels with their captions; those without values are left out.

    Args:
      series: metric -> its values.
      repeat: frames of an environment step.
    """
    drawn = []
    for chart in charts:
        lines, dotted = (series(m) if m else {} for m in (chart.metric, chart.dotted))
        if chart.share:
            lines, dotted = (
                {n: (t, np.clip(v, -1, 1)) for n, (t, v) in x.items()} for x in (lines, dotted)
            )
        scale = chart.scale
        if scale == "wide":
            most = max((np.nanmax(np.abs(v), initial=0.0) for _, v in lines.values()), default=0.0)
            scale = "symlog" if most > _HUGE else "linear"
        if lines:
            panel = Panel(
                lines,
                chart.ylabel,
                chart.title,
                dotted or None,
                scale=scale,
                floor=chart.floor,
                include=chart.include,
            )
            drawn.append((panel.framed(repeat), chart.meaning))
    return drawn


#: Of kind "fit".
MODEL = (
    Chart(
        "r2_reward",
        "Reward learned?",
        "R² of the reward",
        "Share of the reward's variation that the model predicts on transitions it was not trained "
        "on: 1 is perfect, 0 no better than always saying the average (below -1 is cut off). The "
        "agent cannot climb a reward that its model does not see.",
        floor=-1.0,
    ),
    Chart(
        "r2_state",
        "State learned?",
        "R² of the state's change",
        "The same for how the state changes in a step, the median over the state's channels.",
        floor=-1.0,
    ),
    Chart(
        "target_variance_ratio",
        "How large beside the reward?",
        "state over reward variance",
        "Variance of all state targets over that of the reward target, as the network sees them. "
        "The larger, the less of the loss is about the reward.",
        scale="log",
    ),
    Chart(
        "real_reward_mean",
        "Reward biased?",
        "mean reward of a step",
        "Mean reward on held-out transitions: solid what the environment gave, dotted what the "
        "model says. The gap is a bias that the agent learns from.",
        dotted="model_reward_mean",
    ),
    Chart(
        "holdout_mse",
        "Held-out error",
        "mean squared error",
        "Error on held-out transitions in the network's own units. These differ between variants: "
        "compare shapes, not heights. A rise goes with overfitting, or with new ground.",
        scale="log",
    ),
    Chart(
        "nll",
        "Training loss",
        "negative log-likelihood",
        "The loss that the fits minimise, on held-out transitions, in the network's own units: "
        "again compare shapes.",
    ),
    Chart(
        "epistemic_std",
        "Do the members agree?",
        "standard deviation of means",
        "How far the ensemble's members are apart, in the network's own units. It falls as data "
        "pin the dynamics down, and rises where the agent explores.",
        scale="log",
    ),
    Chart(
        "aleatoric_std",
        "How noisy does the world look?",
        "standard deviation",
        "The noise that the members see in the world, in the network's own units. Rollouts add it "
        "to every step; above the error, it is more than the data show.",
        scale="log",
    ),
    Chart(
        "coverage_80",
        "Does it know its errors?",
        "share of held-out transitions",
        "Share of the true values inside the intervals that should hold 80 % of them. Less is "
        "overconfidence, more is needless noise.",
        include=0.8,
    ),
    Chart(
        "fit_steps",
        "Work of each fit",
        "gradient steps of a fit",
        "How long each refit trained. With early stopping a short fit had nothing left to gain.",
    ),
)

#: Of kind "learn", of what the model has made.
SYNTHETIC = (
    Chart(
        "valid_fraction",
        "How much was kept?",
        "share of synthetic transitions",
        "Share of the imagined transitions that were learned from: finite, of a rollout that goes on, "
        "and trusted by the rule, where there is one.",
        include=1.0,
    ),
    Chart(
        "penalty",
        "Penalty",
        "reward",
        "What the rule takes off the reward, on average over what is kept; below 0 it is a bonus.",
        include=0.0,
    ),
    Chart(
        "weight",
        "Weight",
        "weight in the critic's loss",
        "What a synthetic transition counts beside a real one, which counts 1, on average.",
        include=1.0,
    ),
    Chart(
        "synthetic_reward_mean",
        "Imagined reward",
        "mean reward of a step",
        "Mean reward in the agent's minibatches: solid the model's, dotted the real ones'. If they "
        "part, the agent is learning in a world that is not the one it is tested in.",
        dotted="real_reward_mean",
    ),
)

#: Of kind "diagnosis", by experiments/diagnose.py.
DIAGNOSED = (
    Chart(
        "critic_bias",
        "Is the critic right?",
        "share of the mean return",
        "By experiments/diagnose.py: the critic's value less the entropy-corrected return that the "
        "current policy really gets, over its mean. Below 0 it underestimates.",
        include=0.0,
    ),
    Chart(
        "policy_reward_bias",
        "Is its reward biased?",
        "standard deviations",
        "By experiments/diagnose.py: mean reward by the model less the real one, solid where the "
        "policy goes, dotted in the synthetic transitions.",
        dotted="synthetic_reward_bias",
        include=0.0,
    ),
)

#: Of kind "learn".
CRITIC = (
    Chart(
        "q_mean",
        "Value estimates",
        "value",
        "Solid: what the critic expects of the states it trains on (discounted return). Dotted: "
        "the target it is pulled towards. Both should grow with the return, and stay together; "
        "growth without bound is divergence.",
        dotted="target_mean",
        scale="wide",
    ),
    Chart(
        "start_value",
        "Expected, and real",
        "value",
        "Solid: what the critic expects in the first states of the evaluation's episodes. Dotted: "
        "the discounted return that the deterministic policy had there, without SAC's reward for "
        "randomness. Solid far below dotted is underestimation; experiments/diagnose.py --run "
        "measures it exactly.",
        dotted="start_return",
    ),
    Chart(
        "critic_loss",
        "Critic loss",
        "squared error",
        "How far the critic is from its targets. It grows with the values.",
        scale="log",
    ),
    Chart(
        "temperature",
        "Temperature",
        "temperature (alpha)",
        "The price of randomness, tuned so that the entropy meets its target: it rises while the "
        "entropy is below the target, and falls above.",
        scale="log",
    ),
    Chart(
        "entropy",
        "Entropy",
        "entropy (nats)",
        "How random the policy's actions are. It should settle at the target, minus half the "
        "number of action dimensions unless it was set otherwise.",
    ),
)
