"""The rows of `ALGORITHMS`: what each paper uses, and what overrides a row."""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import scripts
from dynajax import UsageError, make_config
from dynajax.algorithms import ALGORITHMS, describe
from dynajax.config import Config
from dynajax.config.presets import PRESETS
from dynajax.models import make_model
from dynajax.settings import all_settings

RUN = Path(__file__).parents[1] / "experiments" / "run.py"


class Method(NamedTuple):
    """How an algorithm makes synthetic data and uses them; None where it has no such thing."""

    source: str
    real_fraction: float  # real transitions among those of one agent step's updates
    mixing: str | None = "mixed"
    horizon: tuple[int, ...] | None = (1,)
    trust: str = "none"
    reward_from: str | None = "inputs"
    value_expansion_steps: int = 0


#: What the papers use.
PUBLISHED = {
    "model-free": Method("none", 1.0, mixing=None, horizon=None, reward_from=None),
    "mbpo": Method("buffered", 0.05),
    "m2ac": Method("buffered", 0.05, horizon=(10,), trust="m2ac"),
    "macura": Method("buffered", 0.05, horizon=(10,), trust="macura"),
    "infoprop": Method("buffered", 0.05, horizon=(100,), trust="infoprop"),
    "mopo": Method("buffered", 0.05, horizon=(5,), trust="penalty"),
    "mve": Method("none", 1.0, mixing=None, value_expansion_steps=1),
    "mad-td": Method("on_the_fly", 0.95),
    "wimle": Method("buffered", 0.5, mixing="separate", trust="uncertainty_weight"),
    "dynajax": Method("on_the_fly", 0.5, reward_from="next_state"),
}
#: Fields that some row sets.
ROW_FIELDS = {path for row in ALGORITHMS.values() for path in row.settings}


def method(config: Config) -> Method:
    """Return what a configuration does, in the terms of the table."""
    real, synthetic = config.real_batch, config.synthetic_batch
    return Method(
        source=config.rollout.source,
        real_fraction=real / (real + synthetic),
        mixing=config.rollout.mixing if config.has_rollouts else None,
        horizon=config.rollout.horizon if config.has_model else None,
        trust=config.trust_name,
        reward_from=config.model.reward_from if config.has_model else None,
        value_expansion_steps=config.rollout.value_expansion_steps,
    )


def values(config: Config, paths) -> dict:
    """Return the values of fields by path."""

    def value(path):
        group, name = path.split(".")
        return getattr(getattr(config, group), name)

    return {path: value(path) for path in paths}


def refusal(**arguments) -> str:
    """Return the error of an invalid configuration, which has one line."""
    with pytest.raises(UsageError) as error:
        make_config("cheetah-run", **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_table_has_every_algorithm():
    assert list(PUBLISHED) == list(ALGORITHMS)
    assert all(row.title and row.paper for row in ALGORITHMS.values())


@pytest.mark.parametrize("preset", ["paper", "quick"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_algorithm_is_the_published_one_at_any_sizes(algo, preset):
    config = make_config("cheetah-run", algo=algo, preset=preset)
    # A minibatch has a whole number of real transitions.
    rounding = 0.5 / config.learn.batch
    real_fraction = pytest.approx(PUBLISHED[algo].real_fraction, abs=rounding)
    assert method(config) == PUBLISHED[algo]._replace(real_fraction=real_fraction)
    assert values(config, ALGORITHMS[algo].settings) == ALGORITHMS[algo].settings
    fix = "scale,auto,beta" if algo == "dynajax" else ""
    assert [",".join(variant.fixes) for variant in config.variants] == [fix]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"preset": "paper"}, "MBPO (Janner et al., 2019) without fixes; agent sac, preset paper"),
        ({}, "agent simba, preset quick: not the paper's agent or sizes"),
        ({"agent": "sac"}, "agent sac, preset quick: not the paper's sizes"),
        ({"algo": "mve", "agent": "sac"}, "not the paper's agent or sizes"),
        ({"algo": "wimle", "agent": "bro"}, "agent bro, preset quick: not the paper's sizes"),
        ({"algo": "m2ac", "preset": "paper"}, "agent sac, preset paper: not the paper's sizes"),
        (
            {"algo": "dynajax"},
            "dynajax (this project) with scale,auto,beta; agent simba, preset quick",
        ),
        ({"oracle": "both"}, ", oracle both; agent"),
        (
            {"settings": {"rollout.value_expansion_steps": 1, "rollout.real_fraction": 0.5}},
            ", changed: rollout.real_fraction, rollout.value_expansion_steps; agent",
        ),
    ],
)
def test_description_says_how_far_a_run_is_from_the_paper(arguments, text):
    described = describe(make_config("cheetah-run", **arguments))
    assert text in described and (text.endswith("; agent") or described.endswith(text)), described


@pytest.mark.parametrize("preset", ["paper", "quick"])
def test_wimle_regenerates_from_recent_states_without_noise(preset):
    c = make_config("cheetah-run", algo="wimle", preset=preset)
    assert (c.source.regenerate_every, c.rollout.start_window) == (1000, 100_000)
    assert (c.rollout.state_noise, c.rollout.reward_noise) == (0, 0)
    assert c.real_batch == c.synthetic_batch == c.learn.batch
    # The buffer holds the rollouts of one regeneration.
    assert c.rollout.batch == 10_000 <= c.replay.synthetic


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_only_sizes(preset):
    paths = set(PRESETS[preset].settings)
    # A cleared buffer has to be refilled at once, with more rollouts than those of an agent step.
    assert paths & ROW_FIELDS <= {"rollout.batch"}
    assert not paths & {
        *("rollout.source", "rollout.mixing", "rollout.real_fraction", "model.reward_from")
    }
    assert not {path for path in paths if path.startswith(("source.", "trust."))}


def test_fixes_at_the_defaults_are_ftfl(spec, monkeypatch, capsys):
    """Check `--fix=scale,target` alone: published MBPO's data, with both fixes of the paper."""
    config = make_config("cheetah-run", fixes=["scale,target"])
    assert (config.algo, config.preset) == ("mbpo", "quick")
    assert [variant.fixes for variant in config.variants] == [("scale", "target")]
    assert config.real_batch == round(0.05 * config.learn.batch)
    assert method(config)._replace(real_fraction=0.05) == PUBLISHED["mbpo"]
    # One network predicts the state and the reward, each a mean and a log-variance.
    params = jax.eval_shape(
        lambda key: make_model(config.model, spec).init(key, 2), jax.random.key(0)
    )
    assert set(params) == {"network"}
    assert params["network"]["head"]["bias"].shape == (2, 2 * (spec.obs_dim + 1))
    with scripts.loaded(RUN) as script:
        assert scripts.run(script, monkeypatch, "--fix=scale,target", "--fields") == 0
    shown = capsys.readouterr().out
    for path, value in (
        ("rollout.source", "buffered"),
        ("rollout.real_fraction", "0.05"),
        ("model.reward_from", "inputs"),
    ):
        assert re.search(rf"(?m)^[* ] {re.escape(path)} +{value} ", shown), path


@pytest.mark.parametrize("algo", sorted(set(ALGORITHMS) - {"model-free"}))
def test_users_values_override_the_row(algo):
    changed = {
        "rollout.mixing": "mixed" if algo == "wimle" else "separate",
        "rollout.real_fraction": 0.25,
        "rollout.horizon": (2,),
        "rollout.batch": 500,
        "rollout.start_window": 70,
        "model.reward_from": "inputs" if algo == "dynajax" else "next_state",
    }
    # Infoprop has a variance of its own.
    noise = {"rollout.state_noise": 0.5, "rollout.reward_noise": 0.25}
    changed |= {} if algo == "infoprop" else noise
    # Infoprop keeps a state for each rollout, and WIMLE's rule weights rollouts: value expansion has
    # none.
    expansion = {"rollout.value_expansion_steps": 2}
    changed |= {} if algo in ("infoprop", "wimle") else expansion
    changed |= {"source.regenerate_every": 30} if algo == "wimle" else {}
    config = make_config("cheetah-run", algo=algo, settings=changed)
    assert values(config, changed) == changed


def test_users_trust_rule_overrides_the_row():
    for algo in set(ALGORITHMS) - {"model-free"}:
        for trust in ("none", "penalty"):
            config = make_config("cheetah-run", algo=algo, trust=trust)
            assert config.trust_name == trust
            # All else is the row's.
            assert values(config, ALGORITHMS[algo].settings) == ALGORITHMS[algo].settings
    assert make_config("cheetah-run", algo="mopo").trust.kind == "aleatoric"
    # Settings are those of the chosen rule.
    text = refusal(algo="mopo", trust="none", settings={"trust.kind": "epistemic"})
    assert text.startswith("--set=trust.kind: there is no such field with --trust=none; ")


def test_users_fixes_override_the_row():
    config = make_config("cheetah-run", algo="dynajax", fixes=["none", "scale"])
    assert [variant.fixes for variant in config.variants] == [(), ("scale",)]
    assert method(config) == PUBLISHED["dynajax"]


@pytest.mark.parametrize("algo", sorted(set(ALGORITHMS) - {"model-free"}))
@pytest.mark.parametrize("source", ["none", "buffered", "on_the_fly"])
def test_users_source_overrides_the_row(algo, source):
    row = ALGORITHMS[algo]
    config = make_config("cheetah-run", algo=algo, settings={"rollout.source": source})
    assert config.rollout.source == source
    # The row's settings of another source do not apply; all others do.
    same = source == row.settings["rollout.source"]
    kept = {p: v for p, v in row.settings.items() if same or not p.startswith("source.")}
    kept["rollout.source"] = source
    assert values(config, kept) == kept
    assert ("source.regenerate_every" in all_settings(config)) == (source == "buffered")
    if source == "buffered" and algo != "wimle":
        assert config.source.regenerate_every == 0


@pytest.mark.parametrize(
    ("arguments", "begins", "says"),
    [
        (
            {
                "algo": "wimle",
                "settings": {"rollout.source": "on_the_fly", "source.regenerate_every": 5},
            },
            "--set=source.regenerate_every: ",
            "with --set rollout.source=on_the_fly",
        ),
        (
            {"algo": "model-free", "settings": {"rollout.source": "buffered"}},
            "--set rollout.source=buffered: ",
            "choose --algo=mbpo",
        ),
        (
            {"algo": "wimle", "settings": {"rollout.source": "buffer"}},
            "--set rollout.source=buffer: ",
            "the nearest is buffered",
        ),
        (
            {"algo": "mve", "trust": "infoprop"},
            "--set rollout.value_expansion_steps=1: ",
            "--trust=infoprop",
        ),
        (
            {"algo": "wimle", "trust": "none", "oracle": "reward"},
            "--oracle=reward: ",
            "choose --set source.regenerate_every=0",
        ),
        ({"algo": "macura", "oracle": "state"}, "--oracle=state: ", "rollout.horizon=1"),
        ({"algo": "mve", "oracle": "both"}, "--oracle=both: ", "rollout.source=buffered"),
    ],
)
def test_values_that_do_not_go_with_a_row_are_refused(arguments, begins, says):
    text = refusal(**arguments)
    assert text.startswith(begins) and says in text, text
