"""Train on CIFAR or other small images: `accelerate launch train/cifar.py --data DIR`."""

from collections.abc import Sequence

from sdnet.train.cli import parse_job, user_errors
from sdnet.train.recipes import CIFAR_RECIPES


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the training; `--help` lists recipes and options."""
    with user_errors():
        job = parse_job(CIFAR_RECIPES, "cifar_sdnet18", argv)
        # Imported late, so that `--help` and wrong options need not wait for them.
        from sdnet.train.data.cifar import open_small_pictures
        from sdnet.train.runs import train_runs

        train_runs(job, open_small_pictures)


if __name__ == "__main__":
    main()
