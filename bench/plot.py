"""Draws how each contestant compares with Sallyport's fast lane: `plot.py FILE.svg`, the ratios as JSON on stdin."""

from __future__ import annotations

import json
import math
import sys

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "bench"

from matplotlib import pyplot  # noqa: E402


def main() -> None:
    """One panel per scenario; 1 is Sallyport, to the right is better than it."""
    panels = {title: ratios for title, ratios in json.load(sys.stdin).items() if ratios}
    columns = 2 if len(panels) > 1 else 1
    rows = math.ceil(len(panels) / columns) or 1
    figure, axes = pyplot.subplots(rows, columns, figsize=(6 * columns, 2.4 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, ratios) in zip(axes.flat, panels.items(), strict=False):
        names = sorted(ratios, key=ratios.__getitem__)
        axis.barh(names, [ratios[name] - 1 for name in names], left=1, height=0.6,
                  color=["#3a7d44" if ratios[name] < 1 else "#9aa5b1" for name in names])  # fmt: skip
        axis.axvline(1, color="#222", linewidth=1)
        for place, name in enumerate(names):
            ahead = ratios[name] > 1
            style = {"fontsize": 8, "textcoords": "offset points", "va": "center", "ha": "left" if ahead else "right"}
            axis.annotate(f"{ratios[name]:.2f}", (ratios[name], place), (3 if ahead else -3, 0), **style)
        axis.set_xscale("log")
        axis.set_xticks([], minor=True)
        axis.set_xticks([])
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("How many times as good as Sallyport's fast lane (1); green: Sallyport is ahead", fontsize=10)
    figure.tight_layout()
    figure.savefig(sys.argv[1], metadata={"Date": None, "Creator": None})


main()
