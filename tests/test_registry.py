"""Registry lookups: known names, unknown names, and names in a user's module."""

import pytest

from dynajax import UsageError, registry


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
    assert "(of sac, simba, bro, or module:name" in text
    if name != "zzz":
        assert f"the nearest is {near} " in text


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


def test_module_that_does_not_register_the_name(module):
    name = module("")
    text = lookup_error(f"{name}:custom")
    assert text.startswith(f"--agent={name}:custom: the module '{name}' does not register 'custom'")


@pytest.mark.parametrize("entry", [5, int, ENTRIES["sac"]()])
def test_entry_that_is_not_a_subclass_is_refused(entry):
    text = lookup_error("five", ENTRIES | {"five": entry})
    assert text.startswith(f"--agent=five: {entry!r} is registered as 'five'; it must be a class ")
    assert text.endswith(" Base")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("def (", "SyntaxError: "),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import no_such_package_at_all", "ModuleNotFoundError: No module named"),
    ],
)
def test_import_error_is_one_line(module, text, reason):
    name = module(text)
    line = lookup_error(f"{name}:custom")
    assert line.startswith(
        f"--agent={name}:custom: the module '{name}' cannot be imported ({reason}"
    )
    assert "PYTHONPATH" in line


def test_missing_module():
    assert "the module 'nowhere.at_all' cannot be imported" in lookup_error("nowhere.at_all:custom")
    assert "cannot be imported" in lookup_error(":custom")
