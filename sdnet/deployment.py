"""`export`: a network as a .pt2 file of torch.export or as an ONNX file, made of plain operators."""

import copy
import os
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sdnet.blocks import BasicBlock, Bottleneck, StemBlock
from sdnet.kernels import checks
from sdnet.kernels.operators import problem_of
from sdnet.kernels.reference import copies_of, momentum, residual_scale, shrink, synthesis
from sdnet.step_size import csc_layers

SUFFIXES = (".pt2", ".onnx")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

TOLERANCE = 1e-4
"""The largest difference between the outputs of the model and of the file, as a part of the largest output, or of 1."""

NOT_FOR_ALL_SIZES = (
    "dynamic_size is True, but the model cannot be traced for images of all sizes; export it with dynamic_size=False."
)


class Exported(NamedTuple):
    """What `export` wrote.

    Attributes:
        path: the file.
        difference: the largest difference between the outputs of the model and of the file.
    """

    path: Path
    difference: float


def export(
    model: nn.Module,
    path: str | PathLike[str],
    example: Tensor,
    *,
    dynamic_size: bool = True,
    fold_batch_norm: bool = True,
) -> Exported:
    """Write a model for inference as `path`, which ends in .pt2 (torch.export) or .onnx.

    The file has plain operators only, also in place of the operator of the CSC layers. It takes batches of any size.
    Before the file gets its name, it is loaded and its outputs are compared with those of the model, for the example,
    for one image of it and, with `dynamic_size`, for images of another size. The model is unchanged.

    Args:
        model: a network in fp32 that takes one tensor and returns one. It is exported in evaluation mode.
        path: the file; an existing one is replaced.
        example: a batch that the model takes, on the device of the model.
        dynamic_size: whether the file takes images of any height and width that the model takes.
        fold_batch_norm: whether to compute a batch norm after a plain convolution by the convolution. Batch norms after
            CSC layers stay, because codes are not linear in the input.

    Shape:
        - example: [N, C, H, W]; with `dynamic_size=False` of any shape with a batch dimension.

    Returns:
        The file, and how much its outputs differ.

    Raises:
        ValueError: an argument has a wrong type or value, or the model cannot be traced for all sizes.
        ImportError: a package for ONNX files is not installed: pip install 'sdnet[export]'.
        RuntimeError: the outputs differ by more than `TOLERANCE`; no file is written.

    Example:
        >>> sdnet.export(model, "model.onnx", torch.randn(2, 3, 224, 224))
    """
    file = exported_file(path)
    model = getattr(model, "_orig_mod", model)  # of a compiled model
    check_arguments(model, example, checks.flag("dynamic_size", dynamic_size))
    fold_batch_norm = checks.flag("fold_batch_norm", fold_batch_norm)
    if file.suffix == ".onnx" and (missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]):
        raise ImportError(f"{missing[0]} is not installed; ONNX files need it: pip install 'sdnet[export]'.")

    plain = copy.deepcopy(model).eval()
    examples = examples_of(example, dynamic_size)
    with torch.no_grad():
        expected = [plain(images) for images in examples]
    if not isinstance(expected[0], Tensor):
        raise ValueError(f"model returns {type(expected[0]).__name__}; it must return one tensor.")
    for layer in csc_layers(plain).values():
        layer.impl = "torch"
    if fold_batch_norm:
        fold_batch_norms(plain)
    with torch.no_grad():  # without gradients the operator of a CSC layer returns the last codes alone
        program = traced(plain, examples[0], dynamic_size)
    temporary = file.with_name(f".{file.stem}.tmp{file.suffix}")
    try:
        write = as_onnx if file.suffix == ".onnx" else as_pt2
        found = write(program, temporary, examples)
        difference = largest_difference(found, expected)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(file, difference)


def exported_file(path: str | PathLike[str]) -> Path:
    """Return the path of a file that can be written.

    Raises:
        ValueError: `path` has another suffix, is a folder, or lies in a folder that does not exist.
    """
    if not isinstance(path, (str, PathLike)) or Path(path).suffix not in SUFFIXES:
        raise ValueError(f"path is {checks.shown(path)}; it must be the path of a file that ends in .pt2 or .onnx.")
    file = Path(path)
    if not file.parent.is_dir():
        raise ValueError(f"path is '{file}'; there is no folder '{file.parent}'.")
    if file.is_dir():
        raise ValueError(f"path is '{file}', a folder; it must be the path of a file.")
    return file


def check_arguments(model: nn.Module, example: Tensor, dynamic_size: bool) -> None:
    """Raise a ValueError unless `export` takes the model and the example."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {checks.shown(model)}; it must be an nn.Module.")
    if others := {parameter.dtype for parameter in model.parameters()} - {torch.float32}:
        raise ValueError(f"model has parameters of {others.pop()}; export model.float().")
    shaped = isinstance(example, Tensor) and (example.ndim == 4 if dynamic_size else example.ndim >= 2)
    if not shaped or 0 in example.shape:
        shape = "[N, C, H, W]" if dynamic_size else "with a batch dimension"
        raise ValueError(f"example is {checks.shown(example)}; it must be a tensor {shape}.")
    if dynamic_size and not example.is_floating_point():
        raise ValueError(f"example is {example.dtype}; it must be floating point, or dynamic_size be False.")
    if not bool(example.isfinite().all()):
        raise ValueError("example holds NaN or infinite values; the outputs could not be compared.")


def examples_of(example: Tensor, dynamic_size: bool) -> list[Tensor]:
    """Return a batch of 2 or more to trace with, and inputs of other sizes to compare with."""
    example = example.detach()
    batch = example if len(example) > 1 else torch.cat([example, example])
    examples = [batch, example[:1]]
    if dynamic_size:  # an odd change, so that strided layers are seen at both parities
        examples.append(torch.nn.functional.interpolate(batch, (batch.shape[2] + 3, batch.shape[3] + 5)))
    return examples


def traced(model: nn.Module, example: Tensor, dynamic_size: bool) -> torch.export.ExportedProgram:
    """Return a model as a program of torch.export for batches, and images, of any size."""
    shapes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if not dynamic_size:
        return of_plain_operators(torch.export.export(model, (example,), dynamic_shapes=(shapes,)))
    shapes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    # Where a size shrinks to 1 within the network, the tracer takes it as a constant: then larger images show the rest.
    larger = nn.functional.interpolate(example, scale_factor=4.0)
    cause: Exception | None = None
    for images in (example, larger):
        try:
            program = torch.export.export(
                model, (images,), dynamic_shapes=(shapes,), prefer_deferred_runtime_asserts_over_guards=True
            )
            return without_assertions(of_plain_operators(program))
        except Exception as error:
            cause = error
    raise ValueError(NOT_FOR_ALL_SIZES) from cause


def of_plain_operators(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Replace the operator of the CSC layers in a program by plain operators."""
    return program.run_decompositions({torch.ops.sdnet.csc_forward.default: plain_forward})


def plain_forward(x: Tensor, weight: Tensor, step_size: Tensor, lam: Tensor, *options: Any) -> list[Tensor]:
    """Compute the last codes, as `sdnet.kernels.torch_path.forward` does, without operators that work in place.

    For nonnegative codes the threshold is the bias of the convolution, so that a step costs two convolutions, a
    difference, a sum and a rectifier.
    """
    problem = problem_of(step_size, lam, options[:-4])
    coding, size = problem.coding, (x.shape[2], x.shape[3])
    scaled, threshold = problem.scaled(weight), problem.gamma * problem.lam
    by_bias = coding.nonnegative and (threshold.ndim == 0 or threshold.shape[0] == 1)
    bias = -threshold.flatten().expand(len(weight)) if by_bias else None

    def step(y: Tensor | None, residual: Tensor, scaled: Tensor) -> Tensor:
        v = F.conv2d(residual, scaled, bias, problem.stride, problem.padding)
        if y is not None:
            v = v + (y * problem.damping if coding.mu else y)
        return v.clamp_min(0) if by_bias else shrink(v, threshold, coding.nonnegative)

    first = scaled.unflatten(1, (coding.n_dict, -1)).sum(1) if coding.n_dict > 1 else scaled
    previous = codes = step(None, x, first)
    for beta in momentum(coding.n_steps, coding.solver)[1:]:
        y = codes + beta * (codes - previous) if beta else codes
        point = y if coding.solver == "fista" else codes
        reconstruction = synthesis(point, weight, size, problem.stride, problem.padding)
        residual = copies_of(x, coding.n_dict) - reconstruction
        scale = residual_scale(residual, coding.data_term)
        previous, codes = codes, step(y, residual if scale is None else residual * scale, scaled)
    return [codes]


def without_assertions(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Remove the assertions that a program makes about sizes, and return it.

    The tracer asserts what it assumed to simplify strides, which holds for sizes of the parity of the example alone.
    The operators compute the right values without it, which `export` checks for other sizes.
    """
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def as_pt2(program: torch.export.ExportedProgram, file: Path, examples: list[Tensor]) -> list[Tensor]:
    """Write a program as a .pt2 file, load it, and return what it computes for the examples.

    Raises:
        ValueError: the file does not take every size.
    """
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()
    try:
        with torch.no_grad():
            return [loaded(images) for images in examples]
    except AssertionError as error:  # what the tracer took for granted does not hold for all sizes
        raise ValueError(NOT_FOR_ALL_SIZES) from error


def as_onnx(program: torch.export.ExportedProgram, file: Path, examples: list[Tensor]) -> list[Tensor]:
    """Write a program as an ONNX file and return what onnxruntime computes by it."""
    import onnxruntime

    exported: Any = torch.onnx.export(
        program, (), dynamo=True, input_names=["images"], output_names=["output"], verbose=False
    )
    exported.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    return [torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0]) for images in examples]


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference between outputs.

    Raises:
        RuntimeError: it is above `TOLERANCE`, or a shape differs.
    """
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            raise RuntimeError(
                f"The exported file gives outputs {list(ours.shape)} where the model gives {list(theirs.shape)}; "
                "no file was written."
            )
    differences = [
        float((ours.cpu() - theirs.cpu()).abs().max() / theirs.cpu().abs().max().clamp_min(1))
        for ours, theirs in zip(found, expected, strict=True)
    ]
    largest = max(differences, key=lambda difference: (difference != difference, difference))  # a NaN is the largest
    if not largest <= TOLERANCE:
        raise RuntimeError(
            f"The outputs of the exported file differ from those of the model by {largest:.1e} of the largest output, "
            f"which is more than {TOLERANCE:.0e}; no file was written."
        )
    return largest


def fold_batch_norms(model: nn.Module) -> None:
    """Let plain convolutions compute the batch norms that follow them, in place, in evaluation mode.

    These are the pairs of the blocks of an SDNet, and neighbours in an `nn.Sequential`.
    """
    counts: dict[nn.Module, int] = {}
    for module in model.modules():
        for child in module.children():
            counts[child] = counts.get(child, 0) + 1
    for module in model.modules():
        children = dict(module.named_children())
        if isinstance(module, (StemBlock, BasicBlock, Bottleneck)):
            pairs = [(name, name.replace("conv", "norm")) for name in children if name.startswith("conv")]
        elif type(module) is nn.Sequential:
            pairs = list(zip(children, list(children)[1:], strict=False))
        else:
            pairs = []
        for first, second in pairs:
            convolution, norm = children[first], children[second]
            if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d and counts[convolution] == 1:
                if norm.running_mean is None or counts[norm] != 1:
                    continue
                setattr(module, first, fuse_conv_bn_eval(convolution, norm))
                setattr(module, second, nn.Identity())
