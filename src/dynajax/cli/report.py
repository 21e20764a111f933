"""Write the report of a run that is finished, still training, or was interrupted.

  dynajax report runs/cheetah-run-mbpo-...

Writes report.html and curves.png into the run directory, also for several runs, and prints the result
of each.
"""

from collections.abc import Sequence

from dynajax import read_run, report
from dynajax.report import html
from dynajax.runs.directory import expand_user
from dynajax.types import UsageError


def main(folders: Sequence[str]) -> int:
    """Write the reports of some runs."""
    if not folders:
        raise UsageError("name at least one run's folder, such as runs/cheetah-run-*")
    for folder in dict.fromkeys(map(expand_user, folders)):
        try:
            path = report.write_report(folder)
        except OSError as error:
            raise UsageError(f"{folder}: the report cannot be written ({error.strerror})") from None
        print("\n".join(html.plain_text(line) for line in report.headline(read_run(folder))))
        print(f"report: {path}", flush=True)
    return 0
