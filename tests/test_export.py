"""Exported policies without JAX, and the command `dynajax play`."""

import contextlib
import errno
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import onnxruntime
import pytest

import dynajax
import scripts
from dynajax import agents, envs
from dynajax.agents.sac import SAC
from dynajax.envs import mjx
from dynajax.envs.vector import episode_seed
from dynajax.policy import export, play, standalone
from dynajax.policy.policy import Policy
from dynajax.report import statistics
from dynajax.types import EnvSpec, UsageError
from sizes import NETWORKS
from test_policy import train

ROOT = Path(__file__).parents[1]
SPEC = EnvSpec("walk", 5, 2, 50, tuple("abcde"), None, ((-1.0, -0.4), (1.0, 3.0)))


def random_policy(agent_name: str, **settings) -> Policy:
    """Return a policy with random parameters, and statistics of badly scaled observations."""
    settings = {f"agent.{name}": value for name, value in settings.items()}
    config = dynajax.make_config(
        "walk",
        algo="model-free",
        agent=agent_name,
        preset="paper",
        settings=NETWORKS[agent_name] | settings,
    )
    agent = agents.make_agent(config, SPEC)
    state = agent.init(jax.random.PRNGKey(1))
    rng = np.random.default_rng(0)

    def add_noise(x):
        return x + 0.3 * rng.normal(size=x.shape).astype(np.float32)

    state = state._replace(actor=jax.tree.map(add_noise, state.actor))
    for obs in rng.normal(size=(20, 5)) * [1, 0, 1e3, 1e-3, 1] + [0, 4, 1e3, 0, 0]:
        state = agent.update_obs_statistics(state, np.float32(obs), True)
    return Policy(SPEC, 1, "none", 0, 10, 1.0, agent, agent.policy(state))


VARIANTS = [
    ("sac", {}),
    ("sac", {"hidden": (4,)}),
    ("simba", {}),
    ("simba", {"actor_blocks": 2, "clip": 1.0}),
    ("simba", {"normalise": False}),
    ("bro", {"actor_blocks": 2}),
]


def observations() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, 40, 5)) * [1, 1, 2e3, 1e-3, 1]


@pytest.mark.parametrize(("agent", "settings"), VARIANTS)
def test_numpy_export_gives_the_same_actions(tmp_path, agent, settings):
    policy = random_policy(agent, **settings)
    export.export(policy, tmp_path / "deep" / "policy.npz")
    exported = standalone.load_policy(tmp_path / "deep" / "policy.npz")
    obs, want = observations(), policy(observations())
    assert np.ptp(want[..., 1]) > 0.5
    got = exported(obs)
    assert got.dtype == np.float32 and got.shape == (3, 40, 2)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(exported(obs[0, 0]), want[0, 0], atol=1e-5)


@pytest.mark.parametrize(("agent", "settings"), VARIANTS)
def test_onnx_export_gives_the_same_actions(tmp_path, agent, settings):
    policy = random_policy(agent, **settings)
    export.export(policy, tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    obs = observations().reshape(-1, 5).astype(np.float32)
    (got,) = session.run(["action"], {"obs": obs})
    np.testing.assert_allclose(got, policy(obs), atol=1e-5)


def test_standalone_function_is_short_and_in_the_documentation():
    source = Path(standalone.__file__).read_text()
    body = source[source.index("import json") :]
    assert len(body.splitlines()) < 100
    imports = set(re.findall(r"(?m)^ *(?:import|from) .*", source))
    assert imports == {"import json", "import numpy as np"}
    text = (ROOT / "docs" / "using-a-policy.md").read_text()
    assert body.strip() in text


def test_standalone_function_does_not_need_dynajax(tmp_path):
    policy = random_policy("simba")
    export.export(policy, tmp_path / "policy.npz")
    (tmp_path / "copied.py").write_text(Path(standalone.__file__).read_text())
    code = (
        "import sys; sys.modules['jax'] = sys.modules['dynajax'] = None; import copied;"
        "print(*copied.load_policy('policy.npz')([1, 2, 3, 0, 1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    got = np.array(done.stdout.split(), float)
    np.testing.assert_allclose(got, policy(np.array([1, 2, 3, 0, 1.0])), atol=1e-5)


def test_export_errors(tmp_path, monkeypatch):
    policy = random_policy("sac")
    with pytest.raises(UsageError, match=r"must end in \.npz or \.onnx"):
        export.export(policy, tmp_path / "policy.pt")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match="ONNX is not installed"):
        export.export(policy, tmp_path / "policy.onnx")
    monkeypatch.setattr(SAC, "layers", dynajax.Agent.layers)
    with pytest.raises(UsageError, match="SAC: this agent cannot be exported yet"):
        export.export(policy, tmp_path / "policy.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the directory of a run with two seeds."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    train(folder, "sac", steps=60, algo="model-free", seeds=2)
    return folder


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Return a function that runs `dynajax play` here and returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    with scripts.loaded(ROOT / "experiments" / "play.py") as script:

        def run_play(*arguments):
            status = scripts.run(script, monkeypatch, *map(str, arguments))
            return status, *capsys.readouterr()

        yield run_play


def test_play_prints_returns(run, command):
    status, out, err = command(run, "--episodes=3", "--which=last")
    assert (status, err) == (0, "")
    name, returns, mean, *second = out.splitlines()
    assert len(second) == 3 and second[0].startswith(f"{run}, learner 1: none, seed 1")
    policy = dynajax.load_policy(run, 0, "last")
    assert name == f"{run}, learner 0: none, seed 0, last policy, at step 60"
    numbers = [float(x) for x in re.findall(r"-?[\d.]*\d", mean.replace(",", ""))]
    values = [
        float(text.replace(",", "")) for text in returns.removeprefix("  returns ").split(", ")
    ]
    point, level, low, high, evaluation = numbers
    expected = statistics.interval(values)
    np.testing.assert_allclose([point, low, high], expected, atol=0.2)
    assert (level, evaluation) == (95, round(policy.score, 1))
    assert command(run, "--episodes=3", "--which=last")[1] == out


def test_play_another_task_of_the_same_sizes(run, command):
    status, out, _ = command(run, "--learner=1", "--episodes=1", "--env=Pendulum-v1")
    assert status == 0 and " on Pendulum-v1; the evaluation during training gave" in out
    status, out, err = command(run, "--learner=1", "--env=cartpole-swingup")
    assert (status, out) == (2, "")
    assert err == (
        "error: --env=cartpole-swingup: it has 5 observation and 1 action dimensions, but the policy "
        "of Pendulum-v1 takes 3 and 1\n"
    )


LIMIT, END = 30, 1.4


def drift_task() -> mjx.Task:
    """Return a task whose state drifts to `END`; the action adds to the drift and is the reward."""
    spec = EnvSpec("Drift", 1, 1, LIMIT, ("x",), lambda obs, action, new: new[0] > END)

    def reset(key):
        x = jax.random.uniform(key, (1,))
        return mjx.EnvState(x, x)

    def step(state, action):
        x = state.physics + 0.05 * (2 + action)
        return mjx.EnvState(x, x), action[0], x[0] > END

    return mjx.Task(spec, reset, step)


def test_play_a_task_that_exists_only_on_the_device(command, tmp_path, monkeypatch):
    mjx.register_mjx_task("Drift", drift_task)
    try:
        train(tmp_path / "run", "sac", steps=60, algo="model-free", env="Drift", engine="mjx")
        status, out, err = command(tmp_path / "run", "--episodes=3")
        assert (status, err) == (0, "")
        played = [float(x) for x in out.splitlines()[1].removeprefix("  returns ").split(", ")]
        policy = dynajax.load_policy(tmp_path / "run")
        config, spec = play.configure(policy, None, 3, 1000)
        evaluation = play.episodes(policy, config, spec, 0)
        np.testing.assert_allclose(evaluation.returns[0], played, atol=0.06)
        # Compute the same episodes in Python; their start states differ.
        ends = []
        for i in range(3):
            x = float(evaluation.starts[0, i, 0])
            total = steps = 0
            while x <= END and steps < LIMIT:
                action = float(policy.normalized_action(np.array([x]))[0])
                total, steps, x = total + action, steps + 1, x + 0.05 * (2 + action)
            ends.append((total, steps))
        np.testing.assert_allclose(evaluation.returns[0], [e[0] for e in ends], atol=1e-4)
        assert evaluation.lengths[0].tolist() == [e[1] for e in ends]
        assert len(set(evaluation.starts.ravel().tolist())) == 3
        assert command(tmp_path / "run", "--video")[2].startswith(
            "error: --video: only host environments"
        )
        monkeypatch.setenv("DISPLAY", ":9")
        monkeypatch.setattr("glfw.init", lambda: True)
        assert (
            "--view: only host environments can be shown" in command(tmp_path / "run", "--view")[2]
        )
    finally:
        del mjx.TASKS["Drift"]


AGENT = """
import gymnasium, dynajax
from dynajax.agents.sac import SAC

class CustomAgent(SAC):
    pass

dynajax.AGENTS["custom"] = CustomAgent
gymnasium.register("Custom-v0", "gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=9)
"""


def test_agent_registered_by_the_module_of_the_task(command, tmp_path, monkeypatch):
    (tmp_path / "custom_agent.py").write_text(AGENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(dynajax.AGENTS, "custom", SAC)
    train(
        tmp_path / "run",
        "sac",
        steps=60,
        algo="model-free",
        env="custom_agent:Custom-v0",
        named="custom",
    )
    # As in another process, which has not imported the module yet.
    monkeypatch.delitem(dynajax.AGENTS, "custom")
    monkeypatch.delitem(sys.modules, "custom_agent")
    status, out, err = command(tmp_path / "run", "--episodes=2")
    assert (status, err) == (0, "") and "mean" in out
    assert dynajax.load_policy(tmp_path / "run").agent.__class__.__name__ == "CustomAgent"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--view"], "--view: there is no display"),
        (["--learner=2"], "--learner=2: "),
        (["--export=policy.npz"], "--export=policy.npz: one policy at a time"),
        (["--env=nothing", "--learner=0"], "--env=nothing: no such task; the nearest is"),
        (["--export=x.npz", "--episodes=3"], "--episodes=3: it has no effect with --export"),
        (["--export=x.npz", "--seed=4"], "--seed=4: it has no effect with --export"),
        (["--export=x.npz", "--env=a"], "--env=a: it has no effect with --export"),
        (["--export=x.npz", "--video"], "--video: it has no effect with --export"),
        (["--export=x.npz", "--view"], "--view: it has no effect with --export"),
        (["--view", "--video"], "--video: it has no effect with --view; leave it out"),
    ],
)
def test_play_errors_are_one_line(run, command, monkeypatch, arguments, line):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    status, out, err = command(run, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {line}") and err.count("\n") == 1


def test_unusable_display_is_one_line(run, command, monkeypatch):
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":4242")
    status, out, err = command(run, "--view")
    assert (status, out) == (2, "")
    assert err.startswith("error: --view: the display cannot be used (") and ":4242" in err
    assert err.count("\n") == 1


def test_export_prints_the_location_of_the_standalone_function(run, command, tmp_path):
    status, out, _ = command(
        run, "--learner=0", "--export=~/policy.npz".replace("~", str(tmp_path))
    )
    assert status == 0
    assert (
        out
        == f"written: {tmp_path}/policy.npz; the function that reads it: {standalone.__file__}\n"
    )
    obs = np.ones((2, 3))
    exported = standalone.load_policy(tmp_path / "policy.npz")
    np.testing.assert_allclose(exported(obs), dynajax.load_policy(run)(obs), atol=1e-5)


def test_viewer_shows_every_step(monkeypatch):
    """The window is closed in the second episode, and `view` waits until its thread has ended."""
    import mujoco.viewer

    shown, closed, ended = [], threading.Event(), threading.Event()

    def window():
        closed.wait(60)
        threading.Event().wait(0.2)
        ended.set()

    @contextlib.contextmanager
    def handle(data):
        yield SimpleNamespace(
            sync=lambda: shown.append(data.qpos.copy()),
            is_running=lambda: len(shown) < 7,
            cam=mujoco.MjvCamera(),
        )
        closed.set()

    def launch(model, data, **panels):
        threading.Thread(target=window, daemon=True).start()
        return handle(data)

    monkeypatch.setattr(mujoco.viewer, "launch_passive", launch)
    monkeypatch.setattr(play.time, "sleep", lambda seconds: None)
    policy = SimpleNamespace(
        spec=EnvSpec("InvertedPendulum-v4", 4, 1, 1000, (), None),
        repeat=1,
        seed=0,
        normalized_action=lambda obs: [1.0],
    )
    config, _ = play.configure(policy, None, 9, 1000)
    assert play.view(policy, config, 0) > 1
    assert ended.is_set()
    assert len(shown) == 7 and np.std(shown, 0).min() > 0
    pendulum = SimpleNamespace(
        spec=EnvSpec("Pendulum-v1", 3, 1, 200, (), None),
        repeat=1,
        seed=0,
        normalized_action=lambda obs: [1.0],
    )
    config, _ = play.configure(pendulum, None, 1, 1000)
    with pytest.raises(UsageError, match="--view: Pendulum-v1 is not a MuJoCo task"):
        play.view(pendulum, config, 0)


def test_play_records_a_video(run, command):
    """Use a task that renders without OpenGL."""
    status, out, _ = command(run, "--learner=0", "--episodes=1", "--video")
    assert status == 0
    video = run / "video-none-seed0-best.mp4"
    assert f"video: {video}" in out and video.stat().st_size > 1000


def test_folder_of_a_video_is_checked_before_the_episodes(run, command, monkeypatch):
    def denied(dir):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    status, out, err = command(run, "--learner=0", "--video")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(
        f"error: --video: {run}: the folder cannot be written (Permission denied); make it writable"
    )


def test_failed_encoder_gives_one_line_and_leaves_nothing(run, command, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    name = "video-none-seed0-best.mp4"
    (folder / name).unlink(missing_ok=True)
    (folder / f".{name}").symlink_to("/dev/full")
    status, _, err = command(folder, "--learner=0", "--episodes=1", "--video")
    assert status == 2 and err.splitlines()[-1].startswith(
        f"error: --video: {name} cannot be written into {folder} ("
    )
    assert not list(folder.glob("*.mp4")) and not list(folder.glob(".*.mp4"))


@pytest.mark.parametrize("evaluate_on", ["copies", "training"])
def test_task_has_the_seed_of_the_learner_and_episodes_another(evaluate_on, monkeypatch):
    """The dynamics of lqr are sampled when the task is loaded."""
    policy = SimpleNamespace(
        spec=EnvSpec("lqr-lqr_2_1", 4, 1, 20, (), None),
        repeat=1,
        seed=5,
        evaluate_on=evaluate_on,
        normalized_action=lambda obs: np.zeros((*np.shape(obs)[:-1], 1)),
    )
    config, spec = play.configure(policy, None, 2, 20)
    assert config.seed == 5  # the task of a video
    played = play.episodes(policy, config, spec, 7).returns[0]
    env = envs.make("lqr-lqr_2_1", time_limit=20, seed=5)
    for episode, total in enumerate(played):
        env.reset(seed=episode_seed(7, "play", episode))
        assert total == pytest.approx(sum(env.step(np.zeros(1))[1] for _ in range(20)))
    monkeypatch.setattr(
        play.envs, "make", lambda name, *, seed, **_: pytest.fail(f"made with seed {seed}")
    )
    with pytest.raises(pytest.fail.Exception, match="made with seed 5"):
        play.view(policy, config, 7)


def test_play_of_a_run_with_a_damaged_configuration_is_refused_in_one_line(run, command, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    info = json.loads((folder / "config.json").read_text())
    for field, value in (("variants", [1]), ("learn", [1]), ("host", {})):
        changed = info | {"config": info["config"] | {field: value}}
        (folder / "config.json").write_text(json.dumps(changed))
        status, out, err = command(folder)
        assert (status, out) == (2, "")
        assert err == f"error: {folder}/config.json: not a run configuration\n"
