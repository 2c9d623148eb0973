"""Batch normalization on a CPU, side by side with the limit (a copy), torch eager, torch.compile and others.

    python -m benchmarks            all of it, under 20 minutes on two cores
    python -m benchmarks --quick    the cases that tell most, under 2 minutes
    python -m benchmarks --page     tables and plots of docs/performance.md out of the rows there are

Every contestant's result is compared with the float64 reference first, and no figure is kept for a wrong one. The
contestants of a case then take turns on the same tensors in one process; figures are medians. A ratio is the result,
an absolute time a note. `python -m benchmarks --suite gpu` is the same for CUDA.
"""
