"""Look up registry entries by the name that a user types, including "module:NAME"."""

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, TypeVar

from dynajax import user_code
from dynajax.types import UsageError

T = TypeVar("T", bound=type[Any])


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
    place = user_code.place(error, anyones=True)
    text = str(error)
    if isinstance(error, SyntaxError):
        text = error.msg
        place = (error.filename, error.lineno) if error.filename else place
    where = f" ({place[0]}, line {place[1]})" if place else ""
    text = " ".join(f"{type(error).__name__}: {text}".split())
    return f"the module {module!r} raised {text} while it was imported{where}"


def _shown(value: Any) -> str:
    """Return the beginning of a value's text, in one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the name that is most like a mistyped one."""
    by_lower_name = {known.lower(): known for known in names}
    return by_lower_name[difflib.get_close_matches(name.lower(), by_lower_name, 1, 0.0)[0]]


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
    entry = entries.get(short_name)
    # The name of another module cannot mean an entry of this package.
    if entry is not None and (imported is None or not _is_of_package(entry)):
        if not accepts(entry):
            raise UsageError(
                f"{flag}={name}: {_shown(entry)} is registered as {short_name!r}; it "
                f"must be {required}"
            )
        return entry
    if defined is not None:
        raise UsageError(
            f"{flag}={name}: {short_name!r} of the module {module!r} is "
            f"{_shown(defined)}; it must be {required}"
        )
    if imported is not None:
        own = ", ".join(_own_entries(imported, entries, accepts)) or f"nothing that is {required}"
        raise UsageError(
            f"{flag}={name}: the module {module!r} has no {short_name!r}; it has {own}"
        )
    raise UsageError(
        f"{flag}={name}: unknown name; the nearest is {nearest(short_name, entries)} "
        f"(of {', '.join(entries)}, or module:NAME of a module of yours)"
    )


def _is_of_package(entry: Any) -> bool:
    """Return whether an entry is a class of this package."""
    return isinstance(entry, type) and entry.__module__.startswith(f"{__package__}.")


def _own_entries(
    module: ModuleType, entries: Mapping[str, Any], accepts: Callable[[Any], bool]
) -> list[str]:
    """Return the names of a module's own entries, and those that it has registered."""

    def is_own(value: Any) -> bool:
        return not isinstance(value, type) or value.__module__ == module.__name__

    own = [name for name, value in vars(module).items() if accepts(value) and is_own(value)]
    registered = [n for n, entry in entries.items() if isinstance(entry, type) and is_own(entry)]
    return list(dict.fromkeys(own + registered))


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
    cls = find(flag, entries, name, accepts, required, base)
    if missing := user_code.missing(cls, base):
        raise UsageError(
            f"{flag}={name}: the class {cls.__name__} has no {', '.join(missing)}; define "
            f"{'them' if len(missing) > 1 else 'it'}, see {base.__module__}.{base.__name__}"
        )
    return cls
