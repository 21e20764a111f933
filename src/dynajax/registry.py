"""Names that a user types for an entry of a registry, the user's own modules included."""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from dynajax.types import UsageError

T = TypeVar("T", bound=type[Any])


def import_module(flag: str, name: str) -> None:
    """Imports the module part of `module:name`, so that it can register what it has.

    Raises:
      UsageError: it cannot be imported.
    """
    module, colon, _ = name.rpartition(":")
    if not colon:
        return
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's module raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(
            f"{flag}={name}: the module {module!r} cannot be imported ({reason}); "
            "it must be installed or on PYTHONPATH"
        ) from error


def lookup(flag: str, entries: Mapping[str, T], name: str) -> T:
    """The entry called `name`, or, of `module:name`, what that module has registered.

    Raises:
      UsageError: there is none, and the line names the nearest; or it is of another kind.
    """
    import_module(flag, name)
    module, _, short = name.rpartition(":")
    if short in entries:
        entry = entries[short]
        base = next(iter(entries.values())).__mro__[-2]  # Agent, or Rule
        if not (isinstance(entry, type) and issubclass(entry, base)):
            raise UsageError(
                f"{flag}={name}: {entry!r} is registered as {short!r}; it must be a class that "
                f"inherits from {base.__name__}"
            )
        return entry
    by_lower = {name.lower(): name for name in entries}
    near = by_lower[difflib.get_close_matches(short.lower(), by_lower, 1, 0.0)[0]]
    missing = f"the module {module!r} registers no {short!r}" if module else "there is no such one"
    raise UsageError(
        f"{flag}={name}: {missing}; the nearest is {near} (of {', '.join(entries)}, or "
        "module:name where a module of yours registers it)"
    )
