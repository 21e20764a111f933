"""Load trained policies and models as functions of numpy arrays.

Only `play` imports environments; everything else works without their packages.
"""

from dynajax.policy.dynamics import Dynamics, Estimate, ModelPrediction, load_model
from dynajax.policy.policy import Policy, load_policy

__all__ = ["Dynamics", "Estimate", "ModelPrediction", "Policy", "load_model", "load_policy"]
