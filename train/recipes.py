"""Recipes: everything that decides the numbers of a training run, as one typed, frozen dataclass.

Functions return them; `RECIPES` and `CIFAR_RECIPES` name those that train/imagenet.py and train/cifar.py offer.
`sdnet.train.cli` makes an option of every field, so a new field with a `setting(...)` needs nothing else.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from sdnet.kernels.coding import CODING_FIELDS, Coding
from sdnet.train.errors import UserError


def setting(default: Any, group: str, text: str, least: float | None = None) -> Any:
    """A recipe's field: its heading and sentence in `--help`, and the least value that makes sense."""
    return field(default=default, metadata={"group": group, "help": text, "least": least})


@dataclass(frozen=True)
class Recipe:
    """The settings of one training run; two runs with equal recipes, data and processes give equal losses.

    Raises:
        UserError: a count below 1, a rate out of range, or an evaluation that crops more than it resized.
    """

    name: str = setting("imagenet_sdnet18", "recipe", "name, for the run folder and reports")

    model: str = setting("sdnet18", "model", "one of sdnet.list_models()")
    stem: Literal["imagenet", "cifar"] = setting("imagenet", "model", "7x7 stride 2 and pooling, or 3x3 stride 1")
    shortcut: bool = setting(True, "model", "residual connections; without them only *_all models")
    n_steps: int = setting(2, "model", "steps of the sparse coding in every CSC layer", 1)
    lam: float = setting(0.1, "model", "lambda, the weight of |z|_1", 0)
    mu: float = setting(0.0, "model", "mu, the weight of |z|_2^2 / 2", 0)
    nonnegative: bool = setting(True, "model", "codes >= 0")
    solver: Literal["ista", "fista", "sdnet"] = setting("fista", "model", "they differ from the third step on")
    data_term: Literal["squared", "norm"] = setting("squared", "model", "|x - Az|^2 / 2, or the official norm")
    n_dict: int = setting(1, "model", "dictionaries per layer", 1)
    impl: str = setting("auto", "model", "implementation of the CSC operator")

    image_size: int = setting(224, "pictures", "height and width that the model sees, in pixels", 1)
    eval_resize: int = setting(256, "pictures", "shorter side before the centre crop of the evaluation, in pixels", 1)

    crop_padding: int = setting(4, "pictures", "black margin of random crops, in pixels; train/cifar.py only", 0)
    extras: Literal["none", "trivial", "rand"] = setting(
        "none", "pictures", "DALI's TrivialAugmentWide or RandAugment after the crop; train/imagenet.py only"
    )
    mixup: float = setting(0.0, "pictures", "alpha of Mixup, 0 for none", 0)
    cutmix: float = setting(0.0, "pictures", "alpha of CutMix, 0 for none", 0)

    epochs: int = setting(100, "optimisation", "passes over the training set", 1)
    batch: int = setting(512, "optimisation", "pictures of one step over all processes and accumulated batches", 1)
    accumulate: int = setting(1, "optimisation", "batches whose gradients make one step", 1)
    lr: float = setting(0.1, "optimisation", "learning rate at its highest", 0)
    schedule: Literal["step", "cosine"] = setting("step", "optimisation", "x gamma at milestones, or cosine to lr_min")
    milestones: tuple[int, ...] = setting((30, 60, 90), "optimisation", "epochs at which step drops the rate")
    gamma: float = setting(0.1, "optimisation", "the factor of a drop", 0)
    lr_min: float = setting(0.0, "optimisation", "learning rate at the end of the cosine", 0)
    warmup_epochs: float = setting(0.0, "optimisation", "epochs of linear rise from zero, part of the epochs", 0)
    momentum: float = setting(0.9, "optimisation", "of SGD", 0)
    nesterov: bool = setting(False, "optimisation", "Nesterov's momentum")
    weight_decay: float = setting(1e-4, "optimisation", "of all parameters", 0)
    label_smoothing: float = setting(0.0, "optimisation", "share of the target spread over all classes", 0)

    mixed_precision: Literal["no", "fp16", "bf16"] = setting("no", "execution", "autocast type; fp16 needs a GPU")
    input_dtype: Literal["fp32", "fp16", "bf16"] = setting(
        "fp32", "execution", "type of the pictures that the loader gives; fp16 and bf16 need that mixed precision"
    )
    channels_last: bool = setting(False, "execution", "NHWC memory format")
    compile: bool = setting(False, "execution", "torch.compile the model")
    seed: int = setting(0, "execution", "of weights, order and augmentation", 0)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            least = item.metadata["least"]
            if least is not None and not least <= value < float("inf"):
                raise UserError(f"{item.name} is {value}; it must be a finite number of at least {least}.")
        if self.eval_resize < self.image_size:
            raise UserError(f"eval_resize is {self.eval_resize}, less than image_size, {self.image_size}.")
        if self.input_dtype not in ("fp32", self.mixed_precision):
            raise UserError(f"input_dtype {self.input_dtype} needs mixed_precision {self.input_dtype}.")

    @property
    def coding(self) -> Coding:
        """The options of the sparse coding.

        Raises:
            ValueError: an option has a wrong type or value.
        """
        return Coding(**{name: getattr(self, name) for name in CODING_FIELDS})

    def local_batch(self, processes: int) -> int:
        """Pictures of one batch of one process.

        Raises:
            UserError: `batch` does not divide among processes and accumulated batches.
        """
        local, left = divmod(self.batch, processes * self.accumulate)
        if left:
            shares = f"{processes} processes x {self.accumulate} accumulated batches"
            raise UserError(f"batch is {self.batch}, which does not divide among {shares}.")
        return local

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `json` can write and `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Recipe":
        """The recipe that `to_json` wrote.

        Raises:
            UserError: fields are missing or unknown, as in a run of another version.
        """
        wrong = sorted({item.name for item in fields(cls)} ^ set(values))
        if wrong:
            raise UserError(f"The recipe was stored by another version of sdnet: {', '.join(wrong)} came or went.")
        restored: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**restored)

    def differences(self, other: "Recipe") -> list[str]:
        """`field: ours, not theirs` for every field that differs."""
        ours, theirs = asdict(self), asdict(other)
        return [f"{name}: {ours[name]}, not {theirs[name]}" for name in ours if ours[name] != theirs[name]]


def imagenet_sdnet18() -> Recipe:
    """SDNet-18 on ImageNet with the official settings."""
    return Recipe()


def imagenet_sdnet18_all() -> Recipe:
    """SDNet-18 with CSC layers throughout on ImageNet, official settings."""
    return Recipe(name="imagenet_sdnet18_all", model="sdnet18_all")


def imagenet_sdnet34() -> Recipe:
    """SDNet-34 on ImageNet with the official settings."""
    return Recipe(name="imagenet_sdnet34", model="sdnet34")


def imagenet_resnet18() -> Recipe:
    """ResNet-18 under the same protocol: the yardstick."""
    return Recipe(name="imagenet_resnet18", model="resnet18")


def demo() -> Recipe:
    """SDNet-18 at 64 px on the pictures of sdnet.train.demo_data: minutes on two CPU cores."""
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
    for recipe in (imagenet_sdnet18, imagenet_sdnet18_all, imagenet_sdnet34, imagenet_resnet18, demo)
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
    """SDNet-18 with CSC layers throughout on CIFAR, official settings."""
    return replace(cifar_sdnet18(), name="cifar_sdnet18_all", model="sdnet18_all")


def cifar_sdnet34() -> Recipe:
    """SDNet-34 on CIFAR with the official settings."""
    return replace(cifar_sdnet18(), name="cifar_sdnet34", model="sdnet34")


def cifar_resnet18() -> Recipe:
    """ResNet-18 on CIFAR under the same protocol: the yardstick."""
    return replace(cifar_sdnet18(), name="cifar_resnet18", model="resnet18")


CIFAR_RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for recipe in (cifar_sdnet18, cifar_sdnet18_all, cifar_sdnet34, cifar_resnet18)
}
