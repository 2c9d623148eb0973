"""The operator boundary: schemas, fake kernels, gradients, choice of implementation."""

from batchnorm.ops import registration as registration  # registers the implementations
