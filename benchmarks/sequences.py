"""Evidence for batch normalization in recurrent networks: two data sets, five seeds, every row kept.

python -m benchmarks.sequences run     # train and measure (about ten minutes on a quiet core), into results/
python -m benchmarks.sequences page    # figures and the tables of docs/recurrent.md, out of these rows
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import batchnorm as bn
from batchnorm.training import Dataset, load_data
from batchnorm.training.loop import batch_indices, evaluate
from batchnorm.training.networks import SequenceClassifier, lstm

from .rows import read

RESULTS = Path(__file__).parent / "results" / "recurrent"
DOCS = Path(__file__).parent.parent / "docs"
SEEDS = range(5)
RATES = (0.001, 0.01)  # of Adam; both are shown
BATCH = {"japanese-vowels": 30, "mnist5k": 50}
STEPS = {"japanese-vowels": 300, "mnist5k": 480}
HIDDEN = 100
GAMMAS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
KEPT = (1, 2, 4, 8, 16)  # time steps with statistics of their own

FORMS: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "sequence": {"batch_norm": "sequence"},
    "frame": {"batch_norm": "frame"},
    "BN-LSTM": {"batch_norm": "frame", "recurrent": True},
}
COUNTED = ", padding counted"


def forms_of(data: str) -> list[str]:
    padded = [name + COUNTED for name in FORMS if name != "LSTM"] if data == "japanese-vowels" else []
    return [*FORMS, *padded]


def network(data: Dataset, form: str, seed: int) -> SequenceClassifier:
    """The classifier in one of its forms, from the same weights for a seed."""
    torch.manual_seed(seed)
    plain = lstm(data.input_shape, data.num_classes, HIDDEN)
    options = FORMS[form.removesuffix(COUNTED)]
    if not options:
        return plain
    made = plain.with_batch_norm(**options)
    made.counts_padding = form.endswith(COUNTED)
    return made


def train(net: nn.Module, data: Dataset, name: str, rate: float, seed: int) -> dict[str, float]:
    """Test accuracy a quarter of the way and at the end, and the test loss."""
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    found = {}
    for step in range(STEPS[name]):
        batch = batch_indices(len(data.x_train), BATCH[name], seed, step)
        optimizer.zero_grad()
        cross_entropy(net.train()(data.x_train[batch]), data.y_train[batch]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step + 1 == STEPS[name] // 4:
            found["accuracy_at_quarter"] = evaluate(net.eval(), data)[1]
    loss, accuracy, _ = evaluate(net.eval(), data)
    return {**found, "accuracy": accuracy, "loss": loss}


def comparisons() -> Iterator[dict[str, Any]]:
    """Every form on both sets; of BN-LSTM and frame also what its statistics are worth at test time."""
    for name in BATCH:
        for seed in SEEDS:
            data = load_data(name, seed=seed)
            for rate in RATES:
                for form in forms_of(name):
                    net = network(data, form, seed)
                    row = {"data": name, "form": form, "rate": rate, "seed": seed}
                    yield {"experiment": "accuracy", **row, **train(net, data, name, rate, seed)}
                    if rate == RATES[-1] and form in ("frame", "BN-LSTM"):
                        yield from ({**row, **found} for found in statistics_at_test(net, data, name))


def statistics_at_test(net: SequenceClassifier, data: Dataset, name: str) -> Iterator[dict[str, Any]]:
    """Moving averages, exact statistics, those of the first steps alone, and one set for all steps."""
    yield {"experiment": "statistics", "kind": "moving averages", "accuracy": evaluate(net, data)[1]}
    order = torch.randperm(len(data.x_train))  # the set lies class by class
    bn.calibrate(net, data.x_train[order].split(BATCH[name]))
    yield {"experiment": "statistics", "kind": "per step", "accuracy": evaluate(net, data)[1]}
    for kept in KEPT:
        cut = copy.deepcopy(net)
        for norm in steps_of(cut):
            norm.num_batches_tracked[kept:] = 0
        yield {"experiment": "max_steps", "kept": kept, "accuracy": evaluate(cut, data)[1]}
    shared = copy.deepcopy(net)
    frames = (data.x_train != 0).any(2).sum(0) if net.padded else torch.full((28,), len(data.x_train))
    for norm in steps_of(shared):
        share(norm, frames)
    yield {"experiment": "statistics", "kind": "shared", "accuracy": evaluate(shared, data)[1]}


def steps_of(net: nn.Module) -> list[bn.StepBatchNorm]:
    return [m for m in net.modules() if isinstance(m, bn.StepBatchNorm)]


def share(norm: bn.StepBatchNorm, frames: Tensor) -> None:
    """One mean and variance for all steps: that of all frames, the variance between steps included."""
    rows = int((norm.num_batches_tracked > 0).sum())
    weight = (frames[:rows].double() / frames[:rows].sum())[:, None]
    means, variances = norm.running_mean[:rows], norm.running_var[:rows]
    mean = (weight * means).sum(0)
    norm.running_var[:] = (weight * (variances + (means - mean).square())).sum(0)
    norm.running_mean[:] = mean


def gradients() -> Iterator[dict[str, Any]]:
    """Figure 1 of Cooijmans et al.: the gradient of the loss at the state of each step, of a tanh network at its start.

    The images pixel by pixel, 784 steps; one loss, at the end.
    """
    for seed in SEEDS:
        data = load_data("mnist5k", seed=seed)
        pixels, labels = data.x_train[:100].flatten(1), data.y_train[:100]
        for gamma in GAMMAS:
            torch.manual_seed(seed)
            layer = bn.RNN(1, HIDDEN, batch_norm="frame", recurrent=True, gamma=gamma, max_steps=1)
            nn.init.orthogonal_(layer.weight_hh_l0)
            cell, classes = layer.cell(), nn.Linear(HIDDEN, 10)
            states: list[Tensor] = []
            for t in range(pixels.shape[1]):
                # Noise where all pixels are black: the variance of a constant is 0.
                x = pixels[:, t : t + 1] + 0.1 * torch.randn(100, 1)
                states.append(cell(x, states[-1] if states else None, step=t))
                states[-1].retain_grad()
            cross_entropy(classes(states[-1]), labels).backward()
            norms = [float(state.grad.norm()) for state in states]
            yield {"experiment": "gradients", "gamma": gamma, "seed": seed, "norms": norms[::8] + norms[-1:]}


def run() -> None:
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "evidence.jsonl").open("w", encoding="utf-8") as file:
        for experiment in (gradients, comparisons):
            for row in experiment():
                file.write(json.dumps(row) + "\n")
                file.flush()


# ---------------------------------------------------------------------------------------------- the page


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    found = [100 * value for value in values]
    return f"{statistics.fmean(found):.1f} ± {statistics.stdev(found):.1f}"


def verdict(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Win, loss or tie by the mean of the paired differences against two of its standard errors."""
    differences = [ours[seed] - theirs[seed] for seed in ours]
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return "tie" if abs(mean) <= 2 * error else "win" if mean > 0 else "loss"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy_table(rows: list[dict[str, Any]], data: str) -> str:
    found = [row for row in rows if row["experiment"] == "accuracy" and row["data"] == data]
    lines = []
    for rate in RATES:
        plain = {row["seed"]: row["accuracy"] for row in found if row["rate"] == rate and row["form"] == "LSTM"}
        for form in forms_of(data):
            of = [row for row in found if row["rate"] == rate and row["form"] == form]
            mine = {row["seed"]: row["accuracy"] for row in of}
            lines.append(
                [
                    f"{rate:g}",
                    form,
                    spread(row["accuracy_at_quarter"] for row in of),
                    spread(mine.values()),
                    "" if form == "LSTM" else verdict(mine, plain),
                ]
            )
    columns = ["rate", "form", f"after {STEPS[data] // 4} steps, %", f"after {STEPS[data]} steps, %", "against LSTM"]
    return table(columns, lines)


def statistics_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for data in BATCH:
        for form in ("frame", "BN-LSTM"):
            cells = []
            for kind in ("moving averages", "per step", "shared"):
                cells.append(
                    spread(
                        row["accuracy"]
                        for row in rows
                        if row["experiment"] == "statistics"
                        and (row["data"], row["form"], row["kind"]) == (data, form, kind)
                    )
                )
            lines.append([data, form, *cells])
    return table(["data", "form", "moving averages, %", "exact, per step, %", "exact, shared by all steps, %"], lines)


def length_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for data in BATCH:
        for form in ("frame", "BN-LSTM"):
            of = [row for row in rows if (row.get("data"), row.get("form")) == (data, form)]
            cells = [
                spread(r["accuracy"] for r in of if r["experiment"] == "max_steps" and r["kept"] == k) for k in KEPT
            ]
            whole = spread(r["accuracy"] for r in of if r["experiment"] == "statistics" and r["kind"] == "per step")
            lines.append([data, form, *cells, whole])
    return table(["data", "form", *(f"{k} steps" for k in KEPT), "all"], lines)


def speed_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        ratio = f"{1 / row['x_torch']:.2f}" if "x_torch" in row else ""
        loop = f"{row['x_loop']:.1f}" if "x_loop" in row else ""
        products = f"{row['x_limit']:.2f}" if "x_limit" in row else ""
        lines.append([row["cell"], row["contestant"], f"{row['ms']:.1f}", ratio, products, loop])
    return table(
        ["cell", "contestant", "ms", "time / torch.nn's", "/ the products'", "times as fast as its loop"], lines
    )


FORMS_OURS = ("ours sequence", "ours frame", "ours recurrent")


def growth_table(rows: list[dict[str, Any]]) -> str:
    """Time over torch.nn's, times as fast as the loop, and what that could be at most, as each size grows."""
    lines = []
    for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
        of = {r["contestant"]: r for r in rows if tuple(r["shape"]) == shape}
        ours = [f"{of[name]['ms'] / of['torch']['ms']:.2f}" for name in FORMS_OURS]
        loops = [f"{of[name]['x_loop']:.1f}" for name in FORMS_OURS]
        most = f"{of['loop recurrent']['x_limit']:.1f}"
        lines.append([*map(str, shape), f"{of['torch']['ms']:.1f}", *ours, *loops, most])
    head = ["steps", "batch", "units", "torch.nn.LSTM, ms", "sequence", "frame", "recurrent"]
    head += [f"{name}: times its loop" for name in ("sequence", "frame", "recurrent")]
    return table([*head, "recurrent loop / products"], lines)


def draw_gradients(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colors = plt.get_cmap("viridis")([i / len(GAMMAS) for i in range(len(GAMMAS))])
    for gamma, color, style in zip(GAMMAS, colors, ("-", "--", "-.", ":", "-", "--"), strict=True):
        curves = [row["norms"] for row in rows if row["experiment"] == "gradients" and row["gamma"] == gamma]
        steps = [*range(0, 784, 8), 783]
        mean = [math.exp(statistics.fmean(math.log(max(v, 1e-30)) for v in at)) for at in zip(*curves, strict=True)]
        axes.semilogy(steps, mean, color=color, linestyle=style, linewidth=2, label=f"gamma = {gamma:g}")
    axes.set(xlabel="time step t", ylabel="norm of dL/dh_t (geometric mean of 5 seeds)", xlim=(0, 790))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def page() -> None:
    rows, speed = read([RESULTS / "evidence.jsonl"]), read([RESULTS / "speed.jsonl"])
    parts: dict[str, Callable[[], str]] = {
        "japanese-vowels": lambda: accuracy_table(rows, "japanese-vowels"),
        "mnist5k": lambda: accuracy_table(rows, "mnist5k"),
        "statistics": lambda: statistics_table(rows),
        "max_steps": lambda: length_table(rows),
        "speed": lambda: speed_table([row for row in speed if "axis" not in row and "ms" in row]),
        "growth": lambda: growth_table([row for row in speed if "axis" in row and "ms" in row]),
    }
    path = DOCS / "recurrent.md"
    text = path.read_text(encoding="utf-8")
    for name, make in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{path} has no block {name!r}")
        text = f"{before}{begin}{make()}\n{end}{after}"
    path.write_text(text, encoding="utf-8")
    (DOCS / "images").mkdir(exist_ok=True)
    draw_gradients(rows, DOCS / "images" / "recurrent-gradients.svg")


if __name__ == "__main__":
    {"run": run, "page": page}[sys.argv[1]]()
