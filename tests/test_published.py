"""Compare runs with published curves, and aggregate over tasks."""

import csv

import numpy as np
import pytest

from dynajax.report import aggregate, compare, figures, published, statistics
from dynajax.report.curves import gather
from dynajax.types import UsageError
from fake_runs import fake_run


def test_every_published_curve_has_a_source_and_a_method():
    curves = [
        c for task in _tasks() for c in published.curves_on(task, published.parse_methods("all"))
    ]
    assert {c.key for c in curves} == set(published.METHODS)
    for c in curves:
        assert c.source.count("/") >= 2 and min(c.seeds) > 1 and c.repeat in (1, 2)
        assert (np.diff(c.frames) > 0).all() and np.isfinite(c.mean).all()
    # Numbers that README and the notes quote from the files of results.
    [simba] = published.curves_on("quadruped-walk", ["simba"])
    assert simba.frames[:2].tolist() == [50_000, 100_000] and simba.mean[1] == 665.9
    [simba8] = published.curves_on("quadruped-walk", ["simba-utd8"])
    assert simba8.mean[simba8.frames == 100_000] == pytest.approx([869], abs=0.5)


def _tasks():
    lines = csv.DictReader((published.resources.files("dynajax.report") / "published.csv").open())
    return sorted({line["task"] for line in lines})


def test_parse_methods():
    assert published.parse_methods("") == ()
    assert published.parse_methods("SimBa, bro,bro") == ("simba", "bro")
    assert published.parse_methods("all") == tuple(published.METHODS)
    with pytest.raises(UsageError, match="no curves of simbaa; choose all, or from sac, simba"):
        published.parse_methods("bro,simbaa")
    with pytest.raises(UsageError, match="--published=all,simba: all includes the others"):
        published.parse_methods("all,simba")


def test_published_curves_end_with_the_run_but_have_a_point():
    assert [c.frames[-1] for c in published.curves_until("quadruped-walk", ["simba"], 40_000)] == [
        50_000
    ]
    both = published.curves_until("quadruped-walk", ["simba", "sac"], 40_000)
    assert [c.frames.tolist() for c in both] == [[50_000, 100_000], [100_000]]
    [long] = published.curves_until("quadruped-walk", ["simba"], 500_000)
    assert long.frames[-1] == 500_000 and len(long.seeds) == len(long.frames)
    assert published.curves_until("no-task", ["simba"], 1) == []


def test_labels_name_seeds_and_known_updates_and_widths():
    curves = published.curves_on("quadruped-walk", ["bro", "sac"]) + published.curves_on(
        "humanoid-run", ["bro"]
    )
    assert published.labels(curves) == {
        "bro": "BRO (UTD 10, repeat 1, 256/512 wide, 5 to 10 seeds)",
        "sac": "SAC (repeat 2, 3 seeds)",
    }


def test_runs_are_compared_with_published_curves_by_frames(tmp_path):
    """One run has two frames per step, the other one."""
    fake_run(tmp_path / "two", env="quadruped-walk", algo="model-free", agent="simba", repeat=2)
    fake_run(tmp_path / "one", env="quadruped-walk", algo="model-free")
    tasks = gather([tmp_path / "two", tmp_path / "one"])
    [panel], notes = compare.curve_panels(tasks, ["simba", "bro"])
    assert panel.xlabel == "frames"
    ends = {name: frames[-1] for name, (frames, _) in panel.lines.items()}
    assert ends == {"SimBa (model-free)": 20_000, "SAC (model-free)": 10_000}
    assert [c.key for c in panel.published] == ["simba", "bro"]
    assert "SimbaV2 results/baseline/simba_utd2.csv (SimBa)" in notes[-1]
    assert "BRO (UTD 10, repeat 1, 256/512 wide, 5 seeds)" in notes[-2]


def test_task_without_published_curves_has_a_note_and_its_figure(tmp_path):
    fake_run(tmp_path / "run", env="Pendulum-v1", steps=2000)
    table = compare.plot([tmp_path / "run"], tmp_path / "out", "simba,bro").table
    line = "Pendulum-v1: there are no published curves of SimBa or BRO."
    assert table.count(line) == 1
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out/aggregate.png").exists(), "one task"


def test_published_curves_are_drawn_behind_those_of_runs(tmp_path):
    fake_run(tmp_path / "run", env="quadruped-walk", steps=5000)
    panels, _ = compare.curve_panels(gather([tmp_path / "run"]), published.parse_methods("all"))
    figure = figures.curves(panels)
    [axes] = figure.axes
    by_label = {line.get_label(): line for line in axes.get_lines()}
    behind = {name: line for name, line in by_label.items() if name.startswith("_")}
    keys = [c.key for c in panels[0].published]
    assert len(keys) >= 9 and {f"_{key}" for key in keys} <= set(behind)
    front = by_label["MBPO + scale"].get_zorder()
    assert all(behind[f"_{key}"].get_zorder() < front for key in keys)
    # Four runs and two published curves have colours, and the names of these two are next to them.
    colours = [behind[f"_{key}"].get_color() for key in keys]
    assert colours[:2] != [figures._GREY] * 2 and set(colours[2:]) == {figures._GREY}
    assert [text.get_text() for text in axes.texts] == ["SAC", "SimBa"]
    [legend] = figure.legends
    assert legend.get_texts()[0].get_text() == "MBPO"
    assert "Grey: published means of BRO, TD-MPC2" in figure.get_supxlabel()
    assert not axes.collections, "no bands overlap"


def test_aggregate_over_tasks(tmp_path):
    for env, level in (("cheetah-run", 1.0), ("humanoid-walk", 0.5)):
        fake_run(tmp_path / f"{env}-m", env=env, level=level, variants=("none", "scale"))
        fake_run(tmp_path / f"{env}-s", env=env, level=level, algo="model-free")
    folders = sorted(tmp_path.iterdir())
    tasks = gather(folders)
    over_tasks, notes = aggregate.aggregate(tasks)
    assert not notes and [p.title for p in over_tasks.panels] == [
        "Over training",
        "Final return",
        "Improvement over model-free",
    ]
    scores = [curves["MBPO + scale"].at(10_000) / 1000 for curves in tasks.values()]
    expected = statistics.stratified_bootstrap(scores)
    _, end, better = over_tasks.panels
    assert end.values["MBPO + scale"] == expected
    assert list(better.values) == ["MBPO", "MBPO + scale"]
    pairs = [
        [curves[n].at(10_000) for curves in tasks.values()]
        for n in ("MBPO + scale", "SAC (model-free)")
    ]
    assert better.values["MBPO + scale"] == statistics.probability_of_improvement(*pairs)
    last = [r for r in over_tasks.rows if r["variant"] == "MBPO + scale"][-1]
    assert (last["frames"], last["iqm"]) == (10_000, f"{expected.point:.4f}")
    compare.plot(folders, tmp_path / "out")
    assert (tmp_path / "out/aggregate.png").read_bytes().startswith(b"\x89PNG")
    [first, *_] = csv.DictReader((tmp_path / "out/aggregate.csv").open())
    assert set(first) == {"variant", "tasks", "frames", "iqm", "low", "high"}


def test_tasks_without_a_common_unit_are_not_aggregated(tmp_path):
    for env in ("cheetah-run", "Hopper-v4"):
        fake_run(tmp_path / env, env=env)
    tasks = gather(sorted(tmp_path.iterdir()))
    over_tasks, [note] = aggregate.aggregate(tasks)
    assert over_tasks is None and "no common unit" in note
    fake_run(tmp_path / "a", env="cheetah-run", algo="model-free")
    fake_run(tmp_path / "b", env="Hopper-v4", algo="model-free", level=4.0)
    over_tasks, notes = aggregate.aggregate(gather(sorted(tmp_path.iterdir())))
    assert not notes and "model-free = 1" in over_tasks.panels[0].ylabel
    assert over_tasks.panels[1].values["SAC (model-free)"].point == pytest.approx(1.0, abs=0.01)


def test_table_has_probability_of_improvement_and_sample_efficiency(tmp_path):
    fake_run(tmp_path / "m", variants=("scale", "target"))
    fake_run(tmp_path / "s", algo="model-free")
    table = compare.plot([tmp_path / "m", tmp_path / "s"], tmp_path / "out").table
    rows = {r["variant"]: r for r in csv.DictReader((tmp_path / "out/table.csv").open())}
    assert rows["SAC (model-free)"]["probability_of_improvement"] == ""
    assert float(rows["MBPO + scale"]["probability_of_improvement"]) == 1.0
    assert float(rows["MBPO + scale"]["sample_efficiency"]) > 1
    assert rows["MBPO + target"]["sample_efficiency"] == "0.00"
    assert "Sample efficiency: frames" in table
    # A seed with a return that is not finite is left out of the sample efficiency.
    text = (tmp_path / "m/eval.csv").read_text().splitlines()
    text[1] = ",".join([*text[1].split(",")[:4], "nan", *text[1].split(",")[5:]])
    (tmp_path / "m/eval.csv").write_text("\n".join(text) + "\n")
    curve = gather([tmp_path / "m"])["cheetah-run"]["MBPO + scale"]
    assert curve.until(10_000)[1].shape == (2, 10)
