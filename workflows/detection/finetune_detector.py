"""Fine-tune a YOLO11 or YOLO12 detector on labelled drone images, for `archive verify-detection`.

    python workflows/detection/finetune_detector.py DATA --start yolo11n.pt \
        --run runs/detector --minutes 60
    archive verify-detection --model runs/detector/detector_openvino_model

DATA is a folder with a data.yaml as YOLO tools write it; only what its `train` names is read. The
images are cut into slices at full resolution, in which the detector also sees them later; images
whose names match --holdout choose the best epoch, and are not trained on. Frames of one sequence
look alike: hold out whole sequences.

--start is a .pt, an OpenVINO export (int8 as well: its weights are dequantised), or a name such as
yolo11n.yaml for random weights. Names of published weights are downloaded.

Writes into --run: detector_openvino_model/ and detector.safetensors (the same weights, with the
architecture and the classes in the file's metadata), README.md, a card with data, command and
metrics; and what the training itself leaves: slices/, train/ with its log and checkpoints.
Ultralytics' weights and code are under AGPL-3.0, and so are weights trained from them.
Needs `pip install 'archive-pipeline[verify]'`.
"""

from __future__ import annotations

import csv
import importlib
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import torch
import yaml
from detection_slices import prepare
from safetensors.torch import save_file
from torch import Tensor, nn

from archive_pipeline.detection.detectors import DetectorError, import_ultralytics
from archive_pipeline.detection.labels import Groups, group_classes, parse_groups

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from openvino_weights import load_network

STATISTICS = 64  # slices that batch normalisation takes its statistics from
METRICS = {
    "metrics/precision(B)": "precision",
    "metrics/recall(B)": "recall",
    "metrics/mAP50(B)": "mAP50",
    "metrics/mAP50-95(B)": "mAP50-95",
}


def batches(folder: Path, size: int, seed: int) -> Iterator[Tensor]:
    """Some slices one by one, float32 (1, 3, size, size) in 0..1, padded with grey."""
    paths = sorted(folder.glob("*.png"))
    chosen = np.random.default_rng(seed).permutation(len(paths))[:STATISTICS]
    for index in chosen:
        pixels = cv2.imread(str(paths[index]))[..., ::-1]
        padded = np.full((size, size, 3), 114, np.uint8)
        padded[: pixels.shape[0], : pixels.shape[1]] = pixels
        yield torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255


def load_start(start: str, slices: Path, size: int, groups: Groups | None, seed: int) -> nn.Module:
    """The network to begin with, a class of each group renamed to the group.

    So the group begins with what the start knows of that class.

    Raises:
        click.ClickException: there is no such start.
    """
    torch.manual_seed(seed)
    if start.endswith(".yaml"):
        model = import_ultralytics().YOLO(start, task="detect").model
    else:
        model = load_network(start, batches(slices / "train" / "images", size, seed))
    names = dict(model.names)
    for group, listed in (groups or {}).items():
        known = group_classes(names, {group: listed}).get(group, [])
        likely = [i for name in listed for i in known if names[i].casefold() == name.casefold()]
        if group not in names.values() and (likely or known):
            names[(likely or known)[0]] = group
    model.names = names
    return model


@contextmanager
def isolated() -> Iterator[None]:
    """Ultralytics' training without what it would download: a font for plots."""
    utils = importlib.import_module("ultralytics.data.utils")
    before, utils.check_font = utils.check_font, lambda *_: None
    try:
        yield
    finally:
        utils.check_font = before


def minutes_spent(run: Path) -> float:
    """Minutes of training that a run's log says."""
    try:
        with (run / "train" / "results.csv").open(newline="") as file:
            return float([row["time"] for row in csv.DictReader(file)][-1]) / 60
    except OSError:
        return 0.0


def train(start: nn.Module | None, run: Path, settings: dict[str, Any]) -> None:
    """Train with Ultralytics' own trainer.

    Args:
        start: None to go on from the run's last checkpoint.
        settings: Ultralytics'; `time` counts the hours before as well.
    """
    detect = importlib.import_module("ultralytics.models.yolo.detect")
    spent = 60 * minutes_spent(run)

    class Trainer(detect.DetectionTrainer):  # type: ignore[misc, name-defined]
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = False) -> Any:
            origin = start if weights is None else weights
            return super().get_model(origin.yaml, origin, verbose)

        def get_dataset(self) -> Any:
            self.epochs = settings["epochs"]  # a checkpoint has what time was thought to be for
            return super().get_dataset()

        def final_eval(self) -> None:
            """Leave the checkpoints as they are, so that the run can go on."""

    def count_on(trainer: Any) -> None:
        if trainer.start_epoch:  # as if there had been one sitting
            trainer.train_time_start -= spent
            trainer.start_epoch = 0

    def stop(trainer: Any) -> None:
        trainer.stop |= trainer.epoch + 1 >= settings["epochs"]  # else only time counts

    resume = str(last_of(run)) if start is None else False
    with isolated():
        trainer = Trainer(overrides={**settings, "resume": resume})
        trainer.add_callback("on_train_epoch_start", count_on)
        trainer.add_callback("on_fit_epoch_end", stop)
        trainer.train()


def last_of(run: Path) -> Path:
    return run / "train" / "weights" / "last.pt"


def export(best: Path, run: Path, input_size: int) -> None:
    """Write the detector as an OpenVINO folder and as safetensors."""
    yolo = import_ultralytics().YOLO(str(best))
    model: nn.Module = yolo.model
    with isolated():
        made = Path(yolo.export(format="openvino", imgsz=input_size, device="cpu", verbose=False))
    target = run / "detector_openvino_model"
    shutil.rmtree(target, ignore_errors=True)
    made.rename(target)
    for file in target.glob(f"{best.stem}.*"):
        file.rename(target / f"detector{file.suffix}")
    # its description names a file of this machine
    path = target / "metadata.yaml"
    about = yaml.safe_load(path.read_text())
    about["description"] = "Fine-tuned on labelled images; README.md beside this folder says which"
    path.write_text(yaml.safe_dump(about, sort_keys=False))
    tensors = {k: v.float().contiguous() for k, v in model.state_dict().items()}
    facts = {"architecture": json.dumps(model.yaml), "names": json.dumps(model.names)}
    save_file(tensors, run / "detector.safetensors", metadata=facts)


def best_epoch(run: Path) -> dict[str, float]:
    """Metrics on the held-out slices of the epoch that was chosen."""
    checkpoint = torch.load(run / "train" / "weights" / "best.pt", "cpu", weights_only=False)
    metrics = checkpoint["train_metrics"]
    return {name: float(metrics[key]) for key, name in METRICS.items()} | {
        "epoch": checkpoint["epoch"] + 1
    }


def without_folders(word: str) -> str:
    """A word of a command line; of a path only its name, which is all that others may know."""
    return Path(word).name if Path(word).exists() else word


def write_card(run: Path, start: str, note: str, facts: dict[str, Any], size: int) -> None:
    """Write README.md: where the detector comes from and what it can do."""
    found = best_epoch(run)
    with (run / "train" / "results.csv").open(newline="") as file:
        epochs = len(list(csv.DictReader(file)))
    classes = "; ".join(f"{name} ({', '.join(of)})" for name, of in facts["classes"].items())
    parts = [
        f"| {part} | {facts[part]['images']} | {facts[part]['objects']} | {facts[part]['slices']} |"
        for part in ("train", "val")
    ]
    lines = [
        "# A detector for drone images",
        "",
        f"Fine-tuned from `{without_folders(start)}` with Ultralytics "
        f"{import_ultralytics().__version__}. License: AGPL-3.0, as Ultralytics' weights and code; "
        "the data's own licenses:",
        "",
        note or "(not given; see --note)",
        "",
        f"Classes: {classes}.",
        "",
        f"| part | images | objects | slices of {size} pixels |",
        "|---|---|---|---|",
        *parts,
        "",
        f"{minutes_spent(run):.1f} minutes, {epochs} epochs; epoch {found['epoch']:.0f} "
        "was the best on the held-out slices (val), whose metrics are:",
        "",
        "| precision | recall | mAP50 | mAP50-95 |",
        "|---|---|---|---|",
        "| " + " | ".join(f"{found[name]:.3f}" for name in METRICS.values()) + " |",
        "",
        "They chose the epoch, so images of other flights are harder. Command:",
        "",
        f"    {shlex.join(['python', *map(without_folders, sys.argv)])}",
        "",
    ]
    (run / "README.md").write_text("\n".join(lines))


@click.command(help=__doc__)
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--start", required=True, help=".pt, OpenVINO folder, or yolo11n.yaml for random.")
@click.option("--run", type=click.Path(path_type=Path), default="runs/detector", show_default=True)
@click.option("--classes", multiple=True, metavar="GROUP[=NAME,...]", help="Join label classes.")
@click.option("--holdout", multiple=True, metavar="PATTERN", help="Default: every tenth image.")
@click.option("--size", default=640, show_default=True, help="Side of the slices in pixels.")
@click.option("--input-size", default=640, show_default=True, help="The exported detector's.")
@click.option("--batch", default=16, show_default=True)
@click.option(
    "--minutes", default=60.0, show_default=True, help="Of training, a resumed run's too."
)
@click.option("--epochs", default=100, show_default=True, help="At most.")
@click.option("--freeze", default=0, show_default=True, help="Layers that stay; 11: the backbone.")
@click.option("--lr", default=1e-3, show_default=True, help="AdamW's, falling to a hundredth.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--note", default="", help="For the card: the images' origins and licenses.")
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
def main(
    data: Path,
    start: str,
    run: Path,
    classes: tuple[str, ...],
    holdout: tuple[str, ...],
    size: int,
    input_size: int,
    batch: int,
    minutes: float,
    epochs: int,
    freeze: int,
    lr: float,
    seed: int,
    device: str,
    note: str,
    resume: bool,
) -> None:
    try:
        import_ultralytics()
        groups = parse_groups(classes)
    except (DetectorError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    run.mkdir(parents=True, exist_ok=True)
    slices, facts_file = run / "slices", run / "slices.json"
    if resume and not last_of(run).is_file():
        raise click.ClickException(f"{last_of(run)}: no checkpoint to resume from")
    if resume:
        facts = json.loads(facts_file.read_text())
    else:
        facts = prepare(data, holdout, groups, size, slices)
        facts_file.write_text(json.dumps(facts, indent=2) + "\n")
        shutil.rmtree(run / "train", ignore_errors=True)
    network = None if resume else load_start(start, slices, size, groups, seed)
    if minutes_spent(run) < minutes:
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        settings = {
            "model": start if network is None else network.yaml.get("yaml_file", "yolo11n.yaml"),
            "data": str((slices / "data.yaml").absolute()),
            "project": str(run.absolute()),
            "name": "train",
            "exist_ok": True,
            "time": minutes / 60,
            "epochs": epochs,
            "imgsz": size,
            "batch": batch,
            "nbs": batch,  # one optimiser step a batch
            "freeze": freeze,
            "optimizer": "AdamW",
            "lr0": lr,
            "momentum": 0.9,
            "flipud": 0.5,  # seen from above, no direction is up
            "close_mosaic": 1,
            "warmup_epochs": 0.5,
            "warmup_bias_lr": 0.0,  # 0.1 suits SGD
            "patience": epochs,
            "seed": seed,
            "device": "0" if cuda else "cpu",
            "amp": "bf16" if cuda else False,  # no check, which would download weights
            "plots": False,
            "verbose": False,
        }
        train(network, run, settings)
    export(run / "train" / "weights" / "best.pt", run, input_size)
    write_card(run, start, note, facts, size)
    click.echo((run / "README.md").read_text())


if __name__ == "__main__":
    main()
