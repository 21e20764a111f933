"""dynajax: model-based policy optimisation in JAX, and why it fails where it fails.

    import dynajax

    config = dynajax.make_config("cheetah-run", fixes=["none", "scale,target"], seeds=2)
    result = dynajax.train(config, "runs/mine")
    run = dynajax.read_run(result.folder)
    policy = dynajax.load_policy(result.folder)

Your own agents, trust rules, models, likelihoods, sources and fixes are subclasses of `Agent`,
`TrustRule`, `DynamicsModel`, `Likelihood` and `Source`, or a `Fix`, named as "module:NAME" or added to
a table (`AGENTS`, ...). Your own tasks need `register_termination` or `register_mjx_task`. A name is
imported when it is first used, so a trained policy needs no environment's packages.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynajax.agents import AGENTS, Agent
    from dynajax.config import Config, fields, static, traced
    from dynajax.envs import register_mjx_task, register_termination
    from dynajax.models import MODELS, DynamicsModel, NeuralModel
    from dynajax.models.likelihoods import LIKELIHOODS, Likelihood
    from dynajax.models.targets import FIXES, Fix
    from dynajax.policy import load_model, load_policy
    from dynajax.report import Run, read_run, write_report
    from dynajax.settings import make as make_config
    from dynajax.synthetic import SOURCES, Source
    from dynajax.train import Result, train
    from dynajax.trust import TRUST, Predictions, TrustOutput, TrustRule
    from dynajax.types import UsageError
    from dynajax.xla.backend import use_cores

__version__ = "0.1.0"
__all__ = [
    "AGENTS",
    "FIXES",
    "LIKELIHOODS",
    "MODELS",
    "SOURCES",
    "TRUST",
    "Agent",
    "Config",
    "DynamicsModel",
    "Fix",
    "Likelihood",
    "NeuralModel",
    "Predictions",
    "Result",
    "Run",
    "Source",
    "TrustOutput",
    "TrustRule",
    "UsageError",
    "fields",
    "load_model",
    "load_policy",
    "make_config",
    "read_run",
    "register_mjx_task",
    "register_termination",
    "static",
    "traced",
    "train",
    "use_cores",
    "write_report",
]

#: Where each name is, and what it is called there.
_PLACES = {
    **dict.fromkeys(("AGENTS", "Agent"), "agents"),
    **dict.fromkeys(("Config", "fields", "static", "traced"), "config"),
    **dict.fromkeys(("register_mjx_task", "register_termination"), "envs"),
    **dict.fromkeys(("MODELS", "DynamicsModel", "NeuralModel"), "models"),
    **dict.fromkeys(("LIKELIHOODS", "Likelihood"), "models.likelihoods"),
    **dict.fromkeys(("FIXES", "Fix"), "models.targets"),
    **dict.fromkeys(("SOURCES", "Source"), "synthetic"),
    **dict.fromkeys(("TRUST", "Predictions", "TrustRule", "TrustOutput"), "trust"),
    **dict.fromkeys(("load_model", "load_policy"), "policy"),
    **dict.fromkeys(("Run", "read_run", "write_report"), "report"),
    **dict.fromkeys(("Result", "train"), "train"),
    "UsageError": "types",
    "make_config": "settings",
    "use_cores": "xla.backend",
}
_CALLED = {"make_config": "make"}


class _Package(ModuleType):
    """Lets `dynajax.train` stay the function: an import of the module would put itself there."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name == "train" and isinstance(value, ModuleType)
        super().__setattr__(name, value.train if is_module else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'dynajax' has no attribute {name!r}")
    module = importlib.import_module(f"dynajax.{_PLACES[name]}")
    value = globals()[name] = getattr(module, _CALLED.get(name, name))
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
