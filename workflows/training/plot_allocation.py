"""Draw the log of an allocation policy's training.

    python workflows/training/plot_allocation.py runs/allocation

\b
Writes RUN/training.png and RUN/training.svg, over PPO updates; the decoder's part is shaded:
    rate against R_max, and the price of bits that dual ascent sets for it
    utility gained over the base level throughout, less the bits beyond R_max, in usual bits
    entropy of the policy, and how often each level is drawn
"""

from __future__ import annotations

import csv
from pathlib import Path

import click
import numpy as np
from plot_training import running_median

LEVELS = ("level_1", "level_2", "level_3", "level_4", "level_5")


def draw(rows: list[dict[str, str]], title: str, path: Path) -> None:
    """Write `path`.png and .svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot

    table = {k: np.array([float(r[k]) for r in rows]) for k in rows[0] if k != "part"}
    decoding = [float(r["update"]) for r in rows if r["part"] == "decoder"]
    at = table["update"]
    with pyplot.rc_context({"font.size": 9, "svg.hashsalt": "training", "axes.grid": True}):
        figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
        for panel, values, label in (
            (axes[0, 0], table["rate"], "rate / R_max"),
            (axes[0, 1], table["gain"] - (table["rate"] - 1), "net utility gained (usual bits)"),
        ):
            panel.plot(at, values, ".", color="#9a9a9a", markersize=3)
            panel.plot(at, running_median(values), color="#0072B2", label="running median")
            panel.set_ylabel(label)
        axes[0, 0].axhline(1, color="black", linewidth=0.8)
        axes[0, 0].plot(at, table["price"], color="#D55E00", label="price")
        axes[0, 0].legend()
        axes[1, 0].plot(at, table["entropy"], color="#0072B2")
        axes[1, 0].set_ylabel("entropy of the policy (nats)")
        axes[1, 1].stackplot(
            at,
            [table[name] for name in LEVELS],
            colors=colormaps["RdYlBu_r"](np.linspace(0, 1, len(LEVELS))),
            labels=[name.replace("_", " ") for name in LEVELS],
        )
        axes[1, 1].set_ylim(0, 1)
        axes[1, 1].set_ylabel("share of blocks")
        axes[1, 1].legend(loc="lower left", fontsize=7)
        for panel in axes.flat:
            if decoding:
                panel.axvspan(decoding[0], decoding[-1], color="#000000", alpha=0.06)
        for panel in axes[1]:
            panel.set_xlabel("PPO update")
        figure.suptitle(title)
        figure.savefig(path.with_suffix(".png"), dpi=140)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        pyplot.close(figure)


@click.command(help=__doc__)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(run: Path) -> None:
    try:
        with (run / "log.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        draw(rows, run.name, run / "training")
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error
    except (KeyError, IndexError, ValueError) as error:
        raise click.ClickException(f"{run} holds no log of a policy's training") from error


if __name__ == "__main__":
    main()
