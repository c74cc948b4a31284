"""What both training stages share: options, optimiser, learning rate, averaged weights, files.

A run is a folder:

    checkpoint.pt   weights, averaged weights, optimiser, steps and minutes so far
    log.csv         a row every 50 steps: means of that step's batch
    validation.csv  rows about held-out crops at every checkpoint, and one is made every 5 minutes
"""

from __future__ import annotations

import csv
import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click
import processes
import torch
from checkpoints import write_checkpoint
from pytorch_optimizer import SOAP
from torch import Tensor, nn
from torch.optim import Optimizer

from archive_pipeline.pcdc.precision import PRECISIONS, Precision, chosen
from archive_pipeline.pcdc.training.judge import UtilityError, require_lpips

Placed = TypeVar("Placed", Tensor, nn.Module)

WARM_UP = 200  # steps
LOWEST_RATE = 0.02  # of the highest learning rate
LONGEST_AVERAGE = 0.999  # decay a step
LOG_EVERY = 50  # steps
SAVE_EVERY = 5.0  # minutes


@dataclass(frozen=True)
class Settings:
    """Options that all stages have; `common_options` says what they mean."""

    crops: Path
    folder: Path
    minutes: float
    device: str
    batch: int
    size: int
    lr: float
    seed: int
    threads: int
    start: Path | None
    resume: bool
    compile: bool | None
    precision: Precision

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def own_seed(self) -> int:
        """The seed of this process's crops and noise: they differ where several train at once."""
        return self.seed + 1_000_003 * processes.rank()

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def prepare(self) -> None:
        """Make the run's folder, seed torch, load what both stages judge by.

        Raises:
            click.ClickException: there is no run to resume, or one that would be overwritten, or
                LPIPS cannot be had.
        """
        if self.resume and not self.checkpoint.is_file():
            raise click.ClickException(f"{self.checkpoint}: no such file to resume from")
        if not self.resume and self.checkpoint.exists():
            raise click.ClickException(f"{self.folder} holds a run: --resume it, or name another")
        try:
            require_lpips()
        except UtilityError as error:
            raise click.ClickException(str(error)) from error
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.threads:
            torch.set_num_threads(self.threads)
        processes.join(self.on_cuda)
        torch.manual_seed(self.own_seed)

    def place(self, what: Placed) -> Placed:
        """Networks or pixels (N, C, H, W) on the device, channels last, which convolves faster."""
        return what.to(self.device, memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        """bfloat16 in what is run under it, if that is this run's precision."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.in_bfloat16)

    @property
    def in_bfloat16(self) -> bool:
        return chosen(self.precision, torch.device(self.device)) == torch.bfloat16

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function or module, compiled if it is to be."""
        wanted = self.on_cuda if self.compile is None else self.compile
        return torch.compile(function) if wanted else function


def _times_64(_: click.Context, option: click.Parameter, value: int) -> int:
    if value % 64 or value < 64:
        raise click.BadParameter(f"{value} is no multiple of 64", param=option)
    return value


def common_options(*, batch: int, lr: float, start: str) -> Callable[..., Callable[..., None]]:
    """Decorate a stage's `main(settings, ...)` with the options of `Settings`, and prepare them.

    Args:
        batch, lr: the stage's defaults.
        start: help on what its --start takes.
    """
    path = click.Path(path_type=Path)
    existing = click.Path(exists=True, path_type=Path)
    cuda = torch.cuda.is_available()
    parameters = [
        click.argument("crops", type=existing),
        click.option("--run", "folder", type=path, required=True, help="The run's folder."),
        click.option("--minutes", type=float, default=120.0, show_default=True),
        click.option("--device", default="cuda" if cuda else "cpu", show_default=True),
        click.option(
            "--batch", default=batch, show_default=True, help="Crops a step, of each process."
        ),
        click.option(
            "--size",
            default=256,
            show_default=True,
            callback=_times_64,
            help="Crop side in pixels, a multiple of 64.",
        ),
        click.option("--lr", default=lr, show_default=True, help="Highest learning rate."),
        click.option("--seed", default=0, show_default=True),
        click.option("--threads", default=0, help="CPU threads, 0 = torch's default."),
        click.option("--start", type=existing, help=start),
        click.option("--resume", is_flag=True, help="Go on from the run's checkpoint."),
        click.option(
            "--compile/--no-compile",
            default=None,
            help="Compile the networks with torch.compile.  [default: on CUDA only]",
        ),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            default="auto",
            show_default=True,
            help="Of the networks; auto is bfloat16 on CUDA and on CPUs with AMX.",
        ),
    ]

    def decorate(main: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(main)
        def command(**values: Any) -> None:
            settings = Settings(**{f.name: values.pop(f.name) for f in fields(Settings)})
            settings.prepare()
            try:
                main(settings, **values)
            finally:
                processes.leave()

        for parameter in reversed(parameters):
            command = parameter(command)
        return command

    return decorate


def learning_rate(highest: float, step: int, progress: float) -> float:
    """Linear over the first steps, then a cosine over the time planned (progress 0..1)."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
    return highest * min(1, (step + 1) / WARM_UP) * max(LOWEST_RATE, cosine)


def make_optimiser(network: nn.Module, lr: float) -> Optimizer:
    """SOAP; of several processes each keeps and updates a share of the weights, for all of them."""
    return processes.shared_out(
        SOAP, network, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, max_precondition_dim=256
    )


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, step: int) -> None:
    """Move averaged weights towards the network's after a step, counted from 0."""
    decay = min(LONGEST_AVERAGE, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)


class Run:
    """A network in training: its averaged copy, optimiser, clock and files.

    Args:
        settings: the stage's options.
        name: the network's key in checkpoints.
        network, average: what is trained, and its copy that follows.
        clip: limit of the gradient's norm.
        measure: name of the fifth column of log.csv, what stands beside the loss.
        notes: further entries of checkpoints.

    Attributes:
        step: steps so far; minutes: time so far, that of earlier sessions included.
        began: minutes at which the learning rate's cosine began.
        leads: whether this process saves, logs and validates; of several, one does.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        network: nn.Module,
        average: nn.Module,
        *,
        clip: float,
        measure: str,
        notes: dict[str, str] | None = None,
    ) -> None:
        self.settings, self.name, self.clip, self.notes = settings, name, clip, notes or {}
        self.network, self.average = network, average
        self.optimiser = make_optimiser(network, settings.lr)
        self.step, self.minutes, self.began = 0, 0.0, 0.0
        self.leads = processes.rank() == 0
        self.fields = ["step", "minutes", "lr", "loss", measure, "psnr", "grad"]

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: along its cosine, or a new one where minutes were added."""
        self.network.load_state_dict(state[self.name])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.minutes = state["step"], state["minutes"]
        began, end = state.get("cosine", (None, None))
        self.began = began if end == self.settings.minutes else self.minutes

    def begin(self) -> None:
        """Open the log and start the clock."""
        processes.copy_of_first(self.network, self.average)
        if self.leads and not self.settings.resume:
            self._append("log.csv", [self.fields])
        self._started, self._saved = time.monotonic() - 60 * self.minutes, self.minutes

    @property
    def finished(self) -> bool:
        return self.minutes >= self.settings.minutes

    @property
    def save_due(self) -> bool:
        return self.minutes - self._saved >= SAVE_EVERY

    @property
    def log_due(self) -> bool:
        return self.leads and self.step % LOG_EVERY == 0

    def update(self, loss: Tensor) -> None:
        """Take one step; gradients that are not finite change nothing but the clock."""
        progress = (self.minutes - self.began) / (self.settings.minutes - self.began)
        self.rate = learning_rate(self.settings.lr, self.step, progress)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        processes.average_gradients(self.network)
        self.norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        if torch.isfinite(self.norm):
            self.optimiser.step()
        follow(self.average, self.network, self.step)
        self.step += 1
        minutes = (time.monotonic() - self._started) / 60
        self.minutes = processes.number_of_first(minutes, self.settings.device)

    def log(self, loss: float, measure: float, squared_error: float) -> None:
        """Append a row to log.csv; the error is that of 8-bit pixels."""
        psnr = 10 * math.log10(255**2 / squared_error)
        row = [self.step, f"{self.minutes:.2f}", f"{self.rate:.2e}", f"{loss:.4f}"]
        row += [f"{measure:.4f}", f"{psnr:.2f}", f"{float(self.norm):.3f}"]
        self._append("log.csv", [row])

    def save(self) -> None:
        """Write the checkpoint; every process must, since each has a share of the optimiser."""
        self._saved = self.minutes
        processes.collect(self.optimiser)
        if not self.leads:
            return
        state = {
            self.name: self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "minutes": self.minutes,
            "cosine": (self.began, self.settings.minutes),
        }
        write_checkpoint(self.settings.checkpoint, {**state, **self.notes})

    def report(self, rows: Iterable[tuple[Any, ...]], line: str) -> None:
        """Append rows to validation.csv, after step and minutes, and print a line."""
        where = [self.step, f"{self.minutes:.1f}"]
        self._append("validation.csv", [[*where, *row] for row in rows])
        click.echo(f"{self.step} {self.minutes:.1f} min {line}", err=True)

    def _append(self, name: str, rows: list[list[Any]]) -> None:
        with (self.settings.folder / name).open("a", newline="") as file:
            csv.writer(file).writerows(rows)
