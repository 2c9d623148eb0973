"""Layers: drop-ins for torch.nn's, with explicit modes and fusions."""

from batchnorm.nn import plain as plain
from batchnorm.nn.batch_norm import BatchNorm as BatchNorm
from batchnorm.nn.batch_norm import BatchNorm1d as BatchNorm1d
from batchnorm.nn.batch_norm import BatchNorm2d as BatchNorm2d
from batchnorm.nn.batch_norm import BatchNorm3d as BatchNorm3d
from batchnorm.nn.recurrent import GRU as GRU
from batchnorm.nn.recurrent import LSTM as LSTM
from batchnorm.nn.recurrent import RNN as RNN
from batchnorm.nn.recurrent import GRUCell as GRUCell
from batchnorm.nn.recurrent import LSTMCell as LSTMCell
from batchnorm.nn.recurrent import RNNCell as RNNCell
from batchnorm.nn.step_batch_norm import StepBatchNorm as StepBatchNorm
