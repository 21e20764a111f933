"""Compare runs: learning curves, final returns relative to a base, and a table.

  dynajax plot runs/cheetah-run-* --out=comparison
  dynajax plot runs/cheetah-run-* --published=simba,bro,td-mpc2

Runs of one task share a panel and are compared at the largest number of frames (steps of the
simulator) that all of them have. Runs that differ only in their seeds are merged. Returns are
normalised by the model-free run of the same agent (= 100) if there is one, as Barkley and
Fridovich-Keil (2025) do with SAC. Writes comparison.png, headline.png, table.csv and table.md into
--out, for several tasks also aggregate.png and aggregate.csv, and prints the table.
"""

from collections.abc import Sequence

from absl import flags

from dynajax.cli import common
from dynajax.cli import flags as shared
from dynajax.report import compare
from dynajax.types import UsageError

FLAGS = flags.FLAGS
shared.define_out("comparison", "Folder for the figures and the table.")
flags.DEFINE_string("published", "", "Methods whose published curves are added, or all.")


def main(folders: Sequence[str]) -> int:
    """Compare the runs in some folders."""
    if not folders:
        raise UsageError("name at least one run's folder, such as runs/cheetah-run-*")
    table = compare.plot(
        [common.expand_path(f) for f in folders], common.expand_path(FLAGS.out), FLAGS.published
    )
    print(table, end="")
    return 0
