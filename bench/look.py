"""Pictures of what a trained network sees: its dictionaries, codes and inversions.

It writes these files into the folder --out, at print resolution and in colours that colour-blind readers tell apart:

atoms.png        the atoms of a layer
codes.png        the maps of its most active atoms for the image
inversions.png   the image rebuilt from the codes of every layer
objective.png    the objective of every layer over 1 to 50 FISTA iterations, relative to its minimum
dictionary.png   singular values and mutual coherence of every dictionary
look.json        the numbers: errors and peak signal-to-noise ratios (PSNR) of every layer, coherence, objective; null
                 for what is infinite, such as the PSNR of a layer whose input is zero

Layers behind a shortcut have no inversion; look.json says why. The pictures are those of
`sdnet.invert(..., restore_contrast=True)`. The image is cut to the shape, and scaled to the size, that
the network was made for.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import sdnet
from sdnet.bench import look_document, look_figures
from sdnet.bench.common_options import at_least
from sdnet.bench.ledger import writable_folder
from sdnet.bench.plots import save_figure
from sdnet.bench.tables import NOTHING, markdown
from sdnet.files import write_text
from sdnet.inspection import mutual_coherence, objective_curve, spectrum
from sdnet.inversion import Inversion, match_contrast, psnr
from sdnet.official import load_official_model
from sdnet.step_size import csc_layers
from sdnet.train.data.formats import FORMATS, why_unusable
from sdnet.train.data.normalisation import NORMS, training_program
from sdnet.train.demo_data import photographs_folder
from sdnet.train.errors import UserError
from sdnet.weights import load_model, read_weights, weights_file

OFFICIAL_ENDINGS = (".tar", ".pth", ".pt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the images and the folder for the pictures."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run folder, weights file or official file")
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        help="image files: the first is shown, numbers are means over all; default: a photograph from scikit-image",
    )
    parser.add_argument("--layer", help="the layer of atoms.png and codes.png; default: the first CSC layer")
    parser.add_argument("--n-steps", type=at_least(1), default=50, help="iterations in objective.png; default 50")
    parser.add_argument(
        "--optimum-steps", type=at_least(1), default=1000, help="the most iterations for the minimum; default 1000"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder for the pictures")
    parser.add_argument(
        "--document", type=Path, help="also write the table and two figures into a document, such as docs/inversion.md"
    )
    parser.add_argument("--note", default="", help="a sentence about the data, for --document")


def run(options: argparse.Namespace) -> int:
    """Draw everything and print the table."""
    if options.document:
        look_document.check(options.document)
    elif options.note:
        raise UserError("--note is for --document, which is not given.")
    model = _model(options.checkpoint)
    layers = csc_layers(model)
    if not layers:
        raise UserError(f"{options.checkpoint} has no CSC layers, so there is nothing to look at.")
    name = options.layer or next(iter(layers))
    if name not in layers:
        raise UserError(f"--layer is {name}; it must be one of {', '.join(layers)}.")
    header = _header(options.checkpoint)
    mean, std = _norms(model, header)
    pixels = torch.stack([_pixels(path, model) for path in options.image or [photographs_folder() / "astronaut.png"]])
    images = (pixels - mean) / std
    writable_folder(options.out)

    with torch.no_grad(), sdnet.record(model) as recording:
        model(images)
        inputs, diagnostics = recording.inputs(), recording.diagnose()
    inversions = sdnet.invert_layers(model, images, restore_contrast=True)
    pictures = {layer: found.picture * std + mean for layer, found in inversions.items() if found.picture is not None}
    matched = {layer: match_contrast(picture, pixels) for layer, picture in pictures.items()}
    facts = {
        layer: _facts(found, pixels, pictures.get(layer), matched.get(layer)) for layer, found in inversions.items()
    }
    curves = {}
    for layer, x in inputs.items():
        values = spectrum(layers[layer])
        facts[layer] |= {
            "sparsity": float(diagnostics[layer].sparsity.mean()),
            "lam": layers[layer].lam.flatten().tolist(),
            "coherence": mutual_coherence(layers[layer]),
            "coherence_without_shifts": mutual_coherence(layers[layer], shifts=False),
            "largest_singular_value": float(values[0]),
            "smallest_singular_value": float(values[-1]),
        }
        if layers[layer].prox is None:
            curves[layer] = objective_curve(layers[layer], x[:1], options.n_steps, options.optimum_steps)
            facts[layer] |= {
                "gap_of_the_forward": float(curves[layer].gap[min(layers[layer].coding.n_steps, options.n_steps) - 1]),
                "optimum_steps": curves[layer].optimum_steps,
            }

    with torch.no_grad():
        codes = layers[name](inputs[name][:1])[0]
    figures = {
        "atoms.png": look_figures.atoms(name, layers[name]),
        "codes.png": look_figures.codes(name, pixels[0], codes),
        "inversions.png": look_figures.inversions(pixels[0], matched, facts),
        "objective.png": look_figures.objective(curves, {layer: layers[layer].coding.n_steps for layer in curves}),
        "dictionary.png": look_figures.dictionaries({layer: spectrum(layers[layer]) for layer in inputs}, facts),
    }
    for file, figure in figures.items():
        save_figure(figure, options.out / file, look_figures.DPI)
    found = {"model": model.config, "images": len(pixels), "layers": facts}
    finite = json.loads(json.dumps(found), parse_constant=lambda _: None)  # JSON has no infinity
    write_text(options.out / "look.json", json.dumps(finite, indent=2) + "\n")
    print(table(facts))
    if options.document:
        look_document.write(options.document, model, header, options.note, facts, table(facts), options.out)
    print(f"Written to {options.out}: {', '.join([*figures, 'look.json'])}")
    return 0


def table(facts: dict[str, dict[str, Any]]) -> str:
    """Return the numbers of the layers as a table in Markdown."""
    columns = {
        "error": ("error", ".3f"),
        "PSNR": ("psnr", ".1f"),
        "matched contrast": ("psnr_matched", ".1f"),
        "layer alone": ("layer_psnr", ".1f"),
        "zeros": ("sparsity", ".0%"),
        "coherence": ("coherence", ".2f"),
    }
    lines = [
        [f"`{name}`", fact["kind"]]
        + [NOTHING if fact.get(key) is None else format(fact[key], form) for key, form in columns.values()]
        for name, fact in facts.items()
    ]
    return markdown(["layer", "inversion", *columns], lines)


def _facts(found: Inversion, pixels: Tensor, picture: Tensor | None, matched: Tensor | None) -> dict[str, Any]:
    """Return the numbers of one inversion, means over the images; PSNR of pictures with a peak of 1."""
    facts: dict[str, Any] = {"kind": found.kind, "reason": found.reason, "error": None}
    facts |= {"layer_error": float(found.layer_error.mean()), "layer_psnr": float(found.layer_psnr.mean())}
    if found.error is not None and picture is not None and matched is not None:
        facts |= {
            "error": float(found.error.mean()),
            "psnr": float(psnr(picture, pixels, peak=1.0).mean()),
            "psnr_matched": float(psnr(matched, pixels, peak=1.0).mean()),
        }
    return facts


def _model(checkpoint: Path) -> sdnet.SDNet:
    """Return the network of a run folder, a weights file or an official checkpoint, in evaluation mode.

    Raises:
        UserError: There is none, or it is damaged.
    """
    try:
        if checkpoint.is_file() and checkpoint.suffix in OFFICIAL_ENDINGS:
            return load_official_model(checkpoint)
        return load_model(checkpoint)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def _header(checkpoint: Path) -> dict[str, str]:
    """Return the facts in the header of the weights file that a checkpoint is; none for an official checkpoint."""
    official = checkpoint.is_file() and checkpoint.suffix in OFFICIAL_ENDINGS
    return {} if official else read_weights(weights_file(checkpoint)).facts


def _norms(model: sdnet.SDNet, header: Mapping[str, str]) -> tuple[Tensor, Tensor]:
    """Return mean and deviation by which the training normalised pixels, [C, 1, 1]; one grey channel averages.

    Raises:
        UserError: The images of the network are neither grey nor of three colours.
    """
    if model.in_channels not in (1, 3):
        raise UserError(f"The images of this network have {model.in_channels} channels; they must have 1 or 3.")
    mean, std = (torch.tensor(values) for values in NORMS[training_program(model.config, header)])
    if model.in_channels == 1:
        mean, std = mean.mean().view(1), std.mean().view(1)
    return mean.view(-1, 1, 1), std.view(-1, 1, 1)


def _pixels(path: Path, model: sdnet.SDNet) -> Tensor:
    """Return an image in [0, 1], [C, H, W], cut to the shape of the network's images and scaled to their size.

    Raises:
        UserError: The file is no image, or of a kind that training refuses.
    """
    height, width = model.config["image_size"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--image is {path}, which cannot be read: {error.strerror}.") from error
    if reason := why_unusable(data):
        raise UserError(f"--image is {path}, which {reason}.")
    with Image.open(BytesIO(data), formats=FORMATS) as opened:
        picture = opened.convert("RGB" if model.in_channels == 3 else "L")
    scale = min(picture.width / width, picture.height / height)
    across, down = width * scale, height * scale
    left, top = (picture.width - across) / 2, (picture.height - down) / 2
    box = (left, top, left + across, top + down)
    values = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box), dtype=np.float32) / 255
    return torch.from_numpy(values.reshape(height, width, model.in_channels)).permute(2, 0, 1).contiguous()


if __name__ == "__main__":
    sys.exit("Run this as: python -m sdnet.bench look")
