"""Names of what is registered: the entry, the nearest one, or that of a user's module."""

import pytest

from dynajax import UsageError, registry


class Base:
    """What every entry inherits from."""


ENTRIES = {name: type(name, (Base,), {}) for name in ("sac", "simba", "bro")}


def refusal(name, entries=ENTRIES) -> str:
    with pytest.raises(UsageError) as error:
        registry.lookup("--agent", entries, name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a user's module, of a name of its own, and gives that."""
    monkeypatch.syspath_prepend(tmp_path)
    count = len(list(tmp_path.iterdir()))

    def write(text: str) -> str:
        nonlocal count
        count += 1
        name = f"users_module_{tmp_path.name.replace('-', '_')}_{count}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def test_an_entry_is_found_by_its_name():
    assert [registry.lookup("--agent", ENTRIES, name) for name in ENTRIES] == [*ENTRIES.values()]


@pytest.mark.parametrize(("name", "near"), [("simbo", "simba"), ("sacc", "sac"), ("zzz", "sac")])
def test_an_unknown_name_gets_the_nearest_and_all(name, near):
    text = refusal(name)
    assert text.startswith(f"--agent={name}: there is no such one; the nearest is ")
    assert "(of sac, simba, bro, or module:name" in text
    if name != "zzz":
        assert f"the nearest is {near} " in text


def test_a_users_module_is_imported_and_registers(module):
    name = module("import dynajax.registry as r\nclass Own: pass\nr.TESTED = {'own': Own}\n")
    try:
        registry.import_module("--agent", f"{name}:own")
        assert registry.lookup("--agent", registry.TESTED, f"{name}:own").__name__ == "Own"
    finally:
        vars(registry).pop("TESTED", None)
    # A name without a module imports nothing.
    registry.import_module("--agent", "no_such_module")


def test_a_module_that_registers_nothing_of_that_name(module):
    name = module("")
    text = refusal(f"{name}:own")
    assert text.startswith(f"--agent={name}:own: the module '{name}' registers no 'own'")


@pytest.mark.parametrize("entry", [5, int, ENTRIES["sac"]()])
def test_an_entry_of_another_kind_is_refused(entry):
    text = refusal("five", ENTRIES | {"five": entry})
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
def test_a_module_that_cannot_be_imported_is_refused_in_one_line(module, text, reason):
    name = module(text)
    line = refusal(f"{name}:own")
    assert line.startswith(f"--agent={name}:own: the module '{name}' cannot be imported ({reason}")
    assert "PYTHONPATH" in line


def test_a_module_that_is_not_there():
    assert "the module 'nowhere.at_all' cannot be imported" in refusal("nowhere.at_all:own")
    assert "cannot be imported" in refusal(":own")
