"""`results/scripts/convert.py`: old names in results, studies and notebooks become current ones."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location("convert", ROOT / "results/scripts/convert.py")
convert = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(convert)

STUDY = """# Two arms.
tasks = ["cheetah-run"]

[settings]
model.score_size = 100 # unknown spacing stays

[arms.alone]
algorithms = ["sac"]
agents = ["sac"]

# Of the model.
[arms.half]
trust = ["weight", "penalty"]
settings = { rollout.fresh = true, trust.kind = "spread" }

[arms.defaults]
seeds = 2

[arms.published]
preset = "paper"
"""
STUDY_NOW = """# Two arms.
tasks = ["cheetah-run"]

[settings]
model.max_holdout = 100 # unknown spacing stays

[arms.alone]
algorithms = ["model-free"]
agents = ["sac"]

# Of the model.
[arms.half]
trust = ["uncertainty_weight", "penalty"]
settings = { rollout.source = "on_the_fly", trust.kind = "epistemic", \
rollout.real_fraction = 0.5, model.reward_from = "next_state" }

[arms.defaults]
seeds = 2
settings = { rollout.source = "on_the_fly", rollout.real_fraction = 0.5, \
model.reward_from = "next_state" }

[arms.published]
preset = "paper"
"""
NOTEBOOK = {
    "cells": [
        {
            "cell_type": "code",
            "outputs": [{"text": "rollout.fresh=true"}],
            "source": ['c = make(algo="sac", trust="weight")\n', '{"rollout.fresh": True, "é": 1}'],
        }
    ],
    "nbformat": 4,
}
PAGE = """Set `rollout.on_top=true`, or `rollout.expand`.

    python experiments/run.py --algo=sac --agent=sac
    python experiments/run.py --fix=scale --set rollout.fresh=false
    python experiments/run.py --preset=paper
    python experiments/run.py $Q
"""
PAGE_NOW = """Set `rollout.mixing=separate`, or `rollout.value_expansion_steps`.

    python experiments/run.py --algo=model-free --agent=sac
    python experiments/run.py --fix=scale --set rollout.source=buffered \
--set=rollout.real_fraction=0.5 --set=model.reward_from=next_state
    python experiments/run.py --preset=paper
    python experiments/run.py $Q
"""
METRICS = """{"kind": "fit", "variant": "none", "score": 1e-05, "spread": 2.0, "r2_channels": [1.0]}
{"kind":"learn","variant":"none;sac.polyak=0.1","kept_12":0.5,"synthetic_valid":1.0,"score":3}
{"kind": "diagnosis", "replay_state_skill": 0.1, "policy_inside_80": 0.2, "policy_reward_noise": 1}
{"kind": "time", "spread": 1}
{"kind": "fit", "sco"""
METRICS_NOW = """\
{"kind": "fit", "variant": "none", "holdout_mse": 1e-05, "epistemic_std": 2.0, "r2_state_dims": [1.0]}
{"kind":"learn","variant":"none;agent.polyak=0.1","accepted_fraction_12":0.5,"valid_fraction":1.0,"score":3}
{"kind": "diagnosis", "replay_state_r2": 0.1, "policy_coverage_80": 0.2, "policy_reward_aleatoric_std": 1}
{"kind": "time", "spread": 1}
{"kind": "fit", "sco"""


def first_version():
    """Return a config.json of the version that had one group `sac`."""
    return {
        "config": {
            "env": "cheetah-run",
            "algo": "mbpo",
            "preset": "quick",
            "variants": ["none", "none;sac.polyak=0.1"],
            "sac": {"hidden": [64, 64], "utd": 10, "own": 1},
            "model": {"score_size": 1000},
            "rollout": {"real_fraction": 0.05},
            "mine": {"x": True},
        },
        "command": "python experiments/run.py --set sac.utd=10",
        "machine": "é",
    }


def later_version(**changes):
    """Return a config.json of the version that had `rollout.fresh`."""
    rollout = {"real_fraction": 0.5, "fresh": True, "on_top": False, "expand": 1, "uniform": 0.0}
    config = {
        "algo": "mbpo",
        "agent_name": "sac",
        "trust_name": "weight",
        "variants": ["scale"],
        "model": {"average_steps": 9, "reward_from": "next_state"},
        "rollout": rollout,
        "trust": {"kind": "noise"},
    }
    command = "run.py --trust=weight --set=rollout.fresh=true"
    return {"config": config | changes, "command": command, "commands": [command]}


def converted_config(info):
    return json.loads(convert.convert_config(json.dumps(info)))


def test_config_of_first_version():
    new = converted_config(first_version())
    config = new["config"]
    assert config["learn"] == {
        "utd": 10,
        "batch": 256,
        "reset_every": 0,
        "reset_at": [],
        "discount": 0.99,
    }
    assert config["agent"] == {"hidden": [64, 64], "own": 1}
    assert config["variants"] == ["none", "none;agent.polyak=0.1"]
    assert (config["agent_name"], config["trust_name"], config["trust"]) == ("sac", "none", None)
    assert config["task"] == {"repeat": 1}
    assert config["model"] == {
        "max_holdout": 1000,
        "weight_averaging_steps": 1,
        "reward_from": "inputs",
        "epochs": 0.0,
        "network": "mlp",
        "likelihood": "gaussian",
    }
    assert config["rollout"]["source"] == "buffered" and config["rollout"]["mixing"] == "mixed"
    assert "sac" not in config and config["mine"] == {"x": True} and new["machine"] == "é"
    # The preset of that time set the published method, so the command needs no more settings.
    assert new["command"] == "python experiments/run.py --set learn.utd=10"


def test_config_of_later_version():
    new = converted_config(later_version())
    config = new["config"]
    assert list(config["rollout"].items())[:5] == [
        ("real_fraction", 0.5),
        ("source", "on_the_fly"),
        ("mixing", "mixed"),
        ("value_expansion_steps", 1),
        ("random_action_fraction", 0.0),
    ]
    assert config["rollout"]["start_window"] == config["rollout"]["regenerate_every"] == 0
    assert config["model"]["weight_averaging_steps"] == 9
    assert config["trust_name"] == "uncertainty_weight" and config["trust"]["kind"] == "aleatoric"
    assert new["command"] == (
        "run.py --trust=uncertainty_weight --set=rollout.source=on_the_fly "
        "--set=rollout.real_fraction=0.5 --set=model.reward_from=next_state"
    )
    assert new["commands"] == [new["command"]]


def test_config_without_model_has_no_source():
    config = converted_config(later_version(algo="sac"))["config"]
    assert config["algo"] == "model-free" and config["agent_name"] == "sac"
    assert config["rollout"]["source"] == "none"


def test_current_config_gets_no_fields():
    """A later version may have other fields than this script knows."""
    text = json.dumps({"config": {"algo": "mbpo", "rollout": {"source": "buffered"}}})
    assert convert.convert_config(text) == text


@pytest.mark.parametrize("indent", [None, 1, 2])
def test_json_keeps_its_format(indent):
    text = json.dumps(first_version(), indent=indent, ensure_ascii=False) + "\n"
    new = convert.convert_config(text)
    assert new == json.dumps(json.loads(new), indent=indent, ensure_ascii=False) + "\n"


def test_metrics():
    assert convert.convert_metrics(METRICS) == METRICS_NOW


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("variant,seed\nnone;sac.polyak=0.1,0\n", "variant,seed\nnone;agent.polyak=0.1,0\n"),
        ("env,fit,score,mine\r\na,1,2,3\r\n", "env,fit,holdout_mse,mine\r\na,1,2,3\r\n"),
        (
            'channel,skill none,"noise scale,target",rmse none\n',
            'dimension,r2 none,"aleatoric_std scale,target",rmse none\n',
        ),
        (
            "code,state_skill_worst5,open_skill_20,open_spread,new_inside_95,reward_noise\n",
            "fix,state_r2_worst5,open_r2_20,open_epistemic_std,new_coverage_95,reward_aleatoric_std\n",
        ),
        ("device,rows,kernels\n", "device,learners,kernels\n"),
        (
            'property,tasks\n"state skill, best code",3\n',
            'property,tasks\n"state R², best fix",3\n',
        ),
        ("", ""),
    ],
)
def test_csv(old, new):
    assert convert.convert_csv(old) == new


def test_study():
    assert convert.convert_study(STUDY) == STUDY_NOW


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("[settings]\nrollout.fresh = false\n", {"source": "buffered", "real_fraction": 0.5}),
        ("settings = { rollout.uniform = 0.5 }\n[resources]\ncpus = 2\n", {"source": "on_the_fly"}),
        ("\n[resources]  # rollout.fresh\ncpus = 2\n", {"real_fraction": 0.5}),
    ],
)
def test_study_without_arms_names_its_method(settings, expected):
    new = convert.tomllib.loads(convert.convert_study('tasks = ["a"]\n' + settings))["settings"]
    assert expected.items() <= new["rollout"].items()
    assert new["model"] == {"reward_from": "next_state"}


def test_current_study_and_other_toml_stay():
    for text in ('tasks = ["cheetah-run"]\npreset = "quick"\n', "[tool.x]\nrollout.fresh = true\n"):
        assert convert.convert_study(text) == text


def test_notebook():
    text = json.dumps(NOTEBOOK, indent=1, ensure_ascii=False) + "\n"
    new = convert.convert_notebook(text)
    assert json.loads(new)["cells"] == [
        NOTEBOOK["cells"][0]
        | {
            "source": [
                'c = make(algo="model-free", trust="uncertainty_weight")\n',
                '{"rollout.source": "on_the_fly", "é": 1}',
            ]
        }
    ]
    assert new == json.dumps(json.loads(new), indent=1, ensure_ascii=False) + "\n"


def test_page():
    assert convert.convert_page(PAGE) == PAGE_NOW


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a file of each kind, and files that are not converted."""
    texts = {
        "run/config.json": json.dumps(later_version()),
        "run/metrics.jsonl": METRICS,
        "run/codes.csv": "code,steps\nnone,1\n",
        "study.toml": STUDY,
        "book.ipynb": json.dumps(NOTEBOOK),
        "README.md": PAGE,
        "run/other.json": '{"rollout.fresh": true}',
        ".hidden/config.json": "{",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_second_conversion_changes_nothing(folder, capsys):
    old = contents(folder)
    assert convert.main([str(folder)]) == 0
    new = contents(folder)
    changed = {path.name for path in old if new[path] != old[path]}
    assert changed == {
        *("config.json", "metrics.jsonl", "codes.csv", "study.toml", "book.ipynb", "README.md")
    }
    assert old.keys() == new.keys()
    assert convert.main([str(folder)]) == 0
    assert contents(folder) == new
    assert capsys.readouterr().out == "6 of 6 files converted\n0 of 6 files converted\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run/config.json", "{"),
        ("run/config.json", '{"a": 1}'),
        ("run/metrics.jsonl", "{\n{}\n"),
        ("run/codes.csv", '"code\nnone\n'),
        ("study.toml", "tasks = ["),
        ("study.toml", 'tasks = ["a"]\n[settings.rollout]\nfresh = true\n'),
        ("book.ipynb", "[]"),
        ("README.md", b"\xff"),
    ],
)
def test_damaged_file_is_named_and_nothing_is_written(folder, capsys, name, text):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    old = contents(folder)
    assert convert.main([str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder / name}: ")
    assert contents(folder) == old


@pytest.mark.parametrize("name", ["missing", "run/other.json"])
def test_path_that_cannot_be_converted(folder, capsys, name):
    assert convert.main([str(folder / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder / name}: ")


def test_committed_files_have_current_names():
    paths = [ROOT / name for name in ("results", "launch/studies", "experiments/notebooks")]
    old = [path for path in convert.files(paths) if len(set(convert.convert(path))) == 2]
    assert old == []
