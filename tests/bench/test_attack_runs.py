"""AutoAttack runs its attacks one after another on what the earlier ones have left."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from sdnet.bench.robustness.attack_runs import WHITE_BOX_ATTACKS, AttackOptions, AttackRuns
from sdnet.bench.robustness.measure import correct
from sdnet.bench.robustness.stored import StoredResults, unpack


def test_square_alone_is_measured_at_the_first_bound_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 4)).eval()
    pixels = torch.rand(8, 3, 4, 4)
    labels = model(pixels).argmax(1)
    labels[0] = (labels[0] + 1) % 4  # wrong without an attack
    options = AttackOptions(autoattack=8, autoattack_linf=(2, 4), autoattack_l2=(), queries=30)
    results = StoredResults(tmp_path / "attacks.json", {})
    AttackRuns(model, pixels, labels, options, results, lambda line: None).measure_autoattack()

    def right(bound: str, what: str) -> torch.Tensor:
        return torch.tensor(unpack(results.values[f"AutoAttack, {bound}: {what}"], 8))

    for bound, square in (("Linf 2/255", "after square alone"), ("Linf 4/255", "after square")):
        white_box = [right(bound, f"after {attack}") for attack in WHITE_BOX_ATTACKS]
        before = [correct(model, pixels, labels), *white_box]
        assert all((left <= earlier).all() for earlier, left in pairwise(before))
        left = white_box[-1] & right(bound, square)
        assert results.values[f"AutoAttack, {bound}"] == 100 * left.float().mean().item()
    assert (right("Linf 4/255", "after square") <= right("Linf 4/255", "after fab-t")).all()
    assert {name for name in results.values if name.endswith("square alone")} == {
        "AutoAttack, Linf 2/255: after square alone",
        "AutoAttack, Linf 2/255, square alone",
    }
    assert 0 < results.values["AutoAttack, Linf 2/255"] <= 87.5
