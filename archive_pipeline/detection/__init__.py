"""Objects in pictures: boxes, labels, detectors, metrics, verdict and report.

May import `outputs`, `store`, `flight`, `geo` and below; never `jobs`.
"""
