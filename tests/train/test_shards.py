"""Shards of any origin: labels, damaged tars, and indices that do not fit their tars."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sdnet.train.data.archives import Member
from sdnet.train.data.shard_index import index_line, read_samples
from sdnet.train.data.shards import read_shards
from sdnet.train.data.sources import read_checked, read_pictures
from sdnet.train.errors import UserError
from sdnet.train.prepare import prepare

Files = Sequence[tuple[str, bytes]]
MakeTree = Callable[[Sequence[int], Sequence[int]], Path]


@pytest.fixture
def jpeg(make_tree: MakeTree) -> bytes:
    return (make_tree([1], [1]) / "train/class 00/000.jpg").read_bytes()


def pack(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(jpeg: bytes, labels: Sequence[int | str], begin: int = 0) -> list[tuple[str, bytes]]:
    """A sample for each label; comments after the end of a JPEG tell them apart."""
    return [
        file
        for number, label in enumerate(labels, begin)
        for file in (
            (f"{number:04}.jpg", jpeg[:-2] + b"\xff\xfe\0\x06%04d" % number + jpeg[-2:]),
            (f"{number:04}.cls", str(label).encode()),
        )
    ]


def shards(root: Path, jpeg: bytes, train: Sequence[int | str], val: Sequence[int | str]) -> Path:
    root.mkdir()
    pack(root / "train-0.tar", samples(jpeg, train))
    pack(root / "val-0.tar", samples(jpeg, val))
    return root


@pytest.mark.parametrize(
    ("train", "val", "sentence"),
    [
        ([1, 2, 3], [1, 2, 3], "training shards in .* run from 1 to 3 without 0: they must count from 0"),
        ([0, 1, 3], [0, 1, 3], "run from 0 to 3 without 2"),
        ([0, 5], [0], "run from 0 to 5 without 1"),
        ([0, 1], [0, 1, 2], "validation shards in .* have the label 2, which the training shards do not have"),
        ([0, 1], [7], "have the label 7"),
        ([0, -1], [0], r"0001\.cls in .* is no class number: b'-1'"),
        ([0, "1_0"], [0], "is no class number: b'1_0'"),
        ([0, ""], [0], "is no class number: b''"),
        ([0, "cat"], [0], "is no class number: b'cat'"),
        ([0, 10**9], [0], "is no class number"),
    ],
)
def test_labels_that_would_make_classes_without_images_are_refused(
    tmp_path: Path, jpeg: bytes, train: list[int | str], val: list[int | str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        read_shards(shards(tmp_path / "shards", jpeg, train, val))


def test_labels_from_0(tmp_path: Path, jpeg: bytes) -> None:
    train, val = read_pictures(shards(tmp_path / "shards", jpeg, [2, 0, "1\n"], [1]))
    assert (train.classes, list(train.labels), list(val.labels)) == (("0", "1", "2"), [2, 0, 1], [1])


def damage(path: Path, kind: str, jpeg: bytes) -> None:
    """Spoil a shard of the samples 0 to 3: sample 1 or what follows it is lost, or stored twice."""
    files = samples(jpeg, [0, 1, 0, 1])
    data = bytearray(path.read_bytes())
    header = data.index(b"0001.jpg")
    if kind == "hole":
        data[header : header + 512] = bytes(512)
    elif kind == "garbage":
        data[header : header + 512] = b"\xff" * 512
    elif kind == "hole to the end":
        data[header:] = bytes(len(data) - header)
        data += bytes(20_480)
    elif kind == "truncated":
        del data[header:]
    elif kind == "truncated in an image":
        del data[header + 600 :]
    elif kind == "twice":
        data = bytearray(pack(path, [*files, *files[2:4]]).read_bytes())
    elif kind == "image without a label":
        data = bytearray(pack(path, [*files[:3], *files[4:]]).read_bytes())
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "flaw", "kept"),
    [
        ("hole", "is damaged from byte", [0, 2, 3]),
        ("garbage", "is damaged from byte", [0, 2, 3]),
        ("hole to the end", "holds nothing but zeros from byte", [0]),
        ("truncated", "breaks off at byte", [0]),
        ("truncated in an image", "breaks off at byte", [0]),
        ("twice", "0001.jpg is replaced by a later copy", [0, 2, 3, 1]),
        ("image without a label", "0001.jpg belongs to a sample that is not one image and one .cls", [0, 2, 3]),
    ],
)
@pytest.mark.parametrize("indexed", [False, True], ids=["no index", "old index"])
def test_a_damaged_shard_is_refused_or_its_loss_is_listed(
    tmp_path: Path, jpeg: bytes, kind: str, flaw: str, kept: list[int], indexed: bool
) -> None:
    root = shards(tmp_path / "shards", jpeg, [0, 1, 0, 1], [0])
    pack(root / "train-1.tar", samples(jpeg, [0, 1], 10))
    if indexed:
        write_index(root / "train-0.tar")
    damage(root / "train-0.tar", kind, jpeg)
    for read in (read_pictures, read_checked):
        with pytest.raises(UserError, match=f"(?s)--bad-files skip.*{flaw}"):
            read(root)
    checked = read_checked(root, bad_files="skip")
    numbers = [checked.train.where(at).read()[-6:-2] for at in range(len(checked.train))]
    assert numbers == [b"%04d" % number for number in [*kept, 10, 11]]
    assert any(flaw in f"{name} {reason}" for name, reason in checked.left_out)


def write_index(tar: Path) -> None:
    found = read_samples(tar)
    assert not found.lost
    members = zip(found.images, found.labels, found.places.tolist(), strict=True)
    lines = [index_line(Member(image, *place[:2]), Member(label, *place[2:])) for image, label, place in members]
    tar.with_suffix(".idx").write_text(f"v1.2 {len(lines)}\n" + "".join(lines))


REWRITTEN = {
    "more samples": lambda jpeg: samples(jpeg, [0, 1, 0, 1, 1]),
    "one sample more in front": lambda jpeg: [*samples(jpeg, [1], 9), *samples(jpeg, [0, 1, 0, 1])],
    "another order": lambda jpeg: [*samples(jpeg, [0, 1], 2), *samples(jpeg, [0, 1])],
    "other names": lambda jpeg: samples(jpeg, [0, 1, 0, 1], 4),
    "other sizes": lambda jpeg: samples(jpeg[:-2] + b"\xff\xfe\0\x04ab" + jpeg[-2:], [0, 1, 0, 1]),
    "another sample in the middle": lambda jpeg: [
        *samples(jpeg, [0, 1]),
        *samples(jpeg, [1], 7),
        *samples(jpeg, [0, 1], 2),
    ],
}


@pytest.mark.parametrize("rewritten", REWRITTEN)
def test_an_index_that_is_older_than_its_tar_is_found(tmp_path: Path, jpeg: bytes, rewritten: str) -> None:
    root = shards(tmp_path / "shards", jpeg, [0, 1, 0, 1], [0])
    write_index(root / "train-0.tar")
    assert len(read_pictures(root)[0]) == 4
    files = REWRITTEN[rewritten](jpeg)
    pack(root / "train-0.tar", files)
    with pytest.raises(UserError, match=r"train-0\.idx does not fit its tar; it is not used"):
        read_checked(root)
    checked = read_checked(root, bad_files="skip")
    assert [checked.train.where(at).read() for at in range(len(checked.train))] == [data for _, data in files[::2]]
    assert list(checked.train.labels) == [int(data) for _, data in files[1::2]]
    assert [name for name, _ in checked.left_out] == [str(root / "train-0.idx")]


def test_an_index_that_gives_images_the_labels_of_others_is_not_used(tmp_path: Path, jpeg: bytes) -> None:
    root = shards(tmp_path / "shards", jpeg, [0, 1], [0])
    found = read_samples(root / "train-0.tar")
    members = [
        (Member(image, *place[:2]), Member(label, *place[2:]))
        for image, label, place in zip(found.images, found.labels, found.places.tolist(), strict=True)
    ]
    (one, its), (other, others) = members
    (root / "train-0.idx").write_text("v1.2 2\n" + index_line(one, others) + index_line(other, its))
    sentence = r"train-0\.idx is broken: a line joins 0000\.jpg and 0001\.cls, which are of two samples"
    with pytest.raises(UserError, match=sentence):
        read_checked(root)
    assert list(read_checked(root, bad_files="skip").train.labels) == [0, 1]


def test_labels_in_capital_letters_and_samples_without_one(tmp_path: Path, jpeg: bytes) -> None:
    root = shards(tmp_path / "shards", jpeg, [0, 1], [0, 1])
    pack(root / "train-0.tar", [(name.upper(), data) for name, data in samples(jpeg, [0, 1])])
    assert list(read_checked(root).train.labels) == [0, 1]
    pack(root / "train-0.tar", samples(jpeg, [0, 1])[:-1])
    with pytest.raises(
        UserError, match=r"label 1, which .* \(.*0001\.jpg belongs to a sample that is not one image and"
    ):
        read_checked(root)


SHARD = {"file": "train-0.tar", "pictures": 1, "bytes": 10240}
MANIFESTS: dict[str, tuple[object, str]] = {
    "no classes": ({"version": 1}, "its classes are not a list of names"),
    "a class twice": ({"version": 1, "classes": ["a", "a"]}, "it names a class twice"),
    "no splits": ({"version": 1, "classes": ["a"], "splits": []}, "it lacks the splits train and val"),
    "no shards": ({"version": 1, "classes": ["a"], "splits": {"train": 1, "val": {}}}, "a split has no list of shards"),
    "no sizes": (
        {"version": 1, "classes": ["a"], "splits": {"train": {"shards": [SHARD | {"bytes": "1"}]}, "val": {}}},
        "it does not give the images and bytes of train-0.tar",
    ),
    **{
        file: (
            {"version": 1, "classes": ["a"], "splits": {"train": {"shards": [SHARD | {"file": file}]}, "val": {}}},
            f"{file} is not the name of a tar beside it",
        )
        for file in ("../train-0.tar", "/etc/passwd", "a/train-0.tar", "..", "notes.txt")
    },
}


@pytest.mark.parametrize(("manifest", "flaw"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_of_another_form_or_with_paths_is_refused(
    tmp_path: Path, jpeg: bytes, manifest: object, flaw: str
) -> None:
    root = shards(tmp_path / "shards", jpeg, [0], [0])
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        read_checked(root)
    assert str(caught.value) == f"The manifest {root / 'manifest.json'} is broken: {flaw}."


def test_an_index_over_a_tar_with_folders_is_used_without_a_word(tmp_path: Path, jpeg: bytes) -> None:
    root = shards(tmp_path / "shards", jpeg, [0, 1], [0])
    with tarfile.open(root / "train-0.tar", "w") as tar:
        folder = tarfile.TarInfo("inside")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in samples(jpeg, [0, 1]):
            info = tarfile.TarInfo(f"inside/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    write_index(root / "train-0.tar")
    assert len(read_pictures(root)[0]) == 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_that_is_a_link_to_nothing(tmp_path: Path, jpeg: bytes, split: str) -> None:
    root = shards(tmp_path / "shards", jpeg, [0, 1], [0])
    (root / f"{split}-1.tar").symlink_to(tmp_path / "not mounted/1.tar")
    with pytest.raises(UserError, match=rf"{split}-1\.tar is a link whose target is missing"):
        read_checked(root)
    assert read_checked(root, bad_files="skip").left_out == (
        (str(root / f"{split}-1.tar"), "is a link whose target is missing"),
    )


def test_a_prepared_shard_that_was_exchanged_for_one_of_its_size(make_tree: MakeTree, tmp_path: Path) -> None:
    """The manifest gives sizes, and labels come from names: the exchanged shard must not be read by the old names."""
    prepare(make_tree([4, 4], [1, 1]), tmp_path / "out", shards=2, size=0, say=lambda _: None)
    first, second = (tmp_path / f"out/train-0000{number}.tar" for number in range(2))
    sizes = [path.stat().st_size for path in (first, second)]
    data = second.read_bytes()
    (first if sizes[0] >= sizes[1] else second).write_bytes(data + bytes(max(sizes) - len(data)))
    os.truncate(first, sizes[0])
    with pytest.raises(UserError, match=r"train-00000\.(idx does not fit its tar|tar )"):
        read_checked(tmp_path / "out")


def test_labels_given_beside_shards_that_have_their_own(tmp_path: Path, jpeg: bytes) -> None:
    root = shards(tmp_path / "shards", jpeg, [0, 1], [0])
    with pytest.raises(UserError, match=r"--val-labels is .*val\.txt, but the tar shards in .* have labels"):
        read_pictures(root, root / "val.txt")


def test_a_validation_set_without_a_training_set(tmp_path: Path, jpeg: bytes) -> None:
    root = shards(tmp_path / "shards", jpeg, [0, 1], [0])
    (root / "train-0.tar").unlink()
    with pytest.raises(UserError, match=r"has no shards of both splits: train-\*\.tar and val-\*\.tar"):
        read_pictures(root)


def test_shards_beside_an_image_folder(tmp_path: Path, jpeg: bytes) -> None:
    """Neither is left out in silence."""
    root = shards(tmp_path / "shards", jpeg, [0, 1], [0])
    (root / "train" / "class 00").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds tar shards and a folder train: move the one to train on to a folder"):
        read_pictures(root)
