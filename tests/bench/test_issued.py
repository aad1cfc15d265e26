"""The count of instructions, on planted listings."""

from types import SimpleNamespace
from typing import Any

import pytest

from sdnet.bench import issued
from sdnet.bench.layer_shapes import LayerShape

STEM = LayerShape("", 3, 64, 7, 2, (224, 224))

BODY = ["FFMA R1, R1, R2, R3 ;"] * 20

LOOP = "\n".join(["MOV R0, 0x1 ;", ".L_x_1:", *BODY, "@P0 BRA `(.L_x_1) ;", *["MOV R0, 0x2 ;"] * 4, "EXIT ;"])


def test_a_loop_is_what_lies_between_a_label_and_the_branch_back_to_it() -> None:
    assert issued.lengths(LOOP) == (1 + 1 + 4 + 1, [20])
    assert issued.lengths(LOOP.replace("FFMA R1, R1, R2, R3 ;\n", "", 15)) == (12, [])  # it waits for something


@pytest.mark.parametrize(
    ("name", "path", "count"),
    [
        ("proximal_step", "fused", 256 * 112 * 112 / 128 * 8 * (7 + 20 * 5)),  # 147 pairs of tap and channel by 32
        ("proximal_step", "padded", 256 * 112 * 112 / 128 * 8 * (7 + 20 * 7)),  # 196
        ("synthesis", "padded", 256 * 112 * 112 / 128 * 4 * (7 + 20 * 16)),
        ("correlate", "fused", 256 * 112 * 112 / 64 * 3 * 8 * 20),  # 147 columns by 64
        ("correlate", "padded", 256 * 112 * 112 / 64 * 2 * 4 * 20),  # 196 columns by 128
    ],
)
def test_a_launch_issues_its_loop_as_often_as_it_has_steps(
    name: str, path: str, count: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issued, "machine_code", lambda case: LOOP)
    case: Any = SimpleNamespace(name=f"{name} of the stem")
    assert issued.issued(case, STEM, 256, path) == count
