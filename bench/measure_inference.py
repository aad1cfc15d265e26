"""`infer`: images per second of inference, of networks as they are and as exported files.

Without gradients a CSC layer keeps none of its earlier codes. Networks compute in fp32, on a GPU without TF32. All
models and forms run in turns in one process, in evaluation mode, so that their ratios hold whatever else the machine
does. Forms:

| form     | what runs                                                          |
|----------|--------------------------------------------------------------------|
| eager    | the network under `torch.inference_mode`                           |
| pt2      | the .pt2 file of `sdnet.export`, loaded by torch.export            |
| onnx     | the ONNX file of `sdnet.export`, run by onnxruntime on the CPU     |

`sdnet.export` compares the outputs of a file with those of its network before anything is timed.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdnet
from sdnet.bench.common_options import add_common_options, add_width_option, at_least, open_ledger, seconds
from sdnet.bench.isolation import wait_for
from sdnet.bench.layer_shapes import stem_for
from sdnet.bench.ledger import print_outcome
from sdnet.bench.tables import inference_table
from sdnet.kernels.qualify.timing import fp32_products, interleave, peak_memory, wall_time
from sdnet.train.errors import UserError

MODELS = ("resnet18", "sdnet18", "sdnet18_all")
FORMS = ("eager", "pt2", "onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", nargs="+", choices=sdnet.list_models(), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=["eager", "pt2"], help="default eager and pt2")
    parser.add_argument("--batch", type=at_least(1), default=128, help="default 128")
    parser.add_argument("--image-size", type=at_least(1), default=32, help="pixels; default 32")
    add_width_option(parser)
    parser.add_argument("--seconds", type=seconds, default=60, help="of all models and forms; default 60")
    parser.add_argument("--turns", type=at_least(1), default=5, help="the least number of turns; default 5")
    add_common_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for."""
    on_cpu = options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available())
    if "onnx" in options.form and not on_cpu:
        raise UserError(f"--device is {options.device}; --form onnx runs on the CPU alone: pass --device cpu.")
    device, ledger = open_ledger(options, "inference")
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, options.image_size, options.image_size, device=device)
    stem = stem_for(options.image_size)
    shape = {"batch": options.batch, "image_size": options.image_size, "width": options.width, "stem": stem}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), fp32_products(tf32=False):
        for name, form in itertools.product(options.model, options.form):
            print(f"Preparing {name}, {form}", flush=True)
            with torch.inference_mode(False):
                model = sdnet.create_model(name, 10, stem=stem, width=options.width, image_size=options.image_size).to(
                    device
                )
                calls[name, form] = call_of(model.eval(), form, images, Path(folder))
            calls[name, form]()

        def sampler(call: Callable[[], Any]) -> Callable[[], float]:
            return lambda: wall_time([call, lambda: wait_for(device)])

        timings = interleave(
            {" ".join(key): sampler(call) for key, call in calls.items()}, options.seconds, least=options.turns
        )
        for (name, form), call in calls.items():
            timing = timings[f"{name} {form}"]
            ledger.add(
                name,
                "inference",
                shape,
                dtype="fp32",
                layout="contiguous",
                time_ms=timing._asdict(),
                memory_mib=peak_memory(call, device),
                metrics={"images_per_second": 1e3 * options.batch / timing.p50},
                settings={"form": form},
            )
    print("\n" + inference_table(ledger.rows) + "\n")
    return print_outcome(ledger)


def call_of(model: sdnet.SDNet, form: str, images: Tensor, folder: Path) -> Callable[[], Any]:
    """Return a function that computes the logits of the images in one form of a network."""
    if form == "eager":
        return lambda: model(images)
    example, name = images[:2].clone(), model.config["name"]
    file = sdnet.export(model, folder / f"{name}.{form}", example, dynamic_size=False).path
    if form == "pt2":
        program = torch.export.load(file).module()
        return lambda: program(images)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session, pixels = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"]), images.numpy()
    return lambda: session.run(None, {"images": pixels})
