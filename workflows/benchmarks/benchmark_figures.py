"""Figures of a benchmark: mean rate-distortion curves, and pictures side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_summary import OURS, RANGE, curves_of, groups_of, label
from metrics import METRICS
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's palette, which colour-blind readers tell apart; line styles tell again
STYLES: dict[str, tuple[str, Any]] = {
    OURS: ("#D55E00", "-"),
    "hevc": ("#000000", "-"),
    "hevc_psnr": ("#000000", (0, (1, 1.2))),
    "avif": ("#0072B2", (0, (5, 1.5))),
    "jpegxl": ("#009E73", (0, (6, 1.5, 1, 1.5))),
    "webp": ("#CC79A7", (0, (3, 1.5))),
    "jpeg2000": ("#56B4E9", "-"),
    "jpeg": ("#999999", "-"),
}
OTHER_STEPS = ("#D55E00", (0, (3, 1.5)))  # ours with another number of denoising steps
RATES = np.geomspace(0.05, 1.2, 60)  # bits a pixel at which curves are averaged
RATE_TICKS = (0.05, 0.1, 0.2, 0.4, 0.8)
INK, MUTED, PAPER = "#1a1a1a", "#5f5f5f", "#ffffff"
MARGIN, GAP, CAPTION = 24, 12, 62  # pixels
MAX_PANEL = 512

Pixels = NDArray[np.uint8]


def mean_curves(points: list[dict[str, Any]], metric: str) -> dict[Any, NDArray[np.float64]]:
    """Mean quality at `RATES` by ((set, scale), codec); NaN where not every crop has a value."""
    found: dict[Any, list[NDArray[np.float64]]] = {}
    for (group, _, codec), curve in curves_of(points, metric).items():
        values = curve.quality_at(RATES) if curve else np.full(len(RATES), np.nan)
        found.setdefault((group, codec), []).append(values)
    return {key: np.mean(values, 0) for key, values in found.items()}


def draw_curves(
    points: list[dict[str, Any]], peers: list[str], metrics: list[str], path: Path
) -> None:
    """Write `path`.png and .svg: a row for each set and scale, a column for each metric."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    style = {
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "svg.hashsalt": "benchmark",
    }
    groups = groups_of(points)
    codecs = [*peers, OURS]
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            len(groups),
            len(metrics),
            figsize=(3.1 * len(metrics), 2.7 * len(groups) + 0.6),
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        for column, metric in enumerate(metrics):
            curves = mean_curves(points, metric)
            sign = -1 if METRICS[metric].better == "lower" else 1
            for row, group in enumerate(groups):
                panel = axes[row, column]
                panel.axvspan(*RANGE, color="#f2f2f2", zorder=0, linewidth=0)
                for codec in codecs:
                    if (group, codec) in curves:
                        ours = codec == OURS
                        color, dashes = STYLES.get(codec, OTHER_STEPS)
                        panel.plot(
                            RATES,
                            sign * curves[group, codec],
                            color=color,
                            linestyle=dashes,
                            linewidth=2.6 if ours else 1.3,
                            zorder=4 if ours else 3,
                            label=label(codec),
                        )
                panel.set_xscale("log")
                panel.set_xlim(RATES[0], RATES[-1])
                panel.xaxis.set_major_locator(FixedLocator(RATE_TICKS))
                panel.xaxis.set_major_formatter(FixedFormatter([f"{t:g}" for t in RATE_TICKS]))
                panel.xaxis.set_minor_locator(NullLocator())
                panel.grid(color="#dddddd", linewidth=0.6)
                panel.spines[["top", "right"]].set_visible(False)
                panel.tick_params(length=0)
                if row == 0:
                    panel.set_title(METRICS[metric].axis, fontsize=9.5, color=INK, loc="left")
                if row == len(groups) - 1:
                    panel.set_xlabel("bits a pixel")
                if column == 0:
                    panel.set_ylabel(f"{group[0]}, {group[1]}", fontsize=9.5, labelpad=8)
        lines, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            lines[::-1],
            labels[::-1],
            loc="outside lower center",
            ncols=len(labels),
            frameon=False,
            handlelength=2.8,
        )
        figure.savefig(path.with_suffix(".png"), dpi=150)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        pyplot.close(figure)


@dataclass(frozen=True)
class Panel:
    """A picture and what is known of it; codec and `size` in bytes are None for the original."""

    codec: str | None
    pixels: Pixels
    size: int | None
    quality: dict[str, float]


@dataclass(frozen=True)
class Sheet:
    """Panels of equal size to stand side by side."""

    title: str
    panels: list[Panel]


def caption(panel: Panel) -> list[str]:
    """Two lines: bytes and rate, then quality."""
    height, width = panel.pixels.shape[:2]
    if panel.size is None:
        return [f"{width} x {height} pixels", ""]
    first = f"{panel.size:,} bytes, {8 * panel.size / (width * height):.3f} bits a pixel"
    shown = {
        "lpips": "LPIPS {:.3f}",
        "ssimulacra2": "SSIMULACRA 2 {:.1f}",
        "psnr": "PSNR {:.1f}",
        "texture": "texture {:.2f}",
    }
    known = [text.format(panel.quality[k]) for k, text in shown.items() if k in panel.quality]
    return [first, ", ".join(known)]


def draw_sheet(sheet: Sheet) -> Image.Image:
    """Draw the middle of each panel, captions above; small ones are enlarged 2, 3... times."""
    shape = sheet.panels[0].pixels.shape
    zoom = max(1, MAX_PANEL // max(shape[:2]))
    height, width = (zoom * min(side, MAX_PANEL) for side in shape[:2])
    count = len(sheet.panels)
    title = 40
    canvas = Image.new(
        "RGB",
        (2 * MARGIN + count * width + (count - 1) * GAP, 2 * MARGIN + title + CAPTION + height),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    fonts = {size: ImageFont.load_default(size) for size in (14, 17, 20)}
    draw.text((MARGIN, MARGIN), sheet.title, INK, fonts[20])
    for n, panel in enumerate(sheet.panels):
        left, top = MARGIN + n * (width + GAP), MARGIN + title
        name = label(panel.codec) if panel.codec else "Original"
        ours = (panel.codec or "").startswith(OURS)
        draw.text((left, top), name, STYLES[OURS][0] if ours else INK, fonts[17])
        for line, text in enumerate(caption(panel)):
            draw.text((left, top + 21 + 17 * line), text, MUTED, fonts[14])
        row, col = (shape[0] - height // zoom) // 2, (shape[1] - width // zoom) // 2
        part = panel.pixels[row : row + height // zoom, col : col + width // zoom]
        picture = Image.fromarray(np.ascontiguousarray(part))
        canvas.paste(
            picture.resize((width, height), Image.Resampling.NEAREST), (left, top + CAPTION)
        )
    return canvas
