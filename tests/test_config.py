"""Presets, parsing, and that invalid configurations are refused in one line."""

import dataclasses

import jax
import pytest

from dynajax import config, make_config
from dynajax.algorithms import ALGORITHMS
from dynajax.config import Config, Variant
from dynajax.config.presets import PRESETS
from dynajax.settings import agent_from_dict, all_settings, base, from_dict, parse
from dynajax.types import UsageError

make = make_config

PAPER = {
    "precision": "float32",
    "random_steps": 10_000,
    "agent.hidden": (256, 256),
    "learn.utd": 20,
    "learn.batch": 256,
    "agent.critic_layer_norm": False,
    "learn.reset_every": 0,
    "learn.reset_at": (),
    "agent.learning_rate": 3e-4,
    "learn.discount": 0.99,
    "learn.hold_noise": 1,
    "agent.polyak": 0.005,
    "agent.initial_temperature": 1.0,
    "agent.target_entropy": -0.5,
    "agent.critics": 2,
    "agent.log_std_min": -10.0,
    "agent.log_std_max": 2.0,
    "model.network": "mlp",
    "model.likelihood": "gaussian",
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
    "model.weight_averaging_steps": 1,
    "model.max_holdout": 5000,
    "model.learned_bounds": False,
    "model.holdout": 0.2,
    "model.min_gain": 0.01,
    "model.learning_rate": 3e-4,
    "model.weight_decay": 1.0,
    "model.log_variance_min": -10.0,
    "model.log_variance_max": 0.5,
    "model.bound_penalty": 0.01,
    "model.reward_from": "inputs",
    "model.epochs": 0.0,
    "rollout.batch": 400,
    "rollout.horizon": (1,),
    "rollout.real_fraction": 0.05,
    "rollout.source": "buffered",
    "rollout.mixing": "mixed",
    "rollout.start_window": 0,
    "source.regenerate_every": 0,
    "rollout.value_expansion_steps": 0,
    "rollout.random_action_fraction": 0.0,
    "rollout.state_noise": 1.0,
    "rollout.reward_noise": 1.0,
    "replay.real": 500_000,
    "replay.synthetic": 1_000_000,
    "replay.age_decay": 1.0,
    "eval.every": 5000,
    "eval.episodes": 10,
    "eval.checkpoints": 2,
    "host.workers": -1,
    "host.time_limit": 1000,
    "host.evaluate_on": "copies",
    "task.repeat": 1,
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


def test_paper_preset_has_the_published_values():
    assert set(PAPER) == set(all_settings(base()))
    paper = make("cheetah-run", preset="paper")
    assert {path: value(paper, path) for path in PAPER} == PAPER
    assert paper.steps == 500_000
    # 5 % of 256; the others are synthetic.
    assert (paper.real_batch, paper.synthetic_batch) == (13, 243)
    assert dataclasses.replace(paper, algo="model-free").real_batch == 256


def test_fast_preset_differs_from_paper_only_in_its_fits():
    fast, paper = (make("cheetah-run", preset=name) for name in ("fast", "paper"))
    differ = {path for path in PAPER if value(fast, path) != value(paper, path)}
    assert differ == {"model.fit_steps", "model.learning_rate", "model.weight_averaging_steps"}
    assert 3 * fast.model.fit_steps <= paper.model.fit_steps and fast.steps == paper.steps


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_preset_is_valid_with_every_algorithm(preset, algo):
    c = make("cheetah-run", preset=preset, algo=algo)
    assert (c.preset, c.algo, c.env, c.num_learners) == (preset, algo, "cheetah-run", 1)


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "parsed"),
    [
        ("learn.utd", "10", 10),
        ("learn.utd", 10, 10),
        ("replay.real", "1e5", 100_000),
        ("learn.discount", "0.9", 0.9),
        ("learn.discount", "1", 1.0),
        ("agent.learning_rate", 1e-3, 1e-3),
        ("agent.critic_layer_norm", "true", True),
        ("agent.critic_layer_norm", "False", False),
        ("agent.critic_layer_norm", "0", False),
        ("agent.critic_layer_norm", True, True),
        ("agent.hidden", "64,32", (64, 32)),
        ("agent.hidden", "(64,)", (64,)),
        ("agent.hidden", (64, 32), (64, 32)),
        ("agent.hidden", 64, (64,)),
        ("model.schedule", "early_stop", "early_stop"),
        ("rollout.horizon", "0,100,1,5", (0, 100, 1, 5)),
        ("learn.reset_at", "300,700", (300, 700)),
        ("learn.reset_at", "", ()),
    ],
)
def test_values_are_parsed_by_type(path, text, parsed):
    value = parse("--set", path, text, base())
    assert value == parsed and type(value) is type(parsed)


@pytest.mark.parametrize(
    ("path", "text", "says"),
    [
        ("learn.utd", "ten", "it takes a whole number"),
        ("learn.utd", "1.5", "it takes a whole number"),
        ("learn.utd", "nan", "it takes a whole number"),
        ("learn.utd", "0", "it must be at least 1"),
        ("learn.discount", "high", "it takes a number"),
        ("learn.discount", "1.01", "it must be at least 0 and at most 1"),
        ("learn.discount", "-0.1", "it must be at least 0 and at most 1"),
        ("agent.target_entropy", "inf", "it must be finite"),
        ("agent.learning_rate", "nan", "it must be at least 0"),
        ("agent.learning_rate", None, "it takes a number"),
        ("agent.critic_layer_norm", "maybe", "it takes true or false"),
        ("agent.hidden", "64,wide", "it takes whole numbers with commas between"),
        ("agent.hidden", "64,0", "it must be at least 1"),
        ("agent.hidden", "", "it must be at least 1"),
        ("model.schedule", "often", "choose one of fixed, early_stop"),
        ("learn.reset_at", "0", "it must be at least 1"),
        ("learn.utd", "1e300", "it must be at most 2147483647"),
    ],
)
def test_invalid_values_are_refused(path, text, says):
    line = refusal(make, "cheetah-run", agent="sac", settings={path: text})
    assert line == f"--set {path}={text}: {says}"


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("learn.udt", "learn.utd"),
        ("model.widht", "model.width"),
        ("discount", "learn.discount"),
        ("random_step", "random_steps"),
    ],
)
def test_unknown_field_error_has_the_nearest(path, nearest):
    for flag, arguments in (("--set", {"settings": {path: 1}}), ("--vary", {"vary": {path: [1]}})):
        text = refusal(make, "cheetah-run", **arguments)
        assert text == f"{flag}={path}: there is no such field; the nearest is {nearest}"


@pytest.mark.parametrize(
    ("path", "flag"), [("steps", "steps"), ("agent", "agent"), ("trust_name", "trust")]
)
def test_field_with_its_own_flag_is_refused(path, flag):
    text = refusal(make, "cheetah-run", settings={path: 5})
    assert text == f"--set {path}: it has a flag of its own, --{flag}"


def test_any_unknown_field_error_has_an_existing_field():
    text = refusal(make, "cheetah-run", settings={"qqqq": 1})
    assert text.rsplit(" ", 1)[-1] in all_settings(base())


def test_unknown_field_error_names_agent_trust_rule_and_source():
    text = refusal(make, "cheetah-run", settings={"agent.scale": 1})
    assert "with --agent=simba; the nearest is " in text
    text = refusal(make, "cheetah-run", settings={"trust.scale": 1})
    assert text.startswith("--set=trust.scale: ") and "with --trust=none" in text
    assert make("cheetah-run", trust="penalty", settings={"trust.scale": 2}).trust.scale == 2
    on_the_fly = {"rollout.source": "on_the_fly", "source.regenerate_every": 9}
    text = refusal(make, "cheetah-run", settings=on_the_fly)
    assert text.startswith("--set=source.regenerate_every: ")
    assert "with --set rollout.source=on_the_fly" in text


# --- variants --------------------------------------------------------------------------------


def test_variants_are_all_combinations_of_fixes_and_values():
    c = make(
        "cheetah-run",
        fixes=["none", "target,scale"],
        vary={"learn.discount": [0.9, "0.99"], "model.weight_decay": [2]},
        seeds=3,
    )
    assert c.variants == tuple(
        Variant(fix, (("learn.discount", discount), ("model.weight_decay", 2.0)))
        for fix in ((), ("scale", "target"))
        for discount in (0.9, 0.99)
    )
    assert c.num_learners == 12
    assert c.variants[2].name == "scale,target;learn.discount=0.9;model.weight_decay=2"


@pytest.mark.parametrize(
    ("arguments", "begins", "says"),
    [
        ({"preset": "slow"}, "--preset=slow: ", "quick, medium, paper, fast, modern"),
        ({"algo": "ppo"}, "--algo=ppo: ", "model-free, mbpo, m2ac, "),
        ({"engine": "gpu"}, "--engine=gpu: ", "host"),
        ({"fixes": ["scael"]}, "--fix=scael: ", "did you mean scale"),
        ({"fixes": ["target,auto"]}, "--fix=target,auto: ", "contradict"),
        ({"algo": "model-free", "fixes": ["scale"]}, "--fix=scale: ", "--algo=mbpo"),
        ({"algo": "model-free", "trust": "penalty"}, "--trust=penalty: ", "--algo=mbpo"),
        (
            {"algo": "model-free", "vary": {"model.holdout": [0.1]}},
            "--vary model.holdout: ",
            "no model",
        ),
        (
            {"oracle": "state", "trust": "penalty"},
            "--oracle=state: --trust=penalty ",
            "choose --trust=none",
        ),
        (
            {"trust": "penalty", "settings": {"model.members": 1}},
            "--trust=penalty: ",
            "model.members above 1",
        ),
        ({"fixes": ["scale", "scale"]}, "--fix=scale: ", "twice"),
        ({"fixes": ["target,scale", "scale,target"]}, "--fix=scale,target: ", "twice"),
        ({"fixes": ["", "none"]}, "--fix=none: ", "twice"),
        ({"vary": {"learn.discount": [0.9, "0.90"]}}, "--vary learn.discount=0.9: ", "twice"),
        ({"vary": {"learn.discount": []}}, "--vary learn.discount: ", "at least one"),
        ({"vary": {"learn.utd": [1, 2]}}, "--vary learn.utd: ", "learn.discount"),
        ({"vary": {"learn.discount": [2]}}, "--vary learn.discount=2: ", "at most 1"),
        ({"seeds": 0}, "--seeds=0: ", "at least 1"),
        ({"seed": -1}, "--seed=-1: ", "at least 0"),
        ({"seed": 2**31 - 1}, "--seed=2147483647: ", "2^31 - seeds"),
        ({"steps": 0}, "--steps=0: ", "at least 1"),
        (
            {"trust": "infoprop", "settings": {"trust.low": 0.9, "trust.high": 0.1}},
            "--set trust.low=0.9: ",
            "trust.high=0.1",
        ),
        (
            {"algo": "dynajax", "trust": "m2ac", "settings": {"rollout.horizon": 64}},
            "--trust=m2ac: ",
            "rollout.horizon lower",
        ),
        (
            {"algo": "m2ac", "settings": {"rollout.batch": 1}},
            "--trust=m2ac: ",
            "rollout.batch=1",
        ),
        (
            # A run directory is read back without its variants.
            {
                "trust": "penalty",
                "settings": {"trust.scale": -1},
                "vary": {"trust.scale": [1]},
            },
            "--set trust.scale=-1: ",
            "trust.kind=epistemic",
        ),
    ],
)
def test_invalid_arguments_are_refused(arguments, begins, says):
    text = refusal(make, "cheetah-run", **arguments)
    assert text.startswith(begins) and says in text


@pytest.mark.parametrize(
    ("settings", "begins", "says"),
    [
        (
            {"random_steps": 100_000, "replay.real": 100_000},
            "random_steps=100000: ",
            "replay.real=100000",
        ),
        ({"random_steps": 49}, "random_steps=49: ", "at least 50"),
        ({"model.elites": 6, "model.members": 5}, "model.elites=6: ", "model.members=5"),
        (
            {"replay.synthetic": 100_100, "rollout.batch": 200},
            "replay.synthetic=100100: ",
            "rollout.batch=200",
        ),
        ({"replay.synthetic": 10_007}, "replay.synthetic=10007: ", "rollout.batch=200"),
        ({"rollout.horizon": 0}, "rollout.horizon=0: ", "from 1"),
        ({"rollout.horizon": "1,2"}, "rollout.horizon=1,2: ", "first_step"),
        ({"rollout.horizon": "5,5,1,3"}, "rollout.horizon=5,5,1,3: ", "first_step"),
        ({"rollout.horizon": "0,9,0,3"}, "rollout.horizon=0,9,0,3: ", "first_step"),
        (
            {"rollout.horizon": 501, "replay.synthetic": 100_000},
            "rollout.horizon=501: ",
            "replay.synthetic=100000",
        ),
        (
            {"rollout.horizon": "0,9,501,1", "replay.synthetic": 100_000},
            "rollout.horizon=0,9,501,1: ",
            "replay.synthetic",
        ),
        (
            {"rollout.horizon": "0,2000000000,1,15", "replay.synthetic": 100_000},
            "rollout.horizon=0,2000000000,1,15: ",
            "below 2^31",
        ),
        ({"agent.log_std_min": 5}, "agent.log_std_min=5: ", "agent.log_std_max=2"),
        ({"learn.reset_at": "50,5000"}, "learn.reset_at=50,5000: ", "above random_steps=1000"),
        (
            {"model.schedule": "early_stop", "model.epochs": 4},
            "model.epochs=4: ",
            "model.schedule=fixed",
        ),
        ({"model.log_variance_min": 0.5}, "model.log_variance_min=0.5: ", "log_variance_max=0.5"),
        (
            {"model.fit_steps": 250, "model.round_steps": 100, "model.schedule": "early_stop"},
            "model.fit_steps=250: ",
            "model.round_steps=100",
        ),
    ],
)
def test_incompatible_sizes_are_refused(settings, begins, says):
    text = refusal(make, "cheetah-run", settings=settings)
    assert text.startswith("--set " + begins) and says in text


@pytest.mark.parametrize(
    ("settings", "follow"),
    [
        ({"random_steps": 200_000}, {"replay.real": 200_001}),
        ({"replay.real": 500}, {"random_steps": 499}),
        ({"model.members": 3}, {"model.elites": 3}),
        ({"model.elites": 3}, {}),
        ({"rollout.batch": 250}, {}),
        ({"model.elites": 6}, {"model.members": 6}),
        ({"replay.synthetic": 100_100}, {"rollout.batch": 182}),
        ({"replay.synthetic": 64}, {"rollout.batch": 64}),
        ({"rollout.batch": 7}, {"replay.synthetic": 99_995}),
        ({"rollout.horizon": 501}, {"replay.synthetic": 100_200}),
        (
            {"rollout.horizon": "0,9,1,600"},
            {"replay.synthetic": 120_000, "rollout.source": "buffered"},
        ),
        ({"model.fit_steps": 250}, {"model.round_steps": 250}),
        ({"model.round_steps": 70}, {"model.fit_steps": 560}),
        ({"model.batch": 32}, {}),
    ],
)
def test_dependent_sizes_are_adjusted(settings, follow):
    """Check that all other fields keep the preset's values, with fits that stop early."""
    early = {"model.schedule": "early_stop", "model.fit_steps": 500, "model.round_steps": 100}
    stopped = {path: value for path, value in early.items() if not path.endswith("_steps")}
    steps = {path for path in settings if path.endswith(("t_steps", "d_steps"))}
    explicit = (stopped if steps else early) | settings
    c, plain = (make("cheetah-run", algo="dynajax", settings=s) for s in (explicit, early))
    changed = {p for p in all_settings(plain) if value(c, p) != value(plain, p)}
    assert changed == set(settings) | set(follow)
    assert {path: value(c, path) for path in follow} == follow
    for path, text in settings.items():
        assert value(c, path) == parse("--set", path, text, base())


@pytest.mark.parametrize("steps", [1, 300, 999, 1400, 1500])
def test_any_number_of_steps_is_valid(steps):
    for engine in ("host", "mjx"):
        assert make("cheetah-run", steps=steps, engine=engine).steps == steps


def test_model_free_ignores_the_model():
    make("cheetah-run", algo="model-free", settings={"random_steps": 2, "model.elites": 6})


def test_varied_values_are_checked_with_the_other_fields():
    text = refusal(make, "cheetah-run", vary={"model.log_variance_max": [0.5, -20]})
    assert "model.log_variance_min=-10" in text and "model.log_variance_max=-20" in text


def test_m2ac_is_valid_with_value_expansion_and_no_rollouts():
    """M2AC refuses a single rollout, but it can rank the transitions of an expanded minibatch."""
    settings = {"rollout.real_fraction": 1, "rollout.value_expansion_steps": 1}
    c = make("cheetah-run", algo="dynajax", trust="m2ac", settings=settings)
    assert c.num_parallel_rollouts == c.learn.batch


# --- the configuration as data ---------------------------------------------------------------


def test_only_traced_fields_are_leaves():
    leaves = {
        ".".join(key.name for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(make("cheetah-run", agent="sac"))
    }
    settings = all_settings(base())
    assert leaves == {path for path, setting in settings.items() if setting.traced}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        *({"algo": algo} for algo in ALGORITHMS),
        {"algo": "model-free", "vary": {"learn.discount": [0.9, 0.9999991, 0.9999994]}},
        {
            "trust": "penalty",
            "fixes": ["none", "scale,target"],
            "settings": {
                "trust.kind": "epistemic",
                "random_steps": 200,
                "learn.reset_at": (300, 700),
                "model.elites": 2,
                "precision": "bfloat16",
            },
            "seeds": 3,
            "seed": 5,
            "steps": 1234,
        },
    ],
)
def test_configuration_survives_json(arguments):
    c = make("cheetah-run", **arguments)
    assert from_dict(config.as_dict(c)) == c
    variant = config.variant_config(c, c.variants[-1])
    restored = agent_from_dict(config.as_dict(c), c.variants[-1].name)
    assert (restored.learn, restored.agent) == (variant.learn, variant.agent)


def test_difference_lists_paths_except_steps():
    old = config.as_dict(make("cheetah-run", preset="paper"))
    new = config.as_dict(
        make(
            "cheetah-run",
            preset="paper",
            steps=5000,
            fixes=["scale"],
            settings={"learn.utd": 5, "rollout.horizon": 3},
        )
    )
    assert config.difference(old, old) == []
    assert config.difference(old, new) == [
        "learn.utd: 20 -> 5",
        "rollout.horizon: [1] -> [3]",
        "variants: ['none'] -> ['scale']",
    ]
    assert config.difference({"a": 1}, {}) == ["a: 1 -> None"]
    # Fields that were added later are left out at their defaults.
    held = config.as_dict(make("cheetah-run", preset="paper", settings={"learn.hold_noise": 16}))
    assert config.difference(held, old) == ["learn.hold_noise: 16 -> 1"]


def test_run_names_are_readable_and_differ():
    name = config.run_name(make("cheetah-run", fixes=["none", "scale,target"]))
    assert name.startswith("cheetah-run-mbpo-simba-none_scale+target-quick-")
    others = [
        make("cheetah-run", fixes=["none", "scale,target"], **arguments)
        for arguments in ({}, {"seed": 1}, {"settings": {"learn.utd": 5}}, {"seeds": 2})
    ]
    assert len({config.run_name(c) for c in others}) == 4
    assert config.run_name(make("cheetah-run", steps=2000)) == config.run_name(make("cheetah-run"))
    assert "/" not in config.run_name(make("a/b:c-v1", algo="model-free"))
    judged = make("cheetah-run", trust="penalty")
    assert config.run_name(judged).startswith("cheetah-run-mbpo-simba-none-penalty-quick-")
    assert config.run_name(make("x-y", algo="model-free")).startswith("x-y-simba-quick-")


def test_preset_sets_its_agent_and_the_sizes_of_each_agent():
    quick, paper = make("cheetah-run"), make("cheetah-run", preset="paper")
    assert (quick.agent_name, quick.task.repeat) == ("simba", 2)
    assert (paper.agent_name, paper.task.repeat) == ("sac", 1)
    assert make("cheetah-run", agent="sac").agent.hidden == (64, 64)
    assert make("cheetah-run", preset="paper", agent="simba").agent.critic_width == 512
    assert (quick.agent.critic_width, quick.agent.critics) == (64, 2)
    assert make("cheetah-run", preset="modern").agent.critic_width == 512


def test_oracle_needs_buffered_transitions():
    """Check that they are the default with an oracle, and that another source is refused."""
    assert make("cheetah-run", algo="dynajax", oracle="reward").rollout.source == "buffered"
    for settings in ({"rollout.source": "on_the_fly"}, {"rollout.source": "none"}):
        text = refusal(make, "cheetah-run", oracle="reward", settings=settings)
        assert text.startswith("--oracle=reward: ")
        assert "choose --set rollout.source=buffered" in text
