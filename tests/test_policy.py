"""Loading trained policies and models from a run directory."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest

import dynajax
from dynajax import envs
from dynajax.engines.evaluate import Evaluator
from dynajax.models import make_model, targets
from dynajax.policy import export
from dynajax.runs import policies, serialization
from dynajax.types import ModelState, UsageError
from sizes import NETWORKS, SMALL_OF_ANY

SETTINGS = SMALL_OF_ANY | {
    "eval.every": 30,
    "eval.episodes": 2,
    "model.fit_every": 25,
    "learn.utd": 1,
}
STEPS = 120


def train(folder: Path, agent: str, steps: int = STEPS, **arguments) -> dynajax.Result:
    """Train a small agent on the pendulum, or with other arguments of `make_config`."""
    settings = SETTINGS | NETWORKS[agent] | arguments.pop("settings", {})
    env, name = arguments.pop("env", "Pendulum-v1"), arguments.pop("named", agent)
    config = dynajax.make_config(
        env, agent=name, preset="paper", settings=settings, steps=steps, **arguments
    )
    return dynajax.train(config, folder, quiet=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return run directories by agent; the run of sac has a model and two variants."""
    folders = {}
    for agent in NETWORKS:
        folders[agent] = tmp_path_factory.mktemp(agent)
        if agent == "sac":
            # The variants differ in a setting, so that their learners differ.
            train(folders[agent], agent, vary={"agent.log_std_max": [2.0, 1.0]}, fixes=["scale"])
        else:
            train(folders[agent], agent, algo="model-free")
    return folders


def evaluations(folder: Path) -> dict[tuple[str, int], list[float]]:
    """Return the returns of the episodes by variant and step."""
    lines = csv.DictReader((folder / "eval.csv").open())
    return {
        (line["variant"], int(line["step"])): [float(line["return_0"]), float(line["return_1"])]
        for line in lines
    }


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("agent", list(NETWORKS))
def test_policy_reproduces_the_evaluation_of_the_run(runs, agent, which):
    written = evaluations(runs[agent])
    variants = list(dict.fromkeys(variant for variant, _ in written))
    config = dynajax.make_config("Pendulum-v1", preset="paper", settings={"eval.episodes": 2})
    for learner, variant in enumerate(variants):
        policy = dynajax.load_policy(runs[agent], learner=learner, which=which)
        means = {t: np.mean(returns) for (v, t), returns in written.items() if v == variant}
        step = max(means, key=means.get) if which == "best" else STEPS
        assert (policy.variant, policy.step) == (variant, step)
        assert policy.score == pytest.approx(means[step], rel=1e-12)
        evaluator = Evaluator(config, policy.spec, [0])
        evaluation = evaluator(policy.normalized_action, step)
        evaluator.close()
        np.testing.assert_allclose(evaluation.returns[0], written[variant, step], rtol=1e-5)


def test_actions_are_within_the_bounds_of_the_task(runs):
    policy = dynajax.load_policy(runs["simba"])
    assert (policy.low, policy.high) == (-2, 2)
    obs = np.random.default_rng(0).normal(size=(5, 4, 3)) * [1, 1, 8]
    actions = policy(obs)
    assert actions.shape == (5, 4, 1) and actions.dtype == np.float32
    np.testing.assert_allclose(actions, 2 * policy.normalized_action(obs), rtol=1e-6)
    np.testing.assert_allclose(policy(obs[2, 1]), actions[2, 1], rtol=1e-5)
    env = gymnasium.make("Pendulum-v1")
    first, _ = env.reset(seed=0)
    assert env.action_space.contains(policy(first))
    with pytest.raises(UsageError, match=r"takes observations \(..., 3\), but got \(2,\)"):
        policy(np.zeros(2))


WITHOUT_ENVIRONMENTS = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gymnasium", "dm_control", "mujoco", "brax"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Missing())
import numpy as np
import dynajax
assert "jax" not in sys.modules
policy, model = dynajax.load_policy(sys.argv[1], learner=1), dynajax.load_model(sys.argv[1], learner=1)
obs = np.array([1.0, 0.5, -0.5])
np.savez(sys.argv[2], policy(obs), model(obs, policy(obs)).next_obs.mean)
"""


def test_environment_packages_are_not_needed(runs, tmp_path):
    command = [
        sys.executable,
        "-c",
        WITHOUT_ENVIRONMENTS,
        str(runs["sac"]),
        str(tmp_path / "out.npz"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    action, expected = np.load(tmp_path / "out.npz").values()
    obs = np.array([1.0, 0.5, -0.5])
    policy, model = (
        load(runs["sac"], learner=1) for load in (dynajax.load_policy, dynajax.load_model)
    )
    np.testing.assert_allclose(action, policy(obs), rtol=1e-5)
    np.testing.assert_allclose(expected, model(obs, action).next_obs.mean, rtol=1e-4)


def test_importing_the_package_is_light():
    code = (
        "import dynajax, sys; assert not {'jax', 'gymnasium'} & set(sys.modules); "
        "import dynajax.train; assert callable(dynajax.train); "
        "assert all(hasattr(dynajax, name) for name in dynajax.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(dynajax._PLACES) == set(dynajax.__all__) <= set(dir(dynajax))
    with pytest.raises(AttributeError, match="no attribute 'undefined'"):
        _ = dynajax.undefined


@pytest.mark.parametrize("reward_from", ["inputs", "next_state"])
def test_model_prediction_agrees_with_the_elite_members(tmp_path, reward_from):
    """Compare with predictions of the members in the state that `train` returned."""
    settings = {"model.reward_from": reward_from}
    fixes = ["none", "scale,auto"]
    result = train(tmp_path, "sac", steps=60, fixes=fixes, settings=settings)
    config = result.config
    model = dynajax.load_model(tmp_path, learner=1)
    dynamics = make_model(config.model, model.spec)
    assert (model.variant, model.step) == ("scale,auto", 60)
    state: ModelState = jax.tree.map(lambda x: x[1], result.state.learners.model)
    transform = state.stats.transform
    rng = np.random.default_rng(0)
    obs, unit = rng.normal(size=(2, 3, 3)), rng.uniform(-1, 1, (2, 3, 1))
    prediction = model(obs, 2 * unit)
    for i, j in np.ndindex(2, 3):
        means, deviations = [], []
        for member in np.asarray(state.elites):
            params = jax.tree.map(lambda x, m=member: x[m], state.params)
            z, log_variance = dynamics.predict(params, state.stats, obs[i, j], unit[i, j])
            means.append(np.append(*targets.decode(transform, obs[i, j], z)))
            deviations.append(np.exp(0.5 * log_variance) * transform.scale)
        expected = np.mean(means, 0), np.sqrt(np.mean(np.square(deviations), 0)), np.std(means, 0)
        for value, name in zip(expected, ("mean", "aleatoric", "epistemic"), strict=True):
            next_obs, reward = getattr(prediction.next_obs, name), getattr(prediction.reward, name)
            assert next_obs.shape == (2, 3, 3) and reward.shape == (2, 3)
            np.testing.assert_allclose(next_obs[i, j], value[:3], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(reward[i, j], value[3], rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match=r"actions \(..., 1\), but got \(2, 3, 3\) and \(2, 1\)"):
        model(obs, unit[:, 0])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            {"learner": 2},
            "learner=2: .* has the learners 0: scale;agent.log_std_max=2, seed 0; 1: ",
        ),
        ({"learner": -1}, "learner=-1: "),
        ({"which": "worst"}, "which=worst: choose one of best, last"),
    ],
)
def test_invalid_arguments(runs, arguments, line):
    with pytest.raises(UsageError, match=line) as caught:
        dynajax.load_policy(runs["sac"], **arguments)
    assert "\n" not in str(caught.value)


def test_missing_files(runs, tmp_path):
    with pytest.raises(UsageError, match="it has no config"):
        dynajax.load_policy(tmp_path)
    with pytest.raises(UsageError, match="no model, it was trained with --algo=model-free"):
        dynajax.load_model(runs["bro"])
    (tmp_path / "config.json").write_bytes((runs["bro"] / "config.json").read_bytes())
    with pytest.raises(UsageError, match="the run has no policies yet"):
        dynajax.load_policy(tmp_path)


def test_configuration_with_other_fields_is_refused(runs, tmp_path):
    """Read runs of an older version, whose configuration had other names."""
    run = tmp_path / "run"
    shutil.copytree(runs["sac"], run)
    info = json.loads((run / "config.json").read_text())
    for removed in ("agent_name", "task"):
        old = info | {"config": {k: v for k, v in info["config"].items() if k != removed}}
        (run / "config.json").write_text(json.dumps(old))
        with pytest.raises(UsageError, match=r"config\.json: not a run configuration"):
            dynajax.load_policy(run)
    old = info["config"] | {"agent": {**info["config"]["agent"], "widht": 3}}
    (run / "config.json").write_text(json.dumps(info | {"config": old}))
    with pytest.raises(UsageError, match=r"agent\.widht: there is no such field"):
        dynajax.load_policy(run)
    old = info["config"] | {"model": {**info["config"]["model"], "score_size": 3}}
    (run / "config.json").write_text(json.dumps(info | {"config": old}))
    with pytest.raises(UsageError, match=r"the model settings cannot be read .*score_size"):
        dynajax.load_model(run)


class TestPolicies:
    """Writing and reading the folder of policies."""

    spec = envs.EnvSpec("walk", 3, 2, 50, ("x", "y", "z"), lambda *_: False, ((-1, -3), (1, 3)))

    @staticmethod
    def policies_at(step):
        return {"actor": [np.full((2, 3), step, np.float32)], "flag": np.array([step > 2, False])}

    def test_best_policy_of_each_learner_is_kept(self, tmp_path):
        store = policies.Policies(tmp_path, self.spec)
        for step, scores in enumerate([[1, np.nan], [3, 2], [3, np.nan], [np.nan, 1]]):
            store.add(step, self.policies_at(step), np.array(scores, float))
        assert len(list(tmp_path.iterdir())) == 1
        best = [policies.read(tmp_path, row) for row in range(2)]
        assert [(s.step, s.score) for s in best] == [(1, 3), (1, 2)]
        assert [s.leaves["actor/0"].tolist() for s in best] == [[1] * 3, [1] * 3]
        last = policies.read(tmp_path, 0, "last")
        assert last.step == 3 and np.isnan(last.score) and last.leaves["flag"]
        assert last.spec == self.spec._replace(termination=None)

    @pytest.mark.parametrize("part", ["read_meta", "read"])
    def test_policies_that_a_training_run_replaces_are_read_again(
        self, tmp_path, monkeypatch, part
    ):
        store = policies.Policies(tmp_path, self.spec)
        store.add(1, self.policies_at(1), np.array([1.0, 1.0]))
        read = getattr(serialization, part)

        def replace_and_read(*arguments):
            monkeypatch.setattr(serialization, part, read)
            store.add(2, self.policies_at(2), np.array([2.0, 2.0]))
            return read(*arguments)

        monkeypatch.setattr(serialization, part, replace_and_read)
        assert policies.read(tmp_path, 0).step == 2
        for path in tmp_path.rglob("*"):
            if path.is_file() and path.name != "meta.json":
                path.write_bytes(b"")
        with pytest.raises(UsageError, match="damaged policies"):
            policies.read(tmp_path, 0)

    def test_restored_policies_continue_identically(self, tmp_path):
        store = policies.Policies(tmp_path / "a", self.spec)
        store.add(1, self.policies_at(1), np.array([5.0, 1.0]))
        other = policies.Policies(tmp_path / "b", self.spec)
        other.restore({"unrelated": np.zeros(1)} | store.checkpoint_arrays())
        for policy_store in (store, other):
            policy_store.add(2, self.policies_at(2), np.array([4.0, 2.0]))
        for row, which in ((0, "best"), (1, "best"), (0, "last")):
            a, b = (policies.read(tmp_path / name, row, which) for name in "ab")
            assert a.step == b.step == (1 if (row, which) == (0, "best") else 2)
            assert {n: x.tobytes() for n, x in a.leaves.items()} == {
                n: x.tobytes() for n, x in b.leaves.items()
            }

    def test_damaged_policies_are_refused(self, tmp_path):
        policies.Policies(tmp_path, self.spec).add(1, self.policies_at(1), np.zeros(2))
        (folder,) = serialization.list_steps(tmp_path)
        (folder / "meta.json").write_text("{}")
        with pytest.raises(UsageError, match="damaged policies"):
            policies.read(tmp_path, 0)

    def test_incomplete_writes_are_ignored(self, tmp_path, monkeypatch):
        store = policies.Policies(tmp_path, self.spec)
        store.add(1, self.policies_at(1), np.zeros(2))

        def write_to_full_disk(folder, arrays):
            folder.mkdir()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(serialization, "_write_arrays", write_to_full_disk)
        with pytest.raises(UsageError, match="cannot save the policies"):
            store.add(2, self.policies_at(2), np.ones(2))
        assert policies.read(tmp_path, 0).step == 1 and not (tmp_path / "partial").exists()


def test_examples_of_the_documentation(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pendulum").symlink_to(runs["sac"])
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "using-a-policy.md").read_text()
    names: dict = {}
    policy, model, standalone = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    exec(policy, names)
    assert re.fullmatch(
        r"-\d+; the run's own evaluation of step \d+ said -\d+\n", capsys.readouterr().out
    )
    exec(model, names)
    assert names["prediction"].reward.mean.shape == ()
    export.export(names["policy"], tmp_path / "policy.npz")
    exec(standalone, names)
    obs = np.random.default_rng(0).normal(size=(9, 3))
    got = names["load_policy"](tmp_path / "policy.npz")(obs)
    np.testing.assert_allclose(got, names["policy"](obs), atol=1e-5)
