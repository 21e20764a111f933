"""Commands and code blocks of the documentation, and sizes that keep each run short."""

import re
from pathlib import Path

from conftest import SMALL, SMALL_OF_ANY

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "launch/README.md",
    *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/**/*.md"))),
)
#: The script that is the same as a command of `dynajax`.
SCRIPTS = {
    "train": "experiments/run.py",
    "sweep": "launch/sweep.py",
    **{
        name: f"experiments/{name}.py"
        for name in ("report", "plot", "diagnose", "play", "bench", "ahead")
    },
}
#: A part of each command that is not run here -> the reason.
EXCEPTIONS = {
    "-m venv": "it installs packages; continuous integration begins with it",
    "--engine=mjx --seeds=16": "MJX compiles for a minute; test_device.py trains with that engine",
    "--on=ray": "it needs a cluster; test_sweep.py starts one on this machine",
    "--on=slurm": "it needs a cluster; test_sweep.py uses the local executor of submitit",
    "levers.toml": "it runs for hours; test_commands.py reads it",
    "tiny.toml": "it runs a whole study; test_sweep.py runs one, and --status",
    "ray start": "it starts a cluster; test_sweep.py starts one on this machine",
    "pip install": "it installs packages",
    "--config=": "test_config_file.py reads configurations",
    "srun": "it needs a cluster; test_processes.py starts several processes",
    "tpu-vm.sh": "it needs a TPU",
    "measure.sh": "it needs a GPU for half an hour",
    "sphinx-build": "continuous integration builds the site",
    "taxonomy.py": "it reads seventeen diagnoses, which do not exist here",
    "own_task:": "test_examples.py trains on it",
    "own_fix:": "test_examples.py trains with it",
    "own_agent:": "test_examples.py trains with it",
    "own_trust_rule:": "test_examples.py trains with it",
    "own_model:": "test_examples.py trains with it",
    "own_source:": "test_examples.py trains with it",
    "own_device_task:": "test_examples.py trains on it",
}
#: Settings of the agent sac; other agents have other networks.
OF_SAC = {name: value for name, value in SMALL.items() if name.startswith("agent.")}
SIZES = SMALL_OF_ANY | {
    "random_steps": 60,
    "eval.every": 35,
    "eval.episodes": 1,
    "model.fit_every": 60,
    "rollout.batch": 40,
    "replay.synthetic": 400,
}
#: Settings of the agents with residual networks.
WIDE = {"agent.actor_width": 8, "agent.critic_width": 8}


def blocks(page, language):
    """Return the code blocks of a page in a language."""
    text = (ROOT / page).read_text()
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


def commands():
    """Return (page, command) for every command in a shell block, as a call of its script."""

    def call(line):
        line = line.split("  #")[0].strip()
        return re.sub(
            r"^(?:PYTHONPATH=\S+ )?dynajax (\w+)", lambda match: f"python {SCRIPTS[match[1]]}", line
        )

    lines = [
        (page, line)
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [(page, call(line)) for page, line in lines if line.strip() and not line.startswith("#")]


def runs():
    """Return all commands to run; those that differ only in --seeds or --out count once."""
    kept: dict = {}
    for _, line in commands():
        if not any(part in line for part in EXCEPTIONS):
            kept.setdefault(re.sub(r" --(out|seeds)=\S+", "", line), line)
    return list(kept.values())
