"""Call a user's functions, so that an error in one of them is a single line.

The line names the function, the file and line of the user's code, what the function returned or
raised, and what it must return. The original exception is kept as the cause.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynajax.types import UsageError, reason

_PACKAGE = f"{Path(__file__).parent}{os.sep}"
#: Folders whose code is not the user's.
_LIBRARIES = (
    _PACKAGE,
    *(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "purelib", "platlib")),
)
#: Errors of code that reads the value of an array while JAX traces it.
_NOT_PURE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
_ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float)


class Fault(NamedTuple):
    """What is wrong with a value."""

    text: str  # after "returned": a description, or a path within the value and " = description"
    needed: str  # after "it must be"


class Expected(NamedTuple):
    """What a function must return."""

    text: str  # after "it must return"
    fault: Callable[[Any], Fault | None]  # what is wrong with a value, or None


def expected(text: str, describe_wrong: Callable[[Any], str | None]) -> Expected:
    """Expect a value for which a function returns None, and not a description."""

    def fault(value: Any) -> Fault | None:
        wrong = describe_wrong(value)
        return None if wrong is None else Fault(wrong, text)

    return Expected(text, fault)


def array(kind: Any, *shape: int) -> Expected:
    """Expect an array: `kind` is a dtype, or `jnp.floating` or `jnp.integer` for any of them."""
    name = {jnp.floating: "float", jnp.integer: "int"}.get(kind) or jnp.dtype(kind).name

    def wrong(value: Any) -> str | None:
        if isinstance(value, _ARRAYS) and jnp.shape(value) == shape:
            dtype = jnp.result_type(value)
            # A Python number takes the type of what it is combined with.
            weak = kind is jnp.floating and type(value) is int
            if weak or jnp.issubdtype(dtype, kind):
                return None
        return describe(value)

    return expected(f"{name} {shape}", wrong)


def arrays(what: str, leading: tuple[int, ...] = (), kind: Any = None) -> Expected:
    """Expect any pytree of arrays, all with the same leading axes and kind of dtype."""

    def wrong(value: Any) -> str | None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            is_array = isinstance(leaf, _ARRAYS)
            if (
                not is_array
                or jnp.shape(leaf)[: len(leading)] != leading
                or (kind is not None and not jnp.issubdtype(jnp.result_type(leaf), kind))
            ):
                return _at(jax.tree_util.keystr(path), describe(leaf))
        return None

    return expected(what, wrong)


def like(tree: Any, what: str) -> Expected:
    """Expect a pytree with the structure, shapes and dtypes of another one."""

    def wrong(value: Any) -> str | None:
        old: Any = jax.tree.structure(tree)
        new: Any = jax.tree.structure(value)
        if old != new:
            return f"{describe(value)}, another structure than {describe(tree)}"
        pairs = zip(jax.tree_util.tree_leaves_with_path(value), jax.tree.leaves(tree), strict=True)
        for (path, leaf), before in pairs:
            is_array = isinstance(leaf, _ARRAYS)
            if not is_array or (jnp.shape(leaf), jnp.result_type(leaf)) != (
                jnp.shape(before),
                jnp.result_type(before),
            ):
                text = f"{describe(leaf)}, not {describe(before)}"
                return _at(jax.tree_util.keystr(path), text)
        return None

    return expected(what, wrong)


def several(**parts: Expected) -> Expected:
    """Expect a tuple; the names of its parts are for the error message."""
    text = f"a tuple ({', '.join(f'{name}: {part.text}' for name, part in parts.items())})"

    def fault(value: Any) -> Fault | None:
        if not isinstance(value, tuple) or len(value) != len(parts):
            return Fault(describe(value), text)
        return _first_fault(dict(zip(parts, value, strict=True)), parts)

    return Expected(text, fault)


def listed(part: Expected, count: int) -> Expected:
    """Expect a list or tuple of `count` equal parts."""
    text = f"a list of {count} {part.text}"

    def fault(value: Any) -> Fault | None:
        if not isinstance(value, list | tuple) or len(value) != count:
            return Fault(describe(value), text)
        names = [f"[{i}]" for i in range(count)]
        return _first_fault(dict(zip(names, value, strict=True)), dict.fromkeys(names, part))

    return Expected(text, fault)


def optional(part: Expected) -> Expected:
    """Expect None or something else."""
    return Expected(
        f"{part.text} or None", lambda value: None if value is None else part.fault(value)
    )


def instance(cls: type, name: str = "", /, **attributes: Expected) -> Expected:
    """Expect an instance of a class whose attributes are as expected."""
    parts = ", ".join(f"{name}: {part.text}" for name, part in attributes.items())
    text = f"{name or cls.__name__}({parts})" if parts else _a(name or cls.__name__)

    def fault(value: Any) -> Fault | None:
        if not isinstance(value, cls):
            return Fault(describe(value), text)
        values = {f".{name}": getattr(value, name) for name in attributes}
        return _first_fault(values, {f".{name}": part for name, part in attributes.items()})

    return Expected(text, fault)


def _first_fault(values: Mapping[str, Any], parts: Mapping[str, Expected]) -> Fault | None:
    """Return the first fault of several named values."""
    for name, part in parts.items():
        if fault := part.fault(values[name]):
            return fault._replace(text=_at(name, fault.text))
    return None


def scalars() -> Expected:
    """Expect metrics: numbers by name."""

    def wrong(value: Any) -> str | None:
        if not isinstance(value, dict):
            return describe(value)
        wrong = (
            name
            for name, number in value.items()
            if not isinstance(name, str) or not isinstance(number, _ARRAYS) or jnp.shape(number)
        )
        return next((f"{name!r}: {describe(value[name])}" for name in wrong), None)

    return expected("a dict of scalars", wrong)


ANYTHING = Expected("", lambda value: None)


def _at(name: str, text: str) -> str:
    """Return "name = text", or "name.path = text" if the text begins with a path."""
    if not name:
        return text
    return name + text if text.startswith((".", "[")) else f"{name} = {text}"


def describe(value: Any, depth: int = 2) -> str:
    """Return type, shape and dtype of a value in a few words."""
    if value is None:
        return "None"
    if isinstance(value, bool | int | float | str):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, _ARRAYS):
        return f"{jnp.result_type(value).name} {jnp.shape(value)}"
    if isinstance(value, tuple | list) and depth:
        names = getattr(value, "_fields", None)
        parts = [describe(part, depth - 1) for part in value[:4]]
        parts = [f"{n}={p}" for n, p in zip(names, parts, strict=False)] if names else parts
        parts += ["..."] * (len(value) > 4)
        kind = type(value).__name__
        return f"{kind if names else f'a {kind} of {len(value)} '}({', '.join(parts)})"
    if isinstance(value, dict):
        return f"a dict of ({', '.join(map(str, list(value)[:8]))})"
    if inspect.isfunction(value) or inspect.ismethod(value):
        return f"the function {name_of(value)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return _a(type(value).__name__)


def _a(name: str) -> str:
    """Return a name with its indefinite article."""
    return f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}"


def is_users(value: Any) -> bool:
    """Return whether a function or class is defined outside of this package."""
    value = _function(value) if not isinstance(value, type) else value
    module = getattr(value, "__module__", None) or type(value).__module__
    return module.partition(".")[0] != __package__


def _function(function: Any) -> Any:
    """Return the Python function behind a method, partial function or jitted function."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif inspect.ismethod(function):
            function = function.__func__
        elif isinstance(function, property):
            function = function.fget
        else:
            return function


def name_of(function: Any) -> str:
    """Return "module:function", with a method's class."""
    inner = _function(function)
    owner = getattr(function, "__self__", None)
    if owner is not None and not inspect.ismodule(owner):
        cls = owner if isinstance(owner, type) else type(owner)
        return f"{cls.__module__}:{cls.__qualname__}.{inner.__name__}"
    if hasattr(inner, "__qualname__"):
        return f"{inner.__module__}:{inner.__qualname__}"
    return f"{type(inner).__module__}:{type(inner).__qualname__}"


def _definition(function: Any) -> str:
    """Return " (file, line N)", where a user's function or the class of a method is defined."""
    inner = _function(function)
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    if code is not None and not code.co_filename.startswith(_LIBRARIES):
        return f" ({code.co_filename}, line {code.co_firstlineno})"
    owner = getattr(function, "__self__", inner)
    cls = owner if isinstance(owner, type) else type(owner)
    try:
        file, line = inspect.getsourcefile(cls), inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        return ""
    return f" ({file}, line {line})"


def place(error: BaseException, anyones: bool = False) -> tuple[str, int | None] | None:
    """Return file and line of the user's code that raised an error, or called what raised it.

    Args:
      anyones: without such code, return the place in a library's.
    """
    frames = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<frozen ", _PACKAGE))
    ]
    own = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)]
    return next(reversed(own or (frames if anyones else [])), None)


def raised(error: Exception) -> str:
    """Return the type and the first line of an error."""
    text = reason(error)
    name = type(error).__name__
    return name if text == name else f"{name}: {' '.join(text.split())}"


def _hint(error: BaseException) -> str:
    if not isinstance(error, _NOT_PURE):
        return ""
    return " in pure JAX (jnp.where instead of if, jnp instead of numpy and math)"


def call(
    owner: str, function: Any, *arguments: Any, returns: Expected = ANYTHING, role: str = ""
) -> Any:
    """Call a user's function and return its result, which must be as expected.

    Args:
      owner: flag and value by which the function was selected, for the error message.
      role: what the function is, such as "the termination function".

    Raises:
      UsageError: it cannot be called with the arguments, raises, or returns something else.
    """
    subject = f"{owner}: {role} " if role else f"{owner}: "
    if not callable(function):
        raise UsageError(f"{subject}is {describe(function)}; it must be a function")
    subject += name_of(function)
    _check_arguments(subject, function, len(arguments))
    try:
        result = function(*arguments)
    except UsageError:
        raise
    except Exception as error:
        where = place(error)
        if where is None and not _is_blamed(function, error):
            raise
        at = f" ({where[0]}, line {where[1]})" if where else _definition(function)
        must = f"; it must return {returns.text}{_hint(error)}" if returns.text else ""
        raise UsageError(f"{subject} raised {raised(error)}{at}{must}") from error
    if fault := returns.fault(result):
        raise UsageError(
            f"{subject} returned {fault.text}{_definition(function)}; it must be {fault.needed}"
        )
    return result


def _is_blamed(function: Any, error: BaseException) -> bool:
    """Return whether a function is to blame for an error that no line of the user raised.

    It is if the function is the user's, or if no code of this package raised the error.
    """
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return is_users(function) or not any(
        file.startswith(_PACKAGE) and file != __file__ for file in files
    )


def _check_arguments(subject: str, function: Any, count: int) -> None:
    """Check that a function takes `count` arguments.

    Raises:
      UsageError: it takes more or fewer.
    """
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some functions in C have none
        return
    try:
        signature.bind(*[None] * count)
    except TypeError:
        raise UsageError(
            f"{subject}{_without_annotations(signature)} takes other arguments than the {count} "
            f"that it is called with{_definition(function)}"
        ) from None


def _without_annotations(signature: inspect.Signature) -> str:
    empty = inspect.Signature.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=empty))


def attribute(owner: str, instance: Any, name: str, *, returns: Expected) -> Any:
    """Return an attribute of a user's object, which may be a property; see `call`."""
    static = inspect.getattr_static(type(instance), name)
    if isinstance(static, property) and static.fget is not None:
        return call(owner, static.fget.__get__(instance), returns=returns)
    value = getattr(instance, name)
    if fault := returns.fault(value):
        cls = type(instance)
        remedy = "; decorate it with @property" if inspect.ismethod(value) else ""
        raise UsageError(
            f"{owner}: {cls.__module__}:{cls.__qualname__}.{name} is {fault.text}{_definition(cls)}; "
            f"it must be {fault.needed}{remedy}"
        )
    return value


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn an error that a user's code raises in this context into one line.

    Args:
      what: what is done in the context, for the error message.

    Raises:
      UsageError: a line of the user's code raised, or called what raised.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        where = place(error)
        if where is None:
            raise
        raise UsageError(f"{where[0]}, line {where[1]} raised {raised(error)} {what}") from error


def missing(cls: type, base: type) -> list[str]:
    """Return what a class must define and does not, methods with their arguments.

    These are abstract methods, attributes without a value, and methods that are no functions.
    """
    fields = (
        {field.name for field in dataclasses.fields(base)}
        if dataclasses.is_dataclass(base)
        else set()
    )
    names = []
    for parent in reversed(cls.__mro__):
        if is_users(parent):
            continue
        names += [
            name
            for name in vars(parent).get("__annotations__", {})
            if name not in fields and not hasattr(cls, name)
        ]
        methods = {name: x for name, x in vars(parent).items() if inspect.isfunction(x)}
        names += [
            name + _without_annotations(inspect.signature(method))
            for name, method in methods.items()
            if not callable(getattr(cls, name)) and not name.startswith("__")
        ]
    for name in sorted(getattr(cls, "__abstractmethods__", ())):
        method = inspect.getattr_static(cls, name)
        is_method = inspect.isfunction(method)
        names.append(name + (_without_annotations(inspect.signature(method)) if is_method else ""))
    return list(dict.fromkeys(names))
