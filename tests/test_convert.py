"""`results/scripts/convert.py`: old names in results, studies and notebooks become current ones."""

import importlib.util
import json
from pathlib import Path

import pytest

from dynajax import report, settings

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
{"kind": "diagnosis", "repeated": 2, "not_repeated": 0, "synthetic_state_skill": 0.5, "critic_bias": 1}
{"kind": "time", "spread": 1}
{"kind": "fit", "sco"""
METRICS_NOW = """\
{"kind": "fit", "variant": "none", "holdout_mse": 1e-05, "epistemic_std": 2.0, "r2_state_dims": [1.0]}
{"kind":"learn","variant":"none;agent.polyak=0.1","accepted_fraction_12":0.5,"valid_fraction":1.0,"score":3}
{"kind": "diagnosis", "replay_state_r2": 0.1, "policy_coverage_80": 0.2, "policy_reward_aleatoric_std": 1}
{"kind": "diagnosis", "resimulated": 2, "not_reproduced": 0, "synthetic_state_r2": 0.5, "critic_bias": 1}
{"kind": "time", "spread": 1}
{"kind": "fit", "sco"""


COMPARISON = """\
| task | variant                   | preset | SAC = 100 | beats it with P |
|------|---------------------------|--------|----------:|----------------:|
| a    | SAC                       | quick  |     100.0 |               - |
| a    | simba (learn.utd=2)       | quick  |     101.0 |               - |
| b    | MBPO bro scale,auto       | quick  |      90.5 |            0.60 |

One seed has no interval.
"""
COMPARISON_NOW = """\
| task | variant                         | preset | model-free = 100 | P(improvement) |
|------|---------------------------------|--------|-----------------:|---------------:|
| a    | SAC (model-free)                | quick  |            100.0 |              - |
| a    | SimBa (model-free, learn.utd=2) | quick  |            101.0 |              - |
| b    | MBPO BRO scale,auto             | quick  |             90.5 |           0.60 |

A single seed has no interval.
"""


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
        "channels": ["position[0]"],
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
    assert config["source"] == {"regenerate_every": 0}
    assert new["dims"] == ["position[0]"] and "channels" not in new
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
    assert config["rollout"]["start_window"] == 0 and config["source"] == {}
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
    assert config["rollout"]["source"] == "none" and config["source"] == {}


@pytest.mark.parametrize(
    ("source", "fields"), [("buffered", {"regenerate_every": 0}), ("on_the_fly", {}), ("none", {})]
)
def test_config_that_an_earlier_script_converted(source, fields):
    new = converted_config(later_version(algo="model-free" if source == "none" else "mbpo"))
    earlier = json.loads(json.dumps(new))
    del earlier["config"]["source"]
    earlier["config"]["rollout"] |= {"source": source, "regenerate_every": 0}
    converted = converted_config(earlier)
    assert converted["config"]["source"] == fields
    assert converted["config"]["rollout"] == new["config"]["rollout"] | {"source": source}
    assert converted["command"] == new["command"]


def test_current_config_gets_no_fields():
    """A later version may have other fields than this script knows."""
    text = json.dumps({"config": {"algo": "mbpo", "rollout": {}, "source": {}}, "dims": []})
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
        ("variant,repeated\nnone,1\n", "variant,resimulated\nnone,1\n"),
        (
            "task,variant,final_iqm,improves,efficiency_low\na,SAC,1,,\n"
            'a,"MBPO simba scale,auto trust=weight",2,1,2\n',
            "task,variant,final_iqm,probability_of_improvement,sample_efficiency_low\n"
            "a,SAC (model-free),1,,\n"
            'a,"MBPO SimBa scale,auto trust=uncertainty_weight",2,1,2\n',
        ),
        ("variant,iqm\r\nbro,1\r\nMBPO,2", "variant,iqm\r\nBRO (model-free),1\r\nMBPO,2"),
        ("variant,return_mean\nsimba,1\n", "variant,return_mean\nsimba,1\n"),
        ("device,rows,kernels\n", "device,learners,kernels\n"),
        (
            'property,tasks\n"state skill, best code",3\n',
            'property,tasks\n"state R², best fix",3\n',
        ),
        ("", ""),
    ],
)
def test_csv(old, new):
    assert convert.convert_csv(old) == convert.convert_csv(new) == new


@pytest.mark.parametrize(
    ("name", "old", "earlier", "new"),
    [
        (
            "codes.csv",
            "code,state_skill_worst5,open_skill_20,open_reward_r2_5,open_spread,new_inside_95\n",
            "fix,state_r2_worst5,open_r2_20,open_reward_r2_5,open_epistemic_std,new_coverage_95\n",
            "fix,state_r2_worst5,open_loop_state_r2_20,open_loop_reward_r2_5,"
            "open_loop_epistemic_std,new_coverage_95\n",
        ),
        (
            "codes.csv",
            "code,state_skill,reward_noise,new_state_skill,reward_inside_50,inside_80\n",
            "fix,state_r2,reward_aleatoric_std,new_state_r2,reward_coverage_50,coverage_80\n",
            "fix,state_r2,reward_aleatoric_std,new_state_r2,reward_coverage_50,coverage_80\n",
        ),
        (
            "channels.csv",
            'channel,skill none,"noise scale,target",spread auto,rmse none\n',
            'dimension,r2 none,"aleatoric_std scale,target",epistemic_std auto,rmse none\n',
            'dim,r2 none,"aleatoric_std scale,target",epistemic_std auto,rmse none\n',
        ),
        (
            "chains.csv",
            "code,steps,skill,reward_r2,spread\n",
            "fix,steps,r2,reward_r2,epistemic_std\n",
            "fix,steps,state_r2,reward_r2,epistemic_std\n",
        ),
        (
            "run-channels.csv",
            "variant,channel,skill,rmse,noise,spread\n",
            "variant,dimension,r2,rmse,aleatoric_std,epistemic_std\n",
            "variant,dim,r2,rmse,aleatoric_std,epistemic_std\n",
        ),
    ],
)
def test_tables_of_a_diagnosis(tmp_path, name, old, earlier, new):
    new_name, _ = convert.TABLES[name]
    # After an interruption a converted table may still have its old name.
    for text in (old, earlier, new):
        (tmp_path / name).write_text(text)
        assert convert.main([str(tmp_path)]) == 0
        assert [path.name for path in tmp_path.iterdir()] == [new_name]
        assert (tmp_path / new_name).read_text() == new
        assert convert.main([str(tmp_path)]) == 0
        assert (tmp_path / new_name).read_text() == new
        (tmp_path / new_name).unlink()


def test_other_table_keeps_its_name(tmp_path):
    (tmp_path / "channels.csv").write_text("station,frequency\na,1\n")
    assert convert.main([str(tmp_path)]) == 0
    assert (tmp_path / "channels.csv").read_text() == "station,frequency\na,1\n"


def test_new_name_that_is_taken(folder, capsys):
    (folder / "run/fixes.csv").write_text("fix,steps\n")
    old = contents(folder)
    assert convert.main([str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"{folder / 'run/codes.csv'}: its new name fixes.csv")
    assert contents(folder) == old


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SAC", "SAC (model-free)"),
        ("SAC (learn.utd=1)", "SAC (model-free, learn.utd=1)"),
        ("simba agent.polyak=0.1", "SimBa (model-free) agent.polyak=0.1"),
        ("module:Agent", "module:Agent (model-free)"),
        ("MBPO", "MBPO"),
        ("MBPO bro", "MBPO BRO"),
        ("MBPO scale (oracle=both)", "MBPO scale (oracle=both)"),
        ("MBPO simba scale trust=weight", "MBPO SimBa scale trust=uncertainty_weight"),
    ],
)
def test_labels(old, new):
    assert convert.new_label(old) == convert.new_label(new) == new


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


def test_markdown_table_of_a_comparison():
    assert convert.convert_page(COMPARISON) == COMPARISON_NOW
    assert convert.convert_page(COMPARISON_NOW) == COMPARISON_NOW


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
    changed = {path.name for path, data in new.items() if data != old.get(path)}
    assert changed == {
        *("config.json", "metrics.jsonl", "fixes.csv", "study.toml", "book.ipynb", "README.md")
    }
    assert new.keys() ^ old.keys() == {folder / "run/codes.csv", folder / "run/fixes.csv"}
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
    for path in convert.files(paths):
        old, new = convert.convert(path)
        assert old == new, path
        assert convert.new_path(path, new) == path


def test_committed_runs_are_read():
    """Runs of every algorithm, agent, trust rule and source have the current configuration."""
    methods = {}
    for path in (ROOT / "results").rglob("config.json"):
        config = json.loads(path.read_text())["config"]
        names = config["algo"], config["agent_name"], config["trust_name"]
        methods[*names, config["rollout"]["source"], config["oracle"]] = path.parent, config
    assert len(methods) > 10
    for folder, config in methods.values():
        assert settings.from_dict(config).steps == config["steps"]
        assert report.read_run(folder).steps.size
