"""Write the address of the repository into every file that contains it.

    python docs/set_repository.py https://github.com/NAME/dynajax

The address is defined in `pyproject.toml`, as `Repository` under `[project.urls]`. Notebooks,
`CITATION.cff` and the issue templates repeat it, because nothing could look it up for them.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Files that contain the address.
FILES = (
    "pyproject.toml",
    "CITATION.cff",
    ".github/ISSUE_TEMPLATE/config.yml",
    "experiments/notebooks/*.ipynb",
    "docs/tutorials/*.ipynb",
)


def files(root: Path = ROOT) -> list[Path]:
    """Return the files that contain the address."""
    return [path for pattern in FILES for path in sorted(root.glob(pattern))]


def repository(root: Path = ROOT) -> str:
    """Return "OWNER/NAME" as `pyproject.toml` has it."""
    urls = tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]
    return urls["Repository"].removeprefix("https://github.com/")


def set_repository(address: str, root: Path = ROOT) -> None:
    """Replace the address in all files.

    Raises:
      ValueError: the address is not that of a repository on GitHub.
    """
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)/?", address)
    if not match:
        raise ValueError(f"{address}: give the address as https://github.com/OWNER/NAME")
    old = repository(root)
    for path in files(root):
        text = path.read_text()
        # The name ends here, so that another repository whose name begins alike is left alone.
        new = re.sub(rf"\b(github(?:\.com)?/){re.escape(old)}(?![\w-])", rf"\g<1>{match[1]}", text)
        path.write_text(new)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: python docs/set_repository.py ADDRESS (now: {repository()})")
    try:
        set_repository(sys.argv[1])
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
