"""Compare two arms on one task with the statistic of the study on seven tasks.

  python results/scripts/pair.py results/cheetah-run-medium model-free dynajax

Prints each learner, and the ratio of the second arm to the first with Welch's 95 % interval, of
1 + mean evaluation return over the run.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import seven_runs
from dynajax import UsageError
from dynajax.cli import common
from dynajax.report import statistics


def main(arguments: Sequence[str]) -> int:
    """Print the comparison."""
    if len(arguments) != 3:
        raise UsageError("give a folder and two arms, such as model-free dynajax")
    folder, *arms = arguments
    found = seven_runs.read(Path(folder))
    if len(tasks := {x.task for x in found}) > 1:
        raise UsageError(f"{folder}: it has runs of several tasks: {', '.join(sorted(tasks))}")
    known = dict.fromkeys(x.arm for x in found)
    for arm in arms:
        if arm not in known:
            raise UsageError(f"{folder}: it has no run of the arm {arm}; it has {', '.join(known)}")
    base, other = (sorted((x for x in found if x.arm == arm), key=lambda x: x.seed) for arm in arms)
    for x in (*base, *other):
        print(f"{x.arm}, seed {x.seed}: mean {x.returns.mean():.0f}, last {x.returns[-1]:.0f}")
    effect = statistics.difference([x.log_return for x in base], [x.log_return for x in other])
    ratio = statistics.ConfidenceInterval(*np.exp(effect))
    print(f"{arms[1]} / {arms[0]}: {statistics.format_interval(ratio)}")
    return 0


if __name__ == "__main__":
    common.run(main)
