"""Look up registry entries by the name that a user types, including "module:NAME"."""

import difflib
import importlib
import os
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from dynajax.types import UsageError

T = TypeVar("T", bound=type[Any])

#: Folders whose code is not the user's.
_LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for folder in (
        Path(__file__).parent,
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    )
)


def import_module(flag: str, name: str) -> ModuleType | None:
    """Import and return the module of "module:NAME", which may register its entries.

    Args:
      flag: flag that the name was given to, for the error message.
      name: name of an entry; nothing is imported if it has no module.

    Raises:
      UsageError: the module cannot be imported.
    """
    module, colon, _ = name.rpartition(":")
    if not colon:
        return None
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise UsageError(f"{flag}={name}: {_import_failure(module, error)}") from error


def _import_failure(module: str, error: BaseException) -> str:
    """Return why a module cannot be imported, in one line."""
    if not module:
        return "there is no module before the colon; write it as module:NAME"
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and f"{module}.".startswith(f"{missing}."):
        if module.endswith(".py"):
            return (
                f"the module {module!r} cannot be found; write its name without .py, "
                f"{module.removesuffix('.py')!r}"
            )
        return f"the module {module!r} cannot be found; it must be installed or on PYTHONPATH"
    place: tuple[str | None, int | None] | None = _place(error)
    text = str(error)
    if isinstance(error, SyntaxError):
        text, place = error.msg, (error.filename, error.lineno)
    where = f" ({place[0]}, line {place[1]})" if place else ""
    text = " ".join(f"{type(error).__name__}: {text}".split())
    return f"the module {module!r} raised {text} while it was imported{where}"


def _place(error: BaseException) -> tuple[str, int | None] | None:
    """Return file and line of the user's code that raised an error, or called what raised it."""
    frames = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen ") and frame.filename != __file__
    ]
    own = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)]
    return next(reversed(own or frames), None)


def find(
    flag: str,
    entries: Mapping[str, Any],
    name: str,
    accepts: Callable[[Any], bool],
    required: str,
    base: Any = None,
) -> Any:
    """Return the entry with a name, or what the module of "module:NAME" defines or registers.

    Args:
      flag: flag that the name was given to, for the error message.
      entries: registered entries by name.
      name: name of an entry, or "module:NAME".
      accepts: whether an object is an entry.
      required: what an entry must be, for the error message.
      base: is not taken from a module, which may have imported it only.

    Raises:
      UsageError: there is no such entry, or it is not accepted.
    """
    imported = import_module(flag, name)
    module, _, short_name = name.rpartition(":")
    defined = getattr(imported, short_name, None)
    if accepts(defined) and defined is not base:
        return defined
    if short_name in entries:
        entry = entries[short_name]
        if not accepts(entry):
            raise UsageError(
                f"{flag}={name}: {entry!r} is registered as {short_name!r}; it must be {required}"
            )
        return entry
    if defined is not None:
        raise UsageError(
            f"{flag}={name}: {short_name!r} of the module {module!r} is {defined!r}; it must be "
            f"{required}"
        )
    by_lower_name = {name.lower(): name for name in entries}
    (match,) = difflib.get_close_matches(short_name.lower(), by_lower_name, 1, 0.0)
    missing = f"the module {module!r} has no {short_name!r}" if module else "unknown name"
    raise UsageError(
        f"{flag}={name}: {missing}; the nearest is {by_lower_name[match]} "
        f"(of {', '.join(entries)}, or module:NAME of a module of yours)"
    )


def lookup(flag: str, entries: Mapping[str, T], name: str) -> T:
    """Return the class with a name, or that the module of "module:NAME" defines or registers.

    Args:
      flag: flag that the name was given to, for the error message.
      entries: registered classes by name; the first one determines the required base class.
      name: name of an entry, or "module:NAME".

    Raises:
      UsageError: there is no such class, or it does not inherit from the base class.
    """
    base = next(iter(entries.values())).__mro__[-2]  # the last class before `object`

    def accepts(entry: Any) -> bool:
        return isinstance(entry, type) and issubclass(entry, base)

    required = f"a class that inherits from {base.__name__}"
    return find(flag, entries, name, accepts, required, base)
