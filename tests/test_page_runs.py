"""Run every training command of the documentation, with sizes that keep it short."""

import shlex

import pytest
from absl import flags

import pages
import scripts
from dynajax.cli import common
from dynajax.config.presets import PRESETS
from sizes import without_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the working directory of all commands."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture
def working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(pages.ROOT / "results" / "scripts")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("line", [line for line in pages.runs() if "run.py" in line])
def test_documented_training_command(line, working_directory, monkeypatch, capsys):
    words = shlex.split(line)
    words = words[words.index("python") + 2 :]
    flag = {name: value for name, _, value in (word.partition("=") for word in words)}
    agent = flag.get("--agent") or PRESETS[flag.get("--preset", "quick")].agent
    sizes = pages.SIZES | (pages.OF_SAC if agent == "sac" else pages.WIDE)
    if "--algo=model-free" in words:
        sizes = without_model(sizes)
    # Sizes that the command sets itself are kept.
    given = {name.partition("=")[0] for name in words} | {word.partition("=")[2] for word in words}
    for name in [name for name in sizes if name in given]:
        del sizes[name]
    if "random_steps" in given:
        del sizes["replay.real"]
    if any(word.startswith("rollout.horizon") for word in words):
        sizes |= {"replay.synthetic": 4000}
    more = [f"--set={name}={str(value).strip('()')}" for name, value in sizes.items()]
    with scripts.loaded(pages.ROOT / "experiments" / "run.py") as script:
        if any(word.startswith("--process") for word in words):
            # The command waits for other machines, so only its configuration is checked.
            calls = []
            monkeypatch.setattr(script, "train", lambda *a, **k: calls.append(a) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                script_run(script, monkeypatch, *words, *more, "--steps=70")
            assert calls[0][0].env == "humanoid-walk"
            return
        status = scripts.run(script, monkeypatch, *words, *more, "--seeds=1", "--steps=70")
    printed, err = capsys.readouterr()
    assert status == 0, err
    assert "report: runs/" in printed


def script_run(script, monkeypatch, *words):
    """Call the `main` of a script without turning its errors into exit statuses."""
    monkeypatch.setattr(common, "start", lambda process=None: None)
    flags.FLAGS.unparse_flags()
    flags.FLAGS([script.__file__, *words])
    return script.main([])
