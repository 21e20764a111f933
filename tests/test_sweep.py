"""Studies: errors of study files, and equal results of all backends after interruptions."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import scripts
from dynajax import UsageError, agents, config
from dynajax.config import as_dict
from dynajax.launch import backends, status, study
from dynajax.launch.job import Job, JobRunner
from dynajax.runs.directory import check_resumable
from dynajax.runtime import exit_status
from sizes import NETWORKS, SHORT_RUN

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "launch" / "sweep.py"
RUNS = ("Pendulum-v1-mbpo-sac", "Pendulum-v1-sac")
#: Two runs that take seconds and contain everything.
STUDY = """\
tasks = ["Pendulum-v1"]
algorithms = ["mbpo", "model-free"]
fixes = ["none", "scale,target"]
steps = 400
preset = "paper"
[settings]
""" + "".join(
    f"{name} = {json.dumps(value)}\n" for name, value in (SHORT_RUN | NETWORKS["sac"]).items()
)


def write(folder: Path, text: str = STUDY) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def sweep(path: Path, *flags: str, cwd: Path | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SWEEP), str(path), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd or path.parent,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(condition, process: subprocess.Popen) -> None:
    """Wait until a condition holds; fail if the process has ended."""
    until = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def evaluated(out: Path, name: str, step: int) -> bool:
    path = out / name / "eval.csv"
    return path.exists() and f",{step}," in path.read_text()


def results(out: Path) -> list[bytes]:
    """Return the content of the files with a study's results."""
    return [(out / p).read_bytes() for p in (*(f"{r}/eval.csv" for r in RUNS), "table.csv")]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def paused_run(parent: int) -> Iterator[int]:
    """Pause the run that a process has started, which would otherwise end before it is stopped."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True)
    (run,) = map(int, found.stdout.split())
    os.kill(run, signal.SIGSTOP)
    try:
        yield run
        time.sleep(2)  # a launcher passes a signal on within 0.6 s
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(run, signal.SIGCONT)


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """Give all runs one core: the last digits of a run depend on the number of devices."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the study's folder after an uninterrupted sweep with two runs at a time."""
    folder = tmp_path_factory.mktemp("whole")
    code, printed, err = finish(sweep(write(folder), "--parallel=2"))
    assert code == 0, err
    assert "2 runs: 2 done" in printed and "MBPO + scale, target" in printed
    return folder / "runs" / "study"


def test_study_writes_figures_and_table(whole):
    assert (whole / "headline.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "comparison.png").read_bytes().startswith(b"\x89PNG")
    lines = (whole / "table.csv").read_text().splitlines()
    assert [line.split(",")[1].strip('"') for line in lines[1:]] == [
        "SAC (model-free)",
        "MBPO",
        "MBPO + scale",
    ]
    for name in RUNS:
        info = json.loads((whole / name / "config.json").read_text())
        algo = "mbpo" if "mbpo" in name else "model-free"
        assert f"--algo={algo} --agent=sac " in info["command"]
        # The trust rule is the algorithm's.
        assert info["config"]["trust_name"] == "none" and "--trust" not in info["command"]
    assert (whole / "study.toml").read_text() == STUDY


def test_second_sweep_changes_nothing(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    code, printed, err = finish(sweep(whole.parents[1] / "study.toml"))
    assert code == 0, err
    assert "nothing to do" in printed and "MBPO + scale, target" in printed
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == before


def test_interrupted_and_killed_sweeps_resume(whole, tmp_path):
    path, out = write(tmp_path), tmp_path / "runs" / "study"
    (out / "launch").mkdir(parents=True)
    # This run is already done, so it is not repeated.
    os.symlink(whole / RUNS[0], out / RUNS[0])

    process = sweep(path)
    wait_for(lambda: evaluated(out, RUNS[1], 100), process)
    with paused_run(process.pid):
        process.send_signal(signal.SIGINT)
    code, printed, err = finish(process)
    assert code == exit_status.INTERRUPTED and "Traceback" not in err, err
    assert "interrupted" in printed and "1 of 2 runs to do" in printed
    assert status.read_note(out, RUNS[1])["state"] == "stopped"

    process = sweep(path)
    wait_for(lambda: evaluated(out, RUNS[1], 200), process)
    with paused_run(process.pid) as run:
        process.kill()
        finish(process)
    until = time.monotonic() + 60
    while alive(run):
        assert time.monotonic() < until, "a run outlived its launcher"
        time.sleep(0.05)

    code, printed, err = finish(sweep(path))
    assert code == 0, err
    assert results(out) == results(whole)


def test_second_concurrent_sweep_is_refused(tmp_path):
    path = write(tmp_path)
    folder = tmp_path / "runs" / "study" / "launch"
    folder.mkdir(parents=True)
    with open(folder / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = finish(sweep(path))
    assert code == exit_status.USAGE and "another `dynajax sweep`" in err
    assert [p.name for p in folder.iterdir()] == ["lock"]


def test_preempted_submitit_job_resumes(whole, tmp_path):
    """Send submitit's local executor the signal that SLURM sends before it ends a job."""
    path, out = write(tmp_path), tmp_path / "here"
    process = sweep(path, "--on=submitit", "--parallel=2", f"--out={out}")
    wait_for(lambda: evaluated(out, RUNS[0], 200), process)
    runner = status.read_note(out, RUNS[0])["pid"]
    with paused_run(runner):
        os.kill(runner, signal.SIGUSR2)
    code, _, err = finish(process)
    assert code == 0, err
    assert status.read_note(out, RUNS[0])["attempts"] == 2
    assert results(out) == results(whole)


def test_ray_run_resumes_on_another_node(whole, tmp_path, monkeypatch):
    """Remove the second of two nodes while each of them executes a run."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    path, out = write(tmp_path), tmp_path / "there"
    options = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        node = cluster.add_node(num_cpus=1)
        (raylet,) = (p.process.pid for p in node.all_processes["raylet"])
        process = sweep(path, "--on=ray", f"--address={cluster.address}", f"--out={out}")

        def run_on_second_node() -> str | None:
            """Return the run on the second node once it has evaluated."""
            for name in RUNS:
                pid = status.read_note(out, name).get("pid")
                if pid and _parent(pid) == raylet and evaluated(out, name, 100):
                    return name
            return None

        wait_for(run_on_second_node, process)
        name = run_on_second_node()
        with paused_run(status.read_note(out, name)["pid"]):
            cluster.remove_node(node, allow_graceful=False)
        code, printed, err = finish(process)
        assert code == 0, printed + err
        assert status.read_note(out, name)["attempts"] == 2
    finally:
        cluster.shutdown()
    assert results(out) == results(whole)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_failing_run_is_retried_and_reported(tmp_path):
    job = Job("run", (), str(tmp_path), (str(tmp_path / "script.py"),), str(tmp_path), 3)
    Path(*job.program).write_text("import sys; sys.exit('no such thing')")
    (tmp_path / "launch").mkdir()
    assert JobRunner(job).complete() == "failed"
    note = status.read_note(tmp_path, "run")
    assert note["attempts"] == 3 and note["message"] == "exit status 1: no such thing"
    # A command with a usage error is not retried.
    Path(*job.program).write_text("import sys; print('error: --x', file=sys.stderr); sys.exit(2)")
    status.write_note(tmp_path, "run", attempts=0)
    assert JobRunner(job).complete() == "failed"
    assert status.read_note(tmp_path, "run")["attempts"] == 1


def test_note_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    job = Job("run", (), str(tmp_path), (str(tmp_path / "script.py"),), str(tmp_path), 3)
    Path(*job.program).write_text("import time; time.sleep(1)")
    (tmp_path / "launch").mkdir()
    monkeypatch.setattr(status, "NOTE_INTERVAL", 0)
    write_note, refused = status.write_note, []

    def refuse(out, name, **content):
        if content == {"state": "running"}:  # while the run is training
            refused.append(name)
            raise OSError("no space")
        write_note(out, name, **content)

    monkeypatch.setattr(status, "write_note", refuse)
    assert JobRunner(job).complete() == "done" and refused
    assert status.read_note(tmp_path, "run")["attempts"] == 1


def test_lost_job_is_queued_again_while_it_makes_progress(tmp_path, monkeypatch):
    job = Job("run", (), str(tmp_path), ("script.py",), str(tmp_path), 2)
    (tmp_path / "launch").mkdir()
    steps, lost, waiting = iter([100, 200, 200, 200]), {}, []
    monkeypatch.setattr(status, "saved_step", lambda folder: next(steps))
    for _ in range(3):
        backends._handle_lost(job, "NODE_FAIL", tmp_path, lost, waiting)
    assert waiting == [job] * 3 and status.read_note(tmp_path, "run") == {}
    backends._handle_lost(job, "NODE_FAIL", tmp_path, lost, waiting)
    assert len(waiting) == 3
    assert "2 times without progress" in status.read_note(tmp_path, "run")["message"]


def test_run_that_is_stopped_before_its_start_leaves_no_note(tmp_path):
    runner = JobRunner(Job("run", (), str(tmp_path), ("script.py",), str(tmp_path), 3))
    runner.stop()
    assert runner.complete() == "stopped"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ('tasks = ["Pendulum-v1"]', 'tasks = ["Pendulum-v1"', "", ["array", "line 2"]),
        (
            '"Pendulum-v1"]',
            '"Pendulum-v1", "cheetah-rum"]',
            "tasks",
            ["cheetah-rum", "cheetah-run"],
        ),
        ('tasks = ["Pendulum-v1"]', "tasks = 3", "tasks", ["a list of strings"]),
        ('tasks = ["Pendulum-v1"]', "", "tasks", ["is missing"]),
        ('"model-free"]', '"ppo"]', "algorithms", ["--algo=ppo", "model-free"]),
        ('"model-free"]', '"mbpo"]', "algorithms", ["mbpo is given twice"]),
        ('"none", "scale,target"', '"none", "scal"', "fixes", ["--fix=scal", "scale"]),
        ("steps = 400", 'agents = ["sacc"]', "agents", ["--agent=sacc", "is sac"]),
        ("steps = 400", 'trust = ["penal"]', "trust", ["--trust=penal", "penalty"]),
        ("steps = 400", 'trust = "none"', "trust", ["a list of strings"]),
        ("learn.utd = 2", "sac.utd = 2", "settings.sac.utd", ["learn.utd"]),
        ("steps = 400", "step = 400", "step", ["the nearest is steps"]),
        ("steps = 400", "seeds = 0", "seeds", ["--seeds=0"]),
        ("model.members = 3", "model.membres = 3", "settings.model.membres", ["model.members"]),
        ("learn.utd = 2", 'learn.utd = "two"', "settings.learn.utd", ["=two", "whole number"]),
        (
            "[settings]",
            "[vary]\nmodel.width = [1, 2]\n[settings]",
            "vary.model.width",
            ["shapes the program"],
        ),
        ("[settings]", "[resources]\ncpus = 0\n[settings]", "resources.cpus", ["above 0"]),
        ("[settings]", "[resources]\nram = 1\n[settings]", "resources.ram", ["memory_gb"]),
        ("steps = 400\n", 'engine = "mjx"\n', "tasks", ["Pendulum-v1", "--engine=host"]),
        (
            "[settings]",
            "[resources]\nhours = nan\n[settings]",
            "resources.hours",
            ["nan", "finite"],
        ),
        (
            "[settings]",
            "[resources]\nhours = inf\n[settings]",
            "resources.hours",
            ["inf", "finite"],
        ),
        ("[settings]", "[resources]\ngpus = inf\n[settings]", "resources.gpus", ["inf", "finite"]),
        ("steps = 400", "steps = 0", "steps", ["= 0", "above 0"]),
        ("learn.utd = 2", 'learn.utd = 2\n"learn.utd" = 3', "settings.learn.utd", ["given twice"]),
        ("[settings]", "[slurm]\na = [1]\n[settings]", "slurm.a", ["takes one value"]),
        ("[settings]", '[arms."../../evil"]\n[settings]', "arms.'../../evil'", ["letters"]),
        ("[settings]", '[arms."a/b"]\n[settings]', "arms.'a/b'", ["letters"]),
        ("[settings]", '[arms." a"]\n[settings]', "arms.' a'", ["letters"]),
        ("[settings]", '[arms.""]\n[settings]', "arms.''", ["letters"]),
        ("[settings]", '[arms.".a"]\n[settings]', "arms.'.a'", ["letters"]),
        (
            "[settings]",
            "[arms.a]\nsettings = 3\n[settings]",
            "arms.a: settings",
            ["= 3", "a table"],
        ),
        ("[settings]", "[arms.a]\nseeds = 0\n[settings]", "arms.a: seeds", ["--seeds=0"]),
    ],
)
def test_error_of_study_names_file_and_key(tmp_path, old, new, key, words):
    assert old in STUDY
    path = write(tmp_path, STUDY.replace(old, new))
    with pytest.raises(UsageError) as caught:
        study.load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: {key}") and "\n" not in text, text
    for word in words:
        assert word in text


ALL = "[settings]\n"
ARM = '[arms.a]\nalgorithms = ["mbpo"]\n[arms.b]\n'


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (ALL + "model.widht = 3", "settings.model.widht"),
        (ALL + "[vary]\nrollout.state_noise = [0, 1]", "vary.rollout.state_noise"),
        ('trust = ["m2ac"]', "trust"),
        ('fixes = ["scale"]', "fixes"),
        (ARM + "settings = { model.width = 3 }", "arms.b: settings.model.width"),
        (ARM + 'fixes = ["scale"]', "arms.b: fixes"),
    ],
)
def test_study_refuses_what_has_no_effect_without_a_model(tmp_path, text, key):
    path = write(tmp_path, f'tasks = ["Pendulum-v1"]\nalgorithms = ["model-free"]\n{text}\n')
    with pytest.raises(UsageError) as caught:
        study.load(path)
    assert str(caught.value).startswith(f"{path}: {key}: no run has a model")


def test_arm_without_a_model_ignores_shared_settings_of_the_model(tmp_path):
    shared = 'tasks = ["Pendulum-v1"]\nfixes = ["scale"]\nsettings = { model.width = 3 }\n'
    path = write(tmp_path, f'{shared}[arms.a]\n[arms.b]\nalgorithms = ["model-free"]\n')
    first, second = study.load(path).runs
    assert "--set=model.width=3" in first.flags and not any("model.w" in f for f in second.flags)


def complete(base):
    """Return a subclass that has every method which the base class requires."""
    methods = dict.fromkeys(base.__abstractmethods__, lambda self, *arguments: None)
    return types.new_class("Complete", (base,), exec_body=lambda body: body.update(methods))


def test_error_of_plug_in_names_file(tmp_path, monkeypatch):
    class Strict(complete(agents.Agent)):
        @classmethod
        def check(cls, config):
            raise UsageError("learn.utd=2: take 3")

    monkeypatch.setitem(agents.AGENTS, "sac", Strict)
    path = write(tmp_path, STUDY.replace("agent.hidden = [8, 8]", "# no agent.hidden"))
    with pytest.raises(UsageError) as caught:
        study.load(path)
    assert str(caught.value) == f"{path}: learn.utd=2: take 3"


def test_study_accepts_any_number_of_steps(tmp_path):
    plan = study.load(write(tmp_path, STUDY.replace("steps = 400", "steps = 450")))
    assert all(run.config.steps == 450 for run in plan.runs)


def test_study_with_error_starts_nothing(tmp_path):
    text = STUDY.replace("steps = 400", "seeds = 0")
    code, printed, err = finish(sweep(write(tmp_path, text)))
    assert code == exit_status.USAGE and not printed
    assert len(err.strip().splitlines()) == 1 and "study.toml: seeds: --seeds=0" in err
    assert [p.name for p in tmp_path.iterdir()] == ["study.toml"]


@pytest.mark.parametrize("given", ["out/study.toml", "~/study.toml"])
def test_study_is_copied_into_its_folder(tmp_path, monkeypatch, given):
    """Start from the copy itself, and from a path with ~ that no shell has expanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    write(out if "out" in given else tmp_path)
    monkeypatch.chdir(tmp_path)
    with scripts.loaded(SWEEP) as module:
        monkeypatch.setattr(module, "_start", lambda jobs, plan, out: iter(()))
        assert scripts.run(module, monkeypatch, given, f"--out={out}") == exit_status.INTERRUPTED
    assert (out / "study.toml").read_text() == STUDY
    assert {status.read_note(out, name)["on"] for name in RUNS} == {"here"}


def test_run_without_its_evaluations_prints_remedy(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / RUNS[1] / "eval.csv").unlink()
    code, printed, err = finish(sweep(whole.parents[1] / "study.toml", f"--out={out}"))
    assert code == 1, err
    assert "eval.csv is shorter" in printed and f"delete {out}/NAME to restart that run" in printed


@pytest.fixture
def planned(tmp_path) -> study.StudyRun:
    """Return a run of a study that has not started."""
    (tmp_path / "launch").mkdir()
    return study.load(write(tmp_path)).runs[0]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"attempts": 1}',
        '{"state": 3}',
        '{"state": "running", "attempts": "x"}',
    ],
)
def test_damaged_note_is_ignored(planned, tmp_path, text):
    status.note_path(tmp_path, planned.name).write_text(text)
    run = status.run_status(planned, tmp_path)
    assert run.state == "missing" and "1 missing" in status.table([run])
    status.write_note(tmp_path, planned.name, state="running")
    assert status.run_status(planned, tmp_path).state == "running"


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"config": null}', '{"config": "x"}'])
def test_damaged_configuration_is_refused(planned, tmp_path, text):
    (tmp_path / planned.name).mkdir()
    (tmp_path / planned.name / "config.json").write_text(text)
    with pytest.raises(UsageError, match=f"{planned.name}: its config.json cannot be read"):
        check_resumable(tmp_path / planned.name, as_dict(planned.config))


def test_folder_with_results_of_another_configuration_is_refused(planned, tmp_path):
    folder, wanted = tmp_path / planned.name, as_dict(planned.config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": {**wanted, "seed": 7}}))
    assert check_resumable(folder, wanted) == {}
    (folder / "eval.csv").write_text("variant,seed,step\nnone,7,100\n")
    with pytest.raises(UsageError, match=f"{planned.name}: .*another configuration .seed: 7 -> 0"):
        check_resumable(folder, wanted)
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"contains eval\.csv but no config\.json"):
        check_resumable(folder, wanted)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "launch/studies").glob("*.toml")), ids=lambda p: p.stem
)
def test_shipped_studies_load(path):
    plan = study.load(path)
    if path.stem == "levers":
        assert {run.config.agent_name for run in plan.runs} == {"sac", "simba", "bro"}
        assert all(run.config.task.repeat == 2 for run in plan.runs)
        return
    if path.stem == "agent":
        assert len(plan.runs) == 5 * 3 * 2 and {r.config.seed for r in plan.runs} == {3000, 3001}
        assert {run.config.algo for run in plan.runs} == {"model-free"}
        return
    if path.stem == "seven":
        # Seeds of model-free, `none` and `scale,target` on five and on two tasks.
        assert len(plan.runs) == 5 * (5 + 3 + 3) + 2 * (3 + 2 + 2)
        arms = {(r.config.env, r.config.algo, r.config.variants, r.config.seed) for r in plan.runs}
        assert len(arms) == len(plan.runs)
        assert all(run.config.steps == 50_000 and run.config.seeds == 1 for run in plan.runs)
        # The first third of the study has every arm on every task.
        assert [r.config.seed for r in plan.runs[:22]] == [1000] * 21 + [1001]
        return
    if path.stem == "seven-pilot":
        assert len(plan.runs) == 2 * 3 * 11  # test_pilot.py checks the arms
        return
    if path.stem == "seven-sac":
        assert all(run.config.agent.critic_layer_norm for run in plan.runs)
        fixes = [run.config.variants[0].fixes for run in plan.runs]
        assert fixes == [(), (), ("scale", "target")] * 2
        return
    if path.stem == "cheetah-run-medium":
        assert {r.config.seed for r in plan.runs} == set(range(1000, 1005))
        assert [r.config.algo for r in plan.runs] == ["model-free", "dynajax"] * 5
        return
    assert len(plan.runs) == 2 * len({run.config.env for run in plan.runs})
    assert {run.config.algo for run in plan.runs} == {"mbpo", "model-free"}
    if path.stem.startswith("paper"):
        assert all(run.config.seeds == 6 and run.config.preset == "paper" for run in plan.runs)


def test_each_agent_and_trust_rule_is_a_run(tmp_path, monkeypatch):
    """Set fields of one agent or trust rule only in the runs that have them."""

    class Other(complete(agents.Agent)):
        @config.fields
        class Fields:
            width: int = config.static(8, 1)

    monkeypatch.setitem(agents.AGENTS, "other", Other)
    text = STUDY.replace(
        '"model-free"]\n',
        '"model-free"]\nagents = ["sac", "other"]\ntrust = ["none", "penalty"]\n',
    )
    text += "agent.width = 16\ntrust.scale = 0.5\n[vary]\nagent.polyak = [0.1, 0.2]\n"
    runs = {run.name: run for run in study.load(write(tmp_path, text)).runs}
    assert list(runs) == [
        "Pendulum-v1-mbpo-sac",
        "Pendulum-v1-mbpo-sac-penalty",
        "Pendulum-v1-mbpo-other",
        "Pendulum-v1-mbpo-other-penalty",
        "Pendulum-v1-sac",
        "Pendulum-v1-other",
    ]
    for name, run in runs.items():
        c, other = run.config, "other" in name
        assert (c.agent_name, c.trust_name == "penalty") == (
            "other" if other else "sac",
            "penalty" in name,
        )
        assert (c.agent.width if other else c.agent.hidden) == (16 if other else (8, 8))
        assert len(c.variants) == (1 if other else 2) * (2 if c.has_model else 1)
        assert f"--agent={c.agent_name}" in run.flags
        # Without a model there is no trust rule.
        assert (f"--trust={c.trust_name}" in run.flags) == c.has_model
        assert ("--set=trust.scale=0.5" in run.flags) == ("penalty" in name)


def test_trust_rule_of_an_algorithm_gets_its_fields(tmp_path):
    """Set fields of a trust rule also where the rule is the algorithm's."""
    text = STUDY.replace('"model-free"]\n', '"m2ac"]\n') + "trust.scale = 0.5\n"
    runs = {run.config.algo: run for run in study.load(write(tmp_path, text)).runs}
    assert runs["m2ac"].config.trust_name == "m2ac" and runs["m2ac"].config.trust.scale == 0.5
    assert runs["mbpo"].config.trust_name == "none"
    assert "--set=trust.scale=0.5" not in runs["mbpo"].flags


def test_arms_override_keys_of_the_study(tmp_path):
    text = """
tasks = ["Pendulum-v1"]
agents = ["simba"]
seeds = 2
[settings]
agent.actor_width = 32
learn.utd = 4
[arms.model-free]
algorithms = ["model-free"]
[arms.paper]
algorithms = ["model-free"]
agents = ["sac"]
settings = { learn.utd = 2 }
[arms.on-the-fly]
fixes = ["none", "scale"]
settings = { rollout.source = "on_the_fly" }
"""
    plan = study.load(write(tmp_path, text))
    assert [run.name for run in plan.runs] == [
        "Pendulum-v1-simba-model-free",
        "Pendulum-v1-sac-paper",
        "Pendulum-v1-mbpo-simba-on-the-fly",
    ]
    model_free, paper, on_the_fly = (run.config for run in plan.runs)
    assert (model_free.agent.actor_width, model_free.learn.utd) == (32, 4)
    assert not model_free.has_model
    assert (paper.agent_name, paper.learn.utd) == ("sac", 2)  # simba's settings do not apply
    assert on_the_fly.rollout.source == "on_the_fly" and on_the_fly.num_learners == 4
    assert on_the_fly.agent.actor_width == 32
    with pytest.raises(UsageError, match=r"arms.paper: settings.learn.utdd: .*utdd"):
        study.load(write(tmp_path, text.replace("utd = 2", "utdd = 2")))
    with pytest.raises(UsageError, match=r"arms.model-free.resources: it belongs to the study"):
        study.load(
            write(
                tmp_path,
                text.replace('algorithms = ["model-free"]\n[arms.p', "resources = {}\n[arms.p"),
            )
        )


def test_seeds_per_run_splits_seeds_into_runs(tmp_path):
    path = write(
        tmp_path, STUDY.replace("steps = 400", "seeds = 5\nfirst_seed = 1\nseeds_per_run = 2")
    )
    runs = [run for run in study.load(path).runs if run.config.algo == "model-free"]
    assert [(r.name, r.config.seed, r.config.seeds) for r in runs] == [
        ("Pendulum-v1-sac-seed-1", 1, 2),
        ("Pendulum-v1-sac-seed-3", 3, 2),
        ("Pendulum-v1-sac-seed-5", 5, 1),
    ]
    assert "--seed=5" in runs[-1].flags and "--seeds=1" in runs[-1].flags


def test_processes_share_gpus():
    assert backends.share_gpus([], 0, 2) == {}
    assert [backends.share_gpus(["0", "1", "2"], k, 2)["CUDA_VISIBLE_DEVICES"] for k in (0, 1)] == [
        "0,2",
        "1",
    ]
    shared = [backends.share_gpus(["7"], k, 2) for k in (0, 1)]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in shared] == ["7", "7"]
    assert all(float(s["XLA_CLIENT_MEM_FRACTION"]) <= 0.45 for s in shared)


def test_processes_share_cores():
    assert [backends.share_cores({4, 1, 2}, k, 2) for k in (0, 1)] == [{1, 4}, {2}]
    assert backends.share_cores({3, 5}, 0, 1) == {3, 5}
    assert [backends.share_cores({3, 5}, k, 4) for k in range(4)] == [{3}, {5}, {3}, {5}]


def test_run_uses_only_its_cores(tmp_path):
    job = Job("run", (), str(tmp_path), (str(tmp_path / "script.py"),), str(tmp_path), 1)
    Path(*job.program).write_text("import os; print('cores', *os.sched_getaffinity(0))")
    (tmp_path / "launch").mkdir()
    core = max(os.sched_getaffinity(0))
    assert JobRunner(job).complete(cores={core}) == "done"
    assert f"cores {core}\n" in (tmp_path / "launch" / "run.log").read_text()


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Iterator[Path]:
    """Put fake SLURM commands on PATH: sbatch keeps the script, scontrol knows only job 17."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "sbatch": f'bash -n "$1" && cp "$1" {tmp_path}/script.sh && echo "Submitted batch job 17"',
        "srun": "exit 1",
        "scontrol": '[ "$4" = 17 ] && echo "JobId=17 JobState=PENDING Reason=None" '
        '|| { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    yield tmp_path


def test_slurm_script_has_resources_and_options(slurm):
    text = STUDY + '\n[resources]\ncpus = 8\ngpus = 1\nhours = 12\n[slurm]\npartition = "gpu"\n'
    plan = study.load(write(slurm, text))
    out = slurm / "out"
    job = Job("a", plan.runs[0].flags, str(out), ("run.py",), str(slurm), 3)
    pool = backends.executor("slurm", plan, out)
    handle = pool.submit(backends.Resumable(tuple(job)))
    script = (slurm / "script.sh").read_text()
    for option in (
        "time=720",
        "cpus-per-task=8",
        "gpus-per-node=1",
        "partition=gpu",
        "signal=USR2@120",
        "job-name=study",
        "open-mode=append",
    ):
        assert f"#SBATCH --{option}\n" in script
    assert "#SBATCH --requeue\n" in script
    assert sys.executable in script
    # A later launcher finds the job if it is still in the queue.
    status.write_note(out, "a", state="queued", job=handle.job_id)
    assert backends._find_queued("slurm", pool, job).job_id == "17"
    status.write_note(out, "a", job="16")
    assert backends._find_queued("slurm", pool, job) is None


def test_job_that_sbatch_refuses_is_one_line(slurm):
    """Refuse a partition that does not exist, as sbatch does."""
    (slurm / "bin" / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: invalid partition specified: gqu' >&2\nexit 1\n"
    )
    plan = study.load(write(slurm, STUDY + '\n[slurm]\npartition = "gqu"\n'))
    job = Job("a", plan.runs[0].flags, str(slurm / "out"), ("run.py",), str(slurm), 3)
    with pytest.raises(UsageError, match=r"--on=slurm: a cannot be queued \(.*gqu.*\); correct"):
        next(backends.scheduler("slurm", [job], plan, slurm / "out", 1))
    assert status.read_note(slurm / "out", "a") == {}
