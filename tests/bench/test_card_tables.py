"""The tables of the cards hold what the cards hold, and the committed documents hold the committed cards."""

from pathlib import Path
from typing import Any

import pytest

from sdnet.bench import report
from sdnet.bench.ledger import RESULTS, read
from sdnet.bench.reproduce import tables
from sdnet.bench.reproduce.cards import CARDS, read_cards
from sdnet.bench.robustness.stored import pack
from sdnet.train.errors import UserError


def card(
    network: str, seed: int, last: float, right: str = "f0", values: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A card of 8 test pictures."""
    attack: dict[str, Any] = {"conditions": {"pictures": 4, "steps": 2, "restarts": 1, "autoattack": 2, "queries": 9}}
    attack["values"] = {"clean": 75.0, "PGD-2, Linf 2/255": 25.0, "check: unbounded": 0.0, "AutoAttack, L2 0.25": 0.0}
    attack["values"] |= {
        "AutoAttack, L2 0.25: clean": "8",
        "AutoAttack, L2 0.25: after fab-t": "0",
        "check: two forwards are equal": True,
    }
    return {
        "scale": "tiny",
        "network": network,
        "seed": seed,
        "note": "JPEG",
        "recipe": {"width": 16, "epochs": 5, "holdout": 10},
        "training": {"last": last, "best_on_holdout": last - 1, "best_on_test": last + 1, "train_minutes": 3.2},
        "trained": [{"device": "a CPU", "commit": "a" * 40}],
        "evaluated": {"commit": "b" * 40},
        "test_pictures": 8,
        "right": right,
        "table": {
            "conditions": {"severities": [1, 5], "alone_severities": [5], "test": 8, "held": 4, "alone": 2},
            "values": values or {},
        },
        "attacks": {"training": attack} if seed == 0 else {},
    }


def render(view: str, scale: str, cards: list[dict[str, Any]], pictures: Path = Path()) -> str:
    return tables.render(view, {"scale": [scale]}, cards, pictures, "figures")


def test_accuracies_of_all_seeds_are_shown() -> None:
    text = tables.accuracy_table([card("sdnet18", 0, 50.0), card("sdnet18", 1, 52.5)])
    assert "| sdnet18 | 0, 1 | 50.00, 52.50 | 49.00, 51.50 | 51.00, 53.50 | 3, 3 |" in text


def test_pairs_of_equal_seeds_give_an_interval_and_the_discordant_pictures() -> None:
    ours = [card("sdnet18", seed, 50 + seed, right=pack([True] * 5 + [False] * 3)) for seed in (0, 1, 2)]
    theirs = [card("resnet18", seed, 49.0, right=pack([False] * 2 + [True] * 4 + [False] * 2)) for seed in (0, 1, 2)]
    (line,) = tables.paired_table([*ours, *theirs]).splitlines()[2:]
    assert "| sdnet18 | 0, 1, 2 | +2.00 | -0.48 to +4.48 | 25.00 | 12.50 |" in line
    assert "| +1.00 | one seed |" in tables.paired_table([ours[0], theirs[0]])


def test_rules_are_shown_as_means_over_severities() -> None:
    values = {f"b, {noise} {n}": 10.0 * n for noise in ("gaussian", "shot", "impulse", "speckle") for n in (1, 5)}
    values |= {"b, clean": 80.0, "b, shot 5": 70.0, "batch 1, b, clean": 60.0}
    cards = [card("sdnet18", 0, 50.0, values=values)]
    assert "| sdnet18, b, noise estimate | 80.00 | 30.00 | 40.00 | 30.00 | 30.00 | 32.50 |" in tables.rules_table(cards)
    assert "| sdnet18, b, noise estimate | 10.00 | 55.00 |" in tables.severities_table(cards)
    assert "| sdnet18, b, noise estimate | 60.00 |" in tables.alone_table(cards)


def test_goals_compare_rule_b_with_the_training_lambda_and_with_batch_statistics() -> None:
    noises = ("gaussian", "shot", "impulse", "speckle")
    values = {f"{row}, {noise} {n}": 50.0 for row in ("b", "training") for noise in noises for n in (1, 5)}
    values |= {"training, clean": 80.0, "b, clean": 79.8, "b, shot 5": 51.0, "b, impulse 5": 49.0}
    ours = card("sdnet18", 0, 50.0, values=values | {f"batch 1, b, {noise} 5": 40.0 for noise in noises})
    theirs = card("resnet18", 0, 50.0, values={f"batch 1, BN, {noise} 5": 10.0 for noise in noises})
    text = tables.goals_table([ours, theirs])
    assert "| beats the training lambda, shot | +1.00 points at shot 5 | yes |" in text
    assert "| beats the training lambda, impulse | -1.00 points at impulse 5 | **no** |" in text
    assert "| loses less than 0.3 points, clean | 0.20 points | yes |" in text
    assert "| beats resnet18 with batch statistics, batch 1 | 40.00 % against 10.00 % | yes |" in text


def test_attacks_and_checks_are_apart() -> None:
    cards = [card("resnet18", 0, 50.0)]
    attacks, checks = tables.attacks_table(cards), tables.checks_table(cards)
    assert attacks.splitlines()[2:] == [
        "| clean | 75.00 |",
        "| clean, the pictures of AutoAttack | 50.00 |",
        "| PGD-2, Linf 2/255 | 25.00 |",
        "| AutoAttack, L2 0.25 | 0.00 |",
    ]
    assert checks.splitlines()[2:] == ["| unbounded | 0.00 |", "| two forwards are equal | yes |"]


def test_pictures_that_only_square_finds_are_counted() -> None:
    shown = card("resnet18", 0, 50.0)
    shown["attacks"]["training"]["conditions"] |= {"pictures": 8, "autoattack": 4}
    shown["attacks"]["training"]["values"] = {
        "AutoAttack, L2 0.25: after fab-t": pack([True, True, False, False]),
        "AutoAttack, L2 0.25: after square alone": pack([False, True, False, True]),
        "AutoAttack, L2 0.5: after fab-t": pack([True, True, False, False]),
        "AutoAttack, L2 0.5: after square": pack([False, False, False, False]),
        "AutoAttack, L2 1: after fab-t": pack([True, True, False, False]),
    }
    assert tables.checks_table([shown]).splitlines()[2:] == [
        "| pictures that only Square finds, L2 0.25, % | 25.00 |",
        "| pictures that only Square finds, L2 0.5, % | 50.00 |",
    ]


def test_a_caption_names_the_commits_of_the_cards_in_its_table() -> None:
    attacked, plain = card("resnet18", 0, 50.0), card("sdnet18", 0, 50.0)
    plain["attacks"], plain["evaluated"] = {}, {"commit": "c" * 40}
    assert "commits aaaaaaa, bbbbbbb<" in render("cards-attacks", "tiny", [plain, attacked])
    assert "commits aaaaaaa, bbbbbbb, ccccccc<" in render("cards-accuracy", "tiny", [plain, attacked])


def test_a_mark_names_one_scale_and_its_conditions_are_shown() -> None:
    shown = render("cards-attacks", "tiny", [card("resnet18", 0, 50.0)])
    for words in (
        "JPEG",
        "width 16",
        "5 epochs",
        "one seed",
        "PGD: 4 test pictures, 2 steps",
        "a CPU",
        "aaaaaaa, bbbbbbb",
    ):
        assert words in shown
    assert render("cards-rules", "full", [card("resnet18", 0, 50.0)]) == "Not measured yet.\n"
    assert render("cards-paired", "tiny", [card("resnet18", 0, 50.0)]) == "Not measured yet.\n", "no pair yet"
    with pytest.raises(UserError, match="A mark cards-rules needs the one condition scale=NAME"):
        tables.render("cards-rules", {}, [], Path(), "figures")


def test_curves_are_drawn_of_the_held_out_accuracies(tmp_path: Path) -> None:
    names = ["clean", *(f"{noise} {n}" for noise in ("gaussian", "shot", "impulse", "speckle") for n in (1, 5))]
    values: dict[str, Any] = {f"held-out, {name}": [50.0, 40.0] for name in names}
    values |= {f"held-out facts, {name}": {"residual": float(i)} for i, name in enumerate(names)}
    drawn = card("sdnet18", 0, 50.0, values=values | {"rule a": {"slope": 1.0, "intercept": 0.0}})
    drawn["table"]["conditions"]["lambdas"] = [0.1, 0.2]
    assert "(figures/robustness-tiny.png)" in render("cards-curves", "tiny", [drawn], tmp_path)
    assert (tmp_path / "robustness-tiny.png").stat().st_size > 1000
    assert render("cards-curves", "tiny", [card("resnet18", 0, 50.0)], tmp_path / "none") == "Not measured yet.\n"


@pytest.mark.parametrize("document", report.CARD_DOCUMENTS, ids=lambda path: path.name)
def test_the_committed_documents_show_the_committed_cards(document: Any) -> None:
    text = document.read_text()
    assert report.filled(text, list(read(RESULTS)), document, report.PICTURES, dry=True) == text
    assert read_cards(RESULTS / CARDS) or "Not measured yet." in text
