"""The scripts that compare dynajax with other packages, and the page that reports them."""

import csv
import os
import signal
import sys
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


def test_ratio_is_the_median_over_pairs(beside, tmp_path):
    folder = tmp_path / "beside-sbx"
    folder.mkdir()
    rows = [
        {"package": "sbx-rl", "steps": 4000, "updates": 20, "cache": "empty"}
        | {"seconds_theirs": theirs, "seconds_ours": 10}
        for theirs in (10, 20, 90)
    ]
    with (folder / "empty_20.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    [found] = beside.comparisons(tmp_path)
    assert found.work == "run of 4,000 steps with 20 updates each, empty cache"
    assert (*found.ratio, found.measurements) == (2.0, 1.5, 5.5, 3)


def test_processes_take_turns_and_cpu_seconds_are_counted(turns, monkeypatch):
    """A process that computes for longer needs more seconds, and both see an empty cache."""
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "cache = Path(os.environ['JAX_COMPILATION_CACHE_DIR']); cache.mkdir()\n"
        "assert os.environ['OF_PAIR'] == 'yes' and not list(Path(sys.argv[1]).iterdir())\n"
        "while time.process_time() < float(sys.argv[2]): pass"
    )
    monkeypatch.setattr(turns, "TURN", 0.05)
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


def test_failed_process_is_reported_and_the_other_one_ends(turns, tmp_path, monkeypatch):
    wait = (
        "import os, time; open(os.environ['NUMBER'], 'w').write(str(os.getpid())); time.sleep(60)"
    )
    number = tmp_path / "number"
    sides = {
        "waits": command(turns, wait)._replace(variables={"NUMBER": str(number)}),
        "fails": command(turns, "raise SystemExit('no such task')"),
    }

    def interrupted(*_):
        if number.exists():
            raise KeyboardInterrupt
        return 0, 0, None

    monkeypatch.setattr(turns, "TURN", 0.2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(turns.os, "wait4", interrupted)
        list(turns.time_pairs(lambda folder: sides, pairs=1, cache="empty"))
    _, status = os.waitpid(int(number.read_text()), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    sides["waits"] = sides["fails"]
    with pytest.raises(UsageError, match="no such task"):
        list(turns.time_pairs(lambda folder: sides, pairs=1, cache="empty"))


def test_versions_are_those_of_the_other_environment(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import external_code

    assert external_code.versions(sys.executable, "pytest") == f"pytest {pytest.__version__}"
    with pytest.raises(UsageError, match="it needs nothing-like-it"):
        external_code.versions(sys.executable, "nothing-like-it")
    with pytest.raises(UsageError, match="cannot be started"):
        external_code.versions("/no/python", "pytest")
