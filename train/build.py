"""The parts that a trainer starts from: Accelerate, the check of a recipe on this machine, and the model."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

import sdnet
from sdnet.kernels import explain
from sdnet.step_size import csc_layers
from sdnet.train.checkpoint import Checkpoint
from sdnet.train.environment import describe_software
from sdnet.train.errors import UserError
from sdnet.train.init_from import freeze
from sdnet.train.job import Job
from sdnet.train.ranks import START_TIMEOUT
from sdnet.train.recipes import Recipe
from sdnet.train.run_folder import RunFolder
from sdnet.train.settings import settings_of

MPI_AND_SLURM = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Environment variables in which launchers other than torchrun give the number of processes."""

OTHER_PLUGINS = {
    "FSDP": "FSDP",
    "DEEPSPEED": "DeepSpeed",
    "MEGATRON_LM": "Megatron-LM",
    "PARALLELISM_CONFIG": "a parallelism configuration",
}
"""Accelerate's ways to divide a network, by the end of the variable ACCELERATE_USE_* that its launcher sets."""


def make_accelerator(recipe: Recipe, run: RunFolder) -> Accelerator:
    """Return Accelerate as a recipe needs it; processes launched together form one group, on GPUs or on CPUs.

    Raises:
        UserError: The launcher was given another precision or accumulation or divides the network, the launched
            processes do not form one group, or the device lacks the precision.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", recipe.mixed_precision):
        raise UserError(
            f"accelerate was launched with mixed precision {launched} but the recipe says {recipe.mixed_precision}: "
            f"pass --mixed-precision {launched} to the program instead."
        )
    for name, plugin in OTHER_PLUGINS.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1", "yes"):
            raise UserError(
                f"accelerate was launched with {plugin}, which this trainer does not take: every process holds the "
                "whole network, so that its dictionaries can be updated and saved; launch with --multi_gpu instead."
            )
    processes = launched_processes()
    try:
        accelerator = Accelerator(
            cpu=processes > 1 and not torch.cuda.is_available(),  # else Accelerate makes no group of CPU processes
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_steps=recipe.accumulate,
            project_dir=run.path,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=START_TIMEOUT)] if processes > 1 else None,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if processes > 1 and accelerator.num_processes != processes:
        raise UserError(
            f"{processes} processes were launched, but this one is in a group of {accelerator.num_processes}: they "
            f"would train separately and overwrite each other's run folder; use torchrun or accelerate launch."
        )
    if recipe.mixed_precision != "no" and not accelerator.native_amp:  # Accelerate itself would train in fp32
        raise UserError(f"Mixed precision {recipe.mixed_precision} needs a GPU; this run has {accelerator.device}.")
    if recipe.sync_bn and accelerator.device.type != "cuda":
        raise UserError(f"sync_bn needs GPUs; this run has {accelerator.device}.")
    if accelerator.gradient_accumulation_steps != recipe.accumulate:
        steps = accelerator.gradient_accumulation_steps
        raise UserError(f"accelerate was launched with {steps} accumulation steps: pass --accumulate {steps} instead.")
    return accelerator


def launched_processes() -> int:
    """Return how many processes the launcher started together, according to the environment."""
    names = ("WORLD_SIZE",) if "WORLD_SIZE" in os.environ else MPI_AND_SLURM
    if "SLURM_PTY_PORT" in os.environ:  # an interactive shell: srun counts its tasks, but only one runs commands
        names = tuple(name for name in names if not name.startswith("SLURM"))
    return max([int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()], default=1)


def equal_facts(job: Job, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return what has to be equal in all processes of a run, by the name that a message uses.

    Args:
        job: The job of this process.
        checkpoint: The checkpoint that this process has read.
    """
    facts = describe_software()
    facts |= {f"the setting {name}": value for name, value in job.recipe.to_json().items()}
    facts |= {
        f"the setting {item.name}": getattr(job, item.name)
        for item in settings_of(Job)
        if item.metadata["group"] == "run"
    }
    stored = checkpoint.shared["state"] if checkpoint else "none"
    return {"the checkpoint to resume": stored, **facts}


def check_recipe(recipe: Recipe, accelerator: Accelerator) -> None:
    """Check what only this launch decides, before the data are opened: the batch, the model and its operator.

    Raises:
        UserError: The batch cannot be divided, the model cannot be made or has no such part to freeze, its batch norm
            would see a single value per channel, or the CSC operator cannot run as asked on this device.
    """
    batch = recipe.local_batch(accelerator.num_processes)
    try:
        with torch.device("meta"):  # no memory and no arithmetic
            model = create_model(recipe, num_classes=2)
        freeze(model, recipe.freeze)
        if recipe.learn_lam != "no" and not csc_layers(model):
            raise UserError(f"learn_lam is {recipe.learn_lam!r}; the model {recipe.model} has no CSC layers.")
        for layer in csc_layers(model).values():
            lam = torch.full((1, layer.out_channels, 1, 1), recipe.lam, device=accelerator.device)
            example = torch.zeros(1, layer.in_channels, *layer.power_vector.shape[2:], device=accelerator.device)
            weight = torch.zeros(layer.weight.shape, device=accelerator.device)
            with accelerator.autocast():
                explain(
                    example,
                    weight,
                    example.new_ones(()),
                    lam if recipe.learn_lam == "atom" else recipe.lam,
                    stride=layer.stride,
                    padding=layer.padding,
                    impl=recipe.impl,
                    **vars(recipe.coding),
                )
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    sizes: list[Any] = [module.output_size for module in model.modules() if hasattr(module, "output_size")]
    if batch * min(height * width for height, width in sizes) == 1:
        raise UserError(
            f"A batch of one process has one image and the last stage is 1 x 1 at image_size {recipe.image_size}: "
            "batch norm needs more than one value per channel; raise --batch or --image-size, or lower --accumulate."
        )


def create_model(recipe: Recipe, num_classes: int) -> sdnet.SDNet:
    """Return the model of a recipe with freshly initialised weights.

    Raises:
        ValueError: The model does not take these options.
    """
    return sdnet.create_model(
        recipe.model,
        num_classes,
        stem=recipe.stem,
        width=recipe.width,
        image_size=recipe.image_size,
        shortcut=recipe.shortcut,
        lam=recipe.lam,
        learn_lam=recipe.learn_lam,
        impl=recipe.impl,
        **vars(recipe.coding),
    )


def make_model(recipe: Recipe, num_classes: int, device: torch.device) -> sdnet.SDNet:
    """Return the seeded model of a recipe on a device, with converged step sizes.

    Raises:
        UserError: The model does not take these options.
    """
    torch.manual_seed(recipe.seed)
    try:
        model = create_model(recipe, num_classes)
    except ValueError as error:
        raise UserError(str(error)) from error
    model.to(device)  # before the step sizes converge, which is work for the device
    sdnet.refresh_step_size(model)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if recipe.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # within the model: the model itself is no batch norm
    if recipe.compile:
        model.compile(mode=recipe.compile_mode)
    return model
