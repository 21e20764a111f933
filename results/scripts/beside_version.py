"""Compare whole runs of this version of dynajax with an earlier one, on one core.

    git worktree add before 8a089ed
    taskset -c 0 python results/scripts/beside_version.py --before=before --name=start --pairs=2 \\
      --flags="--env=cheetah-run --algo=dynajax --fix=scale,target" \\
      --flags_before="--env=cheetah-run --fix=scale,target" --out=comparison

Both take turns (`turns`), with the packages of the environment of this script. Writes NAME.csv: CPU
seconds, a line for each pair of runs.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

import external_code
import turns
from dynajax import UsageError
from dynajax.cli import common
from dynajax.runs.directory import git_commit
from turns import Command

FLAGS = flags.FLAGS
flags.DEFINE_string("before", None, "Folder of a clone of the earlier version.", required=True)
flags.DEFINE_string("name", None, "Name of the table.", required=True)
flags.DEFINE_string("flags", None, "Flags of the run.", required=True)
flags.DEFINE_string("flags_before", "", "Flags of the earlier version, if they differ.")
flags.DEFINE_integer("pairs", 3, "Timed runs of each.", lower_bound=1)
flags.DEFINE_enum("cache", "empty", ["empty", "filled"], "Cache of compiled programs.")
flags.DEFINE_string("out", "comparison", "Folder for the table.")


def main(argv: Sequence[str]) -> None:
    """Time both versions."""
    here, before = Path(__file__).resolve().parents[2], Path(FLAGS.before).resolve()
    if not (before / "experiments/run.py").exists():
        raise UsageError(f"--before={FLAGS.before}: it contains no experiments/run.py")
    given = {"before": FLAGS.flags_before or FLAGS.flags, "after": FLAGS.flags}
    try:
        words = {side: shlex.split(text) for side, text in given.items()}
    except ValueError as error:
        raise UsageError(f"--flags={FLAGS.flags}: {error}") from None
    clones = {"before": before, "after": here}

    def commands(folder: Path) -> dict[str, Command]:
        return {
            side: Command(
                [
                    sys.executable,
                    str(clone / "experiments/run.py"),
                    *words[side],
                    f"--out={folder / side}",
                ],
                {"PYTHONPATH": str(clone / "src")},
            )
            for side, clone in clones.items()
        }

    lines: list[dict[str, object]] = []
    for seconds in turns.time_pairs(commands, FLAGS.pairs, FLAGS.cache):
        lines.append(
            {"flags": FLAGS.flags, "flags_before": given["before"], "cache": FLAGS.cache}
            | {"pair": len(lines), "commit_before": git_commit(before)}
            | {f"seconds_{side}": f"{used:.2f}" for side, used in seconds.items()}
            | external_code.origin()
        )
        print(lines[-1], flush=True)
        external_code.write(FLAGS.out, f"{FLAGS.name}.csv", lines)


if __name__ == "__main__":
    common.run(main)
