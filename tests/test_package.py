"""The package: the wheel, its version, the command and its help, and the files about it."""

import datetime
import importlib
import os
import re
import signal
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from absl import flags
from packaging.requirements import Requirement

import dynajax
import scripts
from dynajax.agents import AGENTS
from dynajax.cli import COMMANDS, common, overview
from dynajax.config.presets import PRESETS
from dynajax.models.targets import FIXES
from dynajax.settings import all_settings, base
from dynajax.trust import TRUST

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: The script that calls each command.
SCRIPTS = {
    "train": "experiments/run.py",
    "report": "experiments/report.py",
    "plot": "experiments/plot.py",
    "diagnose": "experiments/diagnose.py",
    "play": "experiments/play.py",
    "bench": "experiments/bench.py",
    "sweep": "launch/sweep.py",
    "ahead": "experiments/ahead.py",
}


def shipped(registry) -> set[str]:
    """Return the names that the package itself registers; other tests register more."""
    return {name for name, cls in registry.items() if cls.__module__.startswith("dynajax.")}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Return a folder with the sdist, and with the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")

    def hatchling(where: Path, kind: str) -> None:
        command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    hatchling(ROOT, "sdist")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    hatchling(folder / sdist.name.removesuffix(".tar.gz"), "wheel")
    return folder


def test_wheel_contains_only_the_package(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "dynajax"
    files = {
        str(path.relative_to(package.parent))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= names
    assert {name.partition("/")[0] for name in names - files} == {
        f"dynajax-{dynajax.__version__}.dist-info"
    }


def test_wheel_installs_and_runs(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(tmp_path), str(wheel)], check=True)

    def dynajax_command(*words: str) -> str:
        """Return the output of the installed command, which imports only the installed package."""
        done = subprocess.run(
            [sys.executable, str(tmp_path / "bin" / "dynajax"), *words],
            env={"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert dynajax_command("--version") == f"{dynajax.__version__}\n"
    header, line, *legend = dynajax_command("tasks", "pendulum-swingup").splitlines()
    assert header.split() == ["task", "obs", "action", "frames", "terminates", "engines"]
    assert line.split() == ["pendulum-swingup", "3", "1", "1000", "no", "host,", "mjx"]
    assert all(f"{column}:" in " ".join(legend) for column in header.split()[3:])


def test_version_is_defined_once():
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dynajax.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["date-released"] > datetime.date(2026, 1, 1)
    summary = PROJECT["description"]
    assert summary.split() == citation["abstract"].rstrip(".").split()
    assert summary in " ".join((ROOT / "README.md").read_text().split())
    changelog = (ROOT / "CHANGELOG.md").read_text()
    (newest, *_) = re.findall(r"(?m)^## \[(.*)\]", changelog)
    assert newest == "Unreleased" or newest == dynajax.__version__
    assert dynajax.__version__ in changelog


def test_every_method_is_cited():
    notes = [
        r.get("notes", "")
        for r in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    ]
    for name in [*shipped(AGENTS), *shipped(TRUST)]:
        if name not in ("none", "sac", "value_weight"):  # the last one is this project's
            assert any(re.search(rf"\b{name}\b", note) for note in notes), name
    assert any(note.startswith("SAC.") for note in notes)


def test_workflow_runs_checks_on_every_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["checks"]
    classifiers = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c}
    assert set(job["strategy"]["matrix"]["python"]) == classifiers
    assert job["steps"][-1]["run"] == ".ci/run"
    checks = (ROOT / ".ci/run").read_text()
    for check in ('ruff" check', 'ruff" format --check', 'mypy"', "-m pytest"):
        assert check in checks, check


@pytest.fixture
def stamp(monkeypatch):
    """Return the script that writes the address of the repository."""
    with scripts.loaded(ROOT / "docs/set_repository.py") as script:
        yield script


def test_address_of_the_repository_is_the_same_everywhere(stamp, tmp_path):
    address = stamp.repository()
    assert len(stamp.files()) == 9
    for path in stamp.files():
        found = re.findall(r"github(?:\.com)?/([\w.-]+/dynajax)\b", path.read_text())
        assert set(found) == {address}, path
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == f"https://github.com/{address}"
    for path in stamp.files():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    stamp.set_repository("https://github.com/someone/else.where/", tmp_path)
    assert stamp.repository(tmp_path) == "someone/else.where"
    for path in stamp.files(tmp_path):
        text = path.read_text()
        assert address not in text and "someone/else.where" in text
    with pytest.raises(ValueError, match="give the address as"):
        stamp.set_repository("github.com/someone", tmp_path)
    # No other file repeats the address.
    known = {path.relative_to(ROOT) for path in stamp.files()}
    listed = subprocess.run(
        ["git", "grep", "-l", address, "--", ":!results"], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    assert {Path(name) for name in listed.stdout.split()} <= known


def test_hooks_and_constraints_have_the_versions_of_pyproject():
    test = PROJECT["optional-dependencies"]["test"]
    pins = {r for r in test if r.startswith(("ruff", "mypy"))}
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    used = {d for hook in hooks["hooks"] for d in hook["additional_dependencies"]}
    assert len(pins) == 2 and pins <= used
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert list(tested) == sorted(tested)
    extras = PROJECT["optional-dependencies"]
    needed = [Requirement(r) for r in [*PROJECT["dependencies"], *test, *extras["docs"]]]
    for requirement in needed:
        name = requirement.name.lower().replace("_", "-")
        assert name == "dynajax" or tested[name] in requirement.specifier, name


def test_continuous_integration_and_images_install_the_tested_versions():
    for name in (".ci/run", "Dockerfile", "Dockerfile.cuda"):
        (install,) = re.findall(r'pip"? install (.*)', (ROOT / name).read_text())
        assert "-c constraints.txt -e " in install
    for name in ("Dockerfile", "Dockerfile.cuda"):
        for files in re.findall(r"(?m)^COPY (.*) \S+$", (ROOT / name).read_text()):
            assert all((ROOT / file).exists() for file in files.split())


def test_overview_lists_commands(monkeypatch, capsys):
    assert PROJECT["scripts"] == {"dynajax": "dynajax.cli:main"}
    modules = {path.stem for path in (ROOT / "src/dynajax/cli").glob("*.py")}
    assert set(COMMANDS) == modules - {"__init__", "common", "config_file", "flags"}
    for name, summary in COMMANDS.items():
        assert re.search(rf"(?m)^  dynajax {name} +{re.escape(summary)}$", overview())
    for words, status, text in (
        ([], None, overview()),
        (["--help"], None, overview()),
        (["--version"], None, dynajax.__version__),
        (["trian"], 2, "error: dynajax trian: there is no such command; the nearest is train"),
    ):
        monkeypatch.setattr(sys, "argv", ["dynajax", *words])
        try:
            assert dynajax.cli.main() is None and status is None
        except SystemExit as exit:
            assert exit.code == status
        assert "".join(capsys.readouterr()) == text + "\n"


@pytest.mark.parametrize("words", [["tasks"], ["train", "--help"]])
def test_closed_output_pipe_ends_quietly(words):
    """Close the reading end as `head` does: no traceback, and the status of a shell for SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "dynajax", *words], stdout=write, stderr=subprocess.PIPE
        )
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_calls_the_command(name):
    text = (ROOT / SCRIPTS[name]).read_text()
    assert f"`dynajax {name}`" in text and len(text.splitlines()) <= 15
    with scripts.loaded(ROOT / SCRIPTS[name]) as module:
        assert module.__name__ == f"dynajax.cli.{name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_flag_and_default(name, monkeypatch):
    known = set(flags.FLAGS)
    module = importlib.import_module(f"dynajax.cli.{name}")
    try:
        monkeypatch.setattr(sys, "argv", [f"dynajax {name}", "--help"])
        text = common.help_text(module.main)
        assert f"  dynajax {name}" in text and len(text.splitlines()) <= 50
        for flag in flags.FLAGS.get_key_flags_for_module(module.__name__):
            if flag.help == common.INTERNAL:
                continue
            default = flag.default
            shown = ",".join(map(str, default)) if isinstance(default, list) else default
            said = "" if default in (None, False, "") or default == [] else f"(default: {shown})"
            (line,) = re.findall(rf"(?s)  --(?:\[no\])?{flag.name} .*?(?=\n  --|\Z)", text)
            assert " ".join(said.split()) in " ".join(line.split()), flag.name
        monkeypatch.setattr(sys, "argv", ["/x/experiments/other.py"])
        assert "  python experiments/other.py" in common.help_text(module.main)
    finally:
        scripts.forget(known)


def test_help_of_ahead_has_the_flags_of_train(monkeypatch):
    known = set(flags.FLAGS)
    module = importlib.import_module("dynajax.cli.ahead")
    try:
        monkeypatch.setattr(sys, "argv", ["dynajax ahead", "--help"])
        text = common.help_text(module.main)
    finally:
        scripts.forget(known)
    for flag in ("device", "env", "preset", "seeds", "set"):
        assert f"  --{flag} " in text
    for flag in module._UNUSED:
        assert f"--{flag}" not in text and f"--[no]{flag}" not in text
    assert "By default the working directory" in text and "run directory" not in text


def test_help_lists_choices_of_the_registries(monkeypatch):
    known = set(flags.FLAGS)
    module = importlib.import_module("dynajax.cli.train")
    try:
        monkeypatch.setattr(sys, "argv", ["dynajax train", "--help"])
        text = " ".join(common.help_text(module.main).split())
    finally:
        scripts.forget(known)
    for names in (shipped(AGENTS), shipped(TRUST), FIXES, PRESETS):
        for name in names:
            assert re.search(rf"\b{name}\b", text), name


def test_no_flag_is_declared_twice():
    """Check that commands share the flags of `cli/flags.py` instead of declaring their own."""
    declared = [
        name
        for path in (ROOT / "src/dynajax/cli").glob("*.py")
        for name in re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', path.read_text())
    ]
    assert len(declared) > 25
    # --env is one task or, for some commands, a list.
    assert {name for name in declared if declared.count(name) > 1} == {"env"}


def test_every_field_has_a_description():
    for agent in shipped(AGENTS):
        for trust in shipped(TRUST):
            for path, setting in all_settings(base(agent, trust)).items():
                assert setting.about, path


def test_fields_flag_lists_the_configuration(monkeypatch, capsys):
    with scripts.loaded(ROOT / "experiments/run.py") as script:
        words = ["--fields", "--trust=m2ac", "--set=learn.utd=3"]
        assert scripts.run(script, monkeypatch, *words) == 0
    text = capsys.readouterr().out
    for path in all_settings(base("simba", "m2ac")):
        assert re.search(rf"(?m)^[* ] {re.escape(path)} ", text), path
    assert re.search(
        r"learn\.utd +3 +gradient updates per agent step \(a whole number from 1\)", text
    )
    assert re.search(r"(?m)^\* learn\.discount", text)
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "launch").glob("*.sh")))
def test_shell_script_is_valid(script):
    subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)
