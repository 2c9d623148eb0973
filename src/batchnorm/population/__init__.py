"""The statistics for inference: measured exactly (`calibrate`), averaged over models, adapted to new data.

Moving averages, which the layers keep while they train, forget old batches, lag behind the weights
and weigh unequal batches alike. Here they are replaced by what a pass over data measures.
"""

from batchnorm.population.adaptation import adapt as adapt
from batchnorm.population.adaptation import restore as restore
from batchnorm.population.averaging import average_statistics as average_statistics
from batchnorm.population.calibration import calibrate as calibrate
from batchnorm.population.weighing import ExampleWeightCurve as ExampleWeightCurve
from batchnorm.population.weighing import tune_example_weight as tune_example_weight

__all__ = ["ExampleWeightCurve", "adapt", "average_statistics", "calibrate", "restore", "tune_example_weight"]
