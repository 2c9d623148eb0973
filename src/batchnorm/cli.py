"""The command line: each command is one function call and one report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.errors import BatchNormError, InputError
from batchnorm.training.config import (
    BATCH_SIZE,
    LEARNING_RATE,
    METHODS,
    MOMENTUM,
    OPTIMIZERS,
    OTHER_STEPS,
    PLACEMENTS,
    SEED,
    STEPS,
    THREADS,
    TrainConfig,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from batchnorm.lab import Experiment, Result
    from batchnorm.training.results import Curve, TrainResult

INTERRUPTED = 130  # the shell's code for a command that Ctrl-C ended

app = typer.Typer(
    name="batchnorm",
    help="Batch normalization for a network's whole life: insert, train, calibrate, fold, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done. 1: done, but the network diverged or a file failed its check. 2: wrong usage or input,
    one message on stderr. 130: interrupted, with a checkpoint to resume from.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # for package.module:name beside the user
    try:
        app(args=None if arguments is None else list(arguments), prog_name="batchnorm")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BatchNormError as error:
        interrupted = type(error).__name__ == "Interrupted"
        sys.stderr.write(f"batchnorm: {'' if interrupted else 'error: '}{error}\n")
        return INTERRUPTED if interrupted else 2
    except KeyboardInterrupt:
        sys.stderr.write("batchnorm: interrupted.\n")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _table(values: dict[str, Any], other: object = None) -> str:
    """Defaults by network or optimizer, for the help."""
    texts = [f"{name}: {value}" for name, value in values.items()]
    return ", ".join([*texts, f"else {other}"] if other is not None else texts)


NETWORK_HELP = (
    "figure1 (784-100-100-100-10 sigmoids), convnet, lstm, or package.module:factory. The factory is "
    "called with those of num_features, in_channels, input_shape and num_classes that it names."
)
DATA_HELP = (
    "mnist5k, digits, japanese-vowels, FILE.npz with x and y (and x_test, y_test), FILE.npy with --labels, or "
    "package.module:loader that returns (x, y) or (x, y, x_test, y_test)."
)


@app.command(
    epilog="""**Examples**

`batchnorm train` - the default: Figure 1 of Ioffe & Szegedy on 5,000 MNIST digits

`batchnorm train --network convnet --data digits --steps 500`

`batchnorm train --network lstm --data japanese-vowels`

`batchnorm train --data table.npz --lr 0.05 --out runs/table`

`batchnorm train --network mymodels:resnet --data mydata:load --baseline`

`batchnorm train --resume runs/figure1-mnist5k-1` - go on after Ctrl-C, to the same bits
"""
)
def train(
    context: typer.Context,
    network: Annotated[str, typer.Option(help=NETWORK_HELP)] = TrainConfig.network,
    data: Annotated[str, typer.Option(help=DATA_HELP)] = TrainConfig.data,
    labels: Annotated[str | None, typer.Option(help="The .npy file of the labels, with --data FILE.npy.")] = None,
    out: Annotated[
        str | None,
        typer.Option(help="The run folder.", show_default="runs/<network>-<data>-<n>"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run in a folder that is not empty.")
    ] = False,
    baseline: Annotated[
        bool | None,
        typer.Option(
            "--baseline/--no-baseline",
            help="Train the same network without batch norm beside it, from the same weights on the same batches.",
            show_default="on for built-in networks",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Updates of each network.", show_default=_table(STEPS, OTHER_STEPS)),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a batch.")] = BATCH_SIZE,
    optimizer: Annotated[str, typer.Option(help=" or ".join(OPTIMIZERS) + ".")] = "sgd",
    lr: Annotated[float, typer.Option(help="Learning rate, constant.")] = LEARNING_RATE,
    baseline_lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of the baseline.", show_default="that of --lr"),
    ] = None,
    momentum: Annotated[
        float | None,
        typer.Option(help="Of SGD; beta1 of Adam.", show_default=_table(MOMENTUM)),
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of weights; never of biases, gamma and beta.")] = 0.0,
    placement: Annotated[
        str, typer.Option(help="Of batch norm: " + " or ".join(PLACEMENTS) + ".")
    ] = "before_activation",
    method: Annotated[
        str,
        typer.Option(
            help="Of the population statistics: "
            + " or ".join(METHODS)
            + ". pooled: the variance over all samples; ioffe: Procedure 2, line 10; sequential: layer "
            "by layer."
        ),
    ] = "pooled",
    seed: Annotated[int, typer.Option(help="The same seed gives the same bits again.")] = SEED,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads.", show_default=_table(THREADS, "torch's choice")),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between two measurements.", show_default="a hundredth of --steps"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="A run folder to go on from; only --steps may be given with it."),
    ] = None,
) -> None:
    """Train a network with batch norm, and make it a proven network for inference.

    Procedure 2 of Ioffe & Szegedy (2015), end to end: insert batch norm and drop the biases that it
    makes redundant, train, compute exact population statistics, freeze, fold, verify, and export
    (safetensors, torch.export, ONNX). The run folder gets all of these, metrics.json,
    certificate.json, a checkpoint, plots, and report.html, which says how it went.
    """
    if resume is not None:
        _refuse_beside_resume(context)
    from batchnorm.report import write_report

    with _progress() as progress:
        if resume is not None:
            from batchnorm.training import resume as go_on

            result = go_on(resume, steps=steps, progress=progress)
        else:
            from batchnorm.training import train as run

            values = {name: value for name, value in context.params.items() if name != "resume"}
            result = run(TrainConfig(**values), progress=progress)
        progress.stage("writing the report")
        report = write_report(result, result.folder)
    _print_result(result, report)
    if not result.ok:
        raise typer.Exit(1)


def _refuse_beside_resume(context: typer.Context) -> None:
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    extra = [f"--{name.replace('_', '-')}" for name in given if name not in ("resume", "steps")]
    if extra:
        raise InputError(
            f"train --resume: {', '.join(extra)} cannot be changed in the middle of a run. "
            "Leave it out (only --steps may be given), or start a new run."
        )


def _print_result(result: TrainResult, report: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from batchnorm.report import verdict

    console = Console(highlight=False)
    findings = Table.grid(padding=(0, 2))
    styles = {"win": "bold green", "tie": "bold yellow", "loss": "bold red", "note": "bold"}
    for finding in verdict(result):
        findings.add_row(Text(finding.kind, styles[finding.kind]), Text(finding.text))
    console.print(findings)
    for export in result.exports:
        console.print(Text(f"  {result.folder / export.file}: {export.status}"))
    console.print(Text(f"\nReport: {report}"))


class _Bar:
    """Stages as lines, training as a bar with loss, accuracy, rate and time left."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.task: Any = None

    def stage(self, text: str) -> None:
        self.bar.console.print(text)

    def step(self, step: int, steps: int, curves: dict[str, Curve]) -> None:
        if self.task is None:
            self.task = self.bar.add_task("", total=steps, completed=step, figures="")
        figures = []
        for name, curve in curves.items():
            loss = curve.train_loss[-1]
            figures.append(
                f"{name}: "
                + (f"loss {loss:.3f}, " if loss is not None else "")
                + f"{100 * curve.test_accuracy[-1]:.1f} %"
                + (" (diverged)" if curve.diverged_at is not None else "")
            )
        self.bar.update(self.task, completed=step, figures="; ".join(figures))


@contextmanager
def _progress() -> Iterator[_Bar]:
    """A bar on stderr, so that stdout is the result alone."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:,.0f} steps/s" if task.speed else "")

    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[figures]}"),
        Rate(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, refresh_per_second=5) as bar:
        yield _Bar(bar)


WeightsOption = Annotated[
    Path | None,
    typer.Option(help="Weights of the network: .safetensors, or a .pt state dict (weights_only)."),
]
FactoryOption = Annotated[str, typer.Option(help="package.module:factory of the network.")]
EitherOption = Annotated[str | None, typer.Option(help="package.module:factory of the network, instead of a file.")]
ShapeOption = Annotated[
    str | None, typer.Option(help="With --network: shape of an example input, the batch first, as in 2,3,32,32.")
]
OutOption = Annotated[Path, typer.Option(help="The .safetensors file to write.")]
FormOption = Annotated[
    Path,
    typer.Option(help="The file to write: weights (.safetensors) or the network (.pt2, .onnx); a file's own kind."),
]
ArchiveArgument = Annotated[Path | None, typer.Argument(help="A torch.export archive (.pt2).")]


@app.command(
    epilog="""**Examples**

`batchnorm summary --network mymodels:resnet --shape 2,3,32,32 --html layers.html`

`batchnorm summary model.pt2 --json`
"""
)
def summary(
    file: ArchiveArgument = None,
    network: EitherOption = None,
    shape: ShapeOption = None,
    weights: WeightsOption = None,
    html: Annotated[Path | None, typer.Option(help="Also write the table as a page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Show a network's batch norm layers: four vectors a layer, two trained, two not.

    Also what feeds each layer, where it stands, biases that it makes redundant, how many values share statistics on
    an input of --shape, and all parameters as trained and not trained.
    """
    from batchnorm import summary as summarize

    if _is_file("summary", file, (".pt2",), network, shape, weights):
        from batchnorm.surgery.archives import open_archive, quiet

        assert file is not None
        archive = open_archive(file)
        with quiet():
            found = summarize(archive.net, archive.example)
    else:
        found = summarize(*_load(network, shape, weights))
    if html is not None:
        _write(html, found.to_html().encode())
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(found)
    else:
        typer.echo(str(found))


@app.command(
    epilog="""**Examples**

`batchnorm diagnose --network mymodels:resnet --weights net.pt --data train.npz --html diagnosis.html`

`batchnorm diagnose --network mymodels:resnet --weights net.pt --data mydata:load --batch-size 8 --in-order`
"""
)
def diagnose(
    network: FactoryOption,
    data: Annotated[str, typer.Option(help=DATA_HELP + " The training part is used.")],
    weights: WeightsOption = None,
    labels: Annotated[str | None, typer.Option(help="With --data FILE.npy.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a batch, as in training.")] = BATCH_SIZE,
    batches: Annotated[int, typer.Option(help="How many to read at most.")] = 50,
    in_order: Annotated[
        bool, typer.Option("--in-order", help="Batches in the order of the data, where training has it so.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order, and of the split where the data has none.")] = SEED,
    html: Annotated[Path | None, typer.Option(help="Also write a page with a figure.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the tables.")] = False,
) -> None:
    """Say how far a network's evaluation is from its training, which layers and what causes it, and what mends it.

    The network runs on the same batches as in training, in evaluation, and in evaluation with exact statistics. Every
    layer's running statistics are compared with the data's, and with what each cause would make of them: too few
    updates, other data, earlier weights, a noisy average, sorted batches, dropout. Nothing of the network is changed.
    """
    import torch

    from batchnorm import diagnose as examine
    from batchnorm.training import load_data

    for name, value in (("--batch-size", batch_size), ("--batches", batches)):
        if value < 1:
            raise InputError(f"diagnose: {name} {value}; expected 1 or more.")
    samples = load_data(data, seed=seed, labels=labels)
    net = _build(network, samples.input_shape, samples.num_classes, weights)
    size = len(samples.x_train)
    order = torch.arange(size) if in_order else torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    parts = [part for part in order.split(batch_size) if len(part) == min(batch_size, size)][:batches]
    found = examine(net, [(samples.x_train[part], samples.y_train[part]) for part in parts], progress=True)
    if html is not None:
        from batchnorm.report import write_diagnosis

        write_diagnosis(html, found, source=f"{network} on {data}, {batch_size} samples a batch.")
        typer.echo(f"Written: {html}", err=as_json)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))


@app.command(
    epilog="`batchnorm calibrate --network mymodels:resnet --weights net.pt --data train.npz "
    "--out calibrated.safetensors`"
)
def calibrate(
    network: FactoryOption,
    data: Annotated[str, typer.Option(help=DATA_HELP + " The training part is used.")],
    out: OutOption,
    weights: WeightsOption = None,
    labels: Annotated[str | None, typer.Option(help="With --data FILE.npy.")] = None,
    method: Annotated[str, typer.Option(help=" or ".join(METHODS) + ".")] = "pooled",
    batch_size: Annotated[int, typer.Option(help="Samples a batch.")] = BATCH_SIZE,
    seed: Annotated[int, typer.Option(help="Of the split, where the data has none.")] = SEED,
) -> None:
    """Compute exact population statistics of a network's batch norm layers over data."""
    from batchnorm import calibrate as compute
    from batchnorm.training import load_data

    samples = load_data(data, seed=seed, labels=labels)
    net = _build(network, samples.input_shape, samples.num_classes, weights)
    size = len(samples.x_train)
    starts = range(0, size - batch_size + 1 if method == "ioffe" else size, max(1, batch_size))
    batches = [samples.x_train[i : i + batch_size] for i in starts]
    compute(net, batches, method=method)  # type: ignore[arg-type]  # which checks it
    _save(net, out)


@app.command(
    epilog="""**Examples**

`batchnorm adapt --network mymodels:resnet --weights net.pt --data shifted.npz --out adapted.safetensors`

`batchnorm adapt --network mymodels:resnet --weights net.pt --data camera.npy --prior 0 --out adapted.safetensors`
"""
)
def adapt(
    network: FactoryOption,
    data: Annotated[str, typer.Option(help=DATA_HELP + " Labels are not looked at, and need not be there.")],
    out: OutOption,
    weights: WeightsOption = None,
    prior: Annotated[float, typer.Option(help="What the old statistics count, in samples; 0: nothing.")] = 16,
    method: Annotated[
        str, typer.Option(help="statistics; or tent, which also trains gamma and beta on the entropy of the outputs.")
    ] = "statistics",
    lr: Annotated[float, typer.Option(help="Learning rate, of tent.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Samples a batch.")] = BATCH_SIZE,
) -> None:
    """Adapt a trained network's batch norm to new, shifted data without labels.

    Mean and variance become N/(N + n) of the old and n/(N + n) of the new ones, N being --prior and n the number of
    samples (Schneider et al. 2020); tent: Wang et al. 2021. Everything else stays. All samples of the data are used.
    """
    from batchnorm import adapt as adapt_to
    from batchnorm.training.datasets import load_samples

    samples, classes = load_samples(data)
    net = _build(network, tuple(samples.shape[1:]), classes, weights)
    if batch_size < 1:
        raise InputError(f"adapt: --batch-size {batch_size}; expected 1 or more.")
    batches = list(samples.split(batch_size))
    adapt_to(net, batches, prior=prior, method=method, learning_rate=lr)  # type: ignore[arg-type]  # which checks it
    _save(net, out)


@app.command(
    epilog="""**Examples**

`batchnorm fold --network mymodels:resnet --weights net.safetensors --shape 2,3,32,32 --out folded.onnx`

`batchnorm fold model.onnx --out folded.onnx --inputs samples.npz`

`batchnorm fold model.pt2 --out folded.pt2`
"""
)
def fold(
    out: FormOption,
    file: Annotated[Path | None, typer.Argument(help="An .onnx file or a torch.export archive (.pt2).")] = None,
    network: EitherOption = None,
    shape: ShapeOption = None,
    weights: WeightsOption = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help="With an .onnx file: arrays by input name (.npz) to compare on.", show_default="random ones"),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest accepted difference, as a share of an output's largest value.", show_default="1e-5 in float32"
        ),
    ] = None,
) -> None:
    """Fold batch norm into the layers around it, prove the result, and write it.

    The certificate says what was folded into what, what stayed and why, and how far the outputs of the folded network
    are from those of the unfolded one. What cannot be folded exactly stays; nothing is written if the outputs differ.
    """
    kinds = (".onnx", ".pt2")
    if inputs is not None and (file is None or file.suffix != ".onnx"):
        raise InputError(
            "fold: --inputs goes with an .onnx file; an archive holds an example, --network takes --shape."
        )
    if _is_file("fold", file, kinds, network, shape, weights, out):
        assert file is not None
        typer.echo(str(_fold_file(file, out, inputs, tolerance)))
        return
    from batchnorm import fold as fold_into

    net, example = _load(network, shape, weights)
    folded = fold_into(net.eval(), example, tolerance=tolerance)
    _save(folded.model, out, example)
    typer.echo(str(folded.certificate))


def _is_file(
    verb: str,
    file: Path | None,
    kinds: tuple[str, ...],
    network: str | None,
    shape: str | None,
    weights: Path | None,
    out: Path | None = None,
) -> bool:
    """Whether a file was given instead of --network; complains about both, neither, or another kind."""
    known = " or ".join(kinds)
    if (file is None) == (network is None):
        raise InputError(f"{verb}: give either a file ({known}) or --network.")
    if file is None:
        if shape is None:
            raise InputError(f"{verb}: --network needs --shape, the shape of an example input.")
        return False
    if shape is not None or weights is not None:
        raise InputError(f"{verb}: --shape and --weights go with --network; a file has its own.")
    if file.suffix not in kinds or (out is not None and out.suffix != file.suffix):
        raise InputError(
            f"{verb}: {file}: expected {known}" + (f", and --out of the same kind, got {out}." * bool(out))
        )
    return True


@app.command(
    epilog="""**Examples**

`batchnorm convert --network mymodels:resnet --shape 2,3,32,32 --set nonfinite=skip --out net.safetensors`

`batchnorm convert model.pt2 --set example_weight=0.02 --out weighed.pt2`
"""
)
def convert(
    out: FormOption,
    file: ArchiveArgument = None,
    network: EitherOption = None,
    shape: ShapeOption = None,
    weights: WeightsOption = None,
    to: Annotated[
        str,
        typer.Option(help="batchnorm, torch, sync, or, of layers that normalize each sample, group_norm, layer_norm."),
    ] = "batchnorm",
    of: Annotated[str, typer.Option(help="Which layers: batch_norm, group_norm or layer_norm.")] = "batch_norm",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option of every layer, NAME=VALUE; may be repeated.")
    ] = None,
) -> None:
    """Give every batch norm layer the same options or class, check the network, and write its weights.

    Without --set the network's output has to stay the same. Of an archive the options count that matter in evaluation.
    """
    values = dict(_assignment(text) for text in options or ())
    if _is_file("convert", file, (".pt2",), network, shape, weights, out):
        from batchnorm.surgery.files import convert_archive, save_archive

        assert file is not None
        save_archive(convert_archive(file, to=to, of=of, **values), out)
        typer.echo(f"Written: {out}")
        return
    from batchnorm import convert as convert_all

    net, example = _load(network, shape, weights)
    convert_all(net, example, to=to, of=of, **values)
    _save(net, out, example)
    typer.echo(str(net))


def _assignment(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value a number, true, false, null or text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"--set {text!r}: expected NAME=VALUE, as in nonfinite=skip.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _fold_file(file: Path, out: Path, inputs: Path | None, tolerance: float | None) -> Any:
    """Fold an ONNX file or an archive into `out`, of the same kind; the certificate."""
    from batchnorm.surgery.files import fold_archive, fold_onnx, save_archive, save_onnx

    if file.suffix == ".onnx":
        model, certificate = fold_onnx(file, None if inputs is None else _arrays(inputs), tolerance=tolerance)
        save_onnx(model, out)
    else:
        program, certificate = fold_archive(file, tolerance=tolerance)
        save_archive(program, out)
    typer.echo(f"Written: {out}")
    return certificate


def _arrays(path: Path) -> dict[str, Any]:
    import zipfile

    import numpy as np

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return dict(held)
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: it cannot be read as an .npz file of arrays ({error}).") from error


def _write(out: Path, content: bytes) -> None:
    """Under a temporary name first."""
    from batchnorm.training.files import write_atomically

    try:
        write_atomically(out, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise InputError(f"{out}: it cannot be written ({error}).") from error
    typer.echo(f"Written: {out}")


@app.command(
    epilog="""**Examples**

`batchnorm lab list` - the experiments, with the question of each and how long it takes

`batchnorm lab figure1 --quick` - one experiment, short

`batchnorm lab all --quick` - all of them, under 10 minutes on two cores; without --quick under 3 hours

`batchnorm lab landscape --network mymodels:resnet --data mydata:load --set steps=500` - on your own network

`batchnorm lab explain --set layer=3.norm --set channel=7` - walk one mini-batch through a layer, with real numbers
"""
)
def lab(
    names: Annotated[list[str], typer.Argument(help="Experiments, `all`, `list` or `explain`.", metavar="NAME...")],
    quick: Annotated[bool, typer.Option("--quick", help="Shorter settings.")] = False,
    seeds: Annotated[int, typer.Option(help="How many, from 0 up; 5 or more for a verdict.")] = 5,
    network: Annotated[str | None, typer.Option(help=NETWORK_HELP, show_default="each experiment's own")] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP, show_default="each experiment's own")] = None,
    insert: Annotated[bool, typer.Option("--insert", help="Put batch norm into a --network that has none.")] = False,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of every experiment named, NAME=VALUE as in steps=500; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page and of the finished seeds.")] = Path("runs/lab"),
    workers: Annotated[
        int | None, typer.Option(help="Processes; each seed computes on one thread.", show_default="one a core")
    ] = None,
) -> None:
    """Run experiments that show what batch norm does, and whether the papers' claims hold here.

    Each experiment has a question, a setting, and a number that counts as reproducing its claim. It is run over seeds,
    and the page says what came of it, ties and failures included. A training that diverges is recorded, not fatal.
    Finished seeds are kept in the folder: after Ctrl-C, the same command goes on from them.
    """
    from batchnorm.lab.experiments import EXPERIMENTS, find

    if names == ["list"]:
        _list_experiments(list(EXPERIMENTS.values()))
        return
    changes = dict(_assignment(text) for text in options or ())
    changes |= {key: value for key, value in (("network", network), ("data", data)) if value is not None}
    if insert:
        changes["insert"] = True
    if names == ["explain"]:
        typer.echo(f"Page: {_explain(out, changes)}")
        return
    chosen = list(EXPERIMENTS.values()) if names == ["all"] else [find(name) for name in names]
    settings = [(experiment, experiment.configure(quick=quick, **changes)) for experiment in chosen]

    from batchnorm.lab import run_all
    from batchnorm.report import write_gallery

    with _lab_progress() as progress:
        results = run_all(settings, seeds=seeds, folder=out, workers=workers or os.cpu_count() or 1, progress=progress)
    name = "gallery" if names == ["all"] else "-".join(names)
    page = write_gallery(out / f"{name}{'-quick' if quick else ''}.html", chosen, results)
    _print_findings(chosen, results)
    typer.echo(f"\nPage: {page}")


def _explain(out: Path, changes: dict[str, Any]) -> Path:
    from batchnorm.lab.explanation import explain_built_in
    from batchnorm.report.explain_page import write_explanation

    found, source = explain_built_in(**changes)
    return write_explanation(out / "explain.html", found, source=source)


def _list_experiments(experiments: list[Experiment]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "question", "quick", "full", box=None, padding=(0, 2, 0, 0))
    for experiment in experiments:
        quick, full = (f"{5 * seconds / 60:.0f} min" if seconds > 9 else "<1 min" for seconds in experiment.seconds)
        table.add_row(experiment.name, experiment.question, quick, full)
    console = Console(highlight=False)
    console.print(table)
    console.print("\nMinutes of one core, for five seeds.")


def _print_findings(experiments: list[Experiment], results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"reproduced": "bold green", "tie": "bold yellow", "not reproduced": "bold red", "note": "bold"}
    console = Console(highlight=False)
    for experiment, result in zip(experiments, results, strict=True):
        console.print(Text(f"\n{experiment.title}", "bold"))
        rows = Table.grid(padding=(0, 2))
        for finding in result.findings:
            rows.add_row(Text(finding.kind, styles[finding.kind]), Text(finding.text))
        console.print(rows)


@contextmanager
def _lab_progress() -> Iterator[Any]:
    """A bar over the seeds of all experiments, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("seeds; {task.description}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


@app.command(
    epilog="""**Examples**

`batchnorm bench` - a few usual shapes

`batchnorm bench 64,256,28,28 4096,512 --dtype bfloat16 --threads 1`
"""
)
def bench(
    shapes: Annotated[
        list[str] | None, typer.Argument(help="Shapes (N, C, *space), as in 32,64,56,56.", metavar="SHAPE...")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")] = None,
    seconds: Annotated[float, typer.Option(help="For each phase of each shape.")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Measure this package's layer beside torch's here: first whether it is right, then how fast.

    Both take turns in one process; times are medians, the ratio is how many times as fast ours is, errors are against
    float64 in units in the last place. Where our layer is off by more than 16 units and by more than torch's there is
    no figure, and the exit code is 1. Other work on the machine shows in the times. After Ctrl-C what has been measured
    is shown.
    """
    from dataclasses import asdict

    import torch
    from rich.console import Console

    from batchnorm.lab.speed import SHAPES, Timing, compare

    if threads is not None:
        if threads < 1:
            raise InputError(f"bench: --threads {threads}; expected 1 or more.")
        torch.set_num_threads(threads)
    wanted = [_sizes("bench", text) for text in shapes] if shapes else SHAPES
    found: list[Timing] = []
    try:
        with Console(stderr=True).status("measuring"):
            found.extend(compare(wanted, dtype=dtype, device=device, seconds=seconds))
    finally:
        if as_json:
            typer.echo(json.dumps([{**asdict(timing), "ratio": timing.ratio} for timing in found], indent=2))
        elif found:
            _print_timings(found)
    if not all(timing.is_right for timing in found):
        raise typer.Exit(1)


def _print_timings(found: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("shape", "phase"):
        table.add_column(name)
    for name in ("torch ms", "ours ms", "ratio", "torch error", "our error"):
        table.add_column(name, justify="right")
    for item in found:
        figures = (f"{item.torch:.3f}", f"{item.ours:.3f}", f"{item.ratio:.2f}") if item.is_right else ("wrong", "", "")
        shape = ",".join(map(str, item.shape))
        table.add_row(shape, item.phase, *figures, f"{item.torch_error:.2g}", f"{item.our_error:.2g}")
    Console(highlight=False).print(table)


@app.command()
def info() -> None:
    """Show versions, kernels and optional parts: what is there, and why something is not."""
    from batchnorm import show_config

    show_config()


def _load(network: str | None, shape: str | None, weights: Path | None) -> tuple[nn.Module, Tensor]:
    """The network, and a random example of `shape`."""
    assert network is not None
    assert shape is not None
    sizes = _sizes("--shape", shape)
    net = _build(network, tuple(sizes[1:]), None, weights)

    import torch

    return net, torch.randn(sizes, generator=torch.Generator().manual_seed(SEED))


def _sizes(what: str, text: str) -> list[int]:
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) < 2 or min(sizes) < 1:
        raise InputError(f"{what} {text!r}: expected sizes like 2,3,32,32, the batch first.")
    return sizes


def _build(network: str, sample_shape: tuple[int, ...], num_classes: int | None, weights: Path | None) -> nn.Module:
    from batchnorm.training.networks import build_network, load_weights

    net = build_network(network, sample_shape, num_classes)
    if weights is not None:
        load_weights(net, weights)
    return net


def _save(net: nn.Module, out: Path, example: Tensor | None = None) -> None:
    from batchnorm.training.export import save_network, save_weights

    if example is None:
        save_weights(net, out)
    else:
        save_network(net, example, out)
    typer.echo(f"Written: {out}")
