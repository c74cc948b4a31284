"""Decoding on a CPU without PyTorch: the networks that steps 0 takes, run by NumPy and OpenVINO."""
