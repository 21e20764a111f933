"""Lays runs side by side: learning curves, final returns relative to a base, and a table.

  dynajax plot runs/cheetah-run-* --out=comparison
  dynajax plot runs/cheetah-run-* --published=simba,bro,td-mpc2

Runs of one task share a panel, and are compared at the largest number of frames (the simulator's
steps) that all of them have. Runs that differ in their seeds only are joined. The same agent without
a model, where there is a run of it, is a curve's measure (100), as SAC is in Barkley and
Fridovich-Keil (2025). Writes comparison.png, headline.png, table.csv and table.md into --out, of
several tasks aggregate.png and aggregate.csv too, and prints the table.
"""

from collections.abc import Sequence

from absl import flags

from dynajax.cli import common
from dynajax.report import compare
from dynajax.types import UsageError

_OUT = flags.DEFINE_string("out", "comparison", "Folder for the pictures and the table.")
_PUBLISHED = flags.DEFINE_string("published", "", "Methods whose published curves to add, or all.")


def main(folders: Sequence[str]) -> int:
    if not folders:
        raise UsageError("name at least one run's folder, such as runs/cheetah-run-*")
    table = compare.plot(
        [common.folder(f) for f in folders], common.folder(_OUT.value), _PUBLISHED.value
    )
    print(table, end="")
    return 0
