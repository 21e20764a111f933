"""Compare whole runs of SAC with those of another package; used by beside_sbx.py and beside_cleanrl.py.

Both train SAC on a dm_control task with the same sizes, in turns (`turns`). A run of dynajax also
evaluates its policy once, and writes logs, a checkpoint and a report.
"""

import sys
from pathlib import Path

from absl import flags

import external_code
import turns
from turns import Command

FLAGS = flags.FLAGS
flags.DEFINE_string("python", None, "The interpreter of the package's environment.", required=True)
flags.DEFINE_string("env", "cheetah-run", "Task.")
flags.DEFINE_integer("steps", 4000, "Environment steps.", lower_bound=1)
flags.DEFINE_integer("random", 500, "Steps with random actions, in which neither learns.")
flags.DEFINE_integer("updates", 1, "Gradient updates per environment step.", lower_bound=1)
flags.DEFINE_integer("width", 256, "Width of both hidden layers.", lower_bound=1)
flags.DEFINE_integer("batch", 256, "Transitions in a minibatch.", lower_bound=1)
flags.DEFINE_integer("pairs", 3, "Timed runs of each.", lower_bound=1)
flags.DEFINE_enum("cache", "empty", ["empty", "filled"], "Cache of compiled programs.")
flags.DEFINE_string("out", "comparison", "Folder for the table.")

#: Transitions in the replay buffers.
CAPACITY = 100_000


def commands(folder: Path, script: str) -> dict[str, Command]:
    """Return the command of each side, whose files may be written to a folder."""
    here = Path(__file__).parent
    sizes = [FLAGS.steps, FLAGS.random, FLAGS.updates, FLAGS.width, FLAGS.batch, CAPACITY, 0]
    settings = {
        "random_steps": FLAGS.random,
        "learn.utd": FLAGS.updates,
        "learn.batch": FLAGS.batch,
        "agent.hidden": f"{FLAGS.width},{FLAGS.width}",
        "replay.real": CAPACITY,
        "eval.every": FLAGS.steps,
        "eval.episodes": 1,
    }
    ours = [sys.executable, str(here.parents[1] / "experiments" / "run.py")]
    ours += [f"--env={FLAGS.env}", "--algo=model-free", "--agent=sac", "--preset=paper"]
    ours += [f"--steps={FLAGS.steps}", f"--out={folder / 'run'}"]
    ours += [word for k, v in settings.items() for word in ("--set", f"{k}={v}")]
    theirs = [
        external_code.interpreter(FLAGS.python),
        str(here / script),
        FLAGS.env,
        *map(str, sizes),
    ]
    return {"theirs": Command(theirs, {"PYTHONPATH": ""}), "ours": Command(ours, {})}


def compare(package: str, script: str, *others: str) -> None:
    """Time pairs of runs, and write a line for each.

    Args:
      package: the other package, in the environment of --python.
      script: the file beside this one that trains with it.
      others: packages whose versions are written down too.
    """
    versions = external_code.versions(FLAGS.python, package, *others)
    work = {k: getattr(FLAGS, k) for k in ("env", "steps", "random", "updates", "width", "batch")}
    table = f"{FLAGS.cache}_{FLAGS.updates}.csv"
    lines: list[dict[str, object]] = []
    for seconds in turns.time_pairs(
        lambda folder: commands(folder, script), FLAGS.pairs, FLAGS.cache
    ):
        lines.append(
            {"package": package, **work, "cache": FLAGS.cache, "pair": len(lines)}
            | {f"seconds_{side}": f"{used:.2f}" for side, used in seconds.items()}
            | {"versions": versions, **external_code.origin()}
        )
        print(lines[-1], flush=True)
        external_code.write(FLAGS.out, table, lines)
