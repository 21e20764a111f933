"""Look up registry entries by the name that a user types, including "module:name"."""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from dynajax.types import UsageError

T = TypeVar("T", bound=type[Any])


def import_module(flag: str, name: str) -> None:
    """Import the module of "module:name", so that it can register its entries.

    Args:
      flag: flag that the name was given to, for the error message.
      name: name of an entry; nothing is imported if it has no module.

    Raises:
      UsageError: the module cannot be imported.
    """
    module, colon, _ = name.rpartition(":")
    if not colon:
        return
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(
            f"{flag}={name}: the module {module!r} cannot be imported ({reason}); "
            "it must be installed or on PYTHONPATH"
        ) from error


def lookup(flag: str, entries: Mapping[str, T], name: str) -> T:
    """Return the entry with a name, after importing the module of "module:name".

    Args:
      flag: flag that the name was given to, for the error message.
      entries: registered classes by name; the first one determines the required base class.
      name: name of an entry, or "module:name".

    Raises:
      UsageError: there is no such entry, or it does not inherit from the base class.
    """
    import_module(flag, name)
    module, _, short_name = name.rpartition(":")
    if short_name in entries:
        entry = entries[short_name]
        base = next(iter(entries.values())).__mro__[-2]  # the last class before `object`
        if not (isinstance(entry, type) and issubclass(entry, base)):
            raise UsageError(
                f"{flag}={name}: {entry!r} is registered as {short_name!r}; it must be a class "
                f"that inherits from {base.__name__}"
            )
        return entry
    by_lower_name = {name.lower(): name for name in entries}
    (match,) = difflib.get_close_matches(short_name.lower(), by_lower_name, 1, 0.0)
    missing = (
        f"the module {module!r} does not register {short_name!r}" if module else "unknown name"
    )
    raise UsageError(
        f"{flag}={name}: {missing}; the nearest is {by_lower_name[match]} "
        f"(of {', '.join(entries)}, or module:name for an entry that your module registers)"
    )
