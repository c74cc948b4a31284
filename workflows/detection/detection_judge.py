"""Judges what detectors found in all versions of a flight's images."""

from __future__ import annotations

from dataclasses import dataclass

from detection_codecs import Codec, Original
from detection_rates import Sampled, draws, sample
from detection_run import Run
from detection_tables import Judged

from archive_pipeline.detection.boxes import Boxes
from archive_pipeline.detection.detectors import Detector, DetectorFile, load_detector
from archive_pipeline.detection.labels import Groups, Labels, read_labels
from archive_pipeline.detection.metrics import Matched
from archive_pipeline.detection.verification import DetectorGroups, VerifyOptions, compare
from archive_pipeline.flight.source_image import SourceImage


@dataclass(frozen=True)
class Setting:
    """How what was found is judged.

    Attributes:
        detectors: with the class groups that each is judged by.
        labels: the reference; without them the originals' detections are.
        options: of the comparison.
        resamples: of the bootstrap over images.
        paper_ratio: source ratio of the table in the paper's layout.
    """

    detectors: DetectorGroups
    labels: Labels | None
    options: VerifyOptions
    resamples: int
    paper_ratio: float

    def labelled(self, run: Run, image: SourceImage, detector: Detector) -> dict[str, Boxes] | None:
        """Boxes of an image's labels by class, if labels are the reference.

        Raises:
            LabelError: they cannot be read.
        """
        label = None if self.labels is None else self.labels.find(run.flight.name, image.id)
        if self.labels is None or label is None:
            return None
        names = detector.classes if self.labels.names is None else self.labels.names
        return read_labels(label, image.width, image.height, names)

    def check_labels(self, run: Run) -> None:
        """Read all labels: what is wrong with them is said before hours of work.

        Raises:
            LabelError: some cannot be read.
        """
        for file, _ in self.detectors:
            detector = load_detector(file, self.options.device)
            for image in run.images:
                self.labelled(run, image, detector)


@dataclass(frozen=True)
class Versions:
    """Images of one codec at one ratio, each matched with its reference; `sizes` are bytes."""

    matched: list[Matched]
    sizes: list[int]


def judge(run: Run, setting: Setting, codecs: list[Codec], ratios: list[float]) -> list[Judged]:
    """Metrics of all codecs at all ratios, under the same resamples of the images.

    Images that failed anywhere are left out of everything.
    """
    weights = draws(len(run.images), setting.resamples)
    confidence = setting.options.confidence
    judged = []
    for file, groups in setting.detectors:
        for group, listed in groups.items():
            own = {group: listed}
            before = match_all(run, setting, file, own, Original(), 0)
            original = sample(before.matched, before.sizes, weights, confidence, None)
            by_codec: dict[str, dict[float, Sampled]] = {}
            for codec in codecs:
                for ratio in ratios:
                    after = match_all(run, setting, file, own, codec, ratio)
                    by_codec.setdefault(codec.name, {})[ratio] = sample(
                        after.matched,
                        after.sizes,
                        weights,
                        confidence,
                        original.values["precision"],
                    )
            objects = sum(matched.references for matched in before.matched)
            images = len(before.matched)
            judged.append(Judged(file.name, group, images, objects, original, by_codec))
    return judged


def match_all(
    run: Run, setting: Setting, file: DetectorFile, group: Groups, codec: Codec, ratio: float
) -> Versions:
    """Match one class group's objects in every image of a codec at a ratio."""
    detector = load_detector(file, setting.options.device)
    (name,) = group
    versions = Versions([], [])
    for image in run.images:
        original = run.found(Original(), image, 0, file)
        found = run.found(codec, image, ratio, file)
        assert original is not None  # what failed is not among the images
        assert found is not None
        labelled = setting.labelled(run, image, detector)
        results = compare(
            detector, group, original.objects, found.objects, labelled, setting.options
        )
        versions.matched.append(results[name].restored)
        versions.sizes.append(found.bytes)
    return versions
