"""Registry lookups: known names, unknown names, and names in a user's module."""

import pytest

from dynajax import UsageError, registry
from dynajax.trust import TRUST


class Base:
    """Base class of all entries."""


ENTRIES = {name: type(name, (Base,), {}) for name in ("sac", "simba", "bro")}


def lookup_error(name, entries=ENTRIES) -> str:
    """Return the message of the error that a lookup raises."""
    with pytest.raises(UsageError) as error:
        registry.lookup("--agent", entries, name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a module with a unique name, and returns the name."""
    monkeypatch.syspath_prepend(tmp_path)
    count = len(list(tmp_path.iterdir()))

    def write(text: str) -> str:
        nonlocal count
        count += 1
        name = f"users_module_{tmp_path.name.replace('-', '_')}_{count}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def test_lookup_by_name():
    assert [registry.lookup("--agent", ENTRIES, name) for name in ENTRIES] == [*ENTRIES.values()]


@pytest.mark.parametrize(("name", "near"), [("simbo", "simba"), ("sacc", "sac"), ("zzz", "sac")])
def test_unknown_name_error_has_the_nearest_and_all_names(name, near):
    text = lookup_error(name)
    assert text.startswith(f"--agent={name}: unknown name; the nearest is ")
    assert "(of sac, simba, bro, or module:NAME" in text
    if name != "zzz":
        assert f"the nearest is {near} " in text


def test_names_of_the_package_are_not_found_in_other_modules():
    assert lookup_error("json:macura", TRUST) == (
        "--agent=json:macura: the module 'json' has no 'macura'; it has nothing that is a class that "
        "inherits from TrustRule"
    )


def test_users_module_is_imported(module):
    name = module(
        "import dynajax.registry as r\nclass Custom: pass\nr.TESTED = {'custom': Custom}\n"
    )
    try:
        registry.import_module("--agent", f"{name}:custom")
        assert registry.lookup("--agent", registry.TESTED, f"{name}:custom").__name__ == "Custom"
    finally:
        vars(registry).pop("TESTED", None)
    # A name without a module does not import anything.
    registry.import_module("--agent", "no_such_module")


def test_class_that_a_module_defines(module):
    name = module(
        "from test_registry import Base, ENTRIES\n"
        "class Own(Base): pass\nclass sac(Base): pass\nother = Own\nnumber = 5\n"
    )
    own = registry.lookup("--agent", ENTRIES, f"{name}:Own")
    assert own.__module__ == name and own.__name__ == "Own" and "Own" not in ENTRIES
    assert registry.lookup("--agent", ENTRIES, f"{name}:other") is own
    # The module's own class comes before a registered one of the same name.
    assert registry.lookup("--agent", ENTRIES, f"{name}:sac").__module__ == name
    assert registry.lookup("--agent", ENTRIES, f"{name}:bro") is ENTRIES["bro"]
    for short_name in ("Base", "number"):
        text = lookup_error(f"{name}:{short_name}")
        assert text.startswith(f"--agent={name}:{short_name}: '{short_name}' of the module ")
        assert text.endswith("it must be a class that inherits from Base")


def test_module_without_the_name(module):
    name = module("")
    text = lookup_error(f"{name}:custom")
    assert text.startswith(f"--agent={name}:custom: the module '{name}' has no 'custom'")


@pytest.mark.parametrize("entry", [5, int, ENTRIES["sac"]()])
def test_entry_that_is_not_a_subclass_is_refused(entry):
    text = lookup_error("five", ENTRIES | {"five": entry})
    assert text.startswith(f"--agent=five: {entry!r} is registered as 'five'; it must be a class ")
    assert text.endswith(" Base")


@pytest.mark.parametrize(
    ("text", "reason", "line"),
    [
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines", 1),
        ("import math\n\nmath.sqroot(2)", "AttributeError: module 'math' has no attribute", 3),
        ("import json\njson.loads('{')", "JSONDecodeError: Expecting property name", 2),
        ("\ndef (", "SyntaxError: ", 2),
        ("import sys; sys.exit(0)", "SystemExit: 0", 1),
        ("import no_such_package_at_all", "ModuleNotFoundError: No module named", 1),
    ],
)
def test_error_while_a_module_is_imported(module, tmp_path, text, reason, line):
    """Say in one line what was raised, and in which line of the user's file."""
    name = module(text)
    message = lookup_error(f"{name}:custom")
    assert message.startswith(f"--agent={name}:custom: the module '{name}' raised {reason}")
    assert message.endswith(f"while it was imported ({tmp_path / name}.py, line {line})")
    assert "PYTHONPATH" not in message


def test_missing_module(module):
    text = "the module 'nowhere.at_all' cannot be found; it must be installed or on PYTHONPATH"
    assert lookup_error("nowhere.at_all:custom") == f"--agent=nowhere.at_all:custom: {text}"
    assert "write it as module:NAME" in lookup_error(":custom")
    name = module("")
    text = f"the module '{name}.py' cannot be found; write its name without .py, '{name}'"
    assert lookup_error(f"{name}.py:custom") == f"--agent={name}.py:custom: {text}"
