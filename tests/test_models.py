"""Networks and likelihoods of the dynamics model: training, diagnosis, rescaling and refusals."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dynajax
import scripts
from conftest import SMALL
from dynajax import UsageError
from dynajax.models import ensemble, head_rescaling, make_model, targets
from dynajax.types import TargetTransform

ROOT = Path(__file__).parents[1]
#: Metrics of a fit that need predicted variances.
OF_VARIANCES = {"nll", "coverage_80", "aleatoric_std"}


@pytest.fixture(scope="module", params=["resnet-gaussian", "mlp-deterministic"])
def run(request, tmp_path_factory):
    """Return a run of two checkpoints, and the network and likelihood of its model."""
    network, likelihood = request.param.split("-")
    settings = SMALL | {
        "model.network": network,
        "model.likelihood": likelihood,
        "model.reward_from": "next_state",
        "model.fit_every": 10,
        "eval.every": 30,
        "eval.episodes": 1,
        "learn.discount": 0.9,  # shortens the diagnosis
    }
    config = dynajax.make_config(
        "Pendulum-v1", preset="paper", fixes=["scale,auto"], settings=settings, steps=90
    )
    result = dynajax.train(config, tmp_path_factory.mktemp("runs") / "run", quiet=True)
    return result, network, likelihood


def lines(folder, kind):
    """Return the entries of one kind in a run's log."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["kind"] == kind]


def test_networks_and_likelihoods_train_and_log(run):
    result, network, likelihood = run
    fits = lines(result.folder, "fit")
    assert len(fits) == 4
    for entry in fits:
        assert np.isfinite([entry["holdout_mse"], entry["epistemic_std"], entry["r2_reward"]]).all()
        assert OF_VARIANCES & set(entry) == (OF_VARIANCES if likelihood == "gaussian" else set())
    model = result.state.learners.model
    assert int(model.num_fits[0]) == 4
    assert ("wide_0" in model.params["network"]) == (network == "resnet")
    report = dynajax.write_report(result.folder).read_text()
    assert ("Negative log-likelihood" in report) == (likelihood == "gaussian")


def test_load_model(run):
    result, _, likelihood = run
    model = dynajax.load_model(result.folder)
    obs = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5]], np.float32)
    prediction = model(obs, np.zeros((2, 1)))
    # The same as the elites' mean prediction in the learner that was trained.
    state = jax.tree.map(lambda x: x[0], result.state.learners.model)
    dynamics = make_model(result.config.model, model.spec)
    elites = ensemble.select_elites(state)
    mean, log_variance = ensemble.predict_all(dynamics, elites, obs, np.zeros((2, 1), np.float32))
    next_obs, reward = targets.decode(state.stats.transform, obs, mean)
    np.testing.assert_allclose(prediction.next_obs.mean, next_obs.mean(0), atol=1e-5)
    np.testing.assert_allclose(prediction.reward.mean, reward.mean(0), atol=1e-5)
    assert (prediction.next_obs.epistemic > 0).any()
    assert (log_variance is None) == (likelihood == "deterministic")
    assert (np.asarray(prediction.next_obs.aleatoric) > 0).all() == (likelihood == "gaussian")


def test_diagnose_run(run, tmp_path, monkeypatch, capsys):
    folder = run[0].folder
    with scripts.loaded(ROOT / "experiments" / "diagnose.py") as script:
        status = scripts.run(script, monkeypatch, f"--run={folder}", f"--out={tmp_path}")
    assert status == 0, capsys.readouterr().err
    assert (tmp_path / "diagnosis.html").exists()
    assert np.isfinite([entry["policy_reward_r2"] for entry in lines(folder, "diagnosis")]).all()


def test_point_predictions_train_with_rules_that_read_no_variance(tmp_path):
    for trust, settings in (("uncertainty_weight", {}), ("penalty", {"trust.kind": "epistemic"})):
        config = dynajax.make_config(
            "pendulum-swingup",
            preset="paper",
            trust=trust,
            settings=SMALL
            | {"model.network": "resnet", "model.likelihood": "deterministic"}
            | {"eval.every": 60, "eval.episodes": 1, "host.time_limit": 30}
            | settings,
            steps=60,
        )
        result = dynajax.train(config, tmp_path / trust, quiet=True)
        (entry,) = lines(result.folder, "learn")
        name = "penalty" if trust == "penalty" else "weight"
        assert np.isfinite(entry[name]) and entry["valid_fraction"] == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"fixes": ["beta"]}, "--fix=beta: beta weights by the predicted variance"),
        ({"fixes": ["none", "scale,beta"]}, "--fix=scale,beta: beta weights by the predicted"),
        ({"algo": "dynajax"}, "--fix=scale,auto,beta: beta weights by the predicted variance"),
        ({"trust": "macura"}, "--trust=macura: it reads predicted variances"),
        ({"algo": "m2ac"}, "--trust=m2ac: it reads predicted variances"),
        ({"algo": "infoprop"}, "--trust=infoprop: it reads predicted variances"),
        ({"trust": "penalty"}, "--set trust.kind=aleatoric: a deterministic model predicts no"),
    ],
)
def test_point_predictions_are_refused_where_a_variance_is_read(arguments, text):
    settings = {"model.likelihood": "deterministic"}
    with pytest.raises(UsageError) as error:
        dynajax.make_config("pendulum-swingup", settings=settings, **arguments)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)
    assert "--set model.likelihood=gaussian" in str(error.value)


@pytest.mark.parametrize("network", ["mlp", "resnet"])
@pytest.mark.parametrize("likelihood", ["gaussian", "deterministic"])
def test_predictions_stay_after_a_change_of_the_target_transform(make, spec, network, likelihood):
    settings = {
        "model.network": network,
        "model.likelihood": likelihood,
        "model.reward_from": "next_state",
        # So far away that the clamp of the log-variance bends nothing.
        "model.log_variance_min": -1e3,
        "model.log_variance_max": 1e3,
    }
    dynamics = make_model(make(settings).model, spec)
    state = ensemble.init(dynamics, jax.random.PRNGKey(0))
    new = TargetTransform(
        skip=jnp.ones(3),
        shift=jnp.array([0.5, -1.0, 3.0, 10.0]),
        scale=jnp.array([0.1, 2.0, 1.0, 30.0]),
        exponent=jnp.zeros(()),
    )
    rescaled = head_rescaling.rescale_heads(
        dynamics, state, new, jnp.zeros(4, bool), jax.random.PRNGKey(1)
    )
    random = np.random.default_rng(0)
    obs, next_obs = (jnp.asarray(random.normal(size=(5, 3)), jnp.float32) for _ in range(2))
    action = jnp.asarray(random.uniform(-1, 1, (5, 2)), jnp.float32)

    def decoded(state):
        mean, log_variance = ensemble.predict_all(dynamics, state, obs, action, next_obs)
        transform = state.stats.transform
        values = targets.decode(transform, obs, mean)
        if log_variance is None:
            return values
        return *values, jnp.exp(log_variance) * jnp.square(transform.scale)

    before, after = decoded(state), decoded(rescaled)
    assert len(before) == (3 if likelihood == "gaussian" else 2)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert np.abs(before[0] - obs).max() > 1e-3  # it predicts something
    np.testing.assert_array_equal(rescaled.stats.transform.scale, new.scale)
