"""Flags that several commands share, each declared in this module only.

A command calls the functions for the flags that it takes. Arguments are what differs between
commands: the default and, where the flag has another purpose, the help text.
"""

from collections.abc import Sequence
from typing import get_args, get_type_hints

from absl import flags

# absl lists a flag in the help of the module that declares it; here that is the calling command.
flags.disclaim_key_flags()


class _ChoiceParser(flags.EnumParser):
    """A parser of a name whose error says which known name is nearest."""

    def parse(self, argument: str) -> str:
        """Return a known name.

        Raises:
          ValueError: the name is unknown.
        """
        try:
            return str(super().parse(argument))
        except ValueError:
            from dynajax.registry import nearest

            names = ", ".join(self.enum_values)
            raise ValueError(
                f"choose one of {names}; the nearest is {nearest(argument, self.enum_values)}"
            ) from None


def define_choice(name: str, default: str, choices: Sequence[str], about: str) -> None:
    """Define a flag that takes one of several names."""
    parser = _ChoiceParser(list(choices))
    flags.DEFINE(parser, name, default, about, serializer=flags.ArgumentSerializer())


def define_env(default: str | None, about: str) -> None:
    """Define --env, one task."""
    flags.DEFINE_string("env", default, about)


def define_envs(*default: str) -> None:
    """Define --env, a list of tasks."""
    flags.DEFINE_list("env", list(default), "Tasks, separated by commas.")


def define_method() -> None:
    """Define --algo, --agent and --trust."""
    # Some commands need neither flag, and should not wait for JAX to be imported.
    from dynajax.agents import AGENTS
    from dynajax.algorithms import ALGORITHMS
    from dynajax.trust import TRUST

    define_choice(
        "algo",
        "mbpo",
        tuple(ALGORITHMS),
        "How synthetic data are generated and used: "
        + ", ".join(f"{name} ({row.paper})" for name, row in ALGORITHMS.items())
        + ".",
    )
    flags.DEFINE_string(
        "agent",
        None,
        f"The agent: {', '.join(AGENTS)}, or module:NAME. By default that of the preset.",
    )
    flags.DEFINE_string(
        "trust",
        None,
        f"The trust rule for synthetic data: {', '.join(TRUST)}, or module:NAME. By default that of "
        "the algorithm.",
    )


def define_fixes(about: str) -> None:
    """Define --fix, which can be repeated.

    Args:
      about: what is done with several of them, and with none.
    """
    from dynajax.models.targets import FIXES

    flags.DEFINE_multi_string(
        "fix", [], f"Comma-separated {', '.join(FIXES)} or module:NAME; or none. {about}"
    )


def define_preset(default: str) -> None:
    """Define --preset."""
    from dynajax.config.presets import PRESETS

    summaries = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    define_choice("preset", default, tuple(PRESETS), f"Named settings. {summaries}.")


def define_settings() -> None:
    """Define --set, which can be repeated."""
    flags.DEFINE_multi_string(
        "set", [], "FIELD=VALUE of the configuration, such as learn.utd=10. Repeat for more fields."
    )


def define_seeds(default: int, about: str, lower_bound: int | None = None) -> None:
    """Define --seeds, a number of seeds."""
    flags.DEFINE_integer("seeds", default, about, lower_bound=lower_bound)


def define_seed(about: str, lower_bound: int | None = None) -> None:
    """Define --seed, the first or only seed."""
    flags.DEFINE_integer("seed", 0, about, lower_bound=lower_bound, upper_bound=2**31 - 1)


def define_engine() -> None:
    """Define --engine and --oracle."""
    define_choice(
        "engine",
        "host",
        _choices("engine"),
        "Where the environments run: host (on the CPU) or mjx (in MJX on the accelerator).",
    )
    define_choice(
        "oracle",
        "none",
        _choices("oracle"),
        "The part of each synthetic transition that the simulator gives instead of the model: none, "
        "reward, state or both.",
    )


def define_video(about: str) -> None:
    """Define --video."""
    flags.DEFINE_bool("video", False, about)


def define_out(default: str | None, about: str) -> None:
    """Define --out, a folder."""
    flags.DEFINE_string("out", default, about)


def _choices(field: str) -> list[str]:
    """Return the values that a field of the configuration can have."""
    from dynajax.config import Config

    return list(get_args(get_type_hints(Config)[field]))
