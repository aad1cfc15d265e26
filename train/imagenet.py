"""Train on ImageNet or any other folder of images: `accelerate launch train/imagenet.py --data DIR`."""

from collections.abc import Sequence

from sdnet.train.cli import parse_job, user_errors
from sdnet.train.recipes import RECIPES


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the training; `--help` lists recipes and options."""
    with user_errors():
        job = parse_job(RECIPES, "imagenet_sdnet18", argv)
        # Imported late, so that `--help` and wrong options need not wait for them.
        from sdnet.train.data.dali import open_pictures
        from sdnet.train.runs import train_runs

        train_runs(job, open_pictures)


if __name__ == "__main__":
    main()
