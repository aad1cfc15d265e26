"""`adversaries`: the accuracy of a network under PGD and AutoAttack, and checks that masked gradients would fail.

    python -m sdnet.bench adversaries --checkpoint RUN --data DIR --out DIR

With --k, lambda is chosen by the noise estimate (`NoiseRule`), and the adversary's gradients flow through it. In --out:
attacks.json and attacks.md. The same command continues after an interruption.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from sdnet.bench.common_options import at_least, choose_device, number
from sdnet.bench.ledger import writable_folder
from sdnet.bench.robustness.attack_runs import (
    AttackOptions,
    AttackRuns,
    autoattack_class,
    check_autoattack,
    found_by_square,
)
from sdnet.bench.robustness.checkpoints import file_of, load_checkpoint
from sdnet.bench.robustness.measure import digest_of, pixel_model
from sdnet.bench.robustness.pictures import CLEAN, test_pictures
from sdnet.bench.robustness.stored import StoredResults
from sdnet.bench.tables import markdown
from sdnet.files import write_text
from sdnet.layers import CSCConv2d
from sdnet.robustness.model import RobustModel
from sdnet.robustness.rules import NoiseRule
from sdnet.train.data.normalisation import training_program
from sdnet.train.errors import UserError
from sdnet.weights import read_weights

DEFAULTS = AttackOptions(pictures=1000, linf=(0.5, 1, 2, 4, 8), autoattack=1000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run folder or a weights file")
    parser.add_argument("--weights", choices=["last", "best"], default="last", help="of a run folder; default last")
    parser.add_argument("--data", type=Path, required=True, help="a folder of CIFAR or other small pictures")
    parser.add_argument("--k", type=number, help="choose lambda by the noise estimate with this factor")
    parser.add_argument("--pictures", type=at_least(1), default=DEFAULTS.pictures, help="default 1000")
    parser.add_argument(
        "--linf",
        nargs="*",
        type=number,
        default=list(DEFAULTS.linf),
        metavar="EPS",
        help="in 1/255; default 0.5 1 2 4 8",
    )
    parser.add_argument(
        "--l2", nargs="*", type=number, default=list(DEFAULTS.l2), metavar="EPS", help="default 0.1 0.25 0.5"
    )
    parser.add_argument("--steps", type=at_least(1), default=DEFAULTS.steps, help="of PGD; default 20")
    parser.add_argument("--restarts", type=at_least(1), default=DEFAULTS.restarts, help="of PGD; default 2")
    parser.add_argument(
        "--autoattack", type=at_least(0), default=DEFAULTS.autoattack, help="pictures, 0 for none; default 1000"
    )
    parser.add_argument("--queries", type=at_least(1), default=DEFAULTS.queries, help="of Square; default 5000")
    parser.add_argument(
        "--batch", type=at_least(1), default=DEFAULTS.batch, help=f"pictures of a forward; default {DEFAULTS.batch}"
    )
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, default=Path("runs", "adversaries"), help="default runs/adversaries")


def run(options: argparse.Namespace) -> int:
    """Attack, and write the results and a table."""
    device = choose_device(options.device)
    model = load_checkpoint(options.checkpoint, options.weights, device)
    if options.k is not None and not isinstance(model.stem.conv, CSCConv2d):
        raise UserError(f"--k is for networks with a CSC layer in the stem; {options.checkpoint} has none.")
    file = file_of(options.checkpoint, options.weights)
    if training_program(model.config, read_weights(file).facts) != "cifar":
        raise UserError(f"adversaries takes networks of train/cifar.py; {file} holds one of ImageNet.")
    writable_folder(options.out)
    if options.autoattack:
        autoattack_class()  # before hours of work, whether it is installed
        check_autoattack(model.num_classes)
    pictures, digest = test_pictures(options.data, options.pictures, device, model)
    attacks = AttackOptions(
        pictures=options.pictures,
        linf=tuple(options.linf),
        l2=tuple(options.l2),
        steps=options.steps,
        restarts=options.restarts,
        autoattack=options.autoattack,
        autoattack_linf=tuple(options.linf),
        autoattack_l2=tuple(options.l2),
        queries=options.queries,
        batch=options.batch,
    )
    weights = digest_of(file)
    conditions = {"weights": weights, "pictures": digest, "k": options.k, "attacks": asdict(attacks)}
    results = StoredResults(options.out / "attacks.json", conditions)
    rule = None if options.k is None else NoiseRule(options.k)
    robust = pixel_model(RobustModel(model, rule))
    AttackRuns(robust, pictures.corrupted(CLEAN), pictures.labels, attacks, results).measure()
    count = min(attacks.autoattack, attacks.pictures)
    values = results.values | found_by_square(results.values, count)
    lines = [[name, str(value)] for name, value in values.items() if ": after" not in name]
    shown = markdown(["attack", "accuracy, %"], [line for line in lines if not line[0].endswith(": clean")])
    text = f"PGD and the checks are of {attacks.pictures} test pictures, AutoAttack of the first {count} of them."
    write_text(options.out / "attacks.md", f"{text}\n\n{shown}\n")
    print(shown)
    return 0
