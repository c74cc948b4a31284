"""Draw the logs of training runs.

    python workflows/training/plot_training.py runs/transform runs/denoiser

\b
Writes RUN/training.png and RUN/training.svg for each run, over minutes:
    log.csv         loss and the gradient's norm before clipping: each row one batch, and
                    running medians
    validation.csv  of the transform bits a pixel, PSNR, 1 - SSIM and LPIPS, of the denoiser LPIPS,
                    PSNR at full and at quarter size and the error of texture, of held-out crops,
                    and their change since the first checkpoint: a colour for each image step g, a
                    line style for each number of denoising steps

What a session logged after the checkpoint that a later one resumed from is left out.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SMOOTH = 9  # rows of a running median
STYLES = {0: ":", 1: "-", 2: "--", 4: "-.", 8: (0, (1, 4))}  # by denoising steps
LPIPS, PSNR = "LPIPS (lower is better)", "PSNR (dB)"
# by the fifth column of log.csv: what validation.csv has behind steps
MEASURES = {
    "bpp": ("bits a pixel", PSNR, "1 - SSIM", LPIPS),
    "lpips": (LPIPS, PSNR, "PSNR at quarter size (dB)", "texture, finest octaves (log2)"),
}


@dataclass(frozen=True)
class Logs:
    """A run's logs.

    Attributes:
        measure: "bpp" (transform) or "lpips" (denoiser).
        log: columns of log.csv by name.
        validation: rows of minutes, g, denoising steps (1 for the transform) and `MEASURES`.
    """

    measure: str
    log: dict[str, Floats]
    validation: Floats

    @classmethod
    def read(cls, run: Path) -> Logs:
        """Read a run's folder.

        Raises:
            click.ClickException: a log is missing, empty or not one of a training run.
        """
        try:
            with (run / "log.csv").open(newline="") as file:
                names, *rows = csv.reader(file)
            table = superseded_dropped(np.array(rows, np.float64).reshape(-1, len(names)))
            log = dict(zip(names, table.T, strict=True))
            [measure] = MEASURES.keys() & log.keys()
            with (run / "validation.csv").open(newline="") as file:
                validation = superseded_dropped(np.array(list(csv.reader(file)), np.float64))
            if measure == "bpp":
                validation = np.insert(validation, 3, 1, axis=1)
            if validation.shape[1] != 4 + len(MEASURES[measure]):
                raise ValueError("validation.csv has other columns")
            return cls(measure, log, validation[:, 1:])
        except OSError as error:
            raise click.ClickException(f"{error.filename}: {error.strerror}") from error
        except (ValueError, IndexError) as error:
            raise click.ClickException(f"{run} holds no logs of a training run: {error}") from error


def superseded_dropped(rows: Floats) -> Floats:
    """Rows (step first) without those that a later row's step goes back behind."""
    later = np.minimum.accumulate(rows[::-1, 0])[::-1]
    return rows[rows[:, 0] <= later]


def running_median(values: Floats) -> Floats:
    """Medians of `SMOOTH` neighbours; the first and last are of fewer."""
    half = SMOOTH // 2
    padded = np.pad(values, half, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, SMOOTH), 1)


def draw(logs: Logs, title: str, path: Path) -> None:
    """Write `path`.png and .svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 9, "svg.hashsalt": "training", "axes.grid": True, "grid.alpha": 0.3}
    with pyplot.rc_context(style):
        labels = MEASURES[logs.measure]
        columns = len(labels)
        figure, axes = pyplot.subplots(
            3, columns, figsize=(4.5 * columns, 9), sharex=True, layout="constrained"
        )
        for panel in axes[0, 2:]:
            panel.set_visible(False)
        for panel, name in zip(axes[0, :2], ("loss", "grad"), strict=True):
            _draw_log(panel, logs.log["minutes"], logs.log[name])
            panel.set_ylabel({"loss": "loss", "grad": "gradient norm"}[name])
        for column, label in enumerate(labels):
            _draw_validation(axes[1, column], logs.validation, 3 + column, change=False)
            _draw_validation(axes[2, column], logs.validation, 3 + column, change=True)
            axes[1, column].set_ylabel(f"held out: {label}")
            axes[2, column].set_ylabel("change since the first checkpoint")
            axes[2, column].set_xlabel("minutes")
        figure.legend(
            *axes[1, 0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=5,
            fontsize=8,
        )
        figure.suptitle(title)
        figure.savefig(path.with_suffix(".png"), dpi=140)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        pyplot.close(figure)


def _draw_log(panel: Any, minutes: Floats, values: Floats) -> None:
    panel.plot(minutes, values, ".", color="#9a9a9a", markersize=3)
    panel.plot(minutes, running_median(values), color="#0072B2")


def _draw_validation(panel: Any, rows: Floats, column: int, *, change: bool) -> None:
    """A line for each image step and number of denoising steps, of a column over minutes."""
    from matplotlib import colormaps

    image_steps, counts = np.unique(rows[:, 1]), np.unique(rows[:, 2])
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(image_steps)))
    for g, colour in zip(image_steps, colours, strict=True):
        for steps in counts:
            part = rows[(rows[:, 1] == g) & (rows[:, 2] == steps)]
            panel.plot(
                part[:, 0],
                part[:, column] - (part[:1, column] if change else 0),
                color=colour,
                linestyle=STYLES.get(int(steps), "-"),
                marker=".",
                markersize=4,
                label=f"g {g:.0f}" + (f", {steps:.0f} steps" if len(counts) > 1 else ""),
            )


@click.command(help=__doc__)
@click.argument(
    "runs",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
def main(runs: tuple[Path, ...]) -> None:
    for run in runs:
        draw(Logs.read(run), run.name, run / "training.png")
        click.echo(run / "training.png")


if __name__ == "__main__":
    main()
