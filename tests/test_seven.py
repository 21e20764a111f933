"""`results/scripts/seven.py`: the claims of the study on seven tasks are decided as registered."""

import csv
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dynajax import UsageError
from dynajax.launch.study import load
from dynajax.report import statistics
from fake_runs import fake_run
from scripts import loaded

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "results/scripts/seven.py"
#: Factors of the returns of an arm without and with both fixes.
LEVELS = {"hopper-hop": 0.9, "quadruped-run": 1.1, "humanoid-walk": 0.01}


@pytest.fixture(scope="module")
def seven():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        with loaded(SCRIPT) as module:
            yield module


@pytest.fixture(scope="module")
def claims(seven):
    return sys.modules["seven_claims"]


@pytest.fixture(scope="module")
def figures(seven):
    return sys.modules["seven_figures"]


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
    assert one.log_return == pytest.approx(math.log(1 + one.returns.mean()))
    assert one.frames[-1] == 20_000
    assert set(one.mechanism) == {"critic_bias", "critic_bias_without_entropy"}
    assert {"r2_reward", "critic_bias"} <= set(next(x for x in found if x.arm == "FTFL").mechanism)


def test_tasks_at_the_floor_are_reported_and_not_counted(seven, claims, study):
    cells = seven.effects(seven.read(study), "MBPO", "FTFL")
    assert [c.task for c in cells if c.at_floor] == ["humanoid-walk"]
    counted = [c.estimate.point for c in cells if not c.at_floor]
    assert claims.pooled(cells).point == pytest.approx(np.mean(counted))
    assert "| humanoid-walk | at the floor |" in seven.claims_table(seven.read(study))


def test_fixes_that_fail_where_model_free_learns_are_seen_in_the_second_table(seven, study):
    found = []
    for x in seven.read(study):
        # Model-free learns on all three tasks; on one of them both arms of MBPO are at the floor.
        level = 1.0 if x.arm == "model-free" else 0.01 if x.task == "hopper-hop" else None
        returns = x.returns if level is None else level * (100 + x.returns / 10)
        found.append(x._replace(returns=returns))
    table = seven.claims_table(found)
    assert re.search(r"\| hopper-hop \| 0.02 \(.*\), below \| at the floor \|", table)
    assert "| C2 | 1.00 " not in table
    [registered] = [line for line in table.splitlines() if line.startswith("| C2: ")]
    [others] = [line for line in table.splitlines() if line.startswith("| C2 |")]
    ratio = [float(line.split("|")[2].split("(")[0]) for line in (registered, others)]
    assert ratio[0] > ratio[1]


def test_no_verdict_before_all_registered_learners_are_there(seven, claims, study):
    found = seven.read(study)
    assert "| incomplete: 17 of 50 registered learners, and 1 others |" in seven.claims_table(found)
    [claim] = [c for c in claims.claims(found) if c.name == "C2"]
    one = {name: next(x for x in found if x.arm == name) for name in ("MBPO", "FTFL")}
    full = [
        one[name]._replace(task=task, seed=seed)
        for name in one
        for task, seed in claims.registered(name)
    ]
    assert len(full) == 38 and claim.missing(full) == ""
    assert claim.missing(full[1:]) == "incomplete: 37 of 38 registered learners"
    other = [full[0]._replace(seed=5), *full[1:]]
    assert claim.missing(other) == "incomplete: 37 of 38 registered learners, and 1 others"


def test_registered_learners_are_those_of_the_study(claims):
    runs = load(ROOT / "launch/studies/seven.toml").runs
    names = {"model-free": "model-free", "mbpo": "MBPO", "ftfl": "FTFL"}
    for suffix, name in names.items():
        planned = {
            (r.config.env, r.config.seed) for r in runs if re.search(rf"-{suffix}(-long)?$", r.name)
        }
        assert planned == claims.registered(name)
    assert len(runs) == sum(len(claims.registered(name)) for name in names.values()) == 69


def test_registration_tells_how_many_runs_are_finished():
    folder = ROOT / "results/seven"
    found = re.search(r"(\d+) of 69 runs are finished", (folder / "README.md").read_text())
    # The sentence goes with the last run.
    assert found is None or int(found[1]) == len(list(folder.glob("*/config.json")))


def test_entropy_bonus_is_taken_from_the_value(seven):
    [metric] = [m for m in seven.MECHANISM if m.name == "critic_bias_without_entropy"]
    # Each step after the first adds 0.5 * 2 to the value: 0.9 + 0.81 + ... = 9.
    assert metric.value(0.9, 20.0, 10.0, 0.5, 2.0) == pytest.approx(1.0)


def test_mechanism_is_seen_where_fixes_learn_the_reward(seven, study):
    table = seven.claims_table(seven.read(study))
    [line] = [x for x in table.splitlines() if x.startswith("| quadruped-run | ") and "yes |" in x]
    _, task, ratio, mbpo, ftfl, without, *_, fails, seen, _ = map(str.strip, line.split("|"))
    assert (task, without, fails, seen) == ("quadruped-run", "0", "yes", "yes")
    assert float(mbpo) < 0.5 < float(ftfl) and ratio.endswith("below")


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
def test_claims_are_decided_as_registered(claims, name, low, high, verdict):
    [claim] = [c for c in claims.claims([]) if c.name == name]
    effect = statistics.ConfidenceInterval((low + high) / 2, low, high)
    assert claim.verdict(effect, []) == verdict


def test_last_claim_needs_three_tasks_of_their_own(seven, claims):
    interval = statistics.ConfidenceInterval(0.3, 0.1, 0.5)
    cells = [claims.Effect(task, interval, False, (5, 5)) for task in seven.TASKS[:3]]
    claim = claims.claims([])[-1]
    assert claim.verdict(interval, cells) == "holds"
    assert claim.verdict(interval, cells[:2]) == "not decided"


def test_dynajax_is_compared_with_model_free_runs_that_sample_as_it_does(seven, claims, study):
    found = seven.read(study)
    base = [x for x in found if x.arm == "model-free"]
    held = [x._replace(arm="dynajax", other_sampling=True) for x in base]
    for dynajax, other in ((held, True), ([x._replace(other_sampling=False) for x in held], False)):
        last = claims.claims([*found, *dynajax])[-1]
        assert last.base == ("model-free, as dynajax" if other else "model-free")
    # Without model-free runs of the same setting there is no verdict.
    assert "C4" not in seven.claims_table([*found, *held])
    alike = [x._replace(arm="model-free, as dynajax", other_sampling=True) for x in base]
    table = seven.claims_table([*found, *held, *alike])
    assert "| dynajax / model-free, as dynajax |" in table
    assert re.search(r"\| C4: dynajax .* \| 1.00 \(.*incomplete: 18 of 62", table)
    assert claims.final([*found, *held, *alike])["dynajax"].improvement.point == 0.5


def test_model_free_runs_with_held_noise_are_an_arm_of_their_own(seven, tmp_path):
    fake_run(tmp_path / "a", env="hopper-hop", algo="model-free")
    settings = {"hold_noise": 16}
    fake_run(tmp_path / "b", env="hopper-hop", algo="model-free", settings=settings)
    assert {x.arm for x in seven.read(tmp_path)} == {"model-free", "model-free, as dynajax"}


def test_values_between_two_evaluations_are_one_point_of_a_figure(seven, figures):
    curve = figures.Curve(np.array([500, 1500, 2000, 3500]), np.array([1.0, 2.0, 4.0, 9.0]))
    medians = figures._medians(curve, np.array([1000, 2000, 3000]))
    np.testing.assert_array_equal(medians, [1.0, 3.0, np.nan])


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
    assert "| hopper-hop | model-free |  |  |  | -" in claims
    index = list(csv.DictReader((study / "index.csv").open()))
    assert {line["claims"] for line in index} == {"C1 C3 C4", "C1 C2", "C2 C3"}


def test_error_of_a_figure_leaves_all_files_as_they_were(seven, tmp_path, monkeypatch):
    for name in ("none", "scale,target"):
        fake_run(tmp_path / name, env="hopper-hop", variants=(name,))
    (tmp_path / "table.csv").write_text("old")

    def fail(found, metric):
        raise OSError("no font")

    monkeypatch.setattr(seven, "draw_mechanism", fail)
    with pytest.raises(OSError, match="no font"):
        seven.main([str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"none", "scale,target", "table.csv"}
    assert (tmp_path / "table.csv").read_text() == "old"


def test_figure_has_the_tasks_and_the_iqm_over_them(seven, claims, figures, study):
    found = seven.read(study)
    *tasks, all_tasks, improvement = seven.draw(found).axes
    assert [axes.get_title(loc="left") for axes in tasks] == list(LEVELS)
    assert all_tasks.get_title(loc="left") == "3 tasks"
    last = {line.get_label(): line.get_ydata()[-1] for line in all_tasks.get_lines()}
    assert last == {
        figures.LABELS[name]: score.iqm.point for name, score in claims.final(found).items()
    }
    assert improvement.get_title(loc="left").startswith("Improvement")
    labels = [text.get_text().replace("\n", " ") for text in improvement.get_yticklabels()]
    assert labels == ["MBPO", "MBPO + scale, target (FTFL)"]
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


def test_an_arm_has_one_configuration(seven, tmp_path):
    fake_run(tmp_path / "a", env="hopper-hop", variants=("none",))
    fake_run(tmp_path / "b", env="hopper-stand", variants=("none",), trust="m2ac")
    with pytest.raises(UsageError, match="b: trust_name is m2ac, but none in a"):
        seven.read(tmp_path)
    fake_run(tmp_path / "b2", env="hopper-stand", variants=("none",), settings={"batch": 8})
    (tmp_path / "b/config.json").unlink()
    with pytest.raises(UsageError, match="b2: learn is not as in a"):
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
    with pytest.raises(UsageError, match="its mean return is negative or missing"):
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
