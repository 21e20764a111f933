"""Presets, and that every impossible configuration is refused in one line."""

import dataclasses

import jax
import pytest

from dynajax import config, make_config
from dynajax.config import PRESETS, Config, Variant
from dynajax.settings import all_settings, parse
from dynajax.types import UsageError

make = make_config

PAPER = {
    "random_steps": 10_000,
    "sac.hidden": (256, 256),
    "sac.utd": 20,
    "sac.batch": 256,
    "sac.critic_layer_norm": False,
    "sac.reset_every": 0,
    "sac.learning_rate": 3e-4,
    "sac.discount": 0.99,
    "sac.polyak": 0.005,
    "sac.initial_temperature": 1.0,
    "sac.target_entropy": -0.5,
    "model.members": 7,
    "model.elites": 5,
    "model.width": 200,
    "model.depth": 4,
    "model.batch": 256,
    "model.fit_every": 250,
    "model.schedule": "fixed",
    "model.fit_steps": 5000,
    "model.round_steps": 250,
    "model.patience": 5,
    "model.average_steps": 1,
    "model.score_size": 5000,
    "model.learned_bounds": False,
    "model.holdout": 0.2,
    "model.min_gain": 0.01,
    "model.learning_rate": 3e-4,
    "model.weight_decay": 1.0,
    "model.log_variance_min": -10.0,
    "model.log_variance_max": 0.5,
    "model.bound_penalty": 0.01,
    "rollout.batch": 400,
    "rollout.horizon": (1,),
    "rollout.real_fraction": 0.05,
    "replay.real": 500_000,
    "replay.synthetic": 1_000_000,
    "eval.every": 5000,
    "eval.episodes": 10,
    "eval.checkpoints": 2,
    "host.workers": -1,
    "host.time_limit": 1000,
}


def value(c: Config, path: str):
    for name in path.split("."):
        c = getattr(c, name)
    return c


def refusal(function, *arguments, **named) -> str:
    with pytest.raises(UsageError) as error:
        function(*arguments, **named)
    text = str(error.value)
    assert text and "\n" not in text
    return text


# --- presets ---------------------------------------------------------------------------------


def test_the_paper_preset_has_the_published_numbers():
    assert set(PAPER) == set(all_settings())
    paper = make("cheetah-run", preset="paper")
    assert {path: value(paper, path) for path in PAPER} == PAPER
    assert paper.steps == 500_000
    # 5 % of 256, the other 243 being synthetic
    assert paper.real_batch == 13
    assert dataclasses.replace(paper, algo="sac").real_batch == 256


def test_the_fast_preset_is_the_papers_but_for_its_fits():
    fast, paper = (make("cheetah-run", preset=name) for name in ("fast", "paper"))
    differ = {path for path in PAPER if value(fast, path) != value(paper, path)}
    assert differ == {"model.fit_steps", "model.learning_rate", "model.average_steps"}
    assert 3 * fast.model.fit_steps <= paper.model.fit_steps and fast.steps == paper.steps


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("algo", ["mbpo", "sac"])
def test_every_preset_passes_its_own_checks(preset, algo):
    c = make("cheetah-run", preset=preset, algo=algo)
    assert (c.preset, c.algo, c.env, c.rows) == (preset, algo, "cheetah-run", 1)


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "given", "parsed"),
    [
        ("sac.utd", "10", 10),
        ("sac.utd", 10, 10),
        ("replay.real", "1e5", 100_000),
        ("sac.discount", "0.9", 0.9),
        ("sac.discount", "1", 1.0),
        ("sac.learning_rate", 1e-3, 1e-3),
        ("sac.critic_layer_norm", "true", True),
        ("sac.critic_layer_norm", "False", False),
        ("sac.critic_layer_norm", "0", False),
        ("sac.critic_layer_norm", True, True),
        ("sac.hidden", "64,32", (64, 32)),
        ("sac.hidden", "(64,)", (64,)),
        ("sac.hidden", (64, 32), (64, 32)),
        ("sac.hidden", 64, (64,)),
        ("model.schedule", "early_stop", "early_stop"),
        ("rollout.horizon", "0,100,1,5", (0, 100, 1, 5)),
    ],
)
def test_values_are_parsed_by_type(path, given, parsed):
    got = parse("--set", path, given)
    assert got == parsed and type(got) is type(parsed)


@pytest.mark.parametrize(
    ("path", "given", "says"),
    [
        ("sac.utd", "ten", "it takes a whole number"),
        ("sac.utd", "1.5", "it takes a whole number"),
        ("sac.utd", "nan", "it takes a whole number"),
        ("sac.utd", "0", "it must be at least 1"),
        ("sac.discount", "high", "it takes a number"),
        ("sac.discount", "1.01", "it must be at least 0 and at most 1"),
        ("sac.discount", "-0.1", "it must be at least 0 and at most 1"),
        ("sac.target_entropy", "inf", "it must be finite"),
        ("sac.learning_rate", "nan", "it must be at least 0"),
        ("sac.learning_rate", None, "it takes a number"),
        ("sac.critic_layer_norm", "maybe", "it takes true or false"),
        ("sac.hidden", "64,wide", "it takes whole numbers with commas between"),
        ("sac.hidden", "64,0", "it must be at least 1"),
        ("sac.hidden", "", "it must be at least 1"),
        ("model.schedule", "often", "choose one of fixed, early_stop"),
    ],
)
def test_wrong_values_are_refused(path, given, says):
    text = refusal(make, "cheetah-run", settings={path: given})
    assert text == f"--set {path}={given}: {says}"


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("sac.udt", "sac.utd"),
        ("model.widht", "model.width"),
        ("discount", "sac.discount"),
        ("random_step", "random_steps"),
    ],
)
def test_an_unknown_field_gets_the_nearest(path, nearest):
    for flag, arguments in (("--set", {"settings": {path: 1}}), ("--vary", {"vary": {path: [1]}})):
        text = refusal(make, "cheetah-run", **arguments)
        assert text == f"{flag}={path}: there is no such field; the nearest is {nearest}"


def test_even_a_hopeless_field_gets_a_real_one():
    text = refusal(make, "cheetah-run", settings={"qqqq": 1})
    assert text.rsplit(" ", 1)[-1] in all_settings()


# --- variants --------------------------------------------------------------------------------


def test_variants_are_fixes_times_values():
    c = make(
        "cheetah-run",
        fixes=["none", "target,scale"],
        vary={"sac.discount": [0.9, "0.99"], "model.weight_decay": [2]},
        seeds=3,
    )
    assert c.variants == tuple(
        Variant(fix, (("sac.discount", discount), ("model.weight_decay", 2.0)))
        for fix in ((), ("scale", "target"))
        for discount in (0.9, 0.99)
    )
    assert c.rows == 12
    assert c.variants[2].name == "scale,target;sac.discount=0.9;model.weight_decay=2"


@pytest.mark.parametrize(
    ("arguments", "begins", "says"),
    [
        ({"preset": "slow"}, "--preset=slow: ", "quick, paper, fast"),
        ({"algo": "ppo"}, "--algo=ppo: ", "mbpo, sac"),
        ({"engine": "gpu"}, "--engine=gpu: ", "host"),
        ({"fixes": ["scael"]}, "--fix=scael: ", "did you mean scale"),
        ({"fixes": ["target,auto"]}, "--fix=target,auto: ", "contradict"),
        ({"algo": "sac", "fixes": ["scale"]}, "--fix=scale: ", "--algo=mbpo"),
        ({"fixes": ["scale", "scale"]}, "--fix=scale: ", "twice"),
        ({"fixes": ["target,scale", "scale,target"]}, "--fix=scale,target: ", "twice"),
        ({"fixes": ["", "none"]}, "--fix=none: ", "twice"),
        ({"vary": {"sac.discount": [0.9, "0.90"]}}, "--vary sac.discount=0.9: ", "twice"),
        ({"vary": {"sac.discount": []}}, "--vary sac.discount: ", "at least one"),
        ({"vary": {"sac.utd": [1, 2]}}, "--vary sac.utd: ", "sac.discount"),
        ({"vary": {"sac.discount": [2]}}, "--vary sac.discount=2: ", "at most 1"),
        ({"seeds": 0}, "--seeds=0: ", "at least 1"),
        ({"seed": -1}, "--seed=-1: ", "from 0"),
        ({"seed": 2**31 - 1}, "--seed=2147483647: ", "2^31 - seeds"),
        ({"steps": 0}, "--steps=0: ", "at least 1"),
        ({"steps": 1400}, "--steps=1400: ", "eval.every=1000; the nearest is 1000"),
        ({"steps": 300}, "--steps=300: ", "the nearest is 1000"),
    ],
)
def test_wrong_arguments_are_refused(arguments, begins, says):
    text = refusal(make, "cheetah-run", **arguments)
    assert text.startswith(begins) and says in text


@pytest.mark.parametrize(
    ("settings", "begins", "says"),
    [
        ({"random_steps": 100_000}, "random_steps=100000: ", "replay.real=100000"),
        ({"random_steps": 49}, "random_steps=49: ", "at least 50"),
        ({"model.elites": 6}, "model.elites=6: ", "model.members=5"),
        ({"rollout.batch": 250}, "rollout.batch=250: ", "model.elites=4"),
        ({"replay.synthetic": 100_100}, "replay.synthetic=100100: ", "rollout.batch=200"),
        ({"rollout.horizon": 0}, "rollout.horizon=0: ", "from 1"),
        ({"rollout.horizon": "1,2"}, "rollout.horizon=1,2: ", "first_step"),
        ({"rollout.horizon": "5,5,1,3"}, "rollout.horizon=5,5,1,3: ", "first_step"),
        ({"rollout.horizon": "0,9,0,3"}, "rollout.horizon=0,9,0,3: ", "first_step"),
        ({"rollout.horizon": 501}, "rollout.horizon=501: ", "replay.synthetic=100000"),
        ({"rollout.horizon": "0,9,501,1"}, "rollout.horizon=0,9,501,1: ", "replay.synthetic"),
        ({"model.log_variance_min": 0.5}, "model.log_variance_min=0.5: ", "log_variance_max=0.5"),
        ({"model.fit_steps": 250}, "model.fit_steps=250: ", "model.round_steps=100"),
    ],
)
def test_sizes_that_cannot_work_together_are_refused(settings, begins, says):
    text = refusal(make, "cheetah-run", settings=settings)
    assert text.startswith("--set " + begins) and says in text


def test_sac_does_not_look_at_the_model():
    make("cheetah-run", algo="sac", settings={"random_steps": 2, "model.elites": 6})


def test_varied_values_are_checked_against_the_others():
    text = refusal(make, "cheetah-run", vary={"model.log_variance_max": [0.5, -20]})
    assert "model.log_variance_min=-10" in text and "model.log_variance_max=-20" in text


# --- the configuration as data -----------------------------------------------------------------


def test_only_traced_fields_are_leaves():
    leaves = {
        ".".join(key.name for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(make("cheetah-run"))
    }
    assert leaves == {path for path, s in all_settings().items() if s.traced}


def test_difference_names_paths_and_leaves_out_the_length():
    old = config.as_dict(make("cheetah-run", preset="paper"))
    new = config.as_dict(
        make(
            "cheetah-run",
            preset="paper",
            steps=5000,
            fixes=["scale"],
            settings={"sac.utd": 5, "rollout.horizon": 3},
        )
    )
    assert config.difference(old, old) == []
    assert config.difference(old, new) == [
        "rollout.horizon: [1] -> [3]",
        "sac.utd: 20 -> 5",
        "variants: ['none'] -> ['scale']",
    ]
    assert config.difference({"a": 1}, {}) == ["a: 1 -> None"]


def test_run_names_are_readable_and_differ():
    name = config.run_name(make("cheetah-run", fixes=["none", "scale,target"]))
    assert name.startswith("cheetah-run-mbpo-none_scale+target-quick-")
    others = [
        make("cheetah-run", fixes=["none", "scale,target"], **arguments)
        for arguments in ({}, {"seed": 1}, {"settings": {"sac.utd": 5}}, {"seeds": 2})
    ]
    assert len({config.run_name(c) for c in others}) == 4
    assert config.run_name(make("cheetah-run", steps=2000)) == config.run_name(make("cheetah-run"))
    assert "/" not in config.run_name(make("a/b:c-v1", algo="sac"))
    assert config.run_name(make("x-y", algo="sac")).startswith("x-y-sac-quick-")
