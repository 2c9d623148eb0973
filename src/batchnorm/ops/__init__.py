"""The operator boundary: schemas, fake kernels, gradients, choice of implementation."""

import re

import torch

from batchnorm.errors import InstallationError

_OLDEST = (2, 10)
_found = re.match(r"(\d+)\.(\d+)", torch.__version__)
if _found and (int(_found[1]), int(_found[2])) < _OLDEST:
    raise InstallationError(
        f"batchnorm needs torch 2.10 or later, this is torch {torch.__version__} in {torch.__path__[0]}: "
        "pip install --upgrade 'torch>=2.10'"
    )

from batchnorm.ops import registration as registration  # noqa: E402  (registers the implementations)
