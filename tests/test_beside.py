"""The scripts that compare dynajax with other packages, and the page that reports them."""

import csv
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from dynajax import UsageError
from scripts import loaded

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "results/scripts"


@pytest.fixture
def beside(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    with loaded(SCRIPTS / "beside.py") as module:
        yield module


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import turns

    return turns


def command(turns, code: str, *words: str):
    return turns.Command([sys.executable, "-S", "-c", code, *words], {"OF_PAIR": "yes"})


def test_page_has_the_measured_ratios(beside):
    found = beside.comparisons(ROOT / "results/bench")
    assert {x.package for x in found} == set(beside.NAMES)
    assert beside.table(found) in (ROOT / "docs/speed.md").read_text()
    assert min(x.measurements for x in found) >= 3
    axes = beside.figure(found).axes[0]
    assert len(axes.get_yticklabels()) == len(found)


def test_readme_has_the_measured_ratios(beside):
    found = {x.name: x.ratio.point for x in beside.comparisons(ROOT / "results/bench")}
    run = "run of 4,000 steps, empty cache"
    sbx, cleanrl = (f"{found[f'{name}: {run}']:.1f}" for name in ("SBX", "CleanRL"))
    step = f"{found['mbrl-lib: environment step']:.1f}"
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"a run of SBX takes {sbx} times as long as ours, a run of CleanRL {cleanrl} times, and an "
        f"environment step of mbrl-lib {step} times"
    ) in readme


def test_ratio_is_the_median_over_pairs(beside, tmp_path):
    folder = tmp_path / "beside-sbx"
    folder.mkdir()
    rows = [
        {"package": "sbx-rl", "steps": 4000, "updates": 20, "cache": "empty"}
        | {"seconds_theirs": theirs, "seconds_ours": 10}
        | {"env": "cheetah-run", "machine": "some CPU, 1 core; Linux"}
        for theirs in (10, 20, 90)
    ]
    with (folder / "empty_20.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    [found] = beside.comparisons(tmp_path)
    assert found.work == "run of 4,000 steps with 20 updates each, empty cache"
    assert (*found.ratio, found.measurements) == (2.0, 1.5, 5.5, 3)
    assert found.conditions == ("cheetah-run", "some CPU, 1 core")


def test_processes_take_turns_and_cpu_seconds_are_counted(turns, monkeypatch):
    """A process that computes for longer needs more seconds, and both see an empty cache."""
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "cache = Path(os.environ['JAX_COMPILATION_CACHE_DIR']); cache.mkdir()\n"
        "assert os.environ['OF_PAIR'] == 'yes' and not list(Path(sys.argv[1]).iterdir())\n"
        "while time.process_time() < float(sys.argv[2]): pass"
    )
    monkeypatch.setattr(turns, "TURN", 0.05)
    sent, kill = [], os.kill
    monkeypatch.setattr(turns.os, "kill", lambda *call: (sent.append(call), kill(*call)))
    pairs = list(
        turns.time_pairs(
            lambda folder: {
                name: command(turns, code, str(folder), seconds)
                for name, seconds in (("short", "0.1"), ("long", "0.3"))
            },
            pairs=2,
            cache="empty",
        )
    )
    assert [list(pair) for pair in pairs] == [["short", "long"]] * 2
    assert all(0.1 <= x["short"] < x["long"] and x["long"] >= 0.3 for x in pairs)
    # No two processes run at the same time, and the longer one is continued several times.
    running, most = set(), 0
    for number, what in sent:
        (running.add if what == signal.SIGCONT else running.discard)(number)
        most = max(most, len(running))
        if what == signal.SIGCONT:
            running &= {number}
    assert most <= 2 and [what for _, what in sent].count(signal.SIGCONT) >= 8


@pytest.fixture
def waiting(turns, tmp_path, monkeypatch):
    """Return a command that waits and writes its process number, and the file of the number."""
    monkeypatch.setattr(turns, "TURN", 0.3)
    code = (
        "import os, time; open(os.environ['NUMBER'], 'w').write(str(os.getpid())); time.sleep(60)"
    )
    number = tmp_path / "number"
    return command(turns, code)._replace(variables={"NUMBER": str(number)}), number


def assert_ended(number: Path) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def test_failed_process_is_reported_at_once_and_the_other_one_ends(turns, waiting):
    fails = command(turns, "raise SystemExit('no such task')")
    begin = time.monotonic()
    with pytest.raises(UsageError, match="no such task"):
        list(turns.time_pairs(lambda folder: {"waits": waiting[0], "fails": fails}, 1, "empty"))
    assert time.monotonic() - begin < 30
    assert_ended(waiting[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_process_stays_after_a_signal(turns, waiting, monkeypatch, number):
    calls = []

    def interrupted(*_):
        calls.append(1)
        if waiting[1].exists():
            os.kill(os.getpid(), number)
        assert len(calls) < 1200
        return 0, 0, None

    # A shell starts a background job with SIGINT ignored.
    monkeypatch.setattr(turns, "TURN", 0.05)
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(turns.os, "wait4", interrupted)
        list(turns.time_pairs(lambda folder: {"waits": waiting[0]}, 1, "empty"))
    assert signal.getsignal(number) is before
    signal.signal(signal.SIGINT, ours)
    assert_ended(waiting[1])


def test_untimed_run_fills_the_caches(turns, monkeypatch):
    monkeypatch.setattr(turns, "TURN", 0.05)
    code = (
        "import os; from pathlib import Path\n"
        "cache = Path(os.environ['JAX_COMPILATION_CACHE_DIR'])\n"
        "cache.mkdir(exist_ok=True); (cache / str(len(list(cache.iterdir())))).touch()\n"
        "raise SystemExit(len(list(cache.iterdir())) > 3)"
    )
    sides = {"ours": command(turns, code)}
    assert len(list(turns.time_pairs(lambda folder: sides, 2, "filled"))) == 2
    assert len(list(turns.time_pairs(lambda folder: sides, 5, "empty"))) == 5
    with pytest.raises(UsageError):
        list(turns.time_pairs(lambda folder: sides, 3, "filled"))


def test_our_side_is_a_run_that_exists(monkeypatch, tmp_path):
    """The flags of the compared run are those of `experiments/run.py`."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    with loaded(SCRIPTS / "beside_sbx.py") as module:
        flags = module.flags.FLAGS
        flags(["beside_sbx.py", "--python=python", "--updates=20"])
        words = module.whole_runs.commands(tmp_path, "theirs_sbx.py")["ours"].words
        sys.modules.pop("whole_runs")
    with loaded(ROOT / "experiments/run.py") as run:
        known = run.flags.FLAGS
        known([*words[1:]])
        assert (known.env, known.algo, known.agent) == ("cheetah-run", "model-free", "sac")
        assert "learn.utd=20" in known.set


def test_folder_without_tables_leaves_the_figure_alone(beside, tmp_path):
    with pytest.raises(UsageError, match="contains no table"):
        beside.flags.FLAGS(["beside.py", f"--bench={tmp_path}", f"--out={tmp_path / 'a.png'}"])
        beside.main([])
    assert not (tmp_path / "a.png").exists()


def test_versions_are_those_of_the_other_environment(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import external_code

    assert external_code.versions(sys.executable, "pytest") == f"pytest {pytest.__version__}"
    with pytest.raises(UsageError, match="it needs nothing-like-it"):
        external_code.versions(sys.executable, "nothing-like-it")
    with pytest.raises(UsageError, match="cannot be started"):
        external_code.versions("/no/python", "pytest")
