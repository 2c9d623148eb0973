"""`batchnorm convert`: other options or another class for every layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from batchnorm.cli import options
from batchnorm.cli.networks import Given, names_argument, save
from batchnorm.errors import InputError

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = """**Examples**

`batchnorm convert --network mymodels:resnet --shape 2,3,32,32 --set nonfinite=skip --out net.safetensors`

`batchnorm convert model.pt2 --set example_weight=0.02 --out weighed.pt2`

`batchnorm convert --from model.keras --network mymodels:resnet --to resnet.safetensors`

`batchnorm convert --from model.pdparams --network mymodels:resnet --to resnet.weights.h5`

`batchnorm convert --from model.keras --network mymodels:resnet --to new.keras --like model.keras`

`batchnorm convert --from yolo.weights --network mymodels:yolo --frozen --to new.weights --like yolo.weights`
"""

OptionalOut = Annotated[
    Path | None,
    typer.Option(help="The file to write: weights (.safetensors) or the network (.pt2, .onnx); a file's own kind."),
]


def convert(
    out: OptionalOut = None,
    file: options.Archive = None,
    network: options.FactoryOrFile = None,
    shape: options.Shape = None,
    weights: options.Weights = None,
    to: Annotated[
        str,
        typer.Option(
            help="batchnorm, torch, sync, or, of layers that normalize each sample, group_norm, layer_norm; "
            "with --from the file to write."
        ),
    ] = "batchnorm",
    of: Annotated[str, typer.Option(help="Which layers: batch_norm, group_norm or layer_norm.")] = "batch_norm",
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="An option of every layer, or an argument of the factory, NAME=VALUE; may be repeated."
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="A file that another framework wrote, to load into the network; --to then names"
            " the file to write: the network's weights (.safetensors), or another framework's file.",
        ),
    ] = None,
    framework: Annotated[
        str | None, typer.Option(help="With --from: whose file --to is, where its name does not tell, as in mlx.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layer", help="With --from: OURS=THEIRS, names of one layer; may be repeated."),
    ] = None,
    source_framework: Annotated[
        str | None, typer.Option("--from-framework", help="Whose file --from is, where its content does not tell.")
    ] = None,
    decay: Annotated[
        float | None, typer.Option(help="Share of the old statistics, where --from does not hold it.")
    ] = None,
    eps: Annotated[float | None, typer.Option(help="Epsilon, where --from does not hold it.")] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="Load --from for inference alone.")] = False,
    like: Annotated[
        Path | None,
        typer.Option(help="With --from: a file of the whole model; --to is that file with other batch norms."),
    ] = None,
    run: options.Run = None,
) -> None:
    """Give every batch norm layer the same options or class, check the network, and write its weights.

    Without --set the network's output has to stay the same. Of an archive the options count that matter in evaluation.
    """
    values = dict(options.assignment(text) for text in assignments or ())
    if source is not None:
        foreign = _Foreign(source, source_framework, _pairs(layers), decay, eps, frozen)
        if network is None and run is None:
            raise InputError("convert: --from needs --network, whose batch normalizations the file is loaded into.")
        given = Given("convert", network, run, weights, assignments)
        _convert_foreign(foreign, given, shape, out or Path(to), framework, like)
        return
    if out is None:
        raise InputError("convert: --out, the file to write, is missing.")
    if options.is_file("convert", file, (".pt2",), network, shape, weights, out, run):
        from batchnorm.surgery.files import convert_archive, save_archive

        assert file is not None
        save_archive(convert_archive(file, to=to, of=of, **values), out)
        typer.echo(f"Written: {out}")
        return
    from batchnorm import convert as convert_all

    of_factory = [name for name in values if network is not None and names_argument(network, name)]
    arguments = [text for text in assignments or () if text.partition("=")[0] in of_factory]
    net, example = Given("convert", network, run, weights, arguments).with_example(shape)
    values = {name: value for name, value in values.items() if name not in of_factory}
    convert_all(net, example, to=to, of=of, **values)
    save(net, out, example)
    typer.echo(str(net))


class _Foreign(NamedTuple):
    """Another framework's file, and how it is read."""

    file: Path
    framework: str | None
    layers: dict[str, str] | None
    decay: float | None
    eps: float | None
    frozen: bool

    def load(self, net: nn.Module) -> None:
        from batchnorm import load_statistics

        how = {"decay": self.decay, "eps": self.eps, "frozen": self.frozen}
        typer.echo(str(load_statistics(net, self.file, self.framework, self.layers, **how)))  # type: ignore[arg-type]


def _pairs(layers: list[str] | None) -> dict[str, str] | None:
    pairs = {ours: (equals, theirs) for ours, equals, theirs in (text.partition("=") for text in layers or ())}
    if bad := [ours for ours, (equals, _) in pairs.items() if not equals]:
        raise InputError(f"convert: --layer {bad[0]}: expected OURS=THEIRS.")
    return {ours: theirs for ours, (_, theirs) in pairs.items()} or None


def _convert_foreign(
    foreign: _Foreign, given: Given, shape: str | None, out: Path, framework: str | None, like: Path | None
) -> None:
    """Another framework's file into the network, and its weights, or a third framework's file, out."""
    from batchnorm import save_statistics

    if out.suffix == "":
        raise InputError(f"convert: --to {out}: with --from it names a file, as in net.safetensors or net.weights.h5.")
    if given.run is not None:
        net, _ = given.with_example(None)
    else:
        net = given.build(() if shape is None else tuple(options.sizes_of("--shape", shape)[1:]), None)
    foreign.load(net)
    if framework is None and like is None and out.suffix == ".safetensors":
        save(net, out)
    else:
        saved = save_statistics(net, out, framework, like=like, frozen=foreign.frozen)
        typer.echo("\n".join([f"Written: {out}", *saved.notes]))


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command(epilog=EXAMPLES)(convert)
