"""Decide which runs are seeds of one method, and join their curves by frames."""

import copy
import csv
import json

import numpy as np
import pytest

from dynajax import make_config, report
from dynajax.config import as_dict
from dynajax.report import aggregate, compare, figures, method_table
from dynajax.report.curves import gather, interpolate
from dynajax.report.methods import NOT_METHOD, method_changes
from dynajax.types import UsageError
from fake_runs import fake_run


def change_config(folder, **values):
    """Set fields of a run's configuration, such as host={"time_limit": 500}."""
    path = folder / "config.json"
    info = json.loads(path.read_text())
    for name, value in values.items():
        old = info["config"].get(name)
        info["config"][name] = {**old, **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(info))
    return folder


def set_returns(folder, function):
    """Replace every return of a run by a function of its frames."""
    lines = list(csv.DictReader((folder / "eval.csv").open()))
    for line in lines:
        line["return_mean"] = function(int(line["frames"]))
    with open(folder / "eval.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return folder


def test_every_setting_counts_as_method_unless_it_is_listed():
    old = as_dict(make_config("cheetah-run", algo="m2ac"))
    paths = [
        f"{group}.{name}" if name else group
        for group, value in old.items()
        for name in (value if isinstance(value, dict) else [""])
    ]
    assert set(NOT_METHOD) <= set(paths) and len(paths) > 60
    for path in [*paths, "model.added_later"]:
        new = copy.deepcopy(old)
        group, _, name = path.partition(".")
        if name:
            new[group][name] = "changed"
        else:
            new[group] = "changed"
        assert bool(method_changes(old, new)) == (path not in NOT_METHOD), path


def test_settings_of_a_model_do_not_count_without_a_model():
    old = as_dict(make_config("cheetah-run", algo="model-free"))
    new = as_dict(make_config("cheetah-run", algo="model-free", settings={"learn.utd": 3}))
    new["model"]["width"] = 7
    assert method_changes(old, new) == ["learn.utd=3"]


@pytest.mark.parametrize(
    ("changed", "suffix"),
    [
        ({"host": {"time_limit": 500}}, "host.time_limit=500"),
        ({"host": {"workers": 3}}, ""),
        ({"eval": {"episodes": 9}}, ""),
        ({"precision": "bfloat16"}, "precision=bfloat16"),
    ],
)
def test_runs_of_different_methods_are_not_joined(tmp_path, changed, suffix):
    fake_run(tmp_path / "a", variants=("scale",), seeds=2)
    change_config(fake_run(tmp_path / "b", variants=("scale",), seeds=2, seed=2), **changed)
    curves = gather([tmp_path / "a", tmp_path / "b"])["cheetah-run"]
    names = ["MBPO + scale", *([f"MBPO + scale ({suffix})"] if suffix else [])]
    assert list(curves) == names
    assert [len(c.returns) for c in curves.values()] == ([2, 2] if suffix else [4])


def test_methods_with_other_settings_on_another_task_are_not_aggregated(tmp_path):
    for name, env, arguments in (
        ("a", "cheetah-run", {}),
        ("b", "walker-run", {"settings": {"utd": 1}}),
        ("c", "cheetah-run", {"algo": "model-free"}),
        ("d", "walker-run", {"algo": "model-free"}),
        ("e", "cheetah-run", {"variants": ("target",), "seed": 5}),
        ("f", "walker-run", {"variants": ("target",), "seed": 5, "repeat": 2}),
    ):
        fake_run(tmp_path / name, env=env, **{"variants": ("scale",), **arguments})
    over_tasks, notes = aggregate.aggregate(gather([tmp_path / name for name in "abcdef"]))
    assert notes == [
        "MBPO + scale is left out of the figure over tasks: learn.utd=1 on some tasks."
    ]
    # A task has a repeat of its own.
    assert list(over_tasks.panels[1].values) == ["SAC (model-free)", "MBPO + target"]
    over_tasks, [_, note] = aggregate.aggregate(gather([tmp_path / name for name in "abc"]))
    assert over_tasks is None and note.startswith("No two methods have run on all tasks")


def test_interpolation_keeps_evaluations_and_the_range_of_a_seed():
    frames = np.array([10, 20, 40])
    values = np.array([[1.0, 3.0, 7.0], [2.0, np.nan, 4.0]])
    got = interpolate(frames, values, np.array([5, 10, 15, 20, 30, 40, 41]))
    np.testing.assert_array_equal(got[0], [np.nan, 1, 2, 3, 5, 7, np.nan])
    np.testing.assert_array_equal(got[1], [np.nan, 2, np.nan, np.nan, np.nan, 4, np.nan])


def test_repeats_are_compared_at_frames_between_their_evaluations(tmp_path):
    """Compare runs of two and three frames per step, whose returns are their frames."""
    for repeat in (2, 3):
        folder = fake_run(tmp_path / f"{repeat}", variants=("scale",), repeat=repeat, steps=10_000)
        set_returns(folder, lambda frames: frames / 100)
    comparison = compare.plot([tmp_path / "2", tmp_path / "3"], tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/table.csv").open()))
    assert [row["frames"] for row in rows] == ["20000", "20000"]
    assert [float(row["final_iqm"]) for row in rows] == [200, 200]
    assert "returns between two evaluations are interpolated" in comparison.table


def test_small_returns_keep_their_digits(tmp_path):
    fake_run(tmp_path / "a", variants=("scale",), level=0.0001)
    comparison = compare.plot([tmp_path / "a"], tmp_path / "out")
    [row] = csv.DictReader((tmp_path / "out/table.csv").open())
    run = report.read_run(tmp_path / "a")
    assert float(row["final_iqm"]) == pytest.approx(run.evals["scale"][:, -1].mean(), rel=1e-5)
    for name in ("low", "high"):
        assert len(row[name].strip("0.")) > 3
    cells = [cell.strip() for cell in comparison.table.splitlines()[2].split("|")]
    assert cells[7] == f"{float(row['final_iqm']):.2f}"
    assert cells[8] == f"{float(row['low']):.2f} to {float(row['high']):.2f}"


def test_seeds_without_a_whole_curve_are_named(tmp_path):
    """Remove an early return of one seed, which its final return does not need."""
    for name, options in (("a", {"algo": "model-free"}), ("b", {"variants": ("scale",)})):
        fake_run(tmp_path / name, seeds=3, **options)
    path = tmp_path / "b" / "eval.csv"
    assert "leaves out" not in compare.plot([tmp_path / n for n in "ab"], tmp_path / "out").table
    lines = path.read_text().splitlines()
    cells = lines[5].split(",")
    cells[lines[0].split(",").index("return_mean")] = "nan"
    path.write_text("\n".join([*lines[:5], ",".join(cells), *lines[6:]]) + "\n")
    comparison = compare.plot([tmp_path / n for n in "ab"], tmp_path / "out")
    assert [r["seeds"] for r in csv.DictReader((tmp_path / "out/table.csv").open())] == ["3", "3"]
    note = "sample efficiency leaves out 1 of 3 seeds of MBPO + scale, because"
    assert f"cheetah-run: {note}" in comparison.table
    assert "seeds of SAC" not in comparison.table


def test_seeds_with_other_cadences_are_joined_on_all_frames(tmp_path):
    fake_run(tmp_path / "a", variants=("scale",), every=1000, seeds=1, steps=6000)
    fake_run(tmp_path / "b", variants=("scale",), every=1500, seeds=1, seed=1, steps=6000)
    for name in "ab":
        set_returns(tmp_path / name, float)
    [curve] = gather([tmp_path / "a", tmp_path / "b"])["cheetah-run"].values()
    assert curve.frames.tolist() == [1500, 2000, 3000, 4000, 4500, 5000, 6000]
    np.testing.assert_array_equal(curve.returns, [curve.frames] * 2)


def test_seed_that_has_just_begun_does_not_cut_the_others(tmp_path):
    fake_run(tmp_path / "a", variants=("scale",), seeds=2)
    fake_run(tmp_path / "b", variants=("scale",), seeds=1, seed=2, steps=2000)
    comparison = compare.plot([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    [note] = comparison.notes
    assert "MBPO + scale: seed 2 covers only 2,000 of 10,000 frames and is left out" in note
    assert note in comparison.table
    tasks = gather([tmp_path / "a", tmp_path / "b"])
    [curve] = tasks["cheetah-run"].values()
    assert curve.frames[-1] == 10_000 and curve.returns.shape == (2, 10) and curve.seeds == (0, 1)
    [(frames, values)] = curve.single
    assert frames.tolist() == [1000, 2000] and values.shape == (1, 2)
    [axes] = figures.curves(compare.curve_panels(tasks, ())[0]).axes
    thin = [line for line in axes.get_lines() if line.get_linewidth() < 1]
    assert sorted(len(line.get_xdata()) for line in thin) == [2, 10, 10]


def test_mean_ends_where_a_long_seed_ends(tmp_path):
    fake_run(tmp_path / "a", variants=("scale",), seeds=2)
    fake_run(tmp_path / "b", variants=("scale",), seeds=1, seed=2, steps=8000)
    [curve] = gather([tmp_path / "a", tmp_path / "b"])["cheetah-run"].values()
    assert curve.frames[-1] == 8000 and len(curve.returns) == 3
    [(frames, values)] = curve.single
    assert frames.tolist() == [8000, 9000, 10_000] and values.shape == (2, 3)
    assert curve.notes == (
        "cheetah-run: MBPO + scale: the mean ends at 8,000 of 10,000 frames, where seed 2 ends.",
    )


def test_runs_without_common_frames_are_refused_in_one_line(tmp_path):
    fake_run(tmp_path / "a", variants=("scale",), steps=2000)
    fake_run(tmp_path / "b", algo="model-free", every=5000)
    curves = gather([tmp_path / "a", tmp_path / "b"])["cheetah-run"]
    with pytest.raises(
        UsageError, match=r"MBPO \+ scale ends at 2,000 agent steps, before .* 5,000"
    ):
        method_table.common_frames("cheetah-run", curves)


def test_label_is_that_of_the_closest_algorithm(tmp_path):
    def label(name, variant, **changed):
        folder = change_config(
            fake_run(tmp_path / name, variants=(variant,), steps=1000), **changed
        )
        return report.label(report.read_run(folder), variant)

    on_the_fly = {"source": "on_the_fly", "mixing": "mixed", "horizon": [1]}
    model = {"reward_from": "next_state"}
    rollout = {**on_the_fly, "real_fraction": 0.5}
    assert label("a", "scale,auto,beta", rollout=rollout, model=model) == "dynajax"
    assert label("b", "scale", rollout=rollout, model=model) == "dynajax + scale"
    assert label("c", "none", rollout=rollout, model=model) == "dynajax + no fix"
    tenth = {**on_the_fly, "real_fraction": 0.9}
    assert (
        label("d", "scale,auto,beta", rollout=tenth, model=model) == "dynajax (real_fraction=0.9)"
    )
    buffered = {"source": "buffered", "mixing": "mixed", "real_fraction": 0.05, "horizon": [1]}
    inputs = {"reward_from": "inputs"}
    assert label("e", "none", rollout=buffered, model=inputs) == "MBPO"
    assert label("f", "scale,target", rollout=buffered, model=inputs) == "MBPO + scale, target"
    rule = label("g", "scale", rollout=buffered, model=inputs, trust_name="m2ac")
    assert rule == "MBPO + scale + trust m2ac"
    oracle = label("h", "none;model.learning_rate=0.1", rollout=buffered, oracle="both")
    assert oracle == "MBPO + oracle both (model.learning_rate=0.1)"
