"""Batch normalization in other people's training loops; each module is imported on first use.

- `batchnorm.integrations.life.Life`: the parts of a network's life in training, for any loop.
- `batchnorm.integrations.lightning.BatchNormCallback`: a callback of Lightning.
- `batchnorm.integrations.transformers.BatchNormCallback`: a ``TrainerCallback`` of Hugging Face.
"""

from batchnorm.integrations.life import Life as Life
