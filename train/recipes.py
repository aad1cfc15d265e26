"""Recipes: the settings that decide the results of a training run, as one frozen dataclass.

A recipe is a function that returns a `Recipe`. `RECIPES` and `CIFAR_RECIPES` list those that train/imagenet.py and
train/cifar.py offer. `sdnet.train.cli` makes a command-line option of every field, and run folders store every field,
so a new setting is one new line in `Recipe`; a new option of the coding is one in `sdnet.kernels.coding.Coding`.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import sdnet
from sdnet.kernels.coding import Coding
from sdnet.kernels.dispatch import Impl
from sdnet.state import LearnLam
from sdnet.train.errors import UserError
from sdnet.train.settings import check_settings, setting, settings_of


@dataclass(frozen=True)
class Recipe:
    """The settings of one training run.

    Two runs with equal recipes, data and number of processes give equal losses. `coding` holds the options of the
    sparse coding in every CSC layer; on the command line and in recipe.json they stand beside the other settings.

    Raises:
        UserError: A setting has the wrong type or is out of range, or two settings contradict each other.
    """

    name: str = setting("imagenet_sdnet18", "recipe", "name of the run folder and in reports")

    model: str = setting("sdnet18", "model", f"one of {', '.join(sdnet.list_models())}")
    stem: Literal["imagenet", "cifar"] = setting("imagenet", "model", "7x7 stride 2 and pooling, or 3x3 stride 1")
    width: int = setting(
        64, "model", "channels of the stem and the first stage; later ones have 2, 4 and 8 times", 1, 4096
    )
    shortcut: bool = setting(True, "model", "residual connections; only *_all models can do without")
    lam: float = setting(0.1, "model", "lambda, the weight of |z|_1")
    learn_lam: LearnLam = setting(
        "no", "model", "learn lambda of each CSC layer, or of each atom, beginning with --lam"
    )
    impl: Impl = setting("auto", "model", "implementation of the CSC operator")

    init_from: str = setting("", "model", "weights to begin with: a file, a run, a hub folder, an official checkpoint")
    freeze: tuple[str, ...] = setting((), "model", "parts that keep their weights, such as stem stages.0")

    coding: Coding = Coding()

    image_size: int = setting(224, "images", "height and width of the input of the model, in pixels", least=1)
    eval_resize: int = setting(256, "images", "shorter side before the centre crop of evaluation, in pixels", least=1)
    first_image_size: int = setting(
        0,
        "images",
        "training image size of the first epoch, rising to image_size; 0 for all; train/imagenet.py only",
    )
    crop_padding: int = setting(4, "images", "black margin of random crops, in pixels; train/cifar.py only")
    extras: Literal["none", "trivial", "rand"] = setting(
        "none", "images", "TrivialAugmentWide or RandAugment of DALI after the crop; train/imagenet.py only"
    )
    holdout: int = setting(
        0, "images", "training images held out to choose the best weights on; 0 chooses on the validation set"
    )
    mixup: float = setting(0.0, "images", "alpha of Mixup, 0 for none", most=1000)
    cutmix: float = setting(0.0, "images", "alpha of CutMix, 0 for none", most=1000)

    random_erasing: float = setting(0.0, "images", "probability that an image loses a rectangle", most=1)

    epochs: int = setting(100, "optimisation", "passes over the training set", least=1)
    batch: int = setting(512, "optimisation", "images of one step, over all processes and accumulated batches", least=1)
    accumulate: int = setting(1, "optimisation", "batches whose gradients make one step", least=1)
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "optimisation", "SGD with momentum, or AdamW")
    lr: float = setting(0.1, "optimisation", "highest learning rate")
    schedule: Literal["step", "cosine", "onecycle"] = setting(
        "step", "optimisation", "x gamma at milestones, cosine to lr_min, or a straight line to lr_min"
    )
    milestones: tuple[int, ...] = setting(
        (30, 60, 90), "optimisation", "epochs at which step changes the rate", least=1
    )
    gamma: float = setting(0.1, "optimisation", "factor of the rate at a milestone", most=1)
    lr_min: float = setting(0.0, "optimisation", "learning rate at the end of cosine and onecycle")
    warmup_epochs: float = setting(0.0, "optimisation", "epochs of linear rise from zero, part of the epochs")
    momentum: float = setting(0.9, "optimisation", "momentum of SGD, beta1 of AdamW", most=1)
    beta2: float = setting(0.999, "optimisation", "beta2 of AdamW", most=1)
    nesterov: bool = setting(False, "optimisation", "Nesterov momentum")
    weight_decay: float = setting(1e-4, "optimisation", "weight decay")
    decay_norms: bool = setting(True, "optimisation", "weight decay of batch norms and biases too")
    decay_atoms: bool = setting(True, "optimisation", "weight decay of the atoms of CSC layers too")
    clip_norm: float = setting(0.0, "optimisation", "largest norm of the gradient, 0 for any")
    label_smoothing: float = setting(0.0, "optimisation", "share of the target spread over all classes", most=1)

    ema: float = setting(0.0, "optimisation", "decay of the averaged weights (EMA), such as 0.9999; 0 for none", most=1)
    eval_every: int = setting(1, "optimisation", "epochs between two evaluations; the last epoch has one too", least=1)
    early_stop: int = setting(0, "optimisation", "epochs without a better top-1 after which training ends, 0 for never")

    mixed_precision: Literal["no", "fp16", "bf16"] = setting("no", "execution", "autocast type; fp16 needs a GPU")
    input_dtype: Literal["fp32", "fp16", "bf16"] = setting(
        "fp32", "execution", "type of the loaded images; fp16 and bf16 need the same mixed precision"
    )
    channels_last: bool = setting(False, "execution", "NHWC memory format")
    compile: bool = setting(False, "execution", "torch.compile the model")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = setting(
        "default", "execution", "mode of torch.compile"
    )
    sync_bn: bool = setting(False, "execution", "batch norm over the images of all GPUs")
    tf32: bool = setting(True, "execution", "TF32 products of fp32 convolutions and matrices; GPUs only")
    cudnn_benchmark: bool = setting(True, "execution", "let cuDNN time its algorithms; not with deterministic")
    deterministic: bool = setting(False, "execution", "deterministic algorithms, where PyTorch has one")
    seed: int = setting(0, "execution", "seed of weights, order and augmentation", most=2**63 - 1)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.name in ("", ".", "..") or "/" in self.name:
            raise UserError(f"name is {self.name!r}; it must be the name of a folder, without a slash.")
        if self.model not in sdnet.list_models():
            raise UserError(f"model is {self.model!r}; it must be one of {', '.join(sdnet.list_models())}.")
        if self.eval_resize < self.image_size:
            raise UserError(f"eval_resize is {self.eval_resize}, less than image_size, {self.image_size}.")
        if self.first_image_size > self.image_size:
            raise UserError(f"first_image_size is {self.first_image_size}, more than image_size, {self.image_size}.")
        if self.input_dtype not in ("fp32", self.mixed_precision):
            raise UserError(f"input_dtype {self.input_dtype} needs mixed_precision {self.input_dtype}.")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(f"milestones is {' '.join(map(str, self.milestones))}; the epochs must rise.")
        if self.warmup_epochs > self.epochs:
            raise UserError(f"warmup_epochs is {self.warmup_epochs}, more than epochs, {self.epochs}.")
        if self.schedule != "step" and self.lr_min > self.lr:
            raise UserError(f"lr_min is {self.lr_min}, more than lr, {self.lr}.")
        for name in ("momentum", "beta2", "ema"):
            if getattr(self, name) == 1:
                raise UserError(f"{name} is 1; it must be less than 1.")
        if self.nesterov and self.optimizer != "sgd":
            raise UserError(f"nesterov is for sgd; optimizer is {self.optimizer}.")
        if self.compile_mode != "default" and not self.compile:
            raise UserError(f"compile_mode {self.compile_mode} needs compile.")
        if self.early_stop % self.eval_every:
            raise UserError(
                f"early_stop is {self.early_stop}; it must be a multiple of eval_every, {self.eval_every}: only "
                "evaluated epochs can be better."
            )
        if self.nesterov and self.momentum == 0:
            raise UserError("nesterov needs a momentum above 0; momentum is 0.")

    def unused(self) -> dict[str, str]:
        """Return the settings that have no effect beside the others, each with the reason."""
        reasons: dict[str, str] = {}
        if self.schedule == "step":
            reasons["lr_min"] = "schedule step ends at lr times gamma for each milestone"
        else:
            reasons |= dict.fromkeys(("milestones", "gamma"), f"schedule {self.schedule} has no milestones")
        if self.optimizer == "sgd":
            reasons["beta2"] = "optimizer sgd has none"
        return reasons

    def local_batch(self, processes: int) -> int:
        """Return the number of images in one batch of one process.

        Raises:
            UserError: `batch` cannot be divided among processes and accumulated batches.
        """
        local, left = divmod(self.batch, processes * self.accumulate)
        if left:
            shares = f"{processes} processes x {self.accumulate} accumulated batches"
            raise UserError(f"batch is {self.batch}, which does not divide among {shares}.")
        return local

    def to_json(self) -> dict[str, Any]:
        """Return the settings as one flat dictionary that `json` can write and `from_json` reads."""
        values = asdict(self)
        return values | values.pop("coding")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Recipe":
        """Return the recipe that `to_json` stored; settings that `values` lacks keep their defaults.

        Raises:
            UserError: `values` holds settings that this version does not have, or values that are not allowed.
        """
        if unknown := sorted(set(values) - set(cls().to_json())):
            raise UserError(f"this version of sdnet has no setting {', '.join(unknown)}.")
        return cls().with_settings(
            {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        )

    def with_settings(self, values: Mapping[str, Any]) -> "Recipe":
        """Return a copy in which the settings in `values` are changed, those of the coding included.

        Raises:
            UserError: A value is not allowed.
        """
        try:
            coding = replace(self.coding, **{name: values[name] for name in asdict(self.coding) if name in values})
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        own = {item.name: values[item.name] for item in settings_of(Recipe) if item.name in values}
        return replace(self, **own, coding=coding)

    def differences(self, other: "Recipe") -> list[str]:
        """Return `field: ours, not theirs` for every field that differs."""
        ours, theirs = self.to_json(), other.to_json()
        return [f"{name}: {ours[name]}, not {theirs[name]}" for name in ours if ours[name] != theirs[name]]


def imagenet_sdnet18() -> Recipe:
    """SDNet-18 on ImageNet with the official settings."""
    return Recipe()


def imagenet_sdnet18_all() -> Recipe:
    """SDNet-18 with CSC layers throughout on ImageNet with the official settings."""
    return Recipe(name="imagenet_sdnet18_all", model="sdnet18_all")


def imagenet_sdnet34() -> Recipe:
    """SDNet-34 on ImageNet with the official settings."""
    return Recipe(name="imagenet_sdnet34", model="sdnet34")


def imagenet_resnet18() -> Recipe:
    """ResNet-18 on ImageNet with the same settings, for comparison."""
    return Recipe(name="imagenet_resnet18", model="resnet18")


def imagenet_modern() -> Recipe:
    """SDNet-18 on ImageNet with what ResNets are trained with today; measured at a small scale only."""
    return Recipe(
        name="imagenet_modern",
        batch=1024,
        lr=1.0,
        schedule="cosine",
        warmup_epochs=5.0,
        nesterov=True,
        weight_decay=5e-5,
        decay_norms=False,
        label_smoothing=0.1,
        mixup=0.2,
        ema=0.9999,
        mixed_precision="bf16",
        input_dtype="bf16",
        channels_last=True,
    )


def demo() -> Recipe:
    """SDNet-18 at 64 px on the images of sdnet.train.demo_data; takes minutes on two CPU cores."""
    return Recipe(
        name="demo",
        image_size=64,
        eval_resize=72,
        epochs=8,
        batch=32,
        lr=0.02,
        schedule="cosine",
        warmup_epochs=1.0,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        imagenet_sdnet18,
        imagenet_sdnet18_all,
        imagenet_sdnet34,
        imagenet_resnet18,
        imagenet_modern,
        demo,
    )
}


def cifar_sdnet18() -> Recipe:
    """SDNet-18 on CIFAR-10 or CIFAR-100 with the official settings."""
    return Recipe(
        name="cifar_sdnet18",
        stem="cifar",
        image_size=32,
        eval_resize=32,
        epochs=220,
        batch=128,
        schedule="cosine",
        lr_min=1e-6,
        nesterov=True,
        weight_decay=5e-4,
    )


def cifar_sdnet18_all() -> Recipe:
    """SDNet-18 with CSC layers throughout on CIFAR with the official settings."""
    return replace(cifar_sdnet18(), name="cifar_sdnet18_all", model="sdnet18_all")


def cifar_sdnet34() -> Recipe:
    """SDNet-34 on CIFAR with the official settings."""
    return replace(cifar_sdnet18(), name="cifar_sdnet34", model="sdnet34")


def cifar_resnet18() -> Recipe:
    """ResNet-18 on CIFAR with the same settings, for comparison."""
    return replace(cifar_sdnet18(), name="cifar_resnet18", model="resnet18")


def cifar_fast() -> Recipe:
    """SDNet-18 on CIFAR-10 in 24 epochs of a one-cycle schedule in bfloat16; measured at a small scale only."""
    return replace(
        cifar_sdnet18(),
        name="cifar_fast",
        epochs=24,
        batch=512,
        lr=0.4,
        schedule="onecycle",
        lr_min=0.0,
        warmup_epochs=5.0,
        decay_norms=False,
        label_smoothing=0.1,
        mixed_precision="bf16",
        input_dtype="bf16",
        channels_last=True,
        eval_every=4,
    )


CIFAR_RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for recipe in (cifar_sdnet18, cifar_sdnet18_all, cifar_sdnet34, cifar_resnet18, cifar_fast)
}
