"""Broken pictures are found before a run, listed, and left out only when asked; one may also break during a run."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from sdnet.train.data.check import check_images
from sdnet.train.data.dali import DaliLoader, open_pictures
from sdnet.train.data.folder import read_image_folder
from sdnet.train.data.loader import Rank
from sdnet.train.data.sources import read_checked, read_pictures
from sdnet.train.errors import DataError, UserError
from sdnet.train.job import Job, Verify
from sdnet.train.recipes import demo
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Verdicts are remembered in the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sdnet"


BROKEN = {
    "empty.jpg": "is empty",
    "truncated.jpg": "is truncated",
    "header.jpg": "is truncated",
    "text.jpg": "is not a picture",
    "gif.jpg": "is not a picture",
    "header.png": "is not a picture",
    "half.png": "is truncated",
}


@pytest.fixture
def tree(make_tree: MakeTree) -> Path:
    """Two classes of six good pictures and one of each bad file in the first."""
    root = make_tree([6, 6], [2, 2])
    folder = root / "train/class 00"
    good = (folder / "000.jpg").read_bytes()
    with Image.open(folder / "000.jpg") as picture:
        picture.save(folder / "good.png")
        picture.save(folder / "gif.gif")
    (folder / "gif.gif").rename(folder / "gif.jpg")
    png = (folder / "good.png").read_bytes()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "truncated.jpg").write_bytes(good[: len(good) // 2])
    (folder / "header.jpg").write_bytes(good[:100])
    (folder / "text.jpg").write_text("not a picture\n" * 50)
    (folder / "header.png").write_bytes(png[:30])
    (folder / "half.png").write_bytes(png[: len(png) // 2])
    return root


@pytest.mark.parametrize("verify", ["header", "full"])
def test_one_of_each_bad_file_is_named_with_its_reason(tree: Path, verify: Verify) -> None:
    found = {Path(bad.name).name: bad.reason for bad in check_images(read_image_folder(tree)[0], verify, 2)}
    assert found == BROKEN


def test_scrambled_pixels_are_found_by_a_full_check_alone(tree: Path) -> None:
    file = tree / "train/class 01/003.jpg"
    data = file.read_bytes()
    file.write_bytes(data[:20] + bytes(len(data) - 40) + data[-20:])
    names = {
        verify: [bad.name for bad in check_images(read_image_folder(tree)[0], verify, 1)]
        for verify in ("header", "full")
    }
    assert str(file) not in names["header"]
    assert str(file) in names["full"]


def test_by_default_a_run_does_not_start(tree: Path) -> None:
    with pytest.raises(UserError, match=f"{len(BROKEN)} of the files .*--bad-files skip") as caught:
        read_checked(tree)
    assert all(name in str(caught.value) for name in BROKEN)


def test_skipping_lists_what_is_left_out_in_the_run_folder(tree: Path, tmp_path: Path) -> None:
    (tree / "train/class 01/.hidden.jpg").write_bytes(b"")
    (tree / "train/class 01/nested").mkdir()
    (tree / "train/loose.jpg").write_bytes(b"")
    run = RunFolder(tmp_path / "run")
    recipe = demo()
    small = recipe.__class__(model="resnet18", image_size=32, eval_resize=32, epochs=1, batch=4, lr=0.01)
    job = Job(small, tree, run, False, 1, 1, bad_files="skip")
    Trainer(job, open_pictures).train()
    left_out = [line.split("\t") for line in (run.path / "left_out.tsv").read_text().splitlines()]
    assert {Path(file).name for file, _ in left_out} == {*BROKEN, ".hidden.jpg", "nested", "loose.jpg"}
    assert all(reason for _, reason in left_out)


def test_links_to_nothing_are_listed_like_broken_images(make_tree: MakeTree, tmp_path: Path) -> None:
    """Whole classes too, in both splits: they may lie on a disk that is not mounted."""
    root = make_tree([3, 3], [2, 2])
    away = tmp_path / "not mounted"
    for split in ("train", "val"):
        (root / split / "class 02").symlink_to(away / "class 02")
    (root / "train/class 00/001.jpg").unlink()
    (root / "train/class 00/001.jpg").symlink_to(away / "001.jpg")
    (root / "train/class 01/circle.jpg").symlink_to("circle.jpg")
    (root / "train/class 01/notes.txt").symlink_to(away / "notes.txt")  # no image: of no interest
    lost = {root / "train/class 02", root / "val/class 02"}
    images = {root / "train/class 00/001.jpg", root / "train/class 01/circle.jpg"}
    with pytest.raises(UserError, match=r"4 of the files in .* cannot be used") as caught:
        read_checked(root)
    assert all(f"  {path} is a link whose target is missing" in str(caught.value) for path in lost | images)
    with pytest.raises(UserError, match=r"2 of the files in .* cannot be used"):
        read_pictures(root)
    checked = read_checked(root, bad_files="skip")
    listed = {Path(name) for name, reason in checked.left_out if reason == "is a link whose target is missing"}
    assert listed == lost | images
    assert list(checked.train.labels) == [0, 0, 1, 1, 1]
    for file in (root / "train/class 00").glob("*.jpg"):
        file.unlink()
        file.symlink_to(away / file.name)
    with pytest.raises(UserError, match="None of the images of class class 00"):
        read_checked(root, bad_files="skip")


def test_a_class_that_one_split_lacks_because_of_a_link(make_tree: MakeTree, tmp_path: Path) -> None:
    root = make_tree([3, 3], [2, 2])
    shutil.rmtree(root / "val/class 01")
    (root / "val/class 01").symlink_to(tmp_path / "not mounted")
    with pytest.raises(UserError, match=r"only in train: class 01; .*val/class 01 is a link whose target is missing"):
        read_checked(root)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("two\nlines.jpg", r"two\nlines.jpg"),
        ("tab\there.jpg", r"tab\there.jpg"),
        ("caf\udce9.jpg", r"caf\xe9.jpg"),
        ("back\\slash.jpg", r"back\\slash.jpg"),
        ("café.jpg", "café.jpg"),
    ],
)
@pytest.mark.parametrize("use", ["broken", "ignored"])
def test_any_file_name_stands_on_a_line_of_its_own(
    make_tree: MakeTree, tmp_path: Path, name: str, written: str, use: str
) -> None:
    root = make_tree([3], [1])
    file = root / "train/class 00" / (name if use == "broken" else f"{name}.txt")
    file.write_bytes(b"no image")
    if use == "broken":
        with pytest.raises(UserError) as caught:
            read_checked(root)
        assert len(str(caught.value).splitlines()) == 2
        str(caught.value).encode()
    checked = read_checked(root, bad_files="skip")
    assert all(note.isprintable() for note in checked.notes)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.note_left_out(checked.left_out)
    ((listed, reason),) = [line.split("\t") for line in (run.path / "left_out.tsv").read_text().splitlines()]
    assert reason.startswith("is not")
    assert Path(listed).name == file.name.replace(name, written)


def test_an_image_that_dali_alone_cannot_decode_is_named_during_a_run(make_tree: MakeTree) -> None:
    """The check before the run refuses such kinds; here none was made."""
    root = make_tree([7], [1])
    file = root / "train/class 00/black and white.tif"
    with Image.open(root / "train/class 00/000.jpg") as image:
        image.convert("1").save(file)
    loader = DaliLoader(read_image_folder(root)[0], batch=4, size=32, augment=True, threads=1)
    with pytest.raises(DataError, match=f"The image {file} broke during the run: it is a TIFF file of a kind"):
        list(loader)
    good, bad = (root / f"train/class 00/{name}" for name in ("000.jpg", "black and white.tif"))
    assert loader._why_not_decoded(good.read_bytes()) is None
    assert loader._why_not_decoded(bad.read_bytes()) == "cannot be decoded by DALI"
    loader.close()


def test_a_class_of_bad_pictures_alone(tree: Path) -> None:
    for file in (tree / "train/class 01").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="None of the images of class class 01"):
        read_checked(tree, bad_files="skip")


def test_verdicts_are_remembered_until_a_file_changes(tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = read_image_folder(tree)[0]
    found = check_images(images, "full", 1)
    monkeypatch.setattr("sdnet.train.data.check.inspect", lambda *_: pytest.fail("looked again"))
    assert check_images(images, "full", 1) == check_images(images, "header", 1) == found
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    (tree / "train/class 01/000.jpg").write_bytes(b"")
    assert len(check_images(images, "header", 1)) == len(found) + 1
    for file in cache.iterdir():
        file.write_text("{broken")
    assert len(check_images(images, "header", 1)) == len(found) + 1


def test_a_link_whose_target_cannot_be_read_says_why(make_tree: MakeTree) -> None:
    root = make_tree([2], [1])
    (root / "train/class 00/001.jpg").unlink()
    (root / "train/class 00/001.jpg").symlink_to("x" * 300)
    (bad,) = check_images(read_image_folder(root)[0], "full", 1)
    assert bad.reason == "cannot be read: File name too long"


def test_a_fifo_does_not_stop_the_check(make_tree: MakeTree) -> None:
    root = make_tree([2], [1])
    images = read_image_folder(root)[0]
    (root / "train/class 00/001.jpg").unlink()
    os.mkfifo(root / "train/class 00/001.jpg")
    (bad,) = check_images(images, "full", 1)
    assert bad.reason == "is not a regular file"


@pytest.mark.parametrize("breaks", ["deleted", "text", "empty", "header"])
def test_a_file_that_breaks_during_an_epoch_is_named(make_tree: MakeTree, breaks: str) -> None:
    train, _ = read_image_folder(make_tree([60], [1]))
    loader = DaliLoader(train, batch=2, size=32, augment=True, threads=1)
    iterator = iter(loader)
    next(iterator)
    victim = train.where(int(loader._batches()[25][1])).path
    if breaks == "deleted":
        victim.unlink()
    else:
        victim.write_bytes({"text": b"no picture" * 20, "empty": b"", "header": victim.read_bytes()[:100]}[breaks])
    with pytest.raises(DataError, match=str(victim)):
        list(iterator)
    loader.close()


def test_a_broken_file_during_a_run_leaves_the_checkpoint(
    make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_tree([40], [2])
    small = demo().__class__(model="resnet18", image_size=32, eval_resize=32, epochs=3, batch=2, lr=0.01)
    trainer = Trainer(Job(small, root, RunFolder(tmp_path / "run"), False, 1, 1), open_pictures)
    finish = trainer._finish_epoch

    def finish_and_break() -> None:
        finish()
        (root / "train/class 00/017.jpg").unlink()

    monkeypatch.setattr(trainer, "_finish_epoch", finish_and_break)
    with pytest.raises(DataError, match=r"017\.jpg cannot be read: No such file"):
        trainer.train()
    assert trainer.run.checkpoint_file.is_file()
    assert len(trainer.run.metrics()) == 1


def test_more_ranks_than_pictures_and_a_single_picture(make_tree: MakeTree) -> None:
    train, val = read_image_folder(make_tree([1], [1]))
    with pytest.raises(UserError, match="1 images, fewer than the 2 processes"):
        DaliLoader(train, batch=1, size=32, augment=True, rank=Rank(0, 2))
    for images, augment in ((train, True), (val, False)):
        loader = DaliLoader(images, batch=1, size=32, resize=32, augment=augment, threads=1)
        assert [len(labels) for _, labels in loader] == [1]
