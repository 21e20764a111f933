"""Compare runs: learning curves, final returns relative to a base, and a table.

  dynajax plot runs/cheetah-run-* --out=comparison
  dynajax plot runs/cheetah-run-* --published=simba,bro,td-mpc2

Runs of one task share a panel and are compared at the largest number of frames (steps of the
simulator) that all of them cover; returns between two evaluations are interpolated. Runs that are
seeds of one method are joined. Returns are normalized by the model-free run of the same agent (= 100)
if there is one, as Barkley and Fridovich-Keil (2025) do with SAC. Writes comparison.png, headline.png,
table.csv and table.md into --out, for several tasks also aggregate.png and aggregate.csv, and prints
the table.
"""

import sys
from collections.abc import Sequence

from absl import flags

from dynajax.cli import flags as shared
from dynajax.report import compare, published
from dynajax.runs.directory import expand_user
from dynajax.types import UsageError

FLAGS = flags.FLAGS
shared.define_out("comparison", "Folder for the figures and the table.")
flags.DEFINE_string(
    "published",
    "",
    "Methods whose published curves are added, separated by commas, or all: "
    f"{', '.join(published.METHODS)}.",
)
flags.DEFINE_list("format", ["png"], "Files of the figures: png, pdf, or both.")
flags.register_validator(
    "format",
    lambda kinds: bool(kinds) and set(kinds) <= {"png", "pdf"},
    "it takes png, pdf, or both: png,pdf",
)


def main(folders: Sequence[str]) -> int:
    """Compare the runs in some folders."""
    if not folders:
        raise UsageError("name at least one run's folder, such as runs/cheetah-run-*")
    comparison = compare.plot(
        [expand_user(f) for f in folders],
        expand_user(FLAGS.out),
        FLAGS.published,
        FLAGS.format,
    )
    print(comparison.table, end="")
    sys.stdout.flush()
    for note in comparison.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0
