"""Instruments for any network and training loop; they change nothing of what they look at."""

from batchnorm.lab.instruments.covariate_shift import CovariateShift as CovariateShift
from batchnorm.lab.instruments.covariate_shift import covariate_shift as covariate_shift
from batchnorm.lab.instruments.descent import Descent as Descent
from batchnorm.lab.instruments.descent import descent as descent
from batchnorm.lab.instruments.layers import Activations as Activations
from batchnorm.lab.instruments.layers import WeightScale as WeightScale
from batchnorm.lab.instruments.layers import activations as activations
from batchnorm.lab.instruments.layers import gradient_norms as gradient_norms
from batchnorm.lab.instruments.layers import weight_scales as weight_scales
from batchnorm.lab.instruments.objective import Objective as Objective
from batchnorm.lab.instruments.recorder import Recorder as Recorder
from batchnorm.lab.instruments.surface import LossSurface as LossSurface
from batchnorm.lab.instruments.surface import loss_surface as loss_surface

__all__ = [
    "Activations",
    "CovariateShift",
    "Descent",
    "LossSurface",
    "Objective",
    "Recorder",
    "WeightScale",
    "activations",
    "covariate_shift",
    "descent",
    "gradient_norms",
    "loss_surface",
    "weight_scales",
]
