"""The train command: its files, interruption and resuming, errors, and that a run learns."""

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import scripts
from conftest import CORES
from dynajax import UsageError, report, settings, train
from dynajax.runs import directory
from dynajax.runtime import exit_status
from sizes import NETWORKS, SHORT_RUN, as_flags

RUN = Path(__file__).parents[1] / "experiments" / "run.py"
#: Sizes of a run that takes seconds.
SETTINGS = SHORT_RUN | NETWORKS["sac"]
FLAGS = [
    "--env=Pendulum-v1",
    "--preset=paper",
    "--fix=none",
    "--fix=scale,target",
    "--steps=400",
    *as_flags(SETTINGS),
]


def start(out: Path, *more: str, command: list[str] = FLAGS) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, str(RUN), *command, f"--out={out}", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=out.parent,
    )
    # As from a user's shell: learners and ensemble members use all cores.
    os.sched_setaffinity(process.pid, CORES)
    return process


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(condition, process: subprocess.Popen) -> None:
    """Wait until a condition holds; fail if the process has ended."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def last_state(out: Path) -> dict:
    """Return the checksum of every array in the newest checkpoint, by path."""
    newest = max((out / "checkpoints").glob("*-step-*"), key=lambda p: int(p.name.split("-")[-1]))
    return json.loads((newest / "meta.json").read_text())["content"]["leaves"]


def last_policies(out: Path) -> dict:
    """Return the checksum of every array of the best and the last policies, by path."""
    (newest,) = (out / "policies").glob("*-step-*")
    return json.loads((newest / "meta.json").read_text())["content"]["leaves"]


@pytest.fixture(scope="module")
def program():
    with scripts.loaded(RUN) as module:
        yield module


@pytest.fixture
def command(program, monkeypatch, tmp_path):
    """Return a function that runs the command in this process and returns its exit status."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(scripts.run, program, monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, printed, err = finish(start(out))
    assert code == 0, err
    assert "2 learners" in printed and "paper" in printed and "report.html" in printed
    return out


def test_run_writes_the_documented_files(whole):
    info = json.loads((whole / "config.json").read_text())
    assert info["config"]["preset"] == "paper"
    assert info["versions"]["jax"] and info["device"] and info["parameters"]["model"] > 0
    lines = list(csv.DictReader((whole / "eval.csv").open()))
    assert [(x["variant"], int(x["step"])) for x in lines] == [
        (v, s) for s in (100, 200, 300, 400) for v in ("none", "scale,target")
    ]
    for line in lines:
        returns = [float(line["return_0"]), float(line["return_1"])]
        assert float(line["return_mean"]) == pytest.approx(np.mean(returns))
        assert float(line["return_std"]) == pytest.approx(np.std(returns))
        assert float(line["length_mean"]) == 200
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    fits = [m["step"] for m in metrics if m["kind"] == "fit" and m["variant"] == "none"]
    assert fits == list(range(100, 400, 50))
    named = {
        "learn": ("critic_loss", "synthetic_reward_mean", "entropy"),
        "fit": ("r2_reward", "target_variance_ratio", "fit_steps"),
        "time": ("seconds", "dropped"),
    }
    for kind, names in named.items():
        assert all(m[name] is not None for m in metrics if m["kind"] == kind for name in names)
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "scale,target" in (whole / "report.html").read_text()
    assert list((whole / "tensorboard").iterdir())


def test_fixes_change_the_scale_of_targets(whole):
    fits = report.read_run(whole).metrics["fit"]
    ratio = {m["variant"]: m["target_variance_ratio"] for m in fits if m["step"] == 350}
    # With the fixes the targets of state (3) and reward (1) have unit variance.
    assert ratio["scale,target"] == pytest.approx(3, rel=0.5)
    assert not 1.5 < ratio["none"] < 6


@pytest.mark.parametrize("kills", [1, 2])
def test_killed_run_resumes_bit_for_bit(whole, tmp_path, kills):
    out = tmp_path / "run"
    for kill in range(kills):
        process = start(out)
        after = 100 * (kill + 1)
        saved = f"checkpoints/*-step-{after}"
        wait_for(lambda saved=saved: any(out.glob(saved)), process)
        time.sleep(0.05 + 0.2 * kill)
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL
    code, printed, err = finish(start(out))
    assert code == 0, err
    assert "resuming from step" in printed
    assert (out / "eval.csv").read_bytes() == (whole / "eval.csv").read_bytes()
    assert last_state(out) == last_state(whole)
    assert last_policies(out) == last_policies(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_saves_and_resumes_bit_for_bit(whole, tmp_path, number):
    out = tmp_path / "run"
    process = start(out)
    wait_for(lambda: ",200," in _text(out / "eval.csv"), process)
    process.send_signal(number)
    code, printed, err = finish(process)
    assert code == exit_status.INTERRUPTED, err
    assert "interrupted and saved" in printed and "Traceback" not in err
    code, printed, err = finish(start(out))
    assert code == 0, err
    assert "resuming from step" in printed
    assert (out / "eval.csv").read_bytes() == (whole / "eval.csv").read_bytes()
    assert last_state(out) == last_state(whole)
    fits = [m["step"] for m in report.read_run(out).metrics["fit"] if m["variant"] == "none"]
    assert fits == list(range(100, 400, 50))


def test_more_steps_extend_a_finished_run(whole, tmp_path):
    """Extend a run whose last interval was shorter, so that it has an additional evaluation."""
    out = tmp_path / "run"
    assert finish(start(out, "--steps=250"))[0] == 0
    steps = [line["step"] for line in csv.DictReader((out / "eval.csv").open())]
    assert steps == ["100", "100", "200", "200", "250", "250"]
    code, printed, err = finish(start(out))
    assert code == 0, err
    assert "resuming from step 250" in printed
    after = (out / "eval.csv").read_bytes().splitlines(keepends=True)
    others = [line for line in after if b",250," not in line]
    assert b"".join(others) == (whole / "eval.csv").read_bytes()
    assert len(after) == len(others) + 2
    assert last_state(out) == last_state(whole)
    before = (out / "eval.csv").read_bytes()
    code, printed, _ = finish(start(out))
    assert code == 0 and "complete" in printed
    assert (out / "eval.csv").read_bytes() == before


def test_damaged_checkpoint_falls_back_with_a_warning(whole, tmp_path):
    out = tmp_path / "run"
    assert finish(start(out, "--steps=300"))[0] == 0
    newest = max((out / "checkpoints").glob("*-step-300"))
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    code, printed, err = finish(start(out))
    assert code == 0, err
    assert "damaged" in printed + err and "resuming from step 200" in printed
    assert (out / "eval.csv").read_bytes() == (whole / "eval.csv").read_bytes()
    assert last_state(out) == last_state(whole)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env=cheetah-rum"], ["--env=cheetah-rum", "cheetah-run"]),
        (["--env=CartPole-v1"], ["--env=CartPole-v1", "Discrete"]),
        (["--fix=scal"], ["--fix=scal", "scale"]),
        (["--fix=target,auto"], ["--fix=target,auto", "contradict"]),
        (["--preset=slow"], ["preset", "quick"]),
        (["--algo=ppo"], ["algo", "mbpo"]),
        (["--algo=model-free", "--fix=scale"], ["--fix=scale", "without a model", "--algo=mbpo"]),
        (["--agent=sacc"], ["--agent=sacc", "the nearest is sac"]),
        (["--agent=no.where:sac"], ["--agent=no.where:sac", "cannot be found"]),
        (["--trust=penal"], ["--trust=penal", "the nearest is penalty"]),
        (["--algo=model-free", "--trust=penalty"], ["--trust=penalty", "--algo=mbpo"]),
        (["--trust=penalty", "--set=trust.scale=-1"], ["trust.scale=-1", "trust.kind=epistemic"]),
        (["--set=sac.utd=3"], ["--set=sac.utd", "learn.utd"]),
        (["--set=agent.hiden=8", "--agent=sac"], ["--set=agent.hiden", "agent.hidden"]),
        (["--set=model.widht=20"], ["model.widht", "model.width"]),
        (["--set=model.width=wide"], ["model.width=wide", "whole number"]),
        (["--set=model.width"], ["--set model.width", "FIELD=VALUE"]),
        (["--vary=model.width=20,30"], ["model.width", "shapes the program"]),
        (["--algo=model-free", "--vary=model.holdout=0.1,0.2"], ["model.holdout", "no model"]),
        (["--steps=0"], ["--steps=0", "at least 1"]),
        (["--seeds=0"], ["--seeds=0", "1"]),
        (["--set=replay.real=2000000000", "--steps=1000"], ["GiB", "replay.real"]),
        (["--no_such_flag=1"], ["no_such_flag"]),
        (["cheetah-run"], ["cheetah-run", "--env"]),
        (["--out=/proc/nothing", "--steps=1000"], ["--out=/proc/nothing", "written"]),
    ],
)
def test_wrong_command_prints_one_line_and_exits_with_2(
    command, tmp_path, capsys, arguments, words
):
    out = [] if any("--out" in a for a in arguments) else [f"--out={tmp_path / 'run'}"]
    status = command(*out, *arguments)
    printed, err = capsys.readouterr()
    assert status == exit_status.USAGE, err
    assert len(err.strip().splitlines()) == 1, err
    # What is checked by making the task comes after the description of the run.
    assert not printed or len(printed.splitlines()) == 2, printed
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir())


def test_wrong_command_in_a_separate_process(tmp_path):
    code, printed, err = finish(start(tmp_path / "run", "--env=cheetah-rum"))
    assert code == exit_status.USAGE and not printed
    assert err.startswith("error: --env=cheetah-rum") and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_folder_of_another_configuration_is_refused_with_the_difference(whole):
    before = (whole / "eval.csv").read_bytes()
    other = [flag.replace("learn.utd=2", "learn.utd=3") for flag in FLAGS]
    code, _, err = finish(start(whole, command=other))
    assert code == exit_status.USAGE
    assert "learn.utd: 2 -> 3" in err and len(err.strip().splitlines()) == 1
    assert (whole / "eval.csv").read_bytes() == before


def test_second_process_in_a_run_directory_is_refused(whole):
    run = settings.make("Pendulum-v1")
    held = directory.RunDirectory(whole.parent / "held", run, {"command": "test"})
    with held:
        code, _, err = finish(start(whole.parent / "held"))
    assert code == exit_status.USAGE
    assert "another process" in err and len(err.strip().splitlines()) == 1


def test_help_fits_on_a_screen(tmp_path):
    done = subprocess.run(
        [sys.executable, str(RUN), "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert "--fix" in done.stdout and len(done.stdout.splitlines()) <= 50


def test_run_resumes_after_the_disk_was_full(tmp_path, monkeypatch):
    """Fail to write logs after step 200, then resume with free space."""
    from dynajax.runs import loggers

    run = settings.make(
        "Pendulum-v1",
        preset="paper",
        fixes=["none", "scale,target"],
        steps=400,
        settings=SETTINGS,
    )
    real = loggers.Files.write

    def full(self, record):
        if record.step > 200:
            raise UsageError("--out: eval.csv cannot be written (No space left on device)")
        real(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(loggers.Files, "write", full)
        with pytest.raises(UsageError, match="No space"):
            train(run, tmp_path / "run", quiet=True)
    for name in ("run", "whole"):
        assert train(run, tmp_path / name, quiet=True).finished
    texts = [(tmp_path / name / "eval.csv").read_bytes() for name in ("run", "whole")]
    assert texts[0] == texts[1]


def test_dynajax_learns_pendulum(tmp_path, optimised):
    """Train from a return of about -1200 (random actions) to one that needs a swing-up."""
    run = settings.make(
        "Pendulum-v1",
        algo="dynajax",
        fixes=["scale,target"],
        steps=1000,
        settings={
            "random_steps": 200,
            "eval.every": 250,
            "eval.episodes": 5,
            "learn.batch": 64,
            "model.width": 64,
            "model.depth": 2,
            "model.batch": 64,
            "model.fit_every": 200,
            "model.fit_steps": 400,
        },
    )
    result = train(run, tmp_path / "run", quiet=True)
    (curve,) = report.read_run(result.folder).evals["scale,target"]
    assert curve[-1] > -400, curve


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
