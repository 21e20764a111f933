"""Published curves, and figures over tasks, beside our own runs."""

import csv

import numpy as np
import pytest

from dynajax.report import aggregate, compare, figures, published, statistics
from dynajax.report.curves import gather
from dynajax.types import UsageError
from fake_runs import fake_run


def test_every_published_curve_has_a_source_and_a_method():
    curves = [c for task in _tasks() for c in published.of(task, published.choose("all"))]
    assert {c.key for c in curves} == set(published.METHODS)
    for c in curves:
        assert c.source.count("/") >= 2 and min(c.seeds) > 1 and c.repeat in (1, 2)
        assert (np.diff(c.frames) > 0).all() and np.isfinite(c.mean).all()
    # Numbers of the results' files, as README and the notes name them.
    [simba] = published.of("quadruped-walk", ["simba"])
    assert simba.frames[:2].tolist() == [50_000, 100_000] and simba.mean[1] == 665.9
    [dhmbpo] = published.of("hopper-stand", ["dhmbpo"])
    assert np.isnan(dhmbpo.std[:2]).all(), "nothing is made up where no deviation was published"


def _tasks():
    lines = csv.DictReader((published.resources.files("dynajax.report") / "published.csv").open())
    return sorted({line["task"] for line in lines})


def test_names_of_published_methods():
    assert published.choose("") == ()
    assert published.choose("SimBa, bro,bro") == ("simba", "bro")
    assert published.choose("all") == tuple(published.METHODS)
    with pytest.raises(UsageError, match="no curves of simbaa; choose all, or from sac, simba"):
        published.choose("bro,simbaa")


def test_published_curves_end_where_ours_do_but_have_a_point():
    assert [c.frames[-1] for c in published.beside("quadruped-walk", ["simba"], 40_000)] == [50_000]
    both = published.beside("quadruped-walk", ["simba", "sac"], 40_000)
    assert [c.frames.tolist() for c in both] == [[50_000, 100_000], [100_000]]
    [long] = published.beside("quadruped-walk", ["simba"], 500_000)
    assert long.frames[-1] == 500_000 and len(long.seeds) == len(long.frames)
    assert published.beside("no-task", ["simba"], 1) == []


def test_labels_name_seeds_updates_and_widths_where_they_are_known():
    curves = published.of("quadruped-walk", ["bro", "sac"]) + published.of("humanoid-run", ["bro"])
    assert published.labels(curves) == {
        "bro": "BRO (UTD 10, repeat 1, 256/512 wide, 5 to 10 seeds)",
        "sac": "SAC (repeat 2, 3 seeds)",
    }


def test_old_runs_count_one_frame_a_step_beside_published_ones(tmp_path):
    """Runs of two frames a step, and of an older version, which knew of none."""
    fake_run(tmp_path / "new", env="quadruped-walk", algo="model-free", agent="simba", repeat=2)
    fake_run(tmp_path / "old", env="quadruped-walk", algo="model-free", old=True)
    tasks = gather([tmp_path / "new", tmp_path / "old"])
    [panel], notes = compare.curve_panels(tasks, ["simba", "bro"])
    assert panel.xlabel == "frames"
    ends = {name: frames[-1] for name, (frames, _) in panel.lines.items()}
    assert ends == {"simba": 20_000, "SAC": 10_000}
    assert [c.key for c in panel.published] == ["simba", "bro"]
    assert "SimbaV2 results/baseline/simba_utd2.csv (SimBa)" in notes[-1]


def test_a_task_without_published_curves_gives_a_line_and_its_figure(tmp_path):
    fake_run(tmp_path / "run", env="Pendulum-v1", steps=2000)
    table = compare.plot([tmp_path / "run"], tmp_path / "out", "simba,bro")
    line = "Pendulum-v1: nothing of SimBa and BRO is published here for it."
    assert table.count(line) == 1
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out/aggregate.png").exists(), "one task"


def test_published_curves_are_drawn_behind_ours(tmp_path):
    fake_run(tmp_path / "run", env="quadruped-walk", steps=5000)
    panels, _ = compare.curve_panels(gather([tmp_path / "run"]), published.choose("all"))
    figure = figures.curves(panels)
    [axes] = figure.axes
    by_label = {line.get_label(): line for line in axes.get_lines()}
    behind = [line for name, line in by_label.items() if "(" in name]
    assert max(line.get_zorder() for line in behind) < by_label["MBPO scale"].get_zorder()
    assert len(behind) == len(panels[0].published) >= 9
    looks = {(line.get_color(), line.get_marker()) for line in behind}
    assert len(looks) == len(behind), "each can be told apart"
    [legend] = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[0] == "MBPO" and "MR.Q (UTD 1, repeat 2, 512 wide, 10 seeds)" in texts


def test_a_figure_over_tasks(tmp_path):
    for env, level in (("cheetah-run", 1.0), ("humanoid-walk", 0.5)):
        fake_run(tmp_path / f"{env}-m", env=env, level=level, variants=("none", "scale"))
        fake_run(tmp_path / f"{env}-s", env=env, level=level, algo="model-free")
    folders = sorted(tmp_path.iterdir())
    tasks = gather(folders)
    together, notes = aggregate.aggregate(tasks)
    assert not notes and [p.title for p in together.panels] == [
        "Along training",
        "At the end",
        "Better than without a model",
    ]
    scores = [curves["MBPO scale"].at(10_000) / 1000 for curves in tasks.values()]
    wanted = statistics.stratified_bootstrap(scores)
    _, end, better = together.panels
    assert end.values["MBPO scale"] == wanted
    assert list(better.values) == ["MBPO", "MBPO scale"]
    pairs = [[curves[n].at(10_000) for curves in tasks.values()] for n in ("MBPO scale", "SAC")]
    assert better.values["MBPO scale"] == statistics.probability_of_improvement(*pairs)
    last = [r for r in together.rows if r["variant"] == "MBPO scale"][-1]
    assert (last["frames"], last["iqm"]) == (10_000, f"{wanted.point:.4f}")
    compare.plot(folders, tmp_path / "out")
    assert (tmp_path / "out/aggregate.png").read_bytes().startswith(b"\x89PNG")
    [first, *_] = csv.DictReader((tmp_path / "out/aggregate.csv").open())
    assert set(first) == {"variant", "tasks", "frames", "iqm", "low", "high"}


def test_tasks_without_a_common_unit_have_no_figure_together(tmp_path):
    for env in ("cheetah-run", "Hopper-v4"):
        fake_run(tmp_path / env, env=env)
    tasks = gather(sorted(tmp_path.iterdir()))
    together, [note] = aggregate.aggregate(tasks)
    assert together is None and "no common unit" in note
    fake_run(tmp_path / "a", env="cheetah-run", algo="model-free")
    fake_run(tmp_path / "b", env="Hopper-v4", algo="model-free", level=4.0)
    together, notes = aggregate.aggregate(gather(sorted(tmp_path.iterdir())))
    assert not notes and "without a model = 1" in together.panels[0].ylabel
    assert together.panels[1].values["SAC"].point == pytest.approx(1.0, abs=0.01)


def test_the_table_has_improvement_and_sample_efficiency(tmp_path):
    fake_run(tmp_path / "m", variants=("scale", "target"))
    fake_run(tmp_path / "s", algo="model-free")
    table = compare.plot([tmp_path / "m", tmp_path / "s"], tmp_path / "out")
    rows = {r["variant"]: r for r in csv.DictReader((tmp_path / "out/table.csv").open())}
    assert rows["SAC"]["improves"] == "" and float(rows["MBPO scale"]["improves"]) == 1.0
    assert float(rows["MBPO scale"]["efficiency"]) > 1
    assert rows["MBPO target"]["efficiency"] == "0.00"
    assert "Sample efficiency: frames" in table
    # A seed that was not finite once takes no part in the curves of the ratio.
    text = (tmp_path / "m/eval.csv").read_text().splitlines()
    text[1] = ",".join([*text[1].split(",")[:4], "nan", *text[1].split(",")[5:]])
    (tmp_path / "m/eval.csv").write_text("\n".join(text) + "\n")
    curve = gather([tmp_path / "m"])["cheetah-run"]["MBPO scale"]
    assert curve.until(10_000)[1].shape == (2, 10)
