"""Evaluate the study on seven tasks: test its claims, write its tables, and draw its figures.

  python results/scripts/seven.py results/seven

Reads every run directory in the folder, and writes claims.md, learners.csv (a line for each learner),
table.csv (a line for each task and pair of arms), index.csv, seven.png, and a figure of each metric of
the mechanism beside them. results/seven/README.md registers the statistic and the claims.
"""

from collections.abc import Sequence
from pathlib import Path

from dynajax import UsageError
from dynajax.cli import common
from dynajax.report import figures
from dynajax.runs.directory import write_atomically, write_csv
from seven_claims import claims, claims_table, effects
from seven_figures import draw, draw_mechanism
from seven_runs import ARMS, MECHANISM, TASKS, median, read


def main(arguments: Sequence[str]) -> int:
    """Write the tables and the figure of the folder that is given."""
    if len(arguments) != 1:
        raise UsageError("give one folder, such as results/seven")
    folder = Path(arguments[0])
    found = read(folder)
    if others := sorted({x.task for x in found} - set(TASKS)):
        raise UsageError(f"{folder}: {', '.join(others)} is not a task of the study")
    tested = claims(found)
    rows = [
        {
            "task": x.task,
            "arm": x.arm,
            "seed": x.seed,
            "frames": int(x.frames[-1]),
            "mean_return": x.returns.mean(),
            "final_return": x.returns[-1],
            **{metric.name: median([x], metric.name) for metric in MECHANISM},
        }
        for x in found
    ]
    cells = [
        {
            "task": cell.task,
            "base": claim.base,
            "arm": claim.other,
            "seeds_of_base": cell.seeds[0],
            "seeds_of_arm": cell.seeds[1],
            "log_ratio": cell.estimate.point,
            "low": cell.estimate.low,
            "high": cell.estimate.high,
            "at_floor": cell.at_floor,
            "decision": cell.decision,
        }
        for claim in tested
        for cell in effects(found, claim.base, claim.other)
    ]
    used = {a: " ".join(c.name for c in tested if a in (c.base, c.other)) for a in ARMS}
    index = [
        {
            "folder": x.folder,
            "arm": x.arm,
            "task": x.task,
            "seed": x.seed,
            "commit": x.commit,
            "machine": x.machine,
            "wall_seconds": x.seconds,
            "claims": used[x.arm],
        }
        for x in found
    ]
    text = claims_table(found)
    images = {"seven": figures.png(draw(found))}
    for metric in MECHANISM:
        if any(metric.name in x.mechanism for x in found):
            images[metric.name] = figures.png(draw_mechanism(found, metric))
    # Everything is computed before the first file is written, so that an error leaves no mixed set.
    write_csv(folder / "learners.csv", rows)
    write_csv(folder / "table.csv", cells or [{"task": ""}])
    write_csv(folder / "index.csv", index)
    write_atomically(folder / "claims.md", text.encode())
    for name, image in images.items():
        write_atomically(folder / f"{name}.png", image)
    print(text, end="")
    return 0


if __name__ == "__main__":
    common.run(main)
