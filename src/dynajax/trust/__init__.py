"""Trust rules: which synthetic transitions to learn from. `TRUST` lists them."""

from dynajax import registry
from dynajax.config import Config
from dynajax.trust.base import (
    Predictions,
    TrustOutput,
    TrustRule,
    Values,
    standard_units,
    to_normalized,
    to_standard_units,
)
from dynajax.trust.infoprop import Infoprop
from dynajax.trust.m2ac import M2AC
from dynajax.trust.macura import Macura
from dynajax.trust.penalty import Penalty
from dynajax.trust.uncertainty_weight import UncertaintyWeight
from dynajax.trust.value_weight import ValueWeight
from dynajax.types import EnvSpec

__all__ = [
    "TRUST",
    "Predictions",
    "TrustOutput",
    "TrustRule",
    "Values",
    "make_rule",
    "standard_units",
    "to_normalized",
    "to_standard_units",
    "trust_rule_class",
]

#: Trust rules by the name that `--trust` takes; a module of your own may add to it.
TRUST: dict[str, type[TrustRule]] = {
    "none": TrustRule,
    "macura": Macura,
    "m2ac": M2AC,
    "infoprop": Infoprop,
    "penalty": Penalty,
    "uncertainty_weight": UncertaintyWeight,
    "value_weight": ValueWeight,
}


def trust_rule_class(name: str) -> type[TrustRule]:
    """Return the rule called `name`, or `module:name`.

    Raises:
      UsageError: there is no such rule.
    """
    return registry.lookup("--trust", TRUST, name)


def make_rule(config: Config, spec: EnvSpec) -> TrustRule:
    """Return the trust rule of one learner; traced fields of `config` may be arrays."""
    return trust_rule_class(config.trust_name)(config.trust, spec, config.num_parallel_rollouts)
