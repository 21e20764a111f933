"""Sources of synthetic data. `SOURCES` lists them by the name that `rollout.source` takes."""

from dynajax import registry
from dynajax.config import Config
from dynajax.synthetic.base import RolloutStarts, Source, SourceKeys, UpdateInputs, reward_means
from dynajax.synthetic.buffered import Buffered
from dynajax.synthetic.on_the_fly import OnTheFly
from dynajax.synthetic.value_expansion import expand_targets
from dynajax.trust import TrustRule
from dynajax.types import EnvSpec

__all__ = [
    "SOURCES",
    "RolloutStarts",
    "Source",
    "SourceKeys",
    "UpdateInputs",
    "expand_targets",
    "make_source",
    "reward_means",
    "source_class",
]

#: Sources by the name that `--set rollout.source` takes; a module of your own may add to it.
SOURCES: dict[str, type[Source]] = {
    "none": Source,
    "buffered": Buffered,
    "on_the_fly": OnTheFly,
}


def source_class(name: str) -> type[Source]:
    """Return the source called `name`, or `module:name`.

    Raises:
      UsageError: there is no such source.
    """
    return registry.lookup("--set rollout.source", SOURCES, name)


def make_source(config: Config, spec: EnvSpec, rule: TrustRule) -> Source:
    """Return the source of one learner; traced fields of `config` may be arrays."""
    return source_class(config.rollout.source)(config, spec, rule)
