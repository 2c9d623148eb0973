"""Renders docs/frameworks.md out of the table of conventions that reader and writer use.

python docs/scripts/frameworks.py            # write the page
python docs/scripts/frameworks.py --check    # complain if it differs
"""

from __future__ import annotations

import sys
from pathlib import Path

from batchnorm.population.formats.conventions import CONVENTIONS, ELSEWHERE

sys.path.insert(0, str(Path(__file__).parent))
from printed import kept

PAGE = Path(__file__).parent.parent / "frameworks.md"

HEAD = """# Batch norm in fifteen frameworks

The formula is one; these are not. The variance that *normalizes a batch* is the biased one in every row but Darknet's.
"Kept" is the variance that training keeps for inference: the batch's, of m values, times m/(m - 1) where it is
unbiased. "Share" says what the framework's own number is a share of. `load_statistics` translates all of it, so that
inference and further training are the framework's; the table is the one that the code uses. Rows marked "files" are
tested with files that the framework wrote: evaluation, and five more steps of training, to 1e-6 (evaluation alone where
training is refused). Rows marked "source" follow its source.

"""
TAIL = """
What else to know:

- **Keras 2** decides by the number of axes of the input: the fused layer (four or five axes) keeps the unbiased
  variance. Its files do not hold `fused` nor `synchronized`.
- **Keras 3** in `TimeDistributed` normalizes each time step by its own statistics, and updates once a step. Keras 2
  pools all steps.
- **Haiku** and **Equinox** divide their averages by 1 - decay^t. Haiku infers with `average`, not with `hidden`.
  Equinox keeps the raw averages in its state, of which the variance's starts from 1. Both load as `running="debiased"`.
- **Equinox** with `mode="ema"` normalizes *training* by the moving average; it is refused, or loads with `frozen=True`.
- **PyTorch Geometric**: `HeteroBatchNorm` keeps the biased variance for each type and divides by sqrt(max(var, eps));
  it is refused by name.
- **tinygrad** is lazy: running statistics that are not realized before the optimizer's step are computed with the new
  weights. Realize them together with the loss.
- **MLX** kept the biased variance up to 0.29.4: `running_var="biased"` for files that are trained on there.
- Files of **MLX** and **tinygrad** have torch's keys. A `.safetensors` without a counter and without torch's mark is
  taken for MLX; with a counter for torch, which is tinygrad's convention as well. `framework=` says otherwise.
- **Caffe** keeps sums and their factor, and gamma and beta in the Scale layer behind. It does not install any more: the
  file that is tested was written by its message classes, and OpenCV 4.14 computed its output.
- **Darknet** divides by the unbiased standard deviation in training as well, so its weights load with `frozen=True`. A
  `[batchnorm]` section has a beta that Darknet neither trains nor saves.
- Folders of **orbax** (`StandardCheckpointer`, the last step of a `CheckpointManager`, `flax.training.checkpoints`) are
  read with tensorstore. Checkpoints and SavedModels of **TensorFlow**, and Keras archives with `.npz` weights are
  refused; the message says what to write instead.
- A file that holds a model and its moving average names each layer with the model's path (`ema/BatchNorm_0`), so
  `layers=` says which one is meant.
- `save_statistics` writes a file of each row, and returns what of the layers the file does not hold. `like=` takes
  the model's own `.keras` or `.h5`, and writes momentum, epsilon and `trainable` into it: 29 networks of **Keras**
  3.15.1 and 32 of tf_keras 2.21.0 were trained for five steps here, written back, and trained for three there, to 5e-7.
- A layer that trains by a rule of this package (`renorm`, `ghost_size`, `channel_groups`) is refused by name when it is
  written; `frozen=True` writes it for inference alone.
- Files of **Haiku**, **Equinox** and **Caffe** were read back there: Haiku
  0.0.17 and Equinox 0.13.8 got our outputs, after five more steps as well, to 2e-7; OpenCV 4.14 those of the
  `.caffemodel`, to 6e-8. Weights of **Darknet** are written into a file of the same network (`like=`); Darknet 61c9d02
  read back every number of a yolov3-tiny and of a residual network.
- **Equinox** starts its variance from 1 and divides this 1 as well. A model that saw no batch loads with
  `frozen=True`.
"""


def render() -> str:
    """The page."""
    titles = ("framework", "seen", "gamma, beta, mean, variance", "number (default)", "eps", "kept", "average")
    rows = [[*titles, "one value a channel in training", "files", "tested by"]]
    for row in [*CONVENTIONS.values(), *ELSEWHERE]:
        name, share = row.momentum
        default = "none" if row.decay is None else f"{row.decay if share == 'old' else round(1 - row.decay, 6):g}"
        rows.append(
            [
                row.title,
                row.seen,
                ", ".join(f"`{key}`" for key in dict.fromkeys(row.names)),
                f"`{name}`, share of the {share} ({default})",
                f"{row.eps:g}" if row.eps_place == "sqrt(var + eps)" else f"{row.eps:g}, {row.eps_place}",
                "unbiased over images and volumes, else biased" if row.variance == "fused" else row.variance,
                "moving" if row.running == "ema" else "moving, debiased",
                row.single,
                row.files,
                row.evidence,
            ]
        )
    head, *body = ("| " + " | ".join(cells) + " |" for cells in rows)
    return HEAD + "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n" + TAIL + kept(PAGE)


def main() -> None:
    """Write the page, or compare it."""
    if "--check" in sys.argv:
        sys.exit(None if PAGE.read_text() == render() else f"{PAGE} differs; run {sys.argv[0]}")
    PAGE.write_text(render())


if __name__ == "__main__":
    main()
