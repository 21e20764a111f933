"""Draws what the two causes are, and what the fixes do to them, on tasks that were diagnosed.

  python experiments/method_picture.py results/diagnosis/humanoid-stand --out=docs/pictures

The folder is one that `experiments/diagnose.py --env=TASK --out=FOLDER` has written: random
transitions of three seeds, and small ensembles fitted to them under every fix. Writes method.png.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from dynajax import UsageError, cli
from dynajax.record.folder import write_atomically
from dynajax.report import channels, figures, statistics

_OUT = flags.DEFINE_string("out", "docs/pictures", "Folder for method.png.")

#: Codes in the order of the third panel, with their colours.
_CODES = {
    "none": figures.VERMILLION,
    "scale": figures.SKY,
    "target": figures.PURPLE,
    "scale,target": figures.BLUE,
    "scale,auto": figures.ORANGE,
    "scale,auto,beta": figures.GREEN,
}


def _table(path: Path) -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(path.open()))
    except OSError as error:
        raise UsageError(
            f"{path}: it cannot be read ({error.strerror}); give a folder that diagnose.py has written"
        ) from None


def draw(folder: Path) -> bytes:
    """The picture of one diagnosed task, as a PNG."""
    by_channel, codes = _table(folder / "channels.csv"), _table(folder / "codes.csv")
    rows = [row for row in by_channel if row["kind"] != "reward"]
    names = [row["channel"] for row in rows]
    delta, following = (np.array([float(r[k]) for r in rows]) for k in ("var_delta", "var_next"))
    reward = np.mean([float(row["var_reward"]) for row in codes])
    x = np.arange(len(names))
    with figures.house_style():
        figure, (sizes, learned, gains) = figures.canvas(3, (5.2, 3.8), (5.2, 3.8))
        shown = np.maximum(delta, 1e-12), np.maximum(following, 1e-12)
        sizes.vlines(x, *shown, color="#c9c9c9", linewidth=1)
        sizes.scatter(x, shown[0], 12, color=figures.VERMILLION, label="s' - s, as published")
        sizes.scatter(x, shown[1], 12, color=figures.PURPLE, marker="s", label="s' itself, target")
        sizes.axhline(1, color=figures.SKY, linewidth=1.6, label="all targets under scale")
        sizes.axhline(
            reward, color=figures.BLACK, linestyle=(0, (4, 3)), label="the reward, as published"
        )
        sizes.set_yscale("log")
        sizes.set_ylim(
            0.2 * min(reward, shown[0].min(), shown[1].min()), 300 * max(shown[0].max(), 1)
        )
        sizes.set_ylabel("variance of a target")
        sizes.set_title("Two causes: unequal sizes, inflated changes")
        sizes.legend(loc="upper left", ncols=2, fontsize=8)
        channels.by_channel(sizes, names)

        for i, code in enumerate(("none", "scale,target", "scale,auto,beta")):
            skill = np.array([float(row[f"skill {code}"]) for row in rows])
            learned.scatter(
                x + 0.2 * (i - 1), np.maximum(skill, -1), 12, color=_CODES[code], label=code
            )
        learned.axhline(0, color="#8a8a8a", linewidth=1)
        learned.set_ylim(-1.05, 1.45)
        learned.set_yticks([-1, -0.5, 0, 0.5, 1])
        learned.set_ylabel("share of the change predicted")
        learned.set_title("What is learned of each channel")
        learned.legend(loc="upper left", ncols=3, fontsize=8)
        channels.by_channel(learned, names)

        for place, (code, colour) in enumerate(_CODES.items()):
            values = np.array([float(row["reward_r2"]) for row in codes if row["code"] == code])
            point, low, high = (float(v) for v in statistics.interval(values))
            gains.barh(place, max(point, -1), 0.66, color=colour, alpha=0.85)
            gains.plot(np.clip([low, high], -1, 1), [place] * 2, color=figures.BLACK, linewidth=1.4)
            gains.text(1.06, place, statistics.number(point), va="center", fontsize=9)
        gains.axvline(0, color=figures.BLACK, linewidth=0.8)
        gains.set_yticks(range(len(_CODES)), list(_CODES))
        gains.set_ylim(len(_CODES) - 0.4, -0.6)
        gains.set_xlim(-1, 1.4)
        gains.set_xticks([-1, -0.5, 0, 0.5, 1])
        gains.grid(axis="y", visible=False)
        gains.set_title("What is learned of the reward")
        gains.set_xlabel("R² on transitions that no fit saw")
    return figures.png(figure)


def main(folders: Sequence[str]) -> None:
    if len(folders) != 1:
        raise UsageError("name one folder that diagnose.py --env has written")
    out = cli.folder(_OUT.value)
    picture = draw(cli.folder(folders[0]))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "method.png", picture)
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None
    print(f"{out / 'method.png'}")


if __name__ == "__main__":
    cli.run(main)
