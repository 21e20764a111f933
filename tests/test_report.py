"""Reading a run back, telling it, and comparing runs."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynajax import config, report
from dynajax.report import figures, statistics
from dynajax.types import UsageError

ROOT = Path(__file__).parents[1]
VARIANTS = ("none", "scale", "target", "scale,target")
_LEVEL = {"none": 120.0, "scale": 560.0, "target": 170.0, "scale,target": 700.0, "SAC": 300.0}


def fake_run(
    folder: Path,
    *,
    env: str = "cheetah-run",
    algo: str = "mbpo",
    preset: str = "quick",
    variants: tuple[str, ...] = VARIANTS,
    seeds: int = 3,
    seed: int = 0,
    steps: int = 10_000,
    every: int = 1_000,
    level: float = 1.0,
    settings: dict[str, float] | None = None,
    agent: str = "sac",
    trust: str = "none",
    repeat: int = 1,
    old: bool = False,
) -> Path:
    """A run's folder as training would leave it, with plausible curves; `old`, as it would have
    before there were agents, rules of trust and action repeat."""
    variants = ("none",) if algo == "sac" else variants
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    plain = {
        "env": env,
        "algo": algo,
        "preset": preset,
        "engine": "host",
        "variants": list(variants),
        "seed": seed,
        "seeds": seeds,
        "steps": steps,
        "random_steps": 1000,
        **(
            {"sac": {"hidden": [128, 128], "utd": 10, "batch": 256, "discount": 0.99}}
            if old
            else {
                "agent_name": agent,
                "agent": {"hidden": [128, 128]},
                "learn": {"utd": 10, "batch": 256, "discount": 0.99, "reset_every": 0}
                | {"reset_at": []}
                | (settings or {}),
                "trust_name": trust,
                "trust": None,
                "task": {"repeat": repeat},
            }
        ),
        "model": {"members": 5},
        "rollout": {"batch": 200},
        "replay": {"real": 100_000},
        "eval": {"every": every, "episodes": 2},
        "host": {"workers": 0},
    }
    (folder / "config.json").write_text(
        json.dumps(
            {
                "config": plain,
                "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
                "device": "cpu: x1",
                "git_commit": "abc1234",
                "command": f"python experiments/run.py --env={env}",
                "parameters": {"actor": 12_345, "critic": 23_456, "model": 345_678},
            }
        )
    )
    lines: list[dict] = []
    with open(folder / "eval.csv", "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        numbers = ("return_mean", "return_std", "length_mean", "return_0", "return_1")
        out.writerow(["variant", "seed", "step", *([] if old else ["frames"]), *numbers])
        for step in range(every, steps + 1, every):
            share = step / steps
            for v in variants:
                top = level * _LEVEL.get("SAC" if algo == "sac" else v, 400.0)
                for s in range(seed, seed + seeds):
                    mean = top * (1 - np.exp(-4 * share)) + 0.06 * top * rng.normal()
                    count = [step] if old else [step, repeat * step]
                    out.writerow([v, s, *count, mean, 5.0, 1000.0, mean - 5, mean + 5])
                    who = {"variant": v, "seed": s, "step": step}
                    noise = np.exp(0.1 * rng.normal())
                    synthetic = algo == "mbpo"
                    lines.append(
                        {
                            "kind": "learn",
                            **who,
                            "critic_loss": (0.1 + share) * noise,
                            "actor_loss": -top * share / 10,
                            "temperature_loss": 0.1,
                            "q_mean": top * share / 10 * noise,
                            "target_mean": top * share / 10,
                            "temperature": 0.5 * np.exp(-3 * share) * noise,
                            "entropy": -3 * noise,
                            "real_reward_mean": mean / 1000,
                            "train_return": None,
                            **(
                                {"synthetic_reward_mean": mean / 1100, "synthetic_valid": 1.0}
                                if synthetic
                                else {}
                            ),
                        }
                    )
                    if synthetic:
                        scaled = "scale" in v
                        r2 = (0.9 if scaled else 0.05) - 0.5 * np.exp(-6 * share) + 0.02 * noise
                        lines.append(
                            {
                                "kind": "fit",
                                **who,
                                "fit_steps": 500 + 100 * int(rng.integers(5)),
                                "nll": -20 * share + noise,
                                "score": 0.5 * np.exp(-share) * noise,
                                "r2_state": 0.8 * share,
                                "r2_reward": r2,
                                "scale_ratio": (17.0 if scaled else 4e5) * noise,
                                "spread": 0.1 * np.exp(-share) * noise,
                                "model_reward_mean": mean / 1000 * (1 if scaled else 0.4),
                                "real_reward_mean": mean / 1000,
                            }
                        )
            lines.append(
                {
                    "kind": "time",
                    "step": step,
                    "wall_seconds": 0.2 * step,
                    "steps_per_second": 5.0,
                    "seconds": {
                        "environment": 0.02 * step,
                        "update": 0.1 * step,
                        "fit": 0.05 * step,
                        "evaluate": 0.02 * step,
                        "checkpoint": 1.0,
                        "other": 1.0,
                    },
                    "dropped": 0,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def plot(*arguments: object) -> subprocess.CompletedProcess[str]:
    """experiments/plot.py in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments/plot.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )


def test_reader_gives_variants_by_seeds_and_steps(tmp_path):
    run = report.read_run(fake_run(tmp_path / "run", steps=3000))
    assert list(run.evals) == list(VARIANTS)
    assert run.steps.tolist() == [1000, 2000, 3000] and run.seeds == (0, 1, 2)
    with open(tmp_path / "run/eval.csv") as file:
        wanted = [
            float(row["return_mean"])
            for row in csv.DictReader(file)
            if row["variant"] == "scale,target" and row["seed"] == "1"
        ]
    assert run.evals["scale,target"][1].tolist() == wanted
    steps, values = report.series(run, "fit", "r2_reward")["none"]
    assert steps.tolist() == [1000, 2000, 3000] and values.shape == (3, 3)


def test_a_torn_last_line_is_not_read(tmp_path):
    folder = fake_run(tmp_path / "run", steps=3000)
    for name in ("eval.csv", "metrics.jsonl"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-7])
    run = report.read_run(folder)
    # The last seed's line is torn, so that evaluation is not whole and does not count.
    assert run.steps.tolist() == [1000, 2000]
    assert len(run.metrics["time"]) == 2
    assert "<b>" in report.headline(run)[0]


def test_every_cut_of_the_files_can_be_read(tmp_path):
    folder = fake_run(tmp_path / "run", variants=("none", "scale"), steps=2000, seeds=2)
    whole = {name: (folder / name).read_bytes() for name in ("eval.csv", "metrics.jsonl")}
    for share in np.linspace(0, 1, 30):
        for name, data in whole.items():
            (folder / name).write_bytes(data[: int(share * len(data))])
        report.headline(report.read_run(folder))


def test_a_step_logged_twice_counts_once_and_null_is_nan(tmp_path):
    folder = fake_run(tmp_path / "run", algo="sac", seeds=1, steps=2000)
    with open(folder / "eval.csv", "a") as file:
        file.write("none,0,2000,2000,77.0,0,0,77,77\n")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind":"learn","variant":"none","seed":0,"step":3000,"q_mean":null}\n')
    run = report.read_run(folder)
    assert run.evals["none"].shape == (1, 2) and run.evals["none"][0, -1] == 77.0
    assert report.series(run, "learn", "q_mean")["SAC"][0].tolist() == [1000, 2000]


@pytest.mark.parametrize("name", ["eval.csv", "metrics.jsonl", "config.json"])
def test_a_damaged_file_is_named_in_one_line(tmp_path, name):
    folder = fake_run(tmp_path / "run", steps=2000)
    lines = (folder / name).read_text().splitlines(keepends=True)
    lines[len(lines) // 2] = "none,zero,{\n"
    (folder / name).write_text("".join(lines))
    with pytest.raises(UsageError, match=re.escape(name)) as caught:
        report.read_run(folder)
    assert "\n" not in str(caught.value)


def test_report_is_whole_and_needs_nothing_else(tmp_path):
    variants = (*VARIANTS, "none;model.learning_rate=0.001")
    folder = fake_run(tmp_path / "run", variants=variants)
    page = report.write_report(folder).read_text()
    for text in (
        *variants,
        "preset quick",
        "cheetah-run",
        "10,000 environment steps",
        "3 seeds",
        "The model's story".replace("'", "&#x27;"),
        "abc1234",
        "learn.utd",
    ):
        assert text in page, text
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:|//|file:)""", page)
    assert not re.search(r"<(link|script|iframe)\b|@import|https?://", page)
    assert "<th>frames</th>" in page and "(10,000 frames)" in page
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*")), "a temporary file was left"


def test_sac_report_leaves_the_model_out(tmp_path):
    page = report.write_report(fake_run(tmp_path / "run", algo="sac", seeds=1)).read_text()
    assert "model&#x27;s story" not in page and "critic&#x27;s story" in page
    assert "One seed has no interval" in page


@pytest.mark.parametrize("keep", ["nothing", "header"])
def test_a_run_just_begun_has_a_report(tmp_path, keep):
    folder = fake_run(tmp_path / "run", steps=2000)
    (folder / "metrics.jsonl").unlink()
    header = (folder / "eval.csv").read_text().splitlines()[0] + "\n"
    (folder / "eval.csv").write_text(header if keep == "header" else "")
    assert "No evaluation has been written yet" in report.write_report(folder).read_text()


def test_headline_says_what_was_measured_and_no_cause(tmp_path):
    run = report.read_run(fake_run(tmp_path / "run"))
    sentences = report.headline(run)
    final = {v: x[:, -1] for v, x in run.evals.items()}
    assert sentences[0].startswith("<b>scale,target</b> has the highest of 4 mean final returns")
    lead = statistics.difference(final["scale"], final["scale,target"])
    assert f"The difference to scale is {statistics.text(lead)}." in sentences[0]
    [scale] = [x for x in sentences if x.startswith("<b>scale</b>")]
    gap = statistics.difference(final["none"], final["scale"])
    fits = report.reward_fit(run, "scale"), report.reward_fit(run, "none")
    assert statistics.text(gap) in scale and "{:.2f} against {:.2f}.".format(*fits) in scale
    for word in ("explanation", "because", "must have", "does not explain", "too small"):
        assert word not in " ".join(sentences)


def test_headline_of_a_run_with_values_that_are_not_finite(tmp_path):
    folder = fake_run(tmp_path / "run", variants=("none", "scale"), steps=1000)
    text = (folder / "eval.csv").read_text()
    (folder / "eval.csv").write_text(
        re.sub(r"^(none,.,1000,1000),[^,]*", r"\1,nan", text, flags=re.M)
    )
    sentences = report.headline(report.read_run(folder))
    assert sentences[0].startswith("<b>scale</b> has the highest of 2")
    assert "to none is not defined" in sentences[0]
    report.write_report(folder)


def test_styles_are_the_same_everywhere_and_differ():
    names = ["SAC", *VARIANTS, *(f"scale;model.learning_rate={i}" for i in range(9))]
    looks = figures.styles(names)
    assert len({tuple(look.values()) for look in looks.values()}) == len(names)
    assert figures.styles(["MBPO scale,target", "MBPO"]) == {
        "MBPO scale,target": looks["scale,target"],
        "MBPO": looks["none"],
    }
    agent = figures.styles(["simba", "MBPO simba", "MBPO simba scale", "MBPO scale"])
    assert agent["MBPO simba scale"] == looks["scale"]
    assert len({tuple(look.values()) for look in agent.values()}) == 4


def test_plot_compares_runs_with_sac(tmp_path):
    for env, level in (("cheetah-run", 1.0), ("humanoid-walk", 0.5)):
        fake_run(tmp_path / f"{env}-mbpo", env=env, level=level)
        fake_run(tmp_path / f"{env}-sac", env=env, algo="sac", level=level, steps=5000)
    done = plot(*sorted(tmp_path.iterdir()), f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out/table.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 10
    row = next(r for r in table if (r["task"], r["variant"]) == ("humanoid-walk", "MBPO scale"))
    run = report.read_run(tmp_path / "humanoid-walk-mbpo")
    sac = report.read_run(tmp_path / "humanoid-walk-sac").evals["none"][:, 4].mean()
    wanted = run.evals["scale"][:, 4].mean()  # of three seeds the IQM cuts none
    assert float(row["final_iqm"]) == pytest.approx(wanted, abs=0.01)
    assert float(row["model_free_100"]) == pytest.approx(100 * wanted / sac, abs=0.1)
    assert (row["steps"], row["frames"]) == ("5000", "5000")
    assert (row["preset"], row["seeds"]) == ("quick", "3")
    assert float(row["low"]) <= wanted <= float(row["high"])
    assert "compared at 5,000 steps" in done.stdout and "| MBPO scale,target |" in done.stdout
    for name in ("comparison.png", "headline.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "compared at 5,000 steps" in (tmp_path / "out/table.md").read_text()


def test_plot_joins_seeds_tells_settings_apart_and_says_what_is_missing(tmp_path):
    fake_run(tmp_path / "a", variants=("scale",), seeds=2)
    fake_run(tmp_path / "b", variants=("scale",), seeds=2, seed=2)
    fake_run(tmp_path / "c", variants=("scale",), settings={"utd": 1})
    fake_run(tmp_path / "d", variants=("scale",), preset="paper")
    done = plot(*(tmp_path / name for name in "abcd"), f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out/table.csv") as file:
        seeds = {row["variant"]: row["seeds"] for row in csv.DictReader(file)}
    assert seeds == {
        "MBPO scale": "4",
        "MBPO scale (learn.utd=1)": "3",
        "MBPO scale (preset=paper)": "3",
    }
    assert (
        "presets paper and quick" in done.stdout and "no run of SAC without a model" in done.stdout
    )


def test_labels_name_the_agent_and_the_rule_of_trust(tmp_path):
    def labels(name, **arguments):
        run = report.read_run(fake_run(tmp_path / name, steps=1000, seeds=1, **arguments))
        return [report.label(run, v) for v in run.config["variants"]]

    variants = ("none", "scale", "none;model.learning_rate=0.001")
    assert labels("a", algo="sac") == ["SAC"]
    assert labels("b", algo="sac", agent="simba") == ["simba"]
    assert labels("c", algo="sac", agent="module:toy", trust="m2ac") == ["module:toy"]
    rate = "model.learning_rate=0.001"
    assert labels("d", variants=variants) == ["MBPO", "MBPO scale", f"MBPO {rate}"]
    assert labels("e", variants=variants, agent="simba", trust="m2ac") == [
        "MBPO simba trust=m2ac",
        "MBPO simba scale trust=m2ac",
        f"MBPO simba {rate} trust=m2ac",
    ]
    page = report.write_report(tmp_path / "e").read_text()
    assert "cheetah-run: MBPO simba trust=m2ac, preset quick" in page
    assert ">simba</span>" in report.write_report(tmp_path / "b").read_text()


def test_an_old_folder_is_read_as_one_of_today(tmp_path):
    old = report.read_run(fake_run(tmp_path / "old", algo="sac", old=True, steps=1000))
    new = report.read_run(fake_run(tmp_path / "new", algo="sac", steps=1000))
    assert not config.difference(old.config, new.config)
    assert report.label(old, "none") == "SAC" and old.repeat == 1
    assert old.frames.tolist() == old.steps.tolist() == [1000]
    page = report.write_report(old.folder).read_text()
    assert "sac.utd" in page, "its configuration is shown as it was written"
    fake_run(tmp_path / "more", algo="sac", seed=3)
    done = plot(old.folder, tmp_path / "more", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    [line] = csv.DictReader((tmp_path / "out/table.csv").open())
    assert (line["variant"], line["seeds"]) == ("SAC", "6")


def test_frames_are_drawn_where_a_step_has_several(tmp_path, monkeypatch):
    drawn = []
    curves = figures.curves
    monkeypatch.setattr(
        figures, "curves", lambda panels, **kw: drawn.extend(panels) or curves(panels, **kw)
    )
    monkeypatch.setattr(
        figures, "small", lambda panel, style: drawn.append(panel) or curves([panel])
    )
    folder = fake_run(tmp_path / "twice", repeat=2, steps=3000)
    page = report.write_report(folder).read_text()
    assert "3,000 environment steps (6,000 frames)" in page and "2 frames a step" in page
    assert "5.0 environment steps (10.0 frames) a second" in page
    main = drawn[0]
    assert main.xlabel == "frames" and main.lines["none"][0].tolist() == [2000, 4000, 6000]
    dotted = figures.Panel({}, "y", dotted=main.lines, mark=500.0).framed(2)
    assert dotted.dotted["none"][0].tolist() == [4000, 8000, 12000] and dotted.mark == 1000
    assert main.framed(1) is main
    drawn.clear()
    report.write_report(fake_run(tmp_path / "once", steps=3000))
    assert {panel.xlabel for panel in drawn} == {"environment steps"}


def test_plot_compares_agents_each_with_itself_by_frames(tmp_path):
    fake_run(tmp_path / "a", algo="sac", steps=4000)
    fake_run(tmp_path / "b", variants=("scale",), steps=4000)
    fake_run(tmp_path / "c", algo="sac", agent="simba", repeat=2, level=2.0, steps=3000)
    fake_run(tmp_path / "d", variants=("scale",), agent="simba", repeat=2, level=3.0, steps=3000)
    done = plot(*(tmp_path / name for name in "abcd"), f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out/table.csv") as file:
        table = {row["variant"]: row for row in csv.DictReader(file)}
    assert list(table) == ["SAC", "simba", "MBPO scale", "MBPO simba scale"]
    assert {row["frames"] for row in table.values()} == {"4000"}
    assert [row["steps"] for row in table.values()] == ["4000", "2000", "4000", "2000"]
    for name, base in (("MBPO scale", "SAC"), ("MBPO simba scale", "simba"), ("simba", "simba")):
        share = 100 * float(table[name]["final_iqm"]) / float(table[base]["final_iqm"])
        assert float(table[name]["model_free_100"]) == pytest.approx(share, abs=0.1)
    assert "compared at 4,000 frames" in done.stdout and "model-free = 100" in done.stdout
    done = plot(*(tmp_path / name for name in "abd"), f"--out={tmp_path / 'out'}")
    assert "no run of simba without a model" in done.stdout


# What a shell, a notebook or a cluster may leave in the variable.
_DRAW = """
import os, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("matplotlib_inline"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from dynajax import report
report.write_report(sys.argv[1])
print(os.environ["MPLBACKEND"], "matplotlib.pyplot" in sys.modules)
"""


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no such one"])
def test_figures_are_drawn_whatever_backend_is_set(tmp_path, backend):
    folder = fake_run(tmp_path / "run", variants=("none",), seeds=1, steps=1000)
    done = subprocess.run(
        [sys.executable, "-c", _DRAW, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "MPLBACKEND": backend},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{backend} False\n", "the variable is as it was"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


# Starting Python takes most of the time, so one process tries many command lines.
_TRY_ALL = """
import json, sys
sys.path.insert(0, sys.argv[1])
import plot
for arguments in json.loads(sys.argv[2]):
    plot.flags.FLAGS.unparse_flags()
    sys.argv = ["plot.py", *arguments]
    try:
        status = plot.cli.run(plot.main)
    except SystemExit as stop:
        status = stop.code
    print(status, file=sys.stderr)
"""


def test_plot_refuses_bad_input_with_one_line(tmp_path):
    (tmp_path / "other").mkdir()
    empty = fake_run(tmp_path / "empty", steps=2000)
    (empty / "eval.csv").unlink()
    cases = (
        ([], "name at least one run's folder"),
        ([tmp_path / "other"], "not a run's folder"),
        ([empty], "no evaluation yet"),
        ([fake_run(tmp_path / "whole", steps=1000), f"--out={empty / 'config.json'}"], "--out="),
        (["--ouut=x", empty], "ouut"),
    )
    tried = json.dumps([[str(a) for a in arguments] for arguments, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", _TRY_ALL, str(ROOT / "experiments"), tried],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    lines = done.stderr.splitlines()
    assert done.stdout == "" and len(lines) == 2 * len(cases), done.stderr
    for (_, text), message, status in zip(cases, lines[::2], lines[1::2], strict=True):
        assert message.startswith("error: ") and text in message and status == "2"


def test_plot_of_a_missing_folder_ends_with_status_2(tmp_path):
    done = plot(tmp_path / "missing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'missing'}: there is no such folder\n"


def test_plot_help_fits_a_screen():
    lines = plot("--help").stdout.splitlines()
    assert "--out" in "\n".join(lines) and len(lines) <= 30
