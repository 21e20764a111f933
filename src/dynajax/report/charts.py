"""Describe the charts of the reports: which metric each draws, and how to read it.

A report draws every chart for whose metric the run has values.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dynajax.report import statistics
from dynajax.report.figures import FramesAt, Panel, Series

#: Values above this would flatten all others on a linear axis.
_HUGE = 1e4


class Chart(NamedTuple):
    """A metric over training, for every variant."""

    metric: str
    title: str
    ylabel: str
    meaning: str  # the caption: what is drawn, and how to read high or low values
    dotted: str | None = None  # another metric, drawn dotted
    scale: str = "linear"  # see `Panel`; "wide": "symlog" if values are huge, else "linear"
    include: float | None = None
    r2: bool = False  # values of R², clipped to at least -1
    bounds: statistics.Bounds = statistics.UNBOUNDED  # see `Panel`


def panels(
    charts: Sequence[Chart], series: Callable[[str], Series], frames_at: FramesAt | None
) -> list[tuple[Panel, str]]:
    """Return the panels of charts with their captions, without charts that have no values.

    Args:
      series: returns the values of a metric.
      frames_at: see `Panel.in_frames`.
    """
    drawn = []
    for chart in charts:
        lines, dotted = (series(m) if m else {} for m in (chart.metric, chart.dotted))
        if chart.r2:
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
                include=chart.include,
                bounds=statistics.R2 if chart.r2 else chart.bounds,
            )
            drawn.append((panel.in_frames(frames_at), chart.meaning))
    return drawn


#: Metrics of kind "fit".
MODEL = (
    Chart(
        "r2_reward",
        "R² of the reward",
        "R² of the reward",
        "Share of the variance of the reward that the model explains on held-out transitions: 1 is "
        "perfect, 0 is no better than predicting the mean (values below -1 are clipped). From "
        "synthetic rewards the agent learns only what the model predicts.",
        r2=True,
    ),
    Chart(
        "r2_state",
        "R² of the state's change",
        "R² of the state's change",
        "The same for the change of the state in one step; median over the state dimensions.",
        r2=True,
    ),
    Chart(
        "target_variance_ratio",
        "Variance of the targets",
        "state variance / reward variance",
        "Sum of the variances of all state targets over the variance of the reward target, in the "
        "units of the network. The larger it is, the less the reward contributes to the loss.",
        scale="log",
    ),
    Chart(
        "real_reward_mean",
        "Bias of the reward",
        "mean reward per step",
        "Mean reward on held-out transitions. Solid: real. Dotted: predicted by the model. The "
        "agent learns from rewards with this bias.",
        dotted="model_reward_mean",
    ),
    Chart(
        "holdout_mse",
        "Holdout error",
        "mean squared error",
        "Error on held-out transitions in the units of the network. These differ between variants, "
        "so compare shapes, not heights. It rises with overfitting, or when the agent visits new "
        "states.",
        scale="log",
    ),
    Chart(
        "nll",
        "Likelihood",
        "negative log-likelihood",
        "Negative log-likelihood of held-out transitions in the units of the network: again compare "
        "shapes. Fits minimize it, weighted if the fix beta is used, plus weight decay.",
    ),
    Chart(
        "epistemic_std",
        "Disagreement of the ensemble",
        "standard deviation of means",
        "Standard deviation between the means of the ensemble members (epistemic), in the units of "
        "the network. It falls with more data, and rises where the agent explores.",
        scale="log",
    ),
    Chart(
        "aleatoric_std",
        "Predicted noise",
        "standard deviation",
        "Standard deviation that the members predict (aleatoric), in the units of the network. "
        "Rollouts add this noise to every step. Above the root of the holdout error it is larger "
        "than the data justify.",
        scale="log",
    ),
    Chart(
        "coverage_80",
        "Calibration",
        "share of held-out transitions",
        "Share of the true values inside the predicted 80 % intervals. Lower values mean "
        "overconfidence, higher values mean too much noise.",
        include=0.8,
        bounds=statistics.SHARE,
    ),
    Chart(
        "fit_steps",
        "Length of the fits",
        "gradient steps per fit",
        "Gradient steps of each refit. With early stopping a fit ends when its holdout error no "
        "longer improves.",
    ),
)

#: Metrics of kind "learn" about synthetic data.
SYNTHETIC = (
    Chart(
        "valid_fraction",
        "Used synthetic transitions",
        "share of synthetic transitions",
        "Share of the synthetic transitions that the agent learns from: those that are finite, "
        "whose rollout has not ended, and that the trust rule accepts, if there is one.",
        include=1.0,
        bounds=statistics.SHARE,
    ),
    Chart(
        "penalty",
        "Penalty",
        "reward",
        "Penalty that the trust rule subtracts from the reward, mean over the accepted "
        "transitions; below 0 it is a bonus.",
        include=0.0,
    ),
    Chart(
        "weight",
        "Weight",
        "weight in the critic loss",
        "Mean weight of a synthetic transition; a real transition has weight 1.",
        include=1.0,
    ),
    Chart(
        "synthetic_reward_mean",
        "Synthetic reward",
        "mean reward per step",
        "Mean reward in the agent's minibatches. Solid: synthetic. Dotted: real. If they differ, "
        "the synthetic data do not represent the task.",
        dotted="real_reward_mean",
    ),
)

#: Metrics of kind "diagnosis", logged by `dynajax diagnose --run`.
DIAGNOSED = (
    Chart(
        "critic_bias",
        "Bias of the critic",
        "share of the mean return",
        "From dynajax diagnose --run: the critic's value minus the entropy-corrected return of "
        "the current policy in the simulator, relative to the mean absolute return. Negative values are "
        "underestimation.",
        include=0.0,
    ),
    Chart(
        "policy_reward_bias",
        "Bias of the predicted reward",
        "standard deviations",
        "From dynajax diagnose --run: mean reward of the model minus the real one. Solid: in "
        "states that the policy visits. Dotted: in the synthetic transitions.",
        dotted="synthetic_reward_bias",
        include=0.0,
    ),
)

#: Metrics of kind "learn" about the agent.
CRITIC = (
    Chart(
        "q_mean",
        "Value estimates",
        "value",
        "Solid: the critic's value (expected discounted return) in the minibatches. Dotted: its "
        "target. Both should grow with the return and stay close together; growth without bound "
        "is divergence.",
        dotted="target_mean",
        scale="wide",
    ),
    Chart(
        "start_value",
        "Values of start states",
        "value",
        "Solid: the critic's value of the first states of the evaluation episodes. Dotted: the "
        "discounted return of the deterministic policy from there, without the entropy bonus of "
        "SAC. Solid far below dotted is underestimation; dynajax diagnose --run measures "
        "it exactly.",
        dotted="start_return",
    ),
    Chart(
        "critic_loss",
        "Critic loss",
        "squared error",
        "Squared error between the critic and its targets. It grows with the values.",
        scale="log",
    ),
    Chart(
        "temperature",
        "Temperature",
        "temperature (alpha)",
        "Coefficient of the entropy bonus. It is tuned towards the target entropy: it rises while "
        "the entropy is below the target, and falls while it is above.",
        scale="log",
    ),
    Chart(
        "entropy",
        "Entropy",
        "entropy (nats)",
        "Entropy of the policy. It should settle at the target entropy, which is minus half the "
        "number of action dimensions by default.",
    ),
)
