"""Shards of a folder: the same pictures, in any order, whole or not at all."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from PIL import Image

from sdnet.train.data import shard_writer
from sdnet.train.data.dali import DaliLoader
from sdnet.train.data.folder import ImageSet, read_image_folder
from sdnet.train.data.shard_writer import shrink
from sdnet.train.data.shards import read_shards
from sdnet.train.data.sources import read_pictures
from sdnet.train.errors import UserError
from sdnet.train.prepare import main, prepare

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]

COMMAND = [sys.executable, "-m", "sdnet.train.prepare"]


def quiet(source: Path, out: Path, **options) -> dict:
    return prepare(source, out, say=lambda _: None, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def pixels(images: ImageSet, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(DaliLoader(images, **{"batch": 4, "size": 32, "resize": 36, "augment": True, "threads": 1} | options))


@pytest.fixture
def tree(make_tree: MakeTree) -> Path:
    return make_tree([9, 8, 6], [3, 2, 2])


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_and_manifest_say_the_same(tree: Path, tmp_path: Path, workers: int) -> None:
    manifest = quiet(tree, tmp_path / "out", shards=3, workers=workers)
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["classes"] == ["class 00", "class 01", "class 02"]
    assert manifest["splits"]["train"]["classes"] == {"class 00": 9, "class 01": 8, "class 02": 6}
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    assert [shard["file"] for shard in shards] == [f"train-0000{n}.tar" for n in range(3)] + ["val-00000.tar"]
    for shard in shards:
        data = (tmp_path / "out" / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".tar", ".idx", ".json"}


def test_pictures_that_are_small_enough_keep_their_bytes_and_give_the_folders_batches(
    tree: Path, tmp_path: Path
) -> None:
    quiet(tree, tmp_path / "out", shards=3)
    for folder, shards in zip(read_image_folder(tree), read_shards(tmp_path / "out"), strict=True):
        assert shards.classes == folder.classes
        assert list(shards.labels) == list(folder.labels)
        assert all(shards.where(at).read() == folder.where(at).read() for at in range(len(folder)))
        for augment in (True, False):
            for one, two in zip(pixels(folder, augment=augment), pixels(shards, augment=augment), strict=True):
                assert all(map(torch.equal, one, two))


def test_dalis_own_reader_takes_the_shards_and_their_indices(tree: Path, tmp_path: Path) -> None:
    quiet(tree, tmp_path / "out", shards=2)
    tars = sorted(map(str, (tmp_path / "out").glob("train-*.tar")))

    @pipeline_def(batch_size=23, num_threads=1)
    def read() -> Any:
        reader: Any = fn.readers.webdataset
        return tuple(reader(paths=tars, index_paths=[tar[:-3] + "idx" for tar in tars], ext=["jpg", "cls"]))

    pipeline: Any = read()
    pictures, labels = pipeline.run()
    stored = {bytes(np.array(pictures.at(at))): int(bytes(np.array(labels.at(at)))) for at in range(23)}
    train, _ = read_image_folder(tree)
    assert stored == {train.where(at).read(): train.labels[at] for at in range(23)}


def test_shards_of_other_origin_need_neither_manifest_nor_index(tree: Path, tmp_path: Path) -> None:
    quiet(tree, tmp_path / "out", shards=2)
    known = read_shards(tmp_path / "out")
    for path in [tmp_path / "out/manifest.json", *(tmp_path / "out").glob("*-00000.idx")]:
        path.unlink()
    for ours, theirs in zip(known, read_shards(tmp_path / "out"), strict=True):
        pairs = [
            sorted((images.where(at).read(), images.labels[at]) for at in range(len(images)))
            for images in (ours, theirs)
        ]
        assert pairs[0] == pairs[1]
        assert theirs.classes == ("0", "1", "2")


def test_shrinks_the_shorter_side_and_never_enlarges() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    out = BytesIO()
    Image.fromarray(noise).save(out, "JPEG", quality=95)
    data = out.getvalue()
    for size, expected in ((60, (80, 60)), (89, (119, 89)), (90, (120, 90)), (400, (120, 90)), (0, (120, 90))):
        stored, suffix = shrink(data, size, 90)
        with Image.open(BytesIO(stored)) as picture:
            assert picture.size == expected
        assert (stored == data) == (expected == (120, 90))
        assert suffix == "jpg"


def test_shards_that_are_older_than_their_source_are_named(tree: Path, tmp_path: Path) -> None:
    said: list[str] = []
    quiet(tree, tmp_path / "out")
    prepare(tree, tmp_path / "out", say=said.append)
    assert said == [f"Already there: {tmp_path / 'out'}"]
    repaired = tree / "val/class 01/001.jpg"
    after = (tmp_path / "out/manifest.json").stat().st_mtime + 1
    os.utime(repaired, (after, after))
    prepare(tree, tmp_path / "out", say=said.append)
    assert said[2] == f"{repaired} was written after the shards: remove {tmp_path / 'out'} to make them again."


def test_a_class_whose_pictures_are_all_broken_is_refused(tree: Path, tmp_path: Path) -> None:
    for file in (tree / "train/class 01").iterdir():
        file.write_text("text")
    with pytest.raises(UserError, match=r"None of the images of class class 01 in .*train can be used"):
        quiet(tree, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def test_two_programs_do_not_write_into_one_folder(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"out/\.prepare is in use by process {os.getpid()} on "):
        prepare(tree, tmp_path / "out", say=lambda _: quiet(tree, tmp_path / "out"))
    assert quiet(tree, tmp_path / "out")["splits"]["train"]["pictures"] == 23, "the lock ended with the first one"
    assert not (tmp_path / "out/.prepare").exists()


def test_bad_pictures_are_left_out_and_listed(tree: Path, tmp_path: Path) -> None:
    (tree / "train/class 00/002.jpg").write_bytes(b"")
    (tree / "train/class 01/003.jpg").write_text("text")
    (tree / "train/class 01/notes.txt").write_text("text")
    facts = quiet(tree, tmp_path / "out")["splits"]["train"]
    assert facts["pictures"] == 21
    assert facts["classes"] == {"class 00": 8, "class 01": 7, "class 02": 6}
    assert {entry["file"]: entry["reason"][:8] for entry in facts["skipped"]} == {
        "class 00/002.jpg": "is empty",
        "class 01/003.jpg": "is not a",
        "class 01/notes.txt": "is not u",
    }
    assert len(read_shards(tmp_path / "out")[0]) == 21


def test_links_are_not_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    shutil.copy(tree / "train/class 00/000.jpg", tmp_path / "outside/secret.jpg")
    (tree / "train/class 00/link.jpg").symlink_to(tmp_path / "outside/secret.jpg")
    skipped = quiet(tree, tmp_path / "out")["splits"]["train"]["skipped"]
    assert skipped == [{"file": "class 00/link.jpg", "reason": "is a link or a device, not a file"}]
    for split in ("train", "val"):
        (tree / split / "class 99").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="class 99 leads out of"):
        quiet(tree, tmp_path / "other")


def test_a_single_picture(make_tree: MakeTree, tmp_path: Path) -> None:
    manifest = quiet(make_tree([1], [1]), tmp_path / "out", shards=5)
    assert [len(split["shards"]) for split in manifest["splits"].values()] == [1, 1]
    assert [len(images) for images in read_shards(tmp_path / "out")] == [1, 1]


def test_a_class_folder_without_pictures(tree: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tree / split / "empty").mkdir()
    with pytest.raises(UserError, match=r"class folder .*empty has no images"):
        quiet(tree, tmp_path / "out")


def test_an_interrupted_preparation_ends_with_the_same_bytes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quiet(tree, tmp_path / "whole", shards=4)
    written = []

    def stop_at_the_second(*arguments: Any) -> Any:
        written.append(arguments)
        if len(written) == 10:
            signal.raise_signal(signal.SIGTERM)
        return shrink(*arguments)

    monkeypatch.setattr(shard_writer, "shrink", stop_at_the_second)
    with pytest.raises(SystemExit) as stopped:
        quiet(tree, tmp_path / "out", shards=4)
    assert stopped.value.code == 128 + signal.SIGTERM
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"train-00000.tar", "train-00000.idx", ".prepare"}
    with pytest.raises(UserError, match="not finished: run the same"):
        read_pictures(tmp_path / "out")
    with pytest.raises(UserError, match="made otherwise; size: 30, not 400"):
        quiet(tree, tmp_path / "out", shards=4, size=30)
    written.clear()
    monkeypatch.setattr(shard_writer, "shrink", lambda *arguments: written.append(1) or shrink(*arguments))
    assert quiet(tree, tmp_path / "out", shards=4) == whole
    assert len(written) == 30 - 6
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    written.clear()
    assert quiet(tree, tmp_path / "out", shards=4) == whole
    assert not written


def test_sigterm_to_a_preparation_with_workers(make_tree: MakeTree, tmp_path: Path) -> None:
    tree, out = make_tree([400], [4]), tmp_path / "out"
    command = [*COMMAND, "--data", tree, "--out", out, "--size", "20", "--shards", "40", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not list(out.glob("train-*.tar")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "run the same command again to finish" in said
    assert not list(out.glob(".*.tmp"))
    assert 0 < len(list(out.glob("train-*.tar"))) < 40
    assert quiet(tree, out, size=20, shards=40) == quiet(tree, tmp_path / "whole", size=20, shards=40)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs more rights than these tests have")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(tree: Path, small_disk: Path) -> None:
    with pytest.raises(UserError, match=r"No space left on device\. Finished shards are kept"):
        quiet(tree, small_disk / "out", shards=12)
    assert not list((small_disk / "out").glob("*.tmp"))
    assert not (small_disk / "out/manifest.json").exists()
    for tar in (small_disk / "out").glob("*.tar"):
        assert tar.with_suffix(".idx").is_file()
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    assert quiet(tree, small_disk / "out", shards=12)["splits"]["train"]["pictures"] == 23


def test_a_limit_on_files(tree: Path, tmp_path: Path) -> None:
    """Where mounting is forbidden: writing fails in the midst of a shard just as on a full disk."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, former[1]))
        with pytest.raises(UserError, match=r"File too large\. Finished shards are kept"):
            quiet(tree, tmp_path / "out", shards=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".prepare"]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda out: (out / "train-00001.tar").unlink(), r"shard .*train-00001\.tar is missing"),
        (lambda out: os.truncate(out / "train-00001.tar", 1024), "has 1024 bytes instead of the"),
        (lambda out: (out / "manifest.json").write_text("{"), "manifest .* is broken"),
        (lambda out: (out / "manifest.json").write_text('{"version": 9}'), "not written by this version"),
        (
            lambda out: (out / "train-00000.idx").write_text("v1.2 1\njpg 1 2\n"),
            r"0\.idx is broken: a line has 3 fields",
        ),
        (
            lambda out: (out / "train-00000.idx").write_text("nonsense\n"),
            r"0\.idx is broken: it should begin",
        ),
        (
            lambda out: (out / "train-00000.idx").write_text("v1.2 1\njpg 512 99999999 c/0.jpg cls 0 1 c/0.cls\n"),
            r"train-00000\.idx does not fit its tar",
        ),
    ],
)
def test_spoilt_shards_are_refused(tree: Path, tmp_path: Path, spoil: Callable[[Path], object], sentence: str) -> None:
    quiet(tree, tmp_path / "out", shards=2)
    spoil(tmp_path / "out")
    with pytest.raises(UserError, match=sentence):
        read_pictures(tmp_path / "out")


def test_wrong_arguments(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="choose a folder outside of it"):
        quiet(tree, tree / "out")
    with pytest.raises(UserError, match="holds something else"):
        quiet(tree, tree.parent)
    with pytest.raises(UserError, match="workers is 0; it must be between 1 and 1024"):
        quiet(tree, tmp_path / "out", workers=0)
    with pytest.raises(SystemExit, match="quality is 101; it must be between 1 and 100"):
        main(["--data", str(tree), "--out", str(tmp_path / "out"), "--quality", "101"])
    with pytest.raises(SystemExit, match="does not exist"):
        main(["--data", str(tmp_path / "no"), "--out", str(tmp_path / "out")])
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(SystemExit, match="circle does not exist"):
        main(["--data", str(tmp_path / "circle"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="circle cannot be written: "):
        main(["--data", str(tree), "--out", str(tmp_path / "circle")])
    with pytest.raises(SystemExit, match="--out is empty; it must be a path"):
        main(["--data", str(tree), "--out", ""])
    with pytest.raises(SystemExit, match="File name too long"):
        main(["--data", str(tree), "--out", str(tmp_path / ("x" * 300))])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bytes": 1}'])
def test_a_damaged_record_is_made_again_and_a_damaged_plan_is_named(tree: Path, tmp_path: Path, text: str) -> None:
    whole, out = quiet(tree, tmp_path / "whole", shards=2), tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    (out / "manifest.json").unlink()
    (out / ".prepare").mkdir()
    (out / ".prepare/plan.json").write_text(json.dumps(whole["plan"]))
    (out / ".prepare/train-00000.json").write_text(text)
    assert quiet(tree, out, shards=2) == whole
    assert contents(out) == contents(tmp_path / "whole")
    (out / "manifest.json").unlink()
    (out / ".prepare").mkdir()
    (out / ".prepare/plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json is damaged; remove .*\.prepare, |holds shards that were made oth"):
        quiet(tree, out, shards=2)


def test_the_command_reports_its_output(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "val/class 00/001.jpg").write_bytes(b"")
    main(["--data", str(tree), "--out", str(tmp_path / "out"), "--workers", "1", "--size", "20"])
    said = capsys.readouterr().out
    assert "train: 23 images, 23 of them shrunk, in 1 shards; 0 left out" in said
    assert "val: 6 images, 6 of them shrunk, in 1 shards; 1 left out\n  class 00/001.jpg is empty" in said
