"""`robustness`: the accuracy of a network over lambda and severity, without a change of its weights.

    python -m sdnet.bench robustness --checkpoint RUN --data DIR --out DIR

For every noise, severity and lambda it measures the accuracy, the residual |x - A z|² of the first layer and its
sparsity. In --out: results.json, table.md, curves.png (accuracy over lambda for every severity, and the best lambda
over the residual with the line) and pictures.png (clean, noisy, and rebuilt from the codes of the first layer).
The same command continues after an interruption.

The pictures are --data, a folder of CIFAR as train/cifar.py takes it, with noise made here; or --published, a folder of
CIFAR-10-C, CIFAR-100-C or ImageNet-C. With --holdout N, the number that the run held out, the held-out training
pictures are used in place of the test pictures: a lambda that is chosen for use has to be chosen there.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import sdnet
from sdnet.bench.common_options import at_least, choose_device, number
from sdnet.bench.ledger import writable_folder
from sdnet.bench.robustness import plots
from sdnet.bench.robustness.checkpoints import file_of, held_out_by, load_checkpoint
from sdnet.bench.robustness.measure import correct, digest_of, first_layer_facts, percent
from sdnet.bench.robustness.pictures import CLEAN, Group, check_classes, name_of, open_sets, test_pictures
from sdnet.bench.robustness.published import Source, picture_digest, published_source
from sdnet.bench.robustness.rule_table import OFFICIAL_LAMBDAS
from sdnet.bench.robustness.stored import StoredResults
from sdnet.bench.tables import markdown
from sdnet.files import write_text
from sdnet.layers import CSCConv2d
from sdnet.robustness.corruptions import NOISES, SCALES, SEVERITIES
from sdnet.robustness.fitting import PixelModel, best_of
from sdnet.robustness.model import RobustModel, first_layer
from sdnet.train.data.normalisation import NORMS, Norms, training_program
from sdnet.train.errors import UserError
from sdnet.weights import read_weights

DRAWN = 4
"""Pictures that are drawn."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run folder or a weights file")
    parser.add_argument("--weights", choices=["last", "best"], default="last", help="of a run folder; default last")
    parser.add_argument("--data", type=Path, help="a folder of CIFAR or other small pictures")
    parser.add_argument("--published", type=Path, help="a folder of CIFAR-10-C, CIFAR-100-C or ImageNet-C")
    parser.add_argument("--holdout", type=at_least(1), help="use the training pictures of --data that the run held out")
    parser.add_argument("--scale", choices=SCALES, help="whose severities, for --data; default cifar10-c")
    parser.add_argument("--noises", nargs="+", metavar="NOISE", help="default: gaussian shot impulse speckle, or all")
    parser.add_argument("--severities", nargs="+", type=at_least(1), metavar="N", help="default all of the scale")
    parser.add_argument("--lambdas", nargs="+", type=number, default=list(OFFICIAL_LAMBDAS), help="default 0.1 ... 1.4")
    parser.add_argument("--layers", choices=["first", "all"], default="first", help="whose lambda; default first")
    parser.add_argument("--pictures", type=at_least(1), help="how many pictures, a seeded choice; default all")
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, default=Path("runs", "robustness"), help="default runs/robustness")


def run(options: argparse.Namespace) -> int:
    """Measure, and write the results, the table and the plots."""
    if (options.data is None) == (options.published is None):
        raise UserError("One of --data and --published is needed, and not both.")
    for name in ("scale", "holdout"):
        if options.published is not None and (given := getattr(options, name)) is not None:
            raise UserError(f"--{name} is {given}; it is for --data, because a published set has pictures of its own.")
    lambdas = sorted(set(options.lambdas))
    device = choose_device(options.device)
    model = load_checkpoint(options.checkpoint, options.weights, device)
    if not isinstance(model.stem.conv, CSCConv2d):
        raise UserError(f"{options.checkpoint} holds a network without CSC layers in its stem, so it has no lambda.")
    for value in lambdas:
        try:
            with_lambda(model, value, options.layers)
        except ValueError as error:
            raise UserError(f"--lambdas has {value:g}: {error}") from error
    writable_folder(options.out)
    file = file_of(options.checkpoint, options.weights)
    norms = NORMS[training_program(model.config, read_weights(file).facts)]
    source, groups, digest = source_of(options, model, file, device)
    conditions = {
        "weights": digest_of(file),
        "pictures": digest,
        "scale": options.scale or SCALES[0],
        "layers": options.layers,
        "normalisation": norms,
    }
    results = StoredResults(options.out / "results.json", conditions)
    if options.published is not None:
        check_published(options.published, groups, results)
    for group in groups:
        measure(model, norms, source, group, lambdas, options.layers, results)
    write(options.out, lambdas, groups, results)
    if options.data is not None:
        write_pictures(options.out / "pictures.png", model, norms, source, groups, lambdas, results)
    print((options.out / "table.md").read_text())
    return 0


def check_published(folder: Path, groups: Sequence[Group], results: StoredResults) -> None:
    """Raise a UserError if the stored results are of another set with the same name as the folder."""
    for noise in dict.fromkeys(noise for noise, _ in groups):
        digest = picture_digest(folder, noise)
        if results.get(f"pictures of {noise}", lambda found=digest: found) != digest:
            raise UserError(
                f"{results.path} was measured with another {noise} than that in {folder}; choose another --out, or "
                "remove the file."
            )


def source_of(
    options: argparse.Namespace, model: sdnet.SDNet, file: Path, device: torch.device
) -> tuple[Source, list[Group], str]:
    """Return where pictures come from, the noises and severities, and a fingerprint of the pictures."""
    if options.published is not None:
        return published_source(options.published, options.noises, options.severities, options.pictures, device, model)
    names = list(dict.fromkeys(options.noises or NOISES))
    if unknown := sorted(set(names) - set(NOISES)):
        raise UserError(f"--noises has {unknown[0]}; they must be among {', '.join(NOISES)}.")
    if model.config.get("stem") == "imagenet":
        raise UserError("--data takes small pictures; for a network with the ImageNet stem give --published.")
    scale = options.scale or SCALES[0]
    groups = [CLEAN]
    for noise in names:
        strengths = len(SEVERITIES[scale][noise])
        if wrong := [n for n in options.severities or () if n > strengths]:
            raise UserError(f"--severities has {wrong[0]}; {noise} of scale {scale} has {strengths}.")
        groups += [(noise, severity) for severity in sorted(set(options.severities or range(1, strengths + 1)))]
    count = options.pictures or 0
    if options.holdout:
        if (known := held_out_by(file)) is not None and known != options.holdout:
            raise UserError(
                f"--holdout is {options.holdout}; the run held out {known} training pictures and was trained on others."
            )
        sets = open_sets(options.data, options.holdout, 1, count, device)
        check_classes(options.data, sets.classes, model)
        pictures, digest = sets.held, sets.digest
    else:
        pictures, digest = test_pictures(options.data, count, device, model)
    return lambda group: (pictures.corrupted(group, scale), pictures.labels), groups, digest


def measure(
    model: sdnet.SDNet,
    norms: Norms,
    source: Source,
    group: Group,
    lambdas: Sequence[float],
    layers: str,
    results: StoredResults,
) -> None:
    """Measure one noise and severity at every lambda."""
    pictures: list[tuple[Tensor, Tensor]] = []

    def loaded() -> tuple[Tensor, Tensor]:
        if not pictures:
            pictures.append(source(group))
        return pictures[0]

    layer = first_layer(model)
    for value in lambdas:

        def compute(value: float = value) -> dict[str, float]:
            pixels, labels = loaded()
            wrapped = PixelModel(with_lambda(model, value, layers), *norms).to(pixels.device).eval()
            facts = first_layer_facts(layer, pixels, wrapped.normalise, value)
            score = percent(correct(wrapped, pixels, labels))
            return {"accuracy": score, **facts}

        found = results.get(key(group, value), compute)
        print(f"{name_of(group)}, lambda {value:g}: {found['accuracy']:.2f} %", flush=True)

    def residual() -> float:
        normalise = PixelModel(model, *norms).to(layer.weight.device).normalise
        return first_layer_facts(layer, loaded()[0], normalise)["residual"]

    results.get(f"residual at the training lambda, {name_of(group)}", residual)


def with_lambda(model: sdnet.SDNet, value: float, layers: str) -> nn.Module:
    """Return a network with lambda of its first layer, or of all, set to a value; the network itself is unchanged."""
    if layers == "first":
        return RobustModel(model, value)
    network = copy.deepcopy(model)
    sdnet.set_lambda(network, value)
    return network


def key(group: Group, value: float) -> str:
    """Return the name of a value of the sweep."""
    return f"{name_of(group)}, lambda {value:g}"


def scores_of(group: Group, lambdas: Sequence[float], results: StoredResults) -> list[float]:
    """Return the accuracies of a noise and severity over the grid."""
    return [results.values[key(group, value)]["accuracy"] for value in lambdas]


def write(out: Path, lambdas: Sequence[float], groups: Sequence[Group], results: StoredResults) -> None:
    """Write the table and the plots."""
    header = ["noise, severity", *(f"{value:g}" for value in lambdas), "best lambda", "residual", "sparsity"]
    lines, points, curves = [], {}, {}
    noises = list(dict.fromkeys(noise for noise, severity in groups if severity)) or ["gaussian"]
    for group in groups:
        scores = scores_of(group, lambdas, results)
        best = best_of(lambdas, scores)
        residual = results.values[f"residual at the training lambda, {name_of(group)}"]
        sparsity = results.values[key(group, best)]["sparsity"]
        words = [f"{best:g}", f"{residual:.1f}", f"{sparsity:.2f}"]
        lines.append([name_of(group), *(f"{score:.2f}" for score in scores), *words])
        points.setdefault(group[0] if group[1] else "clean", []).append((residual, best))
        for noise in [group[0]] if group[1] else noises:
            curves.setdefault(noise, {})[group[1]] = scores
    text = (
        "Accuracy in percent over lambda; residual: mean |x - A z|² of the first layer at the training lambda; "
        "sparsity: share of zero codes at the best lambda.\n\n"
    )
    write_text(out / "table.md", text + markdown(header, lines) + "\n")
    plots.curves_plot(out / "curves.png", lambdas, curves, points)


@torch.no_grad()
def write_pictures(
    path: Path,
    model: sdnet.SDNet,
    norms: Norms,
    source: Source,
    groups: Sequence[Group],
    lambdas: Sequence[float],
    results: StoredResults,
) -> None:
    """Draw clean and noisy pictures, and those rebuilt from the codes at the training lambda and at the best one."""
    layer = first_layer(model)
    wrapped = PixelModel(model, *norms).to(layer.weight.device)
    noisy_group = groups[-1]
    clean, dirty = source(groups[0])[0][:DRAWN], source(noisy_group)[0][:DRAWN]
    best = best_of(lambdas, scores_of(noisy_group, lambdas, results))
    columns = {"clean": clean, name_of(noisy_group): dirty}
    own = f"lambda {float(layer.lam):g}" if layer.lam.numel() == 1 else "the training lambda"
    x = wrapped.normalise(dirty)
    for title, value in {own: None, f"lambda {best:g}": best}.items():
        rebuilt = layer.reconstruct(layer(x, value), (x.shape[2], x.shape[3]))[:, : x.shape[1]]
        columns[f"rebuilt, {title}"] = rebuilt * wrapped.std + wrapped.mean
    plots.pictures_plot(path, columns)
