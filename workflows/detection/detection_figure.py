"""The figure of a detection table: metrics against bytes, a line a codec, a column a detector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, which colour-blind readers tell apart; markers tell again
STYLES: dict[str, tuple[str, str]] = {
    "uniform": ("#0072B2", "o"),
    "policy": ("#D55E00", "D"),
    "objects": ("#009E73", "s"),
    "greedy": ("#CC79A7", "P"),
    "hevc": ("#000000", "^"),
    "jpeg": ("#888888", "v"),
}
OTHERS = ("#56B4E9", "#E69F00", "#CC79A7", "#0072B2")  # of codecs without a style, marker "x"
INK, MUTED = "#1a1a1a", "#5f5f5f"
NAMES = {"map50_95": "mAP50-95", "map50": "mAP50", "recall": "recall", "precision": "precision"}


@dataclass(frozen=True)
class Panel:
    """One detector and class group.

    Attributes:
        title: of its column.
        original: metrics on the originals.
        lines: by codec, for each ratio (bytes, metrics).
    """

    title: str
    original: dict[str, float]
    lines: dict[str, list[tuple[float, dict[str, float]]]]


def style_of(codec: str, codecs: list[str]) -> tuple[str, str]:
    """Colour and marker of a codec."""
    if codec in STYLES:
        return STYLES[codec]
    others = [name for name in codecs if name not in STYLES]
    return OTHERS[others.index(codec) % len(OTHERS)], "x"


def draw(panels: list[Panel], labels: dict[str, str], metrics: list[str], path: Path) -> None:
    """Write `path`.png and .svg: a row for each metric, a column for each panel.

    Args:
        labels: names of the codecs for people, in the order of the legend.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 9.5,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "svg.hashsalt": "detection",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            len(metrics),
            len(panels),
            figsize=(4.3 * len(panels) + 0.4, 3.0 * len(metrics) + 0.5),
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        for row, metric in enumerate(metrics):
            for column, panel in enumerate(panels):
                _panel(axes[row, column], panel, labels, metric)
                if row == 0:
                    axes[row, column].set_title(panel.title, loc="left", fontsize=10, color=INK)
                if row == len(metrics) - 1:
                    axes[row, column].set_xlabel("bytes of all images (kB)")
            axes[row, 0].set_ylabel(NAMES.get(metric, metric))
        lines, names = axes[0, 0].get_legend_handles_labels()
        columns = min(len(names), 4 * len(panels))
        figure.legend(lines, names, loc="outside lower center", ncols=columns, frameon=False)
        figure.savefig(path.with_suffix(".png"), dpi=150, facecolor="white")
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None}, facecolor="white")
        pyplot.close(figure)


def _panel(axis: Any, panel: Panel, labels: dict[str, str], metric: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.axhline(
        panel.original[metric], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="originals"
    )
    for codec, label in labels.items():
        if codec in panel.lines:
            color, marker = style_of(codec, list(labels))
            points = sorted(panel.lines[codec], key=lambda point: point[0])
            axis.plot(
                [size / 1000 for size, _ in points],
                [values[metric] for _, values in points],
                color=color,
                marker=marker,
                markersize=4.5,
                linewidth=1.6,
                label=label,
            )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 3, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(length=0)
