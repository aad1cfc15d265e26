"""Which implementation a call takes, and what it says of itself."""

import pytest

from sdnet.kernels.dispatch import ENVIRONMENT_VARIABLE, choose


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_auto_takes_the_torch_path_and_gives_the_reason() -> None:
    choice = choose("auto")
    assert choice.impl == "torch"
    assert "no Triton kernels" in choice.reason


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_an_implementation_asked_for_is_taken(impl: str) -> None:
    choice = choose(impl)
    assert choice.impl == impl
    assert choice.reason == "the argument impl asks for it"


def test_the_environment_overrides_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    choice = choose("auto")
    assert choice.impl == "reference"
    assert ENVIRONMENT_VARIABLE in choice.reason


def test_the_environment_does_not_override_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert choose("torch").impl == "torch"


def test_triton_says_that_it_is_not_there() -> None:
    with pytest.raises(NotImplementedError, match="impl='triton' is not there yet"):
        choose("triton")


def test_an_unknown_implementation_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="the argument impl is 'cuda'; it must be one of auto, torch, reference, triton"
    ):
        choose("cuda")


def test_an_unknown_implementation_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"the environment variable {ENVIRONMENT_VARIABLE} is 'cuda'"):
        choose("auto")
