"""`--config FILE`: a run's config.json or a TOML file gives the arguments of a run."""

import json
import operator
import re
from pathlib import Path

import pytest

import scripts
from dynajax import UsageError, make_config
from dynajax.cli import config_file
from dynajax.config import as_dict

ROOT = Path(__file__).parents[1]
RUNS = [
    {},
    {"algo": "dynajax", "agent": "simba", "seeds": 3, "seed": 7, "steps": 900},
    {"algo": "wimle", "trust": "none", "settings": {"source.regenerate_every": 500}},
    {"preset": "paper", "fixes": ["none", "scale,target"], "vary": {"learn.discount": "0.98"}},
    {"algo": "model-free", "vary": {"agent.learning_rate": ["1e-3", "3e-4"]}},
    {"oracle": "both", "algo": "dynajax"},
    {"algo": "dynajax", "fixes": ["none"], "agent": "sac"},
    {"settings": {"model.likelihood": "deterministic", "rollout.horizon": "1,5,20,100"}},
]


@pytest.mark.parametrize("arguments", RUNS, ids=[str(i) for i in range(len(RUNS))])
def test_config_of_a_run_makes_the_same_config_again(arguments, tmp_path):
    config = make_config("pendulum-swingup", **arguments)
    (tmp_path / "config.json").write_text(json.dumps({"config": as_dict(config)}))
    found = config_file.read(tmp_path / "config.json")
    assert make_config(**found) == config
    assert config_file.read(tmp_path) == found


@pytest.mark.parametrize(
    ("algo", "chosen"),
    [
        ("mbpo", {"algo": "dynajax"}),
        ("mbpo", {"preset": "paper"}),
        ("mbpo", {"algo": "model-free", "preset": "paper"}),
        ("dynajax", {"algo": "mbpo"}),
        ("dynajax", {"algo": "model-free"}),
        ("macura", {"algo": "mbpo"}),
    ],
)
def test_another_algorithm_or_preset_brings_its_defaults(algo, chosen):
    arguments = {"algo": algo, "settings": {"learn.utd": 3}}
    found = config_file.from_config(as_dict(make_config("pendulum-swingup", **arguments)))
    assert found["settings"] == {"learn.utd": 3}
    assert make_config(**found | chosen) == make_config("pendulum-swingup", **arguments | chosen)


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ({"settings": {"agent.critic_width": 32}}, {"preset": "paper"}),
        ({"algo": "macura", "settings": {"trust.xi": 3.0}}, {"algo": "mbpo"}),
        ({"algo": "wimle", "settings": {"source.regenerate_every": 500}}, {"algo": "dynajax"}),
    ],
)
def test_what_has_settings_of_its_own_stays_with_another_algorithm(arguments, chosen):
    config = make_config("pendulum-swingup", **arguments)
    again = make_config(**config_file.from_config(as_dict(config)) | chosen)
    assert (again.agent_name, again.rollout.source) == (config.agent_name, config.rollout.source)
    [(path, value)] = arguments["settings"].items()
    assert operator.attrgetter(path)(again) == value


def test_agent_trust_rule_fixes_and_steps_of_a_run_stay_with_another_algorithm():
    chosen = {"agent": "sac", "trust": "m2ac", "fixes": ["scale", "beta"], "steps": 900}
    found = config_file.from_config(as_dict(make_config("pendulum-swingup", **chosen)))
    again = make_config(**found | {"algo": "macura"})
    assert again == make_config("pendulum-swingup", algo="macura", **chosen)


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that shows the fields of a run, and returns exit status and streams."""
    with scripts.loaded(ROOT / "experiments" / "run.py") as script:

        def show_fields(*flags):
            status = scripts.run(script, monkeypatch, *flags, "--fields")
            return status, *capsys.readouterr()

        yield show_fields


def test_flag_for_no_model_replaces_what_the_file_says_about_the_model(command, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'trust = "m2ac"\nfix = "scale"\n[settings]\nmodel.width = 9\nlearn.utd = 3\n'
        "[vary]\nrollout.state_noise = [0, 1]\n"
    )
    assert re.search(r"model\.width +9 ", command(f"--config={path}")[1])
    status, out, err = command(f"--config={path}", "--algo=model-free")
    assert (status, err) == (0, "")
    assert re.search(r"model\.width +128 ", out) and re.search(r"learn\.utd +3 ", out)


@pytest.mark.parametrize("setting", ["model.width=9", "rollout.real_fraction=0.5"])
def test_setting_without_effect_is_refused_in_one_line(command, setting):
    status, out, err = command("--algo=model-free", f"--set={setting}")
    assert (status, out) == (2, "")
    assert err == (
        f"error: --set {setting}: without a model it has no effect; leave it out, or choose "
        "--algo=mbpo\n"
    )


def test_toml_file_has_the_names_of_the_flags(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'env = "pendulum-swingup"\nfix = ["none", "scale,target"]\nseeds = 5\nsteps = 2000\n'
        "[vary]\nlearn.discount = [0.99, 0.98]\n[settings]\nlearn.utd = 4\nrandom_steps = 300\n"
    )
    assert make_config(**config_file.read(path)) == make_config(
        "pendulum-swingup",
        fixes=["none", "scale,target"],
        seeds=5,
        steps=2000,
        vary={"learn.discount": [0.99, 0.98]},
        settings={"learn.utd": 4, "random_steps": 300},
    )


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "seedz = 3", "seedz is not known"),
        ("a.toml", "seeds = ", "neither a TOML file nor a run's config.json"),
        ("a.toml", "fix = 3", "fix must be text"),
        ("a.toml", "settings = 3", "settings must be a table"),
        ("config2.json", "[]", "not a run configuration"),
        ("config.json", "{}", "not a run configuration"),
        ("config.json", "[1", "not a run configuration"),
        ("config.json", '{"config": {"env": "pendulum-swingup"}}', "not a run configuration"),
        ("missing.toml", None, "cannot be read"),
    ],
)
def test_wrong_file_is_refused_in_one_line(name, text, words, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=words) as error:
        config_file.read(path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_config_with_a_field_of_another_version_is_refused(tmp_path):
    plain = as_dict(make_config("pendulum-swingup"))
    plain["learn"]["updates"] = 3
    with pytest.raises(UsageError, match=r"learn\.updates"):
        config_file.from_config(plain)


@pytest.mark.parametrize(
    ("group", "name", "value", "line"),
    [
        ("rollout", "horizon", 1, "has rollout.horizon=1, which a run has as [1]; write it so"),
        ("learn", "utd", "2", 'has learn.utd="2", which a run has as 2; write it so'),
        ("learn", "utd", 2.5, "--set learn.utd=2.5: it takes a whole number"),
    ],
)
def test_value_of_another_type_is_refused_in_one_line(group, name, value, line, tmp_path):
    plain = as_dict(make_config("pendulum-swingup"))
    plain[group][name] = value
    (tmp_path / "config.json").write_text(json.dumps({"config": plain}))
    with pytest.raises(UsageError, match=re.escape(line)) as error:
        config_file.read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("field", "value"), [("variants", [1]), ("learn", [1]), ("task", [1])])
def test_config_with_a_field_of_another_type_is_refused_in_one_line(field, value, tmp_path):
    plain = as_dict(make_config("pendulum-swingup")) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps({"config": plain}))
    with pytest.raises(UsageError, match="not a run configuration"):
        config_file.read(tmp_path)
