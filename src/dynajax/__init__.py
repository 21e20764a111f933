"""dynajax: model-based policy optimisation in JAX, and why it fails where it fails.

    import dynajax

    config = dynajax.make_config("cheetah-run", fixes=["none", "scale,target"], seeds=2)
    result = dynajax.train(config, "runs/mine")
    run = dynajax.read_run(result.folder)

Own tasks: `register_termination`; own fixes, agents and rules of trust: entries of `FIXES`, `AGENTS`
and `TRUST`.
"""

from dynajax.agents import AGENTS, Agent
from dynajax.config import Config, fields, static, traced
from dynajax.envs import register_termination
from dynajax.envs.mjx import register_mjx_task
from dynajax.models.targets import FIXES, Fix
from dynajax.models.trust import TRUST, Predictions, Rule, Verdict
from dynajax.report import Run, read_run, write_report
from dynajax.settings import make as make_config
from dynajax.train import Result, train
from dynajax.types import UsageError

__version__ = "0.1.0"
__all__ = [
    "AGENTS",
    "FIXES",
    "TRUST",
    "Agent",
    "Config",
    "Fix",
    "Predictions",
    "Result",
    "Rule",
    "Run",
    "UsageError",
    "Verdict",
    "fields",
    "make_config",
    "read_run",
    "register_mjx_task",
    "register_termination",
    "static",
    "traced",
    "train",
    "write_report",
]
