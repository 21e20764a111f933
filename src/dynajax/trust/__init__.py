"""Rules of trust. `TRUST` is the one place that lists them."""

from dynajax import registry
from dynajax.config import Config
from dynajax.trust.base import Predictions, Rule, Verdict, in_code, in_standard_units
from dynajax.trust.infoprop import Infoprop
from dynajax.trust.m2ac import M2AC
from dynajax.trust.macura import Macura
from dynajax.trust.penalty import Penalty
from dynajax.trust.uncertainty_weight import Weight
from dynajax.types import EnvSpec

__all__ = [
    "TRUST",
    "Predictions",
    "Rule",
    "Verdict",
    "in_code",
    "in_standard_units",
    "rule_class",
    "rule_of",
]

#: By the name that `--trust` takes; a module of one's own adds what it has.
TRUST: dict[str, type[Rule]] = {
    "none": Rule,
    "macura": Macura,
    "m2ac": M2AC,
    "infoprop": Infoprop,
    "penalty": Penalty,
    "weight": Weight,
}


def rule_class(name: str) -> type[Rule]:
    """The rule called `name`, or `module:name`.

    Raises:
      UsageError: there is none.
    """
    return registry.lookup("--trust", TRUST, name)


def rule_of(config: Config, spec: EnvSpec) -> Rule:
    """The rule of a configuration, for one row: its traced fields may be arrays."""
    return rule_class(config.trust_name)(config.trust, spec, config.rollouts_beside)
