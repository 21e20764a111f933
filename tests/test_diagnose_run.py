"""Diagnosis of a run: known values, rebuilt states, and the report."""

import csv
import dataclasses
import fcntl
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

import dynajax
import scripts
from conftest import SMALL
from dynajax import config, envs, replay, report, settings
from dynajax.agents.sac import SAC, SACFields
from dynajax.config import LearnConfig
from dynajax.diagnose import loaded_run, offline, online, online_report, policy_rollouts
from dynajax.engines.oracle import Oracle
from dynajax.envs import mjx
from dynajax.report import statistics
from dynajax.types import EnvSpec, Transition, UsageError

GAMMA = 0.9


class Ones(gymnasium.Env):
    """Gives a reward of 1 in each step, and terminates after `ends` steps."""

    action_space = spaces.Box(-1.0, 1.0, (1,))
    observation_space = spaces.Box(-np.inf, np.inf, (1,))

    def __init__(self, ends=None):
        self.ends = ends

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1), {}

    def step(self, action):
        self.time += 1
        return np.array([self.time]), 1.0, self.time == self.ends, False, {}

    def snapshot(self):
        return np.array([self.time])

    def restore(self, values):
        self.time = int(values[0])


class NotRestorable(Ones):
    snapshot = restore = None


gymnasium.register("Ones-v0", Ones, max_episode_steps=8)
gymnasium.register("OnesEnd-v0", Ones, kwargs={"ends": 5}, max_episode_steps=8)
gymnasium.register("NotRestorable-v0", NotRestorable, kwargs={"ends": 5}, max_episode_steps=8)
dynajax.register_termination("OnesEnd-v0", lambda obs, action, new: new[0] >= 5)
dynajax.register_termination("NotRestorable-v0", lambda obs, action, new: new[0] >= 5)


# --- bias of the critic ------------------------------------------------------------------------


def test_soft_returns_by_hand():
    reward = np.array([[1.0, 1.0], [2.0, 2.0]])
    terminated = np.array([[False, True], [False, False]])
    log_prob = np.array([[9.0, 9.0], [-1.0, -1.0], [3.0, 3.0]])
    returns = policy_rollouts.soft_returns(
        reward, terminated, log_prob, np.array([10.0, 10.0]), 0.5, 2.0
    )
    # 1 + 0.5 ((2 + 0.5 (10 - 2 * 3)) - 2 * -1); the second path ends after its first reward.
    np.testing.assert_allclose(returns, [1 + 0.5 * ((2 + 0.5 * 4) + 2), 1.0])


def agent_with_value(value, log_temperature=-jnp.inf):
    """Return an agent whose critic has the same value everywhere, and its state."""
    spec = EnvSpec("ones", 1, 1, 8, ("x",), None)
    agent = SAC(LearnConfig(discount=GAMMA), SACFields(hidden=(4,)), spec)
    state = agent.init(jax.random.PRNGKey(0))
    head = state.critic["head"]
    head = {"kernel": jnp.zeros_like(head["kernel"]), "bias": jnp.full_like(head["bias"], value)}
    return agent, state._replace(
        critic={**state.critic, "head": head}, log_temperature=jnp.asarray(log_temperature)
    )


def follow(name, agent, state, steps=30):
    def act(obs, key):
        return agent.act(state, jnp.asarray(obs), agent.action_noise(key, obs.shape[:-1]))

    def begin(env, i):
        return env.reset(seed=i)[0]

    return policy_rollouts.follow(lambda: envs.make(name), begin, 5, act, steps, 0)


@pytest.mark.parametrize("share", [0.5, 1.0, 1.3])
def test_critic_bias_with_known_value(share):
    """A constant reward of 1 has the value 1 / (1 - gamma), in spite of the time limit of 8."""
    value = 1 / (1 - GAMMA)
    agent, state = agent_with_value(share * value)
    followed = follow("Ones-v0", agent, state)
    assert followed.alive.all() and followed.valid.all() and (followed.reward == 1).all()
    bias = online.critic_bias(agent, state, followed)
    # The critic's value replaces the return after 30 steps.
    expected = value * (1 - GAMMA**30) + GAMMA**30 * share * value
    assert bias["critic_return"] == pytest.approx(expected, rel=1e-5)
    assert bias["critic_bias"] == pytest.approx(share * value / expected - 1, abs=1e-5)
    assert bias["critic_bias_error"] == pytest.approx(0, abs=1e-6)


def test_critic_measures_do_not_depend_on_the_unit_of_the_reward():
    agent, state = agent_with_value(2.0)
    rng = np.random.default_rng(0)
    followed = follow("Ones-v0", agent, state)
    followed = followed._replace(
        reward=np.float32(rng.random(followed.reward.shape)),
        log_prob=np.zeros_like(followed.log_prob),
    )
    values = rng.random((2, 2, followed.obs.shape[1])).astype(np.float32)

    def measured(unit):
        with pytest.MonkeyPatch.context() as patch:
            each = iter(unit * values)
            patch.setattr(online, "_value", lambda *_: next(each))
            return online.critic_bias(
                agent, state, followed._replace(reward=np.float32(unit) * followed.reward)
            )

    one, small = measured(1.0), measured(1e-9)
    for name in ("critic_bias", "critic_bias_min", "critic_correlation", "critic_bias_error"):
        assert small[name] == pytest.approx(one[name], rel=1e-3), name


def test_return_ends_with_the_episode_and_has_the_entropy_bonus():
    agent, state = agent_with_value(0.0)
    followed = follow("OnesEnd-v0", agent, state)
    assert followed.terminated[4].all() and not followed.alive[5:].any()
    bias = online.critic_bias(agent, state, followed)
    assert bias["critic_return"] == pytest.approx(sum(GAMMA**k for k in range(5)), rel=1e-5)
    assert bias["critic_bias"] == pytest.approx(-1)
    agent, state = agent_with_value(0.0, jnp.log(2.0))
    soft = online.critic_bias(agent, state, followed)["critic_return"]
    bonus = sum(GAMMA**k * -2.0 * followed.log_prob[k].mean() for k in range(1, 5))
    assert soft == pytest.approx(bias["critic_return"] + bonus, rel=1e-5)


# --- checkpoints of a run -----------------------------------------------------------------------

SIZES = SMALL | {
    "eval.every": 100,
    "eval.episodes": 1,
    "eval.checkpoints": 3,
    "replay.real": 500,
    "random_steps": 100,
    "model.fit_every": 100,
    "host.time_limit": 60,
}


def trained(folder, env, **arguments):
    run = settings.make(
        env,
        preset="paper",
        settings=SIZES,
        steps=300,
        fixes=["none", "scale,auto,beta"],
        **arguments,
    )
    assert dynajax.train(run, folder, quiet=True).finished
    return folder


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run") / "hopper", "Hopper-v4")


def test_configuration_survives_json():
    made = settings.make(
        "cheetah-run",
        agent="sac",
        fixes=["scale,beta", "none"],
        vary={"model.learning_rate": [1e-3, 3e-4]},
        settings={"rollout.horizon": (20, 90, 1, 5), "agent.critic_layer_norm": True},
        seeds=3,
    )
    assert settings.from_dict(config.as_dict(made)) == made


def test_reader_loads_every_checkpoint(hopper):
    reader = loaded_run.Reader(hopper)
    assert reader.steps == [100, 200, 300]
    loaded = [reader.load(step) for step in reader.steps]
    assert [x.step for x in loaded] == reader.steps
    # The newest transition is inserted in the next step.
    assert [x.inserted for x in loaded] == [99, 199, 299]
    assert loaded[0].learner(1).model.num_fits == 0 and loaded[2].learner(1).model.num_fits == 2


def test_every_state_of_a_replay_buffer_is_rebuilt(hopper):
    reader = loaded_run.Reader(hopper)
    loaded = reader.load(300)
    for learner in range(2):
        data, valid = loaded_run.in_order(loaded.learner(learner).real_buffer, loaded.inserted)
        parts = loaded_run.episodes(data, valid, reader.spec.time_limit, loaded.host, learner)
        assert parts[0].number == 0 and parts[-1].stop == 299
        assert len(parts) > 5 and [e.number for e in parts] == list(range(len(parts)))
        for episode in parts[:-1]:
            assert data.discount[episode.stop - 1] == 0
        indices = np.arange(299)
        rebuilt = loaded_run.rebuild(loaded, learner, parts, indices, data)
        np.testing.assert_array_equal(rebuilt.indices, indices)
        assert rebuilt.differ == 0 and rebuilt.steps == 299
        env = envs.make("Hopper-v4")
        env.reset(seed=0)
        for index in (290, 3, 150):
            env.restore(rebuilt.states[index])
            next_obs, reward, *_ = env.step(data.action[index])
            assert loaded_run.same_bits(next_obs, data.next_obs[index])
            assert np.float32(reward) == data.reward[index]


def test_states_that_are_not_reproduced_are_left_out_and_counted(hopper):
    loaded = loaded_run.Reader(hopper).load(300)
    data, valid = loaded_run.in_order(loaded.learner(0).real_buffer, loaded.inserted)
    parts = loaded_run.episodes(data, valid, 1000, loaded.host, 0)
    second = parts[1]
    changed = data._replace(obs=data.obs.copy())
    at = second.start + 2
    changed.obs[at, 0] = np.nextafter(changed.obs[at, 0], np.float32(9))
    rebuilt = loaded_run.rebuild(loaded, 0, parts, np.arange(len(valid)), changed)
    missing = set(range(len(valid))) - set(rebuilt.indices.tolist())
    assert missing == set(range(at, second.stop)) and rebuilt.differ == len(missing)


def test_episode_numbers_after_a_ring_buffer_has_wrapped():
    """The buffer has the last ten transitions of five episodes of four steps, one of them invalid."""
    obs = np.float32([[10 * (t // 4) + t % 4] for t in range(20)])
    new = obs + 1
    valid = np.ones(20, bool)
    valid[15] = False
    obs[15], new[15] = 0, 0
    data = Transition(obs, np.zeros((20, 1)), np.zeros(20), np.ones(20), new)
    last = Transition(*(x[9:19] for x in data))
    host = {
        "episode": np.array([5]),
        "length": np.array([0]),
        "pending.obs": obs[19:],
        "pending.valid": np.array([True]),
    }
    parts = loaded_run.episodes(last, valid[9:19], 4, host, 0)
    assert parts == [(2, 0, 3), (3, 3, 7), (4, 7, 10)]


def test_inspect_measures_a_run_and_reports_it(hopper, tmp_path):
    reader = loaded_run.Reader(hopper)
    loaded = reader.load(300)
    findings = [online.inspect(loaded, index, steps=5, starts=8) for index in range(2)]
    for f in findings:
        assert f.numbers["not_reproduced"] == 0 and f.numbers["resimulated"] > 0
        assert f.numbers["synthetic_checked"] > 30
        for name in (
            "critic_bias",
            "policy_reward_r2",
            "counterfactual_state_r2",
            "synthetic_reward_r2",
            "replay_reward_bias",
        ):
            assert np.isfinite(f.numbers[name]), name
        assert f.open_loop["state_r2"].shape == (5, 11)
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "eval.csv", "metrics.jsonl"):
        (folder / name).write_bytes((hopper / name).read_bytes())
    assert online_report.add_to_logs(findings, folder)
    bias = report.series(report.read_run(folder), "diagnosis", "critic_bias")
    assert bias["scale,auto,beta"][1][0, 0] == findings[1].numbers["critic_bias"]
    assert "Bias of the critic" in report.write_report(folder).read_text()
    with open(folder / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not online_report.add_to_logs(findings, folder)
    items = online_report.write(findings, reader.config, reader.spec, tmp_path, "the command")
    assert len(items) == 2
    for item, f in zip(items, findings, strict=True):
        for name in ("critic_bias", "policy_reward_r2", "synthetic_state_r2"):
            assert statistics.format_number(f.numbers[name]) in item, name
    html = (tmp_path / "diagnosis.html").read_text()
    assert "were not reproduced bit for bit" in html and "Top: the body with" in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    lines = list(csv.DictReader((tmp_path / "run.csv").open()))
    assert [x["variant"] for x in lines] == ["none", "scale,auto,beta"]
    assert list(lines[0])[2:4] == ["step", "frames"] and lines[0]["frames"] == "300"
    assert float(lines[0]["critic_bias"]) == pytest.approx(
        findings[0].numbers["critic_bias"], rel=1e-4
    )


def test_parts_that_are_left_out_on_device_and_without_a_model(hopper, tmp_path):
    reader = loaded_run.Reader(hopper)
    loaded = reader.load(300)
    on_device = dataclasses.replace(reader.config, engine="mjx")
    moved = loaded._replace(config=on_device, host={"frames": loaded.host["frames"]})
    findings = online.inspect(moved, 0, steps=3, starts=4)
    assert "resimulated" not in findings.numbers and np.isfinite(
        findings.numbers["policy_reward_r2"]
    )
    online_report.write([findings], on_device, reader.spec, tmp_path, "x")
    assert "were on the device" in (tmp_path / "diagnosis.html").read_text()
    model_free = loaded._replace(learners=loaded.learners._replace(model=None, synthetic=None))
    findings = online.inspect(model_free, 0, steps=3, starts=4)
    assert np.isfinite(findings.numbers["critic_bias"]) and not findings.dims
    items = online_report.write(
        [findings], reader.config, reader.spec, tmp_path / "model_free", "x"
    )
    assert len(items) == 1 and not (tmp_path / "model_free" / "run-dims.csv").exists()


def test_checkpoint_that_a_training_run_has_replaced_is_named(hopper):
    reader = loaded_run.Reader(hopper)
    with pytest.raises(UsageError, match=r"has replaced its checkpoint of step 1; run .* again"):
        reader.load(1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env=cheetah-run", "--run=x"], "--env and --run exclude each other"),
        (["--run=x", "--fix=scale"], "--fix=scale: it has no effect with --run; leave it out"),
        (["--data=x", "--repeat=2"], "--repeat=2: it has no effect with --data; leave it out"),
    ],
)
def test_command_refuses_flags_that_exclude_each_other(flags, message, tmp_path):
    script = Path(__file__).parents[1] / "experiments" / "diagnose.py"
    done = subprocess.run(
        [sys.executable, str(script), *flags], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_sentences_give_numbers_and_no_cause():
    def item(**numbers):
        findings = [
            online.Findings("none", i, 5, {n: v[i] for n, v in numbers.items()}, {}, None, None)
            for i in range(2)
        ]
        return online_report.sentences(findings)[0]

    critic = {"critic_value": [1.0, 2.0], "critic_return": [3.0, 4.0]}
    low = item(critic_bias=[-0.5, -0.3], **critic)
    assert (
        f"a difference of {statistics.format_mean([-0.5, -0.3])} of the mean absolute return" in low
    )
    assert "value is 1.50 (" in low and "return 3.50 (" in low
    model = {"policy_reward_r2": [0.1, 0.2], "policy_reward_bias": [np.nan, np.nan]}
    both = item(critic_bias=[np.nan, np.nan], **critic, **model, policy_state_r2=[0.9, 0.9])
    assert "R² 0.15 (" in both and "bias of not defined standard deviations" in both
    for word in ("overestimates", "about right", "is wrong", "fair", "too low"):
        assert word not in low + both


def test_replay_buffer_as_a_recording(hopper):
    recording = loaded_run.recording(loaded_run.Reader(hopper).load(300), 0)
    assert len(recording.episode) == 299 and recording.episode[0] == 0
    ends = np.flatnonzero(np.diff(recording.episode))
    np.testing.assert_array_equal(recording.transitions.discount[ends], 0)


def test_synthetic_transitions_are_compared_with_the_simulator(hopper):
    """Synthetic transitions that are replaced by real ones have no error."""
    loaded = loaded_run.Reader(hopper).load(300)
    learner = loaded.learner(0)
    data, valid = loaded_run.in_order(learner.real_buffer, loaded.inserted)
    parts = loaded_run.episodes(data, valid, 1000, loaded.host, 0)
    rebuilt = loaded_run.rebuild(loaded, 0, parts, np.arange(299), data)
    states = dict(zip(rebuilt.indices.tolist(), rebuilt.states, strict=True))
    changed = Transition(*(np.array(x) for x in learner.synthetic.unpack()))
    for slot in range(40):
        for name in Transition._fields:
            getattr(changed, name)[slot] = getattr(data, name)[slot]
    learner = learner._replace(synthetic=replay.of_transitions(changed, learner.synthetic.valid))
    chosen = np.arange(40), np.arange(40)
    numbers = online._synthetic(lambda: envs.make("Hopper-v4"), states, learner, chosen)
    assert numbers["synthetic_checked"] == 40
    assert numbers["synthetic_reward_r2"] == numbers["synthetic_state_r2"] == 1
    changed.reward[:40] += 0.5
    learner = learner._replace(synthetic=replay.of_transitions(changed, learner.synthetic.valid))
    shifted = online._synthetic(lambda: envs.make("Hopper-v4"), states, learner, chosen)
    expected = 0.5 / data.reward[:40].std()
    assert shifted["synthetic_reward_bias"] == pytest.approx(expected, rel=1e-4)


def test_task_without_restore_has_no_counterfactual_measures(tmp_path):
    folder = trained(tmp_path / "run", "NotRestorable-v0")
    reader = loaded_run.Reader(folder)
    findings = [online.inspect(reader.load(300), 1, steps=3, starts=8)]
    assert "synthetic_reward_r2" not in findings[0].numbers
    assert findings[0].numbers["critic_return"] > 0
    online_report.write(findings, reader.config, reader.spec, tmp_path, "x")
    assert "cannot be set to a stored state" in (tmp_path / "diagnosis.html").read_text()
    with pytest.raises(UsageError, match="give it methods snapshot"):
        Oracle(settings.make("NotRestorable-v0", oracle="reward"), [0])


def test_reader_refuses_folders_without_a_valid_configuration(tmp_path):
    with pytest.raises(UsageError, match=r"it has no config\.json"):
        loaded_run.Reader(tmp_path)
    (tmp_path / "config.json").write_text('{"config": {"env": "cheetah-run"}}')
    with pytest.raises(UsageError, match="not a run configuration"):
        loaded_run.Reader(tmp_path)
    (tmp_path / "config.json").write_text('{"config": {"agent_name": "sac"}}')
    with pytest.raises(UsageError, match="not a run configuration"):
        loaded_run.Reader(tmp_path)
    for field, value in (("variants", [1]), ("learn", [1]), ("env", 3)):
        plain = config.as_dict(settings.make("Ones-v0", algo="model-free")) | {field: value}
        (tmp_path / "config.json").write_text(json.dumps({"config": plain}))
        with pytest.raises(UsageError, match="not a run configuration"):
            loaded_run.Reader(tmp_path)


@pytest.mark.parametrize("discount", [0.0, 0.005])
def test_return_of_a_discount_near_0(hopper, discount):
    loaded = loaded_run.Reader(hopper).load(300)
    loaded = loaded._replace(config=config.assign(loaded.config, "learn.discount", discount))
    numbers = online.inspect(loaded, 0, steps=3, starts=4).numbers
    assert np.isfinite([numbers["critic_bias"], numbers["policy_state_r2"]]).all()


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that runs the command with quick measures, and returns status and streams."""

    def inspect(loaded, learner):
        variant, seed = loaded.config.variant_seed_pairs[learner]
        name = loaded.config.variants[variant].name
        numbers = dict.fromkeys(("critic_bias", "critic_value", "critic_return"), 0.5)
        return online.Findings(name, seed, loaded.step, numbers, {}, None, None)

    monkeypatch.setattr(online, "inspect", inspect)
    with scripts.loaded(Path(__file__).parents[1] / "experiments" / "diagnose.py") as module:
        yield lambda *flags: (scripts.run(module, monkeypatch, *flags), *capsys.readouterr())


@pytest.fixture
def copied(hopper, tmp_path):
    return shutil.copytree(hopper, tmp_path / "run")


def test_logs_of_a_run_in_the_home_folder_are_extended(copied, command, monkeypatch):
    monkeypatch.setenv("HOME", str(copied.parent))
    path = copied / "metrics.jsonl"
    written = path.read_bytes()
    path.write_bytes(written + b'{"kind": "le')
    status, out, err = command("--run=~/run")
    assert (status, err) == (0, "") and "left as" not in out
    assert path.read_bytes().startswith(written)
    assert len(report.read_run(copied).metrics["diagnosis"]) == 6
    assert (copied / "diagnosis" / "diagnosis.html").exists()
    assert "Bias of the critic" in (copied / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "left"), [("lock", "its logs and its report are"), ("report.html", "its report is")]
)
def test_run_that_cannot_be_written_is_left_as_it_is(copied, command, tmp_path, name, left):
    (copied / name).unlink(missing_ok=True)
    (copied / name).mkdir()
    status, out, err = command(f"--run={copied}", f"--out={tmp_path / 'out'}")
    assert (status, err) == (0, "")
    assert f"{copied} cannot be written (Is a directory), so {left} left as" in out
    assert (tmp_path / "out" / "diagnosis.html").exists()


def test_folder_that_cannot_be_written_is_refused_before_the_measures(
    copied, command, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for module, name in ((online, "inspect"), (offline, "measure")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it measures"))
    (copied / "diagnosis").touch()
    (tmp_path / "diagnosis").touch()
    for flags, out in (
        ([f"--run={copied}"], copied / "diagnosis"),
        (["--env=Ones-v0", "--transitions=600", "--seeds=1"], "diagnosis/Ones-v0"),
    ):
        status, _, err = command(*flags)
        assert status == 2 and err.count("\n") == 1
        assert err.startswith(f"error: --out={out}: the folder cannot be written (")


def test_task_without_a_simulator_on_the_host_is_refused(command, monkeypatch):
    monkeypatch.setitem(mjx.TASKS, "OnDevice", None)
    reader = SimpleNamespace(config=SimpleNamespace(env="OnDevice"))
    monkeypatch.setattr(loaded_run, "Reader", lambda folder: reader)
    for flag in ("--env=OnDevice", "--run=x"):
        status, _, err = command(flag)
        assert status == 2 and err.startswith(f"error: {flag}: ") and err.count("\n") == 1
        assert "has no simulator on the host" in err and "--data" in err
