"""A YOLO detector in PyTorch from its OpenVINO export, int8 or not, so that it can be trained on.

Weights are what the export computes them from (int8 numbers times a scale for each channel). The
export has batch normalisation fused into its convolutions; it is put back with the statistics of
real images, so that the network gives the same numbers both in training and in evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from archive_pipeline.detection.detectors import DetectorError, find_detectors, import_ultralytics

Array = NDArray[np.float32]


def read_weights(folder: Path) -> dict[str, tuple[Array, Array | None]]:
    """Weight and bias of each convolution of an OpenVINO folder, float32, by its module's name.

    Raises:
        click.ClickException: it is no export of a PyTorch detector.
    """
    import_ultralytics()  # before openvino, whose telemetry it turns off
    import openvino

    files = sorted(folder.glob("*.xml"))
    if len(files) != 1:
        raise click.ClickException(f"{folder}: no OpenVINO model (one .xml) in it")
    core = openvino.Core()
    wanted: dict[str, list[Any]] = {}
    for node in core.read_model(files[0]).get_ordered_ops():
        if node.get_type_name() not in ("Convolution", "GroupConvolution"):
            continue
        name = re.match(r"__module\.(.+?)/", node.get_friendly_name())
        if name is None:
            raise click.ClickException(f"{files[0]}: not converted from PyTorch: its layers")
        (after,) = (target.get_node() for target in node.output(0).get_target_inputs())
        bias = [v for v in after.input_values() if v.get_node() != node]
        wanted[name[1]] = [node.input_value(1), *(bias if after.get_type_name() == "Add" else [])]
    # one model without inputs, whose outputs are the weights as the export's layers see them
    outputs = [value for values in wanted.values() for value in values]
    constants = openvino.Model([openvino.opset13.result(v) for v in outputs], [], "weights")
    computed = iter(core.compile_model(constants, "CPU")({}).values())
    read = {name: [np.array(next(computed)) for _ in values] for name, values in wanted.items()}
    return {
        name: (weight, bias[0].reshape(-1) if bias else None)
        for name, (weight, *bias) in read.items()
    }


def architecture(folder: Path) -> tuple[str, dict[int, str]]:
    """Ultralytics' name of an export's architecture, as yolo11n.yaml, and its classes.

    Raises:
        click.ClickException: its metadata do not say.
    """
    path = folder / "metadata.yaml"
    try:
        metadata = yaml.safe_load(path.read_text("utf-8"))
        found = re.search(r"\bYOLO(\d+[nsmlx])\b", metadata["description"])
        if metadata["task"] == "detect" and found:
            return f"yolo{found[1]}.yaml", {int(k): v for k, v in metadata["names"].items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise click.ClickException(f"{path}: {error}") from error
    raise click.ClickException(f"{path}: does not name a YOLO detector's architecture")


def load_network(name: str, images: Iterable[Tensor]) -> nn.Module:
    """The network of a detector: an OpenVINO folder, a .pt file, or one that Ultralytics publishes.

    Args:
        images: for exports, as for `load_export`.

    Raises:
        click.ClickException: there is no such detector.
    """
    if Path(name).is_dir():
        return load_export(Path(name), images)
    try:
        (file,) = find_detectors([name])
    except DetectorError as error:
        raise click.ClickException(str(error)) from error
    if file.path.suffix != ".pt":
        raise click.ClickException(f"{name}: neither a .pt file nor an OpenVINO folder")
    loaded = import_ultralytics().YOLO(str(file.path))
    if loaded.task != "detect":
        raise click.ClickException(f"{name}: its task is {loaded.task}, not detect")
    network: nn.Module = loaded.model
    return network


def load_export(folder: Path, images: Iterable[Tensor]) -> nn.Module:
    """The detector of an OpenVINO folder as Ultralytics' PyTorch model, ready to be trained.

    Args:
        images: batches, float32 (N, 3, H, W) in 0..1, from which batch normalisation takes its
            means and variances.

    Raises:
        click.ClickException: the folder holds something else.
    """
    name, classes = architecture(folder)
    model: nn.Module = import_ultralytics().YOLO(name, task="detect").model
    model.names = classes
    weights = read_weights(folder)
    try:
        for path, (weight, bias) in weights.items():
            layer = model.get_submodule(path)
            layer.weight.data.copy_(torch.from_numpy(weight.reshape(layer.weight.shape)))
            if bias is not None:
                owner = layer if layer.bias is not None else model.get_submodule(_norm(path))
                owner.bias.data.copy_(torch.from_numpy(bias))
    except (AttributeError, ValueError, RuntimeError) as error:
        raise click.ClickException(f"{folder}: is not {name}: {error}") from error
    missing = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)} - weights.keys()
    if missing:
        raise click.ClickException(f"{folder}: is not {name}: no weights of {min(missing)}")
    restore_normalisation(model, images)
    return model


def _norm(convolution: str) -> str:
    """Name of the batch normalisation behind a convolution of this name."""
    return f"{convolution.removesuffix('.conv')}.bn"


@torch.no_grad()
def restore_normalisation(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Give batch normalisations, whose biases are all they add, statistics of real images.

    In evaluation the network computes what it did; in training, too, as far as a batch resembles
    the images.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for layer in layers.values():  # does nothing but add its bias
        layer.running_mean.zero_()
        layer.running_var.fill_(1 - layer.eps)
        layer.weight.fill_(1)
    sums = {name: torch.zeros(3, m.num_features, dtype=torch.float64) for name, m in layers.items()}

    def add(name: str, x: Tensor) -> None:
        x = x.double().transpose(0, 1).flatten(1)
        count = torch.full_like(x[:, 0], x.shape[1])
        sums[name] += torch.stack([count, x.sum(1), x.square().sum(1)])

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
        for name, layer in layers.items()
    ]
    training = model.training
    model.eval()
    for batch in images:
        model(batch)
    for handle in handles:
        handle.remove()
    model.train(training)
    for name, layer in layers.items():
        count, total, squares = sums[name]
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
        layer.bias.copy_(layer.bias + mean)
        layer.weight.copy_((variance + layer.eps).sqrt())
