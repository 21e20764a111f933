"""Agents: what acts, and learns from minibatches. `AGENTS` lists them."""

from dynajax import registry
from dynajax.agents.base import Agent
from dynajax.agents.bro import BRO
from dynajax.agents.sac import SAC
from dynajax.agents.simba import SimBa
from dynajax.config import Config
from dynajax.types import EnvSpec

__all__ = ["AGENTS", "Agent", "agent_class", "make_agent"]

#: Agents by the name that `--agent` takes; a module of your own may add to it.
AGENTS: dict[str, type[Agent]] = {"sac": SAC, "simba": SimBa, "bro": BRO}


def agent_class(name: str) -> type[Agent]:
    """Return the agent called `name`, or `module:name`.

    Raises:
      UsageError: there is no such agent.
    """
    return registry.lookup("--agent", AGENTS, name)


def make_agent(config: Config, spec: EnvSpec) -> Agent:
    """Return the agent of one learner; traced fields of `config` may be arrays."""
    return agent_class(config.agent_name)(config.learn, config.agent, spec)
