"""Evaluate weights: `python -m sdnet.train.evaluate --checkpoint RUN --data DIR`.

The checkpoint is a run folder (its best weights), a weights file of a run such as `last_ema.safetensors`, a file of
`sdnet.save_model`, or one of the official SDNet code, `model_best.pth.tar`. The images are read as in the training that
made the weights. A file of `sdnet.save_model` does not say how that was: it needs --program, and images are then read
as by its first recipe, at the image size of the network. Under torchrun or `accelerate launch` the processes share the
images. The result is one JSON object on standard output; what of the data is not used is said on standard error:

checkpoint, model, data, images     what was evaluated
top1, top5, loss                    accuracies in percent, and the mean cross-entropy
top1_correct, top5_correct          how many images they are
layers                              for each CSC layer the mean share of codes that are zero, the mean |x - A z| / |x|,
                                    and the step margin: step size times largest eigenvalue
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

import sdnet
from sdnet.files import write_text
from sdnet.kernels.dispatch import IMPLEMENTATIONS
from sdnet.official import load_official_model
from sdnet.step_size import csc_layers
from sdnet.train.cli import check_paths, user_errors
from sdnet.train.data.loader import Data, Loader, Program, Rank
from sdnet.train.errors import UserError
from sdnet.train.job import BadFiles, Job, Verify
from sdnet.train.recipes import CIFAR_RECIPES, RECIPES, Recipe
from sdnet.train.run_folder import RunFolder
from sdnet.weights import Weights, load_model, read_weights, weights_file

OFFICIAL_ENDINGS = (".tar", ".pth", ".pt")
MODEL_OPTIONS = ("lam", "n_steps", "impl")
IMAGE_OPTIONS = ("image_size", "eval_resize", "batch", "mixed_precision")


@dataclass(frozen=True)
class Subject:
    """Weights to evaluate.

    Attributes:
        file: The file that they come from.
        model: The network, in evaluation mode.
        recipe: The recipe that made them; the official one for a file that does not say it.
        program: The entry script whose loader reads the images.
        classes: The names of the classes; empty if they are not known.
    """

    file: Path
    model: sdnet.SDNet
    recipe: Recipe
    program: Program
    classes: tuple[str, ...]


def read_subject(checkpoint: Path, program: Program | None, changes: dict[str, Any]) -> Subject:
    """Return the weights that `--checkpoint` names.

    Args:
        checkpoint: A run folder, a weights file, or a file of the official code.
        program: The entry script whose loader reads the images; None for what the file says.
        changes: Arguments of `create_model` that replace those of the file.

    Raises:
        UserError: There are no such weights, or they are damaged.
    """
    if str(checkpoint) == "official" and not checkpoint.exists():
        raise UserError(
            "--checkpoint is official; download model_best.pth.tar, which the README of Delay-Xili/SDNet links, and "
            "give its path."
        )
    try:
        if checkpoint.is_file() and checkpoint.suffix in OFFICIAL_ENDINGS:
            return _official_subject(checkpoint, program, changes)
        file = weights_file(checkpoint)
        weights, model = read_weights(file), load_model(file, **changes)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    said = cast(Program | None, weights.facts.get("program"))
    if program is None and said not in get_args(Program):
        raise UserError(f"{file} does not say how its images were read: pass --program imagenet or --program cifar.")
    program = program or cast(Program, said)
    recipe = _recipe_of(weights, file) if "recipe" in weights.facts else _official_recipe(program, model)
    return Subject(file, model, recipe, program, weights.classes)


def _official_subject(file: Path, program: Program | None, changes: dict[str, Any]) -> Subject:
    model = load_official_model(file, **changes)
    program = program or cast(Program, model.config["stem"])
    return Subject(file, model, _official_recipe(program), program, ())


def _official_recipe(program: Program, model: sdnet.SDNet | None = None) -> Recipe:
    """Return the official recipe of a program, at the image size of a model if one is given.

    Raises:
        UserError: The model is for images that are not square, which no recipe has.
    """
    recipe = RECIPES["imagenet_sdnet18"]() if program == "imagenet" else CIFAR_RECIPES["cifar_sdnet18"]()
    if model is None:
        return recipe
    height, width = model.config["image_size"]
    if height != width:
        raise UserError(f"The network is for images of {height}x{width} pixels; only square ones can be evaluated.")
    size = int(height)
    return replace(recipe, image_size=size, eval_resize=round(size * recipe.eval_resize / recipe.image_size))


def _recipe_of(weights: Weights, file: Path) -> Recipe:
    """Return the recipe in the header of a weights file.

    Raises:
        UserError: It is of another version.
    """
    try:
        return Recipe.from_json(json.loads(weights.facts["recipe"]))
    except (ValueError, TypeError, AttributeError, RecursionError, UserError) as error:
        reason = str(error).rstrip(".")
        raise UserError(f"{file} does not say the recipe that made it, or one of another version: {reason}.") from error


def open_data(subject: Subject, job: Job, rank: Rank, device: torch.device) -> Data:
    """Return the loaders of one rank.

    Raises:
        UserError: The data cannot be used, or have other classes than the weights.
    """
    if subject.program == "imagenet":
        from sdnet.train.data.dali import open_pictures as open_images
    else:
        from sdnet.train.data.cifar import open_small_pictures as open_images
    data = open_images(job, rank, device)
    if len(data.classes) != subject.model.config["num_classes"]:
        raise UserError(
            f"{job.data} has {len(data.classes)} classes, the network in {subject.file} has "
            f"{subject.model.config['num_classes']}."
        )
    different = [pair for pair in zip(data.classes, subject.classes, strict=False) if pair[0] != pair[1]]
    if different:
        here, there = different[0]
        raise UserError(f"{job.data} has a class {here} where the weights in {subject.file} have {there}.")
    return data


class LayerSums:
    """Sums over images of what the CSC layers of a model did; a loader that adds to them after each batch.

    Args:
        recording: The recording of the model.
        loader: The batches that the model will go through.
        device: The device of the model.
    """

    def __init__(self, recording: sdnet.Recording, loader: Loader, device: torch.device) -> None:
        self.recording, self.loader = recording, loader
        self.names: list[str] = []
        self.sums = torch.zeros(0, 2, dtype=torch.float64, device=device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the loader, and add what the layers did with each."""
        for batch in self.loader:
            yield batch
            found = self.recording.diagnose()
            if found:
                self.names = list(found)
                batch_sums = [torch.stack([layer.sparsity, layer.relative_residual]).sum(1) for layer in found.values()]
                self.sums = torch.stack(batch_sums).double() + (self.sums if len(self.sums) else 0)


def evaluate_subject(subject: Subject, job: Job, per_layer: bool = True) -> dict[str, Any]:
    """Return the result of an evaluation, the same on every rank.

    Args:
        subject: The weights.
        job: The data, and a recipe with the settings of the evaluation.
        per_layer: Whether to look into the CSC layers.

    Raises:
        UserError: The data or the device cannot be used, or outputs are not finite.
    """
    from sdnet.train.build import make_accelerator
    from sdnet.train.execution import execution
    from sdnet.train.metrics import count_hits, of_all_ranks

    recipe = job.recipe
    accelerator = make_accelerator(recipe, job.run)
    device, rank = accelerator.device, Rank(accelerator.process_index, accelerator.num_processes)
    with accelerator.local_main_process_first():
        data = open_data(subject, job, rank, device)
    for note in data.notes if accelerator.is_main_process else ():
        print(note, file=sys.stderr)
    model = subject.model.to(device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    layers: dict[str, dict[str, float]] = {}
    with execution(recipe), accelerator.autocast(), torch.no_grad():
        if per_layer and csc_layers(model):
            with sdnet.record(model) as recording:
                watched = LayerSums(recording, data.val, device)
                counts = count_hits(model, cast(Loader, watched), data.val_size, device)
            margins = sdnet.step_margins(model, image_size=recipe.image_size)
            means = (of_all_ranks(watched.sums).sum(0) / data.val_size).tolist()
            for name, (sparsity, residual) in zip(watched.names, means, strict=True):
                layers[name] = {"sparsity": sparsity, "relative_residual": residual, "step_margin": margins[name]}
        else:
            counts = count_hits(model, data.val, data.val_size, device)
    if not math.isfinite(counts.loss):
        raise UserError(f"The network in {subject.file} gives outputs that are infinite or NaN: it has no accuracy.")
    return {
        "checkpoint": subject.file.name,
        "model": subject.model.config,
        "data": job.data.resolve().name,
        "images": data.val_size,
        "top1": 100 * counts.top1 / data.val_size,
        "top5": 100 * counts.top5 / data.val_size,
        "loss": counts.loss / data.val_size,
        "top1_correct": counts.top1,
        "top5_correct": counts.top5,
        "processes": accelerator.num_processes,
        "layers": layers,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m sdnet.train.evaluate",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN|FILE", help="what to evaluate")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the images, as for training")
    parser.add_argument("--program", choices=get_args(Program), help="how images are read; default as in the training")
    parser.add_argument("--val-labels", type=Path, metavar="FILE", help="labels of a flat validation folder")
    parser.add_argument("--image-size", type=int, help="height and width of the input, in pixels")
    parser.add_argument("--eval-resize", type=int, help="shorter side before the centre crop, in pixels")
    parser.add_argument("--batch", type=int, help="images of one batch, over all processes")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="autocast type")
    parser.add_argument("--lam", type=float, help="lambda of all CSC layers")
    parser.add_argument("--n-steps", type=int, help="unrolled steps of all CSC layers")
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, help="implementation of the CSC operator")
    parser.add_argument("--threads", type=int, default=0, help="decoding threads of each process; default its share")
    parser.add_argument("--verify", choices=get_args(Verify), default="header", help="how images are checked before")
    parser.add_argument(
        "--bad-files", choices=get_args(BadFiles), default="fail", help="stop at broken images, or skip"
    )
    parser.add_argument("--no-layers", action="store_true", help="accuracy alone, which takes less memory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object to a file too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate what a command line asks for, and print the result as JSON."""
    with user_errors():
        options = parse(argv)
        check_paths(argv)
        given = {name: value for name, value in vars(options).items() if value is not None}
        if options.out and not options.out.absolute().parent.is_dir():
            raise UserError(f"--out is {options.out}; its folder does not exist.")
        if options.out and options.out.is_dir():
            raise UserError(f"--out is {options.out}, a folder; it must be the path of a file.")
        changes = {name: given[name] for name in MODEL_OPTIONS if name in given}
        subject = read_subject(options.checkpoint, options.program, changes)
        fixed = {"accumulate": 1, "holdout": 0, "mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0}
        fixed |= {"first_image_size": 0, "extras": "none", "crop_padding": Recipe().crop_padding}  # of training alone
        fixed |= {"compile": False, "compile_mode": "default", "sync_bn": False, "input_dtype": "fp32"}
        recipe = subject.recipe.with_settings(fixed | {name: given[name] for name in IMAGE_OPTIONS if name in given})
        settings = {name: given[name] for name in ("threads", "verify", "bad_files", "val_labels") if name in given}
        job = Job(recipe, options.data, RunFolder(Path()), **settings)
        try:
            result = evaluate_subject(subject, job, not options.no_layers)
        except NotImplementedError as error:  # the implementation cannot run on this device
            raise UserError(str(error)) from error
        if torch.distributed.is_initialized():
            main_process = torch.distributed.get_rank() == 0
            torch.distributed.destroy_process_group()
        else:
            main_process = True
        if main_process:
            text = json.dumps(result, indent=2)
            if options.out:
                write_text(options.out, text + "\n")
            sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
