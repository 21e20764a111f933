"""Policies that are used without JAX, and the command that plays them."""

import contextlib
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import onnxruntime
import pytest

import dynajax
import scripts
from dynajax import agents
from dynajax.agents.sac import SAC
from dynajax.envs import mjx
from dynajax.policy import export, play, standalone
from dynajax.policy.policy import Policy
from dynajax.report import statistics
from dynajax.types import EnvSpec, UsageError
from test_policy import OF_AGENT, trained

ROOT = Path(__file__).parents[1]
SPEC = EnvSpec("walk", 5, 2, 50, tuple("abcde"), None, ((-1.0, -0.4), (1.0, 3.0)))


def policy_of(agent: str, **settings) -> Policy:
    """A policy of networks whose every number is drawn, and statistics of odd observations."""
    own = {f"agent.{name}": value for name, value in settings.items()}
    config = dynajax.make_config(
        "walk", algo="model-free", agent=agent, preset="paper", settings=OF_AGENT[agent] | own
    )
    bound = agents.make_agent(config, SPEC)
    state = bound.new(jax.random.PRNGKey(1))
    rng = np.random.default_rng(0)
    noise = lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    state = state._replace(actor=jax.tree.map(noise, state.actor))
    for obs in rng.normal(size=(20, 5)) * [1, 0, 1e3, 1e-3, 1] + [0, 4, 1e3, 0, 0]:
        state = bound.update_obs_statistics(state, np.float32(obs), True)
    return Policy(SPEC, 1, "none", 0, 10, 1.0, bound, bound.policy(state))


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
def test_numpy_alone_gives_the_same_actions(tmp_path, agent, settings):
    policy = policy_of(agent, **settings)
    export.export(policy, tmp_path / "deep" / "policy.npz")
    alone = standalone.load_policy(tmp_path / "deep" / "policy.npz")
    obs, want = observations(), policy(observations())
    assert np.ptp(want[..., 1]) > 0.5
    got = alone(obs)
    assert got.dtype == np.float32 and got.shape == (3, 40, 2)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(alone(obs[0, 0]), want[0, 0], atol=1e-5)


@pytest.mark.parametrize(("agent", "settings"), VARIANTS)
def test_onnx_gives_the_same_actions(tmp_path, agent, settings):
    policy = policy_of(agent, **settings)
    export.export(policy, tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    obs = observations().reshape(-1, 5).astype(np.float32)
    (got,) = session.run(["action"], {"obs": obs})
    np.testing.assert_allclose(got, policy(obs), atol=1e-5)


def test_the_function_that_users_copy_is_short_and_the_pages_is_the_same():
    source = Path(standalone.__file__).read_text()
    body = source[source.index("def load_policy") :]
    assert len(body.splitlines()) < 40
    assert set(re.findall(r"(?m)^ *(?:import|from) .*", source)) == {"import numpy as np"}
    page = (ROOT / "docs" / "using-a-policy.md").read_text()
    assert body.strip() in page


def test_the_file_works_where_there_is_no_dynajax(tmp_path):
    policy = policy_of("simba")
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


def test_what_cannot_be_exported_gets_one_line(tmp_path, monkeypatch):
    policy = policy_of("sac")
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
    """A run of two seeds."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    trained(folder, "sac", steps=60, algo="model-free", seeds=2)
    return folder


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """`dynajax play` in this process: status, what it printed, and its errors."""
    monkeypatch.chdir(tmp_path)
    with scripts.loaded(ROOT / "experiments" / "play.py") as script:

        def called(*words):
            status = scripts.run(script, monkeypatch, *map(str, words))
            return status, *capsys.readouterr()

        yield called


def test_playing_says_what_episodes_return(run, command):
    status, out, err = command(run, "--episodes=3", "--which=last")
    assert (status, err) == (0, "")
    name, returns, mean, *of_second = out.splitlines()
    assert len(of_second) == 3 and of_second[0].startswith(f"{run}, learner 1: none, seed 1")
    policy = dynajax.load_policy(run, 0, "last")
    assert name == f"{run}, learner 0: none, seed 0, last policy, at step 60"
    numbers = [float(x) for x in re.findall(r"-?[\d.]*\d", mean.replace(",", ""))]
    values = [
        float(text.replace(",", "")) for text in returns.removeprefix("  returns ").split(", ")
    ]
    point, level, low, high, said = numbers
    expected = statistics.interval(values)
    np.testing.assert_allclose([point, low, high], expected, atol=0.2)
    assert (level, said) == (95, round(policy.score, 1))
    assert command(run, "--episodes=3", "--which=last")[1] == out


def test_another_task_of_the_same_shapes(run, command):
    status, out, _ = command(run, "--row=1", "--episodes=1", "--env=Pendulum-v1")
    assert status == 0 and " on Pendulum-v1; the evaluation during training gave" in out
    status, out, err = command(run, "--row=1", "--env=cartpole-swingup")
    assert (status, out) == (2, "")
    assert err == (
        "error: --env=cartpole-swingup: it has 5 observations and 1 actions, and a policy of "
        "Pendulum-v1 takes 3 and 1\n"
    )


LIMIT, END = 30, 1.4


def drifting() -> mjx.Task:
    """The state drifts to `END`, faster by the action, which is the reward too."""
    spec = EnvSpec("Drift", 1, 1, LIMIT, ("x",), lambda obs, action, new: new[0] > END)

    def reset(key):
        x = jax.random.uniform(key, (1,))
        return mjx.EnvState(x, x)

    def step(state, action):
        x = state.physics + 0.05 * (2 + action)
        return mjx.EnvState(x, x), action[0], x[0] > END

    return mjx.Task(spec, reset, step)


def test_a_task_of_the_device_alone_is_played_there(command, tmp_path, monkeypatch):
    mjx.register_mjx_task("Drift", drifting)
    try:
        trained(tmp_path / "run", "sac", steps=60, algo="model-free", env="Drift", engine="mjx")
        status, out, err = command(tmp_path / "run", "--episodes=3")
        assert (status, err) == (0, "")
        played = [float(x) for x in out.splitlines()[1].removeprefix("  returns ").split(", ")]
        policy = dynajax.load_policy(tmp_path / "run")
        config, spec = play.task(policy, None, 3, 1000)
        evaluation = play.episodes(policy, config, spec, 0)
        np.testing.assert_allclose(evaluation.returns[0], played, atol=0.06)
        # The same by hand, from starts that differ.
        ends = []
        for i in range(3):
            x = float(evaluation.starts[0, i, 0])
            total = steps = 0
            while x <= END and steps < LIMIT:
                action = float(policy.unit(np.array([x]))[0])
                total, steps, x = total + action, steps + 1, x + 0.05 * (2 + action)
            ends.append((total, steps))
        np.testing.assert_allclose(evaluation.returns[0], [e[0] for e in ends], atol=1e-4)
        assert evaluation.lengths[0].tolist() == [e[1] for e in ends]
        assert len(set(evaluation.starts.ravel().tolist())) == 3
        assert command(tmp_path / "run", "--video")[2].startswith("error: --video: the pictures")
        monkeypatch.setenv("DISPLAY", ":9")
        monkeypatch.setattr("glfw.init", lambda: True)
        assert "Drift is on the device alone" in command(tmp_path / "run", "--view")[2]
    finally:
        del mjx.TASKS["Drift"]


AGENT = """
import gymnasium, dynajax
from dynajax.agents.sac import SAC

class Mine(SAC):
    pass

dynajax.AGENTS["own"] = Mine
gymnasium.register("Own-v0", "gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=9)
"""


def test_an_agent_that_the_tasks_module_registers(command, tmp_path, monkeypatch):
    (tmp_path / "own_agent.py").write_text(AGENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(dynajax.AGENTS, "own", SAC)
    trained(
        tmp_path / "run", "sac", steps=60, algo="model-free", env="own_agent:Own-v0", named="own"
    )
    # As in another process, which knows nothing of it yet.
    monkeypatch.delitem(dynajax.AGENTS, "own")
    monkeypatch.delitem(sys.modules, "own_agent")
    status, out, err = command(tmp_path / "run", "--episodes=2")
    assert (status, err) == (0, "") and "mean" in out
    assert dynajax.load_policy(tmp_path / "run").agent.__class__.__name__ == "Mine"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--view"], "--view: there is no display"),
        (["--row=2"], "row=2: "),
        (["--export=policy.npz"], "--export=policy.npz: one policy at a time"),
        (["--env=nothing", "--row=0"], "--env=nothing: no such task; the nearest is"),
    ],
)
def test_what_cannot_be_done_gets_one_line(run, command, monkeypatch, words, line):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    status, out, err = command(run, *words)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {line}") and err.count("\n") == 1


def test_a_display_that_is_none_gets_one_line(run, command, monkeypatch):
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":4242")
    status, out, err = command(run, "--view")
    assert (status, out) == (2, "")
    assert err.startswith("error: --view: the display cannot be used (") and ":4242" in err
    assert err.count("\n") == 1


def test_an_export_says_where_its_function_is(run, command, tmp_path):
    status, out, _ = command(run, "--row=0", "--export=~/policy.npz".replace("~", str(tmp_path)))
    assert status == 0
    assert (
        out
        == f"written: {tmp_path}/policy.npz; the function that reads it: {standalone.__file__}\n"
    )
    obs = np.ones((2, 3))
    alone = standalone.load_policy(tmp_path / "policy.npz")
    np.testing.assert_allclose(alone(obs), dynajax.load_policy(run)(obs), atol=1e-5)


def test_the_viewer_is_shown_every_step(monkeypatch):
    """With a window that is closed in the second episode; its thread is over before we go on."""
    import mujoco.viewer

    shown, closed, over = [], threading.Event(), threading.Event()

    def window():
        closed.wait(60)
        threading.Event().wait(0.2)
        over.set()

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
        spec=EnvSpec("InvertedPendulum-v4", 4, 1, 1000, (), None), repeat=1, unit=lambda obs: [1.0]
    )
    config, _ = play.task(policy, None, 9, 1000)
    assert play.view(policy, config, 0) > 1
    assert over.is_set()
    assert len(shown) == 7 and np.std(shown, 0).min() > 0
    pendulum = SimpleNamespace(
        spec=EnvSpec("Pendulum-v1", 3, 1, 200, (), None), repeat=1, unit=lambda obs: [1.0]
    )
    config, _ = play.task(pendulum, None, 1, 1000)
    with pytest.raises(UsageError, match="--view: Pendulum-v1 is no task of MuJoCo's"):
        play.view(pendulum, config, 0)


def test_a_film_of_a_policy(run, command):
    """Of a task that draws without OpenGL."""
    status, out, _ = command(run, "--row=0", "--episodes=1", "--video")
    assert status == 0
    film = run / "video-none-seed0-best.mp4"
    assert f"video: {film}" in out and film.stat().st_size > 1000
