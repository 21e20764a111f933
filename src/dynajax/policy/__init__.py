"""What a run has learned, for use: its policies and its model, in plain numpy from outside.

Nothing here imports an environment but `play`.
"""

from dynajax.policy.dynamics import Dynamics, Estimate, ModelPrediction, load_model
from dynajax.policy.policy import Policy, load_policy

__all__ = ["Dynamics", "Estimate", "ModelPrediction", "Policy", "load_model", "load_policy"]
