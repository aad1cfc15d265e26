"""Verdicts and their tables: which candidate is taken, what is written, and what a reader makes of a table."""

import json
import multiprocessing
import resource
import signal
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from sdnet.kernels.qualify import key, verdicts
from sdnet.kernels.qualify.candidates import candidates_of, judge, judge_update
from sdnet.kernels.qualify.key import Call, Flags, batch_class, machine_of
from sdnet.kernels.qualify.verdicts import PLAIN, TORCH, UPDATE, Store, Trial, Verdict
from sdnet.kernels.triton_path.paths import Entry
from sdnet.kernels.triton_path.tiles import Shape, by_rule

SHAPE = Shape(256, 64, 64, (56, 56), (56, 56), (3, 3), (1, 1), 2, "ieee", channels_last=True, arch=90)
FUSED = Entry("fused", by_rule(SHAPE)).encoded()
MACHINE = machine_of(torch.device("cpu"))
CALL = Call(64, 64, (3, 3), (1, 1), (1, 1), (56, 56), 256, "bfloat16", channels_last=True)


def trials(fused: tuple[float, float | None], fault: str = "") -> list[Trial]:
    return [
        Trial("torch", TORCH, launched_ms=3.0, replayed_ms=2.5),
        Trial("plain", PLAIN, launched_ms=2.0, replayed_ms=2.0),
        Trial("fused", FUSED, fault, {}, None if fault else fused[0], None if fault else fused[1]),
    ]


@pytest.mark.parametrize(
    ("fused", "path"),
    [
        ((1.9, 1.9), FUSED),
        ((1.91, 1.0), PLAIN),
        ((1.0, 1.91), PLAIN),
        ((1.9, None), FUSED),
        ((4.0, 4.0), PLAIN),
    ],
    ids=["5 % quicker", "not with launches", "not replayed", "not captured", "slower"],
)
def test_fused_is_taken_where_it_is_five_percent_quicker_launched_and_replayed(
    fused: tuple[float, float | None], path: str
) -> None:
    verdict = judge(trials(fused), batch=256)
    assert verdict.path == path
    assert verdict.batch == 256
    assert ("1.05 times as fast as plain" in verdict.reason) == (path == FUSED)


def test_a_candidate_with_a_fault_is_not_taken_however_quick() -> None:
    verdict = judge(trials((0.1, 0.1), "d_x is off by 0.3, allowed is 0.02"), batch=256)
    assert verdict.path == PLAIN
    assert "1 of 1 candidates were refused" in verdict.reason
    assert "d_x is off by 0.3" in str(verdict)


def test_of_two_quick_candidates_the_quicker_one_is_taken() -> None:
    other = Entry("fused", by_rule(SHAPE)._replace(analysis=by_rule(SHAPE).analysis._replace(stages=2))).encoded()
    found = [*trials((1.5, 1.5)), Trial("fused, other", other, launched_ms=1.4, replayed_ms=1.4)]
    assert judge(found, batch=1).path == other


def test_without_a_baseline_pytorch_computes_it() -> None:
    broken = [Trial("torch", TORCH, "it is out of memory"), Trial("fused", FUSED, launched_ms=1.0)]
    verdict = judge(broken, batch=1)
    assert verdict.path == TORCH
    assert "torch refused: it is out of memory" in verdict.reason


@pytest.mark.parametrize(
    ("ours", "path"),
    [
        (Trial("triton", UPDATE, launched_ms=1.9), UPDATE),
        (Trial("triton", UPDATE, launched_ms=1.95), TORCH),
        (Trial("triton", UPDATE, "two calls gave different bits"), TORCH),
    ],
)
def test_an_update_is_judged_the_same_way(ours: Trial, path: str) -> None:
    assert judge_update([Trial("torch", TORCH, launched_ms=2.0), ours]).path == path


def test_candidates_are_the_baselines_both_paths_and_other_tiles() -> None:
    few, all_of_them = candidates_of(SHAPE, all_tiles=False), candidates_of(SHAPE, all_tiles=True)
    assert [candidate.name for candidate in few] == ["torch", "plain", "cudnn with Triton's correlation", "fused"]
    assert all_of_them[:4] == few
    assert len(all_of_them) > 4
    assert all(candidate.is_ours for candidate in all_of_them[3:])
    assert len({candidate.path for candidate in all_of_them}) == len(all_of_them)


def test_a_batch_class_is_the_least_power_of_two_above() -> None:
    assert [batch_class(n) for n in (1, 2, 3, 64, 65, 256, 300)] == [1, 2, 4, 64, 128, 256, 512]


def test_every_part_of_a_call_and_of_the_flags_is_in_the_key() -> None:
    flags = Flags("tf32", "ieee", benchmark=True, deterministic=False)
    changed = Call(
        channels=32, atoms=32, kernel_size=(1, 1), stride=(2, 2), padding=(0, 0), image_size=(28, 28), batch=512,
        dtype="float16", channels_last=False, n_steps=3, solver="ista", data_term="norm", nonnegative=False,
        has_mu=True, n_dict=2, lam_per_sample=True,
    )  # fmt: skip
    keys = {CALL.key(flags)}
    for name, value in changed._asdict().items():
        keys.add(CALL._replace(**{name: value}).key(flags))
    assert len(keys) == 1 + len(Call._fields)
    single = CALL._replace(dtype="float32")
    others = [flags._replace(**{name: not getattr(flags, name)}) for name in ("benchmark", "deterministic", "enabled")]
    others.append(flags._replace(convolutions="ieee"))
    assert len({single.key(other) for other in [flags, *others]}) == 5
    assert CALL.key(flags) == CALL.key(flags._replace(convolutions="ieee"))  # tf32 concerns fp32 alone


def test_a_key_names_the_driver_and_all_versions() -> None:
    assert {"gpu", "capability", "multiprocessors", "memory_mib", "driver"} <= set(MACHINE)
    assert {"torch", "cuda", "cudnn", "triton", "kernels"} <= set(MACHINE)


def test_the_kernels_sources_are_part_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton_path").mkdir()
    for name in ("triton_path/a.py", "torch_path.py", "reference.py", "step_sizes.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(key, "KERNELS", tmp_path)
    before = key.source_hash.__wrapped__()
    (tmp_path / "triton_path" / "a.py").write_text("x = 2\n")
    assert key.source_hash.__wrapped__() != before


def test_a_table_survives_the_process_and_keeps_figures(tmp_path: Path) -> None:
    verdict = judge(trials((1.5, 1.25)), batch=256)
    Store(tmp_path).add(MACHINE, {"a": verdict})
    assert Store(tmp_path).load(MACHINE) == {"a": verdict}
    assert "fused 1.500 ms (1.250 ms replayed)" in str(Store(tmp_path).load(MACHINE)["a"])


@pytest.mark.parametrize("fact", sorted(MACHINE))
def test_a_verdict_of_a_machine_with_another_fact_is_not_used(fact: str, tmp_path: Path) -> None:
    other = MACHINE | {fact: "another"}
    Store(tmp_path).add(other, {"a": Verdict(TORCH, "a reason")})
    assert Store(tmp_path).load(MACHINE) == {}
    written = Store(tmp_path).file_of(other)
    mine = Store(tmp_path).file_of(MACHINE)
    assert written is not None
    assert mine is not None
    mine.write_bytes(written.read_bytes())  # a copied file still says what machine it is of
    assert Store(tmp_path).load(MACHINE) == {}


def test_a_table_shipped_with_the_package_needs_the_same_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "SHIPPED", tmp_path / "tables")
    (tmp_path / "tables").mkdir()
    table = {"a": Verdict(TORCH, "shipped").encoded()}
    (tmp_path / "tables" / f"{key.digest(MACHINE)}.json").write_text(
        json.dumps({"machine": MACHINE, "verdicts": table})
    )
    store = Store(tmp_path / "cache")
    assert store.load(MACHINE)["a"].reason == "shipped"
    assert store.load(MACHINE | {"driver": "1.2"}) == {}
    store.add(MACHINE, {"a": Verdict(PLAIN, "measured here")})
    assert Store(tmp_path / "cache").load(MACHINE)["a"].reason == "measured here"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"machine": {}}',
        '{"machine": %s, "verdicts": {"a": 1}}',
        '{"machine": %s, "verdicts": {"a": {"path": "/bin/sh", "reason": "", "trials": []}}}',
        '{"machine": %s, "verdicts": {"a": {"path": "torch", "reason": "", "trials": [], "date": "yesterday"}}}',
        r'{"machine": %s, "verdicts": {"a": {"path": "[\"fused\", {}, {}, {}]", "reason": "", "trials": []}}}',
        r'{"machine": %s, "verdicts": {"a": {"path": "[\"quick\"]", "reason": "", "trials": []}}}',
    ],
    ids=range(9),
)
def test_a_damaged_table_is_ignored_with_a_warning_and_replaced(text: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    file = store.file_of(MACHINE)
    assert file is not None
    file.parent.mkdir()
    file.write_text(text % json.dumps(MACHINE) if "%" in text else text)
    if "machine" in text and "%" not in text:
        assert store.load(MACHINE) == {}  # a table of another machine
    else:
        with pytest.warns(UserWarning, match="cannot be read and are ignored"):
            assert store.load(MACHINE) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store.add(MACHINE, {"b": Verdict(TORCH, "a reason")})
    assert list(store.load(MACHINE)) == ["b"]


def add_many(folder: Path, name: str) -> None:
    for number in range(20):
        Store(folder).add(MACHINE, {f"{name}{number}": Verdict(TORCH, "a reason")})


def test_two_processes_at_once_keep_each_others_verdicts(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_many, args=(tmp_path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(Store(tmp_path).load(MACHINE)) == 40
    assert {file.suffix for file in (tmp_path / "verdicts").iterdir()} == {".json", ".lock"}


def write_on_full_disk(folder: Path, answers: "multiprocessing.SimpleQueue[str]") -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    store = Store(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(2):
            store.add(MACHINE, {f"late{number}": Verdict(TORCH, "x" * 1000)})
    answers.put(f"{len(caught)} {sorted(store.load(MACHINE))} {store.complaint}")


def test_on_a_full_disk_the_old_table_stays_and_verdicts_are_kept_in_memory(tmp_path: Path) -> None:
    Store(tmp_path).add(MACHINE, {"early": Verdict(TORCH, "a reason")})
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=write_on_full_disk, args=(tmp_path, answers))
    process.start()
    process.join()
    answer = answers.get()
    assert answer.startswith("1 ['early', 'late0', 'late1']")
    assert "cannot be written (File too large), so the verdicts are kept in memory" in answer
    assert list(Store(tmp_path).load(MACHINE)) == ["early"]
    assert not list((tmp_path / "verdicts").glob(".*"))


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match=r"cannot be written \(Not a directory\)"):
        store.add(MACHINE, {"a": Verdict(TORCH, "a reason")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.add(MACHINE, {"b": Verdict(TORCH, "a reason")})
        assert set(store.load(MACHINE)) == {"a", "b"}


def test_the_folder_is_the_argument_the_variable_or_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDNET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert verdicts.cache_folder() == Path("/somewhere/sdnet")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification tells to ignore
    monkeypatch.setenv("HOME", "/elsewhere")
    assert verdicts.cache_folder() == Path("/elsewhere/.cache/sdnet")
    monkeypatch.setenv("SDNET_CACHE", "/named")
    assert verdicts.cache_folder() == Path("/named")
    monkeypatch.setenv("SDNET_CACHE", "~nobody-of-this-name/cache")  # a shell leaves it as it is too
    assert verdicts.cache_folder() == Path("~nobody-of-this-name/cache")
    assert verdicts.cache_folder("given") == Path("given")


@pytest.mark.parametrize(
    ("ago", "words"),
    [(timedelta(0), "just now"), (timedelta(minutes=61), "1 hour ago"), (timedelta(days=3, hours=5), "3 days ago")],
)
def test_the_age_of_a_verdict_in_words(ago: timedelta, words: str) -> None:
    assert Verdict(TORCH, "a reason", date=(datetime.now(UTC) - ago).isoformat()).age == words
