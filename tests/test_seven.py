"""`results/scripts/seven.py`: the claims of the study on seven tasks are decided as registered."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from dynajax import UsageError
from fake_runs import fake_run
from scripts import loaded

SCRIPT = Path(__file__).resolve().parents[1] / "results/scripts/seven.py"
#: Factors of the returns of an arm without and with both fixes.
LEVELS = {"hopper-hop": 0.9, "quadruped-run": 1.1, "humanoid-walk": 0.01}


@pytest.fixture(scope="module")
def seven():
    with loaded(SCRIPT) as module:
        yield module


@pytest.fixture(scope="module")
def study(seven, tmp_path_factory):
    """Return a folder with runs of three arms on three tasks; on one of them nothing is learned."""
    folder = tmp_path_factory.mktemp("seven")
    for task, level in LEVELS.items():
        for seed in (1000, 1001, 1002):
            sizes = {"env": task, "seed": seed, "seeds": 1, "repeat": 2, "agent": "simba"}
            fake_run(folder / f"{task}-free-{seed}", algo="model-free", level=level, **sizes)
            for name in ("none", "scale,target"):
                out = folder / f"{task}-{name}-{seed}"
                fake_run(out, variants=(name,), level=level, **sizes)
    return folder


def test_statistic_is_the_logarithm_of_the_mean_return(seven, study):
    found = seven.read(study)
    assert len(found) == 27 and {x.arm for x in found} == {"model-free", "MBPO", "FTFL"}
    one = found[0]
    assert one.area == pytest.approx(math.log(1 + one.returns.mean()))
    assert one.frames[-1] == 20_000
    assert set(one.mechanism) == {"critic_bias"}
    assert {"r2_reward", "critic_bias"} <= set(next(x for x in found if x.arm == "FTFL").mechanism)


def test_tasks_at_the_floor_are_reported_and_not_counted(seven, study):
    cells = seven.effects(seven.read(study), "MBPO", "FTFL")
    assert [c.task for c in cells if c.at_floor] == ["humanoid-walk"]
    counted = [c.estimate.point for c in cells if not c.at_floor]
    assert seven.pooled(cells).point == pytest.approx(np.mean(counted))
    assert "| humanoid-walk | at the floor |" in seven.claims_table(seven.read(study))


@pytest.mark.parametrize(
    ("name", "low", "high", "verdict"),
    [
        ("C1", -0.5, -0.1, "holds"),
        ("C1", 0.1, 0.5, "refuted"),
        ("C1", -0.1, 0.1, "not decided"),
        ("C2", 0.1, 0.5, "holds"),
        ("C2", -0.5, -0.1, "refuted"),
        ("C3", -0.2, 0.4, "holds"),
        ("C3", -0.6, -0.3, "refuted"),
        ("C3", -0.3, 0.3, "not decided"),
        ("C4", 0.1, 0.5, "not decided"),  # no task by its own interval
        ("C4", -0.5, -0.1, "refuted"),
        ("C2", math.nan, math.nan, "not decided: fewer than two tasks"),
    ],
)
def test_claims_are_decided_as_registered(seven, name, low, high, verdict):
    [claim] = [c for c in seven.CLAIMS if c.name == name]
    effect = seven.statistics.ConfidenceInterval((low + high) / 2, low, high)
    assert claim.verdict(effect, []) == verdict


def test_last_claim_needs_three_tasks_of_their_own(seven):
    interval = seven.statistics.ConfidenceInterval(0.3, 0.1, 0.5)
    cells = [seven.Effect(task, interval, False, (5, 5)) for task in seven.TASKS[:3]]
    claim = seven.CLAIMS[-1]
    assert claim.verdict(interval, cells) == "holds"
    assert claim.verdict(interval, cells[:2]) == "not decided"


def test_tables_and_figure_are_written_beside_the_runs(seven, study, capsys):
    assert seven.main([str(study)]) == 0
    assert "C2: FTFL" in capsys.readouterr().out
    table = list(csv.DictReader((study / "learners.csv").open()))
    assert len(table) == 27
    for name in ("seven.png", "r2_reward.png", "critic_bias.png"):
        assert (study / name).read_bytes().startswith(b"\x89PNG")
    # Without a model there is a critic, but neither R² nor synthetic data.
    by_arm = {line["arm"]: line for line in table}
    assert by_arm["model-free"]["r2_reward"] == by_arm["model-free"]["r2_state"] == "nan"
    assert float(by_arm["FTFL"]["r2_reward"]) > 0.5 > float(by_arm["MBPO"]["r2_reward"])
    claims = (study / "claims.md").read_text()
    assert "| hopper-hop | model-free |  |  | -" in claims
    index = list(csv.DictReader((study / "index.csv").open()))
    assert {line["claims"] for line in index} == {"C1 C3 C4", "C1 C2", "C2 C3"}


def test_figure_has_the_tasks_and_the_iqm_over_them(seven, study):
    found = seven.read(study)
    *tasks, all_tasks = seven.draw(found).axes
    assert [axes.get_title(loc="left") for axes in tasks] == list(LEVELS)
    assert all_tasks.get_title(loc="left") == "3 tasks"
    last = {line.get_label(): line.get_ydata()[-1] for line in all_tasks.get_lines()}
    assert last == {
        seven.LABELS[name]: score.iqm.point for name, score in seven.final(found).items()
    }
    returns = [x.returns[-1] / 1000 for x in found if x.arm == "FTFL"]
    assert last["MBPO + scale, target (FTFL)"] == pytest.approx(np.mean(sorted(returns)[2:-2]))


def test_run_that_is_no_arm_is_refused(seven, tmp_path):
    fake_run(tmp_path / "a", env="hopper-hop", variants=("scale",))
    with pytest.raises(UsageError, match="scale is not an arm of the study"):
        seven.read(tmp_path)
    with pytest.raises(UsageError, match="contains no run directory"):
        seven.read(tmp_path / "nothing")


def test_runs_of_different_studies_are_not_mixed(seven, tmp_path):
    fake_run(tmp_path / "a", env="hopper-hop", algo="model-free")
    fake_run(tmp_path / "b", env="hopper-hop", algo="model-free", agent="simba")
    with pytest.raises(UsageError, match="b: agent_name is simba, but sac in a"):
        seven.read(tmp_path)


def test_same_learner_is_not_counted_twice(seven, tmp_path):
    for name in "ab":
        fake_run(tmp_path / name, env="hopper-hop", algo="model-free")
    with pytest.raises(UsageError, match="a and b are the same arm, task and seed"):
        seven.read(tmp_path)


def test_unfinished_runs_are_refused(seven, tmp_path):
    fake_run(tmp_path / "a", env="hopper-hop", algo="model-free", seeds=1)
    path = tmp_path / "a" / "eval.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UsageError, match=r"a: it has 9,000 of 10,000 agent steps; collect\.py"):
        seven.read(tmp_path)


def test_other_tasks_are_refused_before_anything_is_written(seven, tmp_path):
    fake_run(tmp_path / "a", env="cheetah-run", algo="model-free")
    with pytest.raises(UsageError, match="cheetah-run is not a task of the study"):
        seven.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_negative_returns_are_refused(seven, tmp_path):
    fake_run(tmp_path / "a", env="hopper-hop", algo="model-free", level=-1.0)
    with pytest.raises(UsageError, match="its mean return is negative"):
        seven.read(tmp_path)


def test_two_arms_of_one_task_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for algo, level in (("model-free", 1.0), ("mbpo", 2.0)):
        fake_run(tmp_path / algo, algo=algo, level=level, variants=("none",), seeds=3)
    with loaded(SCRIPT.parent / "pair.py") as pair:
        assert pair.main([str(tmp_path), "model-free", "MBPO"]) == 0
        assert "MBPO / model-free: " in capsys.readouterr().out
        with pytest.raises(UsageError, match="no run of the arm dynajax"):
            pair.main([str(tmp_path), "model-free", "dynajax"])
        fake_run(tmp_path / "other", env="walker-run", variants=("none",))
        with pytest.raises(UsageError, match="several tasks: cheetah-run, walker-run"):
            pair.main([str(tmp_path), "model-free", "MBPO"])
