"""Markdown tables of the cards, for marks <!-- bench:cards-... scale=NAME --> in documents.

Every table says how many networks and pictures it is of; rows of one seed are labelled so.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from sdnet.bench.reproduce.cards import Card, interval
from sdnet.bench.robustness import plots
from sdnet.bench.robustness.attack_runs import found_by_square
from sdnet.bench.robustness.stored import unpack
from sdnet.bench.tables import NOTHING, markdown
from sdnet.robustness.corruptions import NOISES
from sdnet.robustness.fitting import best_of
from sdnet.train.errors import UserError

ROW_NAMES = {
    "training": "training lambda",
    "a": "a, line over the residual",
    "b": "b, noise estimate",
    "c": "c, loss of ACSC",
    "oracle": "oracle",
    "BN": "batch statistics",
    "b + BN": "b, batch statistics",
}
RULES_HEADER = ["network, lambda", "clean", *(f"{noise}, mean" for noise in NOISES), "mean"]
NETWORKS = ("resnet18", "sdnet18", "sdnet18_all", "sdnet18_all_noshortcut")


def of_network(cards: Sequence[Card], network: str) -> dict[int, Card]:
    """Return the cards of a network by seed."""
    return {card["seed"]: card for card in cards if card["network"] == network}


def seeds(count: int) -> str:
    """Return a number of seeds in words."""
    return f"{count} seed{'s' * (count != 1)}"


def points(value: float | None) -> str:
    """Return percent with two decimals."""
    return NOTHING if value is None else f"{value:.2f}"


def accuracy_table(cards: Sequence[Card]) -> str:
    """Return the accuracy on the clean test pictures, by network."""
    header = ["network", "seeds", "last epoch", "best on held-out", "best on test (official)", "training, minutes"]
    lines = []
    for network in NETWORKS:
        found = of_network(cards, network)
        if not found:
            continue
        of = [card["training"] for card in found.values()]
        columns = [", ".join(points(t[name]) for t in of) for name in ("last", "best_on_holdout", "best_on_test")]
        minutes = ", ".join(f"{t['train_minutes']:.0f}" for t in of)
        lines.append([network, ", ".join(map(str, found)), *columns, minutes])
    return markdown(header, lines)


def paired_table(cards: Sequence[Card]) -> str:
    """Return each network against ResNet-18 of the same seed: difference, interval, and discordant pictures."""
    header = ["network − resnet18", "seeds", "mean difference, points", "95 % interval", "only it is right, %"]
    header += ["only resnet18 is right, %"]
    base, lines = of_network(cards, "resnet18"), []
    for network in NETWORKS[1:]:
        found = of_network(cards, network)
        if not (common := [seed for seed in found if seed in base]):
            continue
        differences = [found[seed]["training"]["last"] - base[seed]["training"]["last"] for seed in common]
        discordant = [discordance(found[seed], base[seed]) for seed in common]
        if len(common) > 1:
            centre, half = interval(differences)
            words = [f"{centre:+.2f}", f"{centre - half:+.2f} to {centre + half:+.2f}"]
        else:
            words = [f"{differences[0]:+.2f}", "one seed"]
        shares = [points(mean(part)) for part in zip(*discordant, strict=True)]
        lines.append([network, ", ".join(map(str, common)), *words, *shares])
    return markdown(header, lines)


def discordance(card: Card, other: Card) -> tuple[float, float]:
    """Return the percentage of pictures that only one of two networks classifies rightly: the first, the second."""
    count = card["test_pictures"]
    if other["test_pictures"] != count:
        raise UserError("Two cards of one scale count different test pictures.")
    pairs = list(zip(unpack(card["right"], count), unpack(other["right"], count), strict=True))
    return tuple(100 * sum(pair == kind for pair in pairs) / count for kind in ((True, False), (False, True)))


def tabled(cards: Sequence[Card]) -> list[Card]:
    """Return the cards that hold a table of rules, in the order of the networks."""
    found = [card for card in cards if card["table"]["values"]]
    return sorted(found, key=lambda card: NETWORKS.index(card["network"]))


def rules_table(cards: Sequence[Card]) -> str:
    """Return the accuracy by rule: clean, and under each noise the mean over the severities."""
    return markdown(RULES_HEADER, [line for card in tabled(cards) for line in rule_lines(card, "", "severities")])


def severities_table(cards: Sequence[Card]) -> str:
    """Return the accuracy by rule at every severity, as a mean over the four noises."""
    lines: list[list[str]] = []
    severities: list[int] = []
    for card in tabled(cards):
        severities = card["table"]["conditions"]["severities"]
        for row in rows_of(card):
            values = card["table"]["values"]
            means = [mean_over([values.get(f"{row}, {noise} {n}") for noise in NOISES]) for n in severities]
            lines.append([f"{card['network']}, {ROW_NAMES[row]}", *map(points, means)])
    return markdown(["network, lambda", *(f"severity {n}" for n in severities)], lines)


def alone_table(cards: Sequence[Card]) -> str:
    """Return the accuracy by rule when every picture is a batch of its own."""
    lines = [line for card in tabled(cards) for line in rule_lines(card, "batch 1, ", "alone_severities")]
    return markdown(RULES_HEADER, lines)


def goals_table(cards: Sequence[Card]) -> str:
    """Return whether rule b reaches its goals, for every SDNet with a table."""
    base = [card for card in tabled(cards) if card["network"] == "resnet18"]
    lines = []
    for card in tabled(cards):
        values, conditions = card["table"]["values"], card["table"]["conditions"]
        if "b, clean" not in values:
            continue
        for noise in NOISES:
            names = [f"{noise} {n}" for n in conditions["severities"] if n >= 3]
            if not names or any(f"b, {name}" not in values for name in names):
                continue
            gains = [values[f"b, {name}"] - values[f"training, {name}"] for name in names]
            shown = ", ".join(f"{gain:+.2f}" for gain in gains) + f" points at {', '.join(names)}"
            lines.append([card["network"], f"beats the training lambda, {noise}", shown, met(min(gains) > 0)])
        lost = values["training, clean"] - values["b, clean"]
        lines.append([card["network"], "loses less than 0.3 points, clean", f"{lost:.2f} points", met(lost < 0.3)])
        ours, theirs = alone_mean(card, "b"), alone_mean(base[0], "BN") if base else None
        if ours is not None and theirs is not None:
            shown = f"{ours:.2f} % against {theirs:.2f} %"
            lines.append([card["network"], "beats resnet18 with batch statistics, batch 1", shown, met(ours > theirs)])
    return markdown(["network", "goal of rule b", "measured", "reached"], lines)


def met(reached: bool) -> str:
    """Return whether a goal is reached, in a word."""
    return "yes" if reached else "**no**"


def alone_mean(card: Card, row: str) -> float | None:
    """Return the mean accuracy of a row at batch 1 over noises and severities; None if it is not measured."""
    table = card["table"]
    names = [f"{noise} {n}" for noise in NOISES for n in table["conditions"]["alone_severities"]]
    return mean_over([table["values"].get(f"batch 1, {row}, {name}") for name in names])


def rows_of(card: Card, prefix: str = "") -> list[str]:
    """Return the rows that the table of a card has."""
    return [row for row in ROW_NAMES if f"{prefix}{row}, clean" in card["table"]["values"]]


def mean_over(values: Sequence[float | None]) -> float | None:
    """Return the mean of numbers, None if one is missing."""
    numbers = [value for value in values if value is not None]
    return mean(numbers) if len(numbers) == len(values) else None


def rule_lines(card: Card, prefix: str, severities: str) -> list[list[str]]:
    """Return a line for each row: clean, each noise, and the mean over the noises."""
    table = card["table"]
    lines = []
    for row in rows_of(card, prefix):
        by_noise = [
            mean_over([table["values"].get(f"{prefix}{row}, {noise} {n}") for n in table["conditions"][severities]])
            for noise in NOISES
        ]
        clean = table["values"][f"{prefix}{row}, clean"]
        lines.append([f"{card['network']}, {ROW_NAMES[row]}", *map(points, (clean, *by_noise, mean_over(by_noise)))])
    return lines


def fits_table(cards: Sequence[Card]) -> str:
    """Return what was fitted on held-out pictures, what the rules chose, and what they cost."""
    header = ["network", "rule a: slope", "intercept", "rule b: k", "mean lambda clean: a", "b", "c"]
    header += ["time over plain, batch 200: a", "b", "c", "batch 1: a", "b", "c"]
    lines = []
    for card in tabled(cards):
        values = card["table"]["values"]
        if "rule a" not in values:
            continue
        words = [f"{values['rule a']['slope']:.3g}", f"{values['rule a']['intercept']:.3g}", f"{values['rule b']:g}"]
        chosen = [values.get(f"mean lambda, {row}, clean") for row in "abc"]
        words += [NOTHING if lam is None else f"{lam:.3f}" for lam in chosen]
        for batch in ("cost at batch 200", "cost at batch 1"):
            cost = values.get(batch, {})
            words += [f"{cost[row]:.2f}×" if row in cost else NOTHING for row in "abc"]
        lines.append([card["network"], *words])
    return markdown(header, lines)


def attacked(cards: Sequence[Card]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the networks that were attacked, each with its values."""
    ordered = sorted(cards, key=lambda card: NETWORKS.index(card["network"]))
    found: list[tuple[str, Mapping[str, Any]]] = []
    for card in ordered:
        for row, attack in card["attacks"].items():
            if values := attack["values"]:
                count = min(attack["conditions"]["autoattack"], attack["conditions"]["pictures"])
                name = card["network"] if card["network"] == "resnet18" else f"{card['network']}, {ROW_NAMES[row]}"
                found.append((name, values | found_by_square(values, count)))
    return found


def attacks_table(cards: Sequence[Card]) -> str:
    """Return the accuracy under PGD and AutoAttack."""
    found = attacked(cards)
    names = list(dict.fromkeys(name for _, values in found for name in values))
    names = [name for name in names if name == "clean" or name.startswith("PGD") or is_autoattack(name)]
    lines = [[name, *(points(values.get(name)) for _, values in found)] for name in names]
    if any(is_autoattack(name) for name in names):
        shares = [points(autoattack_clean(values, cards)) for _, values in found]
        lines.insert(1, ["clean, the pictures of AutoAttack", *shares])
    return markdown(["attack", *(network for network, _ in found)], lines)


def autoattack_clean(values: Mapping[str, Any], cards: Sequence[Card]) -> float | None:
    """Return the clean accuracy on the pictures that AutoAttack attacks; None if it has not begun."""
    flags = [value for name, value in values.items() if name.startswith("AutoAttack") and name.endswith(": clean")]
    counts = {min(a["conditions"][n] for n in ("autoattack", "pictures")) for c in cards for a in c["attacks"].values()}
    return 100 * mean(unpack(flags[0], min(counts))) if flags else None


def is_autoattack(name: str) -> bool:
    """Return whether a stored value is the accuracy under AutoAttack, or under its Square attack alone."""
    return name.startswith("AutoAttack") and ": " not in name


def checks_table(cards: Sequence[Card]) -> str:
    """Return what masked gradients would fail."""
    found = attacked(cards)
    names = [name for name in dict.fromkeys(name for _, values in found for name in values) if "check: " in name]
    lines = [[name.removeprefix("check: "), *(checked(values.get(name)) for _, values in found)] for name in names]
    return markdown(["check", *(network for network, _ in found)], lines)


def checked(value: bool | float | None) -> str:
    """Return the value of a check."""
    return ("yes" if value else "no") if isinstance(value, bool) else points(value)


def draw_curves(cards: Sequence[Card], path: Path) -> bool:
    """Draw accuracy over lambda and the line of rule a, of the first SDNet with a table; return whether one has."""
    found = [card for card in tabled(cards) if "rule a" in card["table"]["values"]]
    if not found:
        return False
    values, conditions = found[0]["table"]["values"], found[0]["table"]["conditions"]
    lambdas, severities = conditions["lambdas"], conditions["severities"]
    names = {noise: {0: "clean"} | {n: f"{noise} {n}" for n in severities} for noise in NOISES}
    scores = {noise: {n: values[f"held-out, {name}"] for n, name in of.items()} for noise, of in names.items()}
    points: dict[str, list[tuple[float, float]]] = {}
    for name in dict.fromkeys(name for of in names.values() for name in of.values()):
        residual = values[f"held-out facts, {name}"]["residual"]
        points.setdefault(name.split()[0], []).append((residual, best_of(lambdas, values[f"held-out, {name}"])))
    plots.curves_plot(path, lambdas, scores, points)
    return True


CURVES = "cards-curves"
VIEWS: dict[str, Callable[[Sequence[Card]], str]] = {
    "cards-accuracy": accuracy_table,
    "cards-paired": paired_table,
    "cards-rules": rules_table,
    "cards-severities": severities_table,
    "cards-alone": alone_table,
    "cards-goals": goals_table,
    "cards-fits": fits_table,
    "cards-attacks": attacks_table,
    "cards-checks": checks_table,
}


def render(
    view: str, conditions: Mapping[str, list[str]], cards: Sequence[Card], pictures: Path, link: str, dry: bool = False
) -> str:
    """Return the text between one pair of marks: a table of the cards of one scale, and what it was measured with.

    Args:
        view: one of `VIEWS`, or `CURVES` for a plot.
        conditions: those of the mark.
        cards: all cards.
        pictures: the folder of the plots.
        link: the same folder as links of the document name it.
        dry: draw no plots.

    Raises:
        UserError: The mark does not name one scale.
    """
    scales = conditions.get("scale", [])
    if len(scales) != 1 or set(conditions) != {"scale"}:
        raise UserError(f"A mark {view} needs the one condition scale=NAME.")
    chosen = shown_by(view, [card for card in cards if card["scale"] == scales[0]])
    nothing = "Not measured yet.\n"
    if not chosen:
        return nothing
    if view == CURVES:
        picture = pictures / f"robustness-{scales[0]}.png"
        if not (picture.exists() if dry else draw_curves(chosen, picture)):
            return nothing
        table = f"![Accuracy over lambda, and the best lambda over the residual]({link}/{picture.name})"
    else:
        table = VIEWS[view](chosen)
        if len(table.splitlines()) < 3:  # a head alone: these cards do not hold it yet
            return nothing
    return f"{table}\n\n{caption(view, chosen)}\n"


def shown_by(view: str, cards: Sequence[Card]) -> Sequence[Card]:
    """Return the cards that hold something of a table."""
    if view in ("cards-accuracy", "cards-paired"):
        return cards
    if view in ("cards-attacks", "cards-checks"):
        return [card for card in cards if any(attack["values"] for attack in card["attacks"].values())]
    return tabled(cards)


def caption(view: str, cards: Sequence[Card]) -> str:
    """Return the conditions of a table: data, recipe, seeds, pictures, machine and commits."""
    recipe, table = cards[0]["recipe"], cards[0]["table"]["conditions"]
    held = "" if not cards[0]["note"] else f"{cards[0]['note']}. "
    facts = [
        f"width {recipe['width']}",
        f"{recipe['epochs']} epochs",
        f"{recipe['holdout']} training pictures held out",
    ]
    if view in ("cards-accuracy", "cards-paired"):
        facts.append(f"{cards[0]['test_pictures']} test pictures")
    else:
        facts.append("one seed")
    if view == CURVES:
        facts.append(f"sdnet18, accuracy on {table['held']} held-out training pictures")
    if view in ("cards-rules", "cards-severities"):
        facts.append(f"{table['test'] or 'all'} test pictures in batches of 200")
        facts.append(f"severities {', '.join(map(str, table['severities']))} of CIFAR-10-C")
        facts.append(f"lambda chosen on {table['held']} held-out pictures")
    if view == "cards-alone":
        facts.append(f"{table['alone']} test pictures, one at a time")
        facts.append(f"severities {', '.join(map(str, table['alone_severities']))} of CIFAR-10-C")
    attacks = [attack["conditions"] for card in cards for attack in card["attacks"].values()]
    if view in ("cards-attacks", "cards-checks") and attacks:
        first, names = attacks[0], {name for _, values in attacked(cards) for name in values}
        restarts = first["restarts"] if view == "cards-attacks" else 1
        facts.append(f"PGD: {first['pictures']} test pictures, {first['steps']} steps, restarts: {restarts}")
        if any(map(is_autoattack, names)):
            facts.append(f"AutoAttack: {first['autoattack']} test pictures, {first['queries']} queries of Square")
    devices = sorted({start["device"] for card in cards for start in card["trained"]})
    commits = sorted({str(start["commit"])[:7] for card in cards for start in [*card["trained"], card["evaluated"]]})
    return f"<sub>{held}{'; '.join([*facts, *devices])}; commits {', '.join(commits)}</sub>"
