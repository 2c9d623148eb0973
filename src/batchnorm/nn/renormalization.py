"""Pickles made by version 0.1 look for `Renorm` here; it lives in `batchnorm.sources`."""

from batchnorm.sources import Renorm as Renorm
