"""ImageNet as it is downloaded: a tar of tars, flat validation pictures, ground truth in several forms."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from sdnet.train.data.archives import list_tar
from sdnet.train.data.folder import ImageSet, read_image_folder
from sdnet.train.data.sources import read_checked, read_pictures
from sdnet.train.errors import UserError
from sdnet.train.prepare import prepare

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]

Download = tuple[Path, Path]

WNIDS = ["n01440764", "n01443537", "n02119789"]
IDS = {"n01440764": 3, "n01443537": 1, "n02119789": 2}  # the devkit's own numbers, not in the order of the wnids
VAL = [1, 0, 2, 2, 0, 1]  # labels of the validation pictures


def pack(path: Path, files: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def synsets() -> bytes:
    """meta.mat as MATLAB writes it: leaves by number, then an inner node."""
    kinds = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "num_children", "children")]
    rows = sorted((number, wnid, f"words of {wnid}", 0, []) for wnid, number in IDS.items())
    rows.append((4, "n00001740", "entity", 3, [1, 2, 3]))
    table = np.empty((len(rows), 1), dtype=kinds)
    for at, (number, wnid, words, count, children) in enumerate(rows):
        values = np.float64(number), wnid, words, np.float64(count), np.array(children, np.float64)
        for (name, _), value in zip(kinds, values, strict=True):
            table[name][at, 0] = value
    out = io.BytesIO()
    savemat(out, {"synsets": table}, do_compression=True)
    return out.getvalue()


@pytest.fixture
def download(make_tree: MakeTree, tmp_path: Path) -> tuple[Path, Path]:
    """The download without ground truth, and an image folder of the same pictures."""
    tree = make_tree([3, 2, 4], [2, 2, 2])
    for split in ("train", "val"):
        for label, wnid in enumerate(WNIDS):
            (tree / split / f"class {label:02}").rename(tree / split / wnid)
    root = tmp_path / "download"
    root.mkdir()
    inner = {}
    for wnid in reversed(WNIDS):
        files = {f"{wnid}_{file.name}": file.read_bytes() for file in (tree / "train" / wnid).iterdir()}
        inner[f"{wnid}.tar"] = pack(tmp_path / "inner.tar", files)
    pack(root / "ILSVRC2012_img_train.tar", inner)
    left = {label: sorted((tree / "val" / wnid).iterdir()) for label, wnid in enumerate(WNIDS)}
    val = {f"ILSVRC2012_val_{at:08}.JPEG": left[label].pop().read_bytes() for at, label in enumerate(VAL, 1)}
    pack(root / "ILSVRC2012_img_val.tar", val)
    return root, tree


def unpack_val(root: Path) -> None:
    with tarfile.open(root / "ILSVRC2012_img_val.tar") as tar:
        tar.extractall(root / "val", filter="data")
    (root / "ILSVRC2012_img_val.tar").unlink()


def kit_folder(root: Path) -> None:
    data = root / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    (data / "meta.mat").write_bytes(synsets())
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{IDS[WNIDS[label]]}\n" for label in VAL))


def kit_archive(root: Path) -> None:
    kit_folder(root)
    folder = root / "ILSVRC2012_devkit_t12"
    files = {str(path.relative_to(root)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pack(root / "ILSVRC2012_devkit_t12.tar.gz", files)
    shutil.rmtree(folder)


def listed(name: str, line: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        head = "ImageId,PredictionString\n" if name.endswith(".csv") else ""
        rows = [
            line.format(stem=f"ILSVRC2012_val_{at:08}", wnid=WNIDS[label], label=label)
            for at, label in enumerate(VAL, 1)
        ]
        (root / name).write_text(head + "".join(rows))

    return write


TRUTHS = {
    "devkit": kit_folder,
    "devkit archive": kit_archive,
    "files and wnids": listed("val_labels.txt", "{stem}.JPEG {wnid}\n"),
    "files and numbers": listed("val.txt", "{stem}.JPEG {label}\n"),
    "Kaggle": listed("LOC_val_solution.csv", "{stem},{wnid} 1 2 3 4\n"),
    "wnids in order": listed("imagenet_2012_validation_synset_labels.txt", "{wnid}\n"),
}


def labelled(images: ImageSet) -> list[tuple[bytes, int]]:
    return sorted((images.where(at).read(), images.labels[at]) for at in range(len(images)))


@pytest.mark.parametrize("flat", [False, True], ids=["val tar", "val folder"])
@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS)
def test_reads_the_pictures_of_the_same_image_folder(
    download: Download, truth: Callable[[Path], object], flat: bool
) -> None:
    root, tree = download
    truth(root)
    if flat:
        unpack_val(root)
    for found, expected in zip(read_pictures(root), read_image_folder(tree), strict=True):
        assert found.classes == expected.classes
        assert labelled(found) == labelled(expected)


def test_an_unpacked_training_set_beside_a_flat_validation_folder(download: Download) -> None:
    root, tree = download
    (root / "ILSVRC2012_img_train.tar").unlink()
    shutil.copytree(tree / "train", root / "train")
    unpack_val(root)
    kit_folder(root)
    train, val = read_pictures(root)
    assert (len(train), len(val)) == (9, 6)


@pytest.mark.parametrize("name", ["@eaDir", ".thumbnails"])
def test_a_folder_of_the_system_does_not_make_classes_of_a_flat_validation_folder(
    download: Download, name: str
) -> None:
    root, tree = download
    unpack_val(root)
    kit_folder(root)
    (root / "val" / name).mkdir()
    _, val = read_pictures(root)
    assert labelled(val) == labelled(read_image_folder(tree)[1])
    assert list(val.ignored) == [name]


def test_archives_of_classes_are_sorted_as_the_folders_of_an_image_folder_are(
    download: Download, tmp_path: Path
) -> None:
    root, tree = download
    picture = next((tree / "train").rglob("*.jpg")).read_bytes()
    inner = {f"{name}.tar": pack(tmp_path / "inner.tar", {"1.jpg": picture}) for name in ("a-b", "a", "c")}
    pack(root / "ILSVRC2012_img_train.tar", inner | {"._a.tar": b"of macOS"})
    (root / "val.txt").write_text("".join(f"ILSVRC2012_val_{at:08} {label}\n" for at, label in enumerate(VAL, 1)))
    train, _ = read_pictures(root)
    assert train.classes == ("a", "a-b", "c"), "as sorted names: an index in val.txt means this order"
    assert list(train.ignored) == ["._a.tar"]


def test_labels_that_do_not_exist_are_named_with_their_option(download: Download) -> None:
    with pytest.raises(UserError, match=r"^--val-labels is none\.txt, which does not exist\.$"):
        read_pictures(download[0], Path("none.txt"))


def test_prepares_shards_from_the_archives(download: Download, tmp_path: Path) -> None:
    root, tree = download
    kit_archive(root)
    prepare(root, tmp_path / "out", say=lambda _: None)
    for found, expected in zip(read_pictures(tmp_path / "out"), read_image_folder(tree), strict=True):
        assert labelled(found) == labelled(expected)


def test_ground_truth_may_lie_elsewhere(download: Download, tmp_path: Path) -> None:
    root, tree = download
    TRUTHS["files and wnids"](tmp_path)
    _, val = read_pictures(root, tmp_path / "val_labels.txt")
    assert labelled(val) == labelled(read_image_folder(tree)[1])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda root: None, "no ground truth of the validation images"),
        (
            lambda root: (root / "val.txt").write_text("a.jpg n01440764\n"),
            r"no label for ILSVRC2012_val_00000001\.JPEG",
        ),
        (lambda root: (root / "val.txt").write_text("n01440764\n" * 5), "5 labels for 6 validation images"),
        (lambda root: (root / "val.txt").write_text("n99999999\n" * 6), "class n99999999, which the training set"),
        (lambda root: (root / "ILSVRC2012_devkit_t12").mkdir(), r"lacks .*truth\.txt and meta\.mat"),
        (
            lambda root: (kit_folder(root), (root / "ILSVRC2012_devkit_t12/data/meta.mat").write_bytes(b"no")),
            r"meta\.mat of the development kit .* cannot be read",
        ),
    ],
)
def test_ground_truth_that_does_not_fit(download: Download, spoil: Callable[[Path], object], sentence: str) -> None:
    root, _ = download
    spoil(root)
    with pytest.raises(UserError, match=sentence):
        read_pictures(root)


def test_an_archive_of_a_class_without_pictures(download: Download, tmp_path: Path) -> None:
    root, _ = download
    kit_folder(root)
    pack(root / "ILSVRC2012_img_train.tar", {"n01440764.tar": pack(tmp_path / "empty.tar", {})})
    with pytest.raises(UserError, match=r"n01440764\.tar in .* has no images"):
        read_pictures(root)


def spoil_inner(root: Path, change: Callable[[bytearray], None]) -> None:
    """Change the archive of the first class inside the training archive."""
    path = root / "ILSVRC2012_img_train.tar"
    (member,) = [member for member in list_tar(path).members if member.name == f"{WNIDS[0]}.tar"]
    data = bytearray(path.read_bytes())
    inner = data[member.offset : member.offset + member.size]
    change(inner)
    data[member.offset : member.offset + member.size] = inner[: member.size].ljust(member.size, b"\0")
    path.write_bytes(data)


def hole_over_a_header(tar: bytearray) -> None:
    at = tar.index(b"n01440764_001.jpg")
    tar[at : at + 512] = bytes(512)


def hole_from_an_image_to_the_end(tar: bytearray) -> None:
    at = tar.index(b"n01440764_001.jpg") + 1500
    tar[at:] = bytes(len(tar) - at)


def nonsense_over_a_header(tar: bytearray) -> None:
    at = tar.index(b"n01440764_002.jpg")
    tar[at : at + 512] = b"?" * 512


@pytest.mark.parametrize("change", [hole_over_a_header, hole_from_an_image_to_the_end, nonsense_over_a_header])
def test_a_damaged_archive_of_a_class_is_refused_or_its_loss_is_listed(
    download: Download, change: Callable[[bytearray], None]
) -> None:
    root, tree = download
    kit_folder(root)
    spoil_inner(root, change)
    flaws = {f"{root}/ILSVRC2012_img_train.tar/{WNIDS[0]}.tar", f"{root}/{WNIDS[0]}/{WNIDS[0]}_001.jpg"}
    with pytest.raises(UserError, match=r"(?s)--bad-files skip:.*(is damaged from byte|is truncated|is not a picture)"):
        read_checked(root)
    checked = read_checked(root, bad_files="skip")
    assert 0 < len(checked.train) < len(read_image_folder(tree)[0])
    assert flaws & {name for name, _ in checked.left_out}
    assert labelled(checked.val) == labelled(read_image_folder(tree)[1])


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_a_truncated_archive_is_refused(download: Download, name: str, share: float) -> None:
    root, _ = download
    kit_folder(root)
    last = list_tar(root / name).members[-1]
    os.truncate(root / name, int(share * (last.offset + last.size)))
    sentences = "breaks off at byte|is damaged from|the training set does not have|6 labels for"
    with pytest.raises(UserError, match=sentences):
        read_checked(root)


def test_a_hole_over_the_archive_of_a_class_does_not_shift_the_labels(download: Download) -> None:
    root, _ = download
    kit_folder(root)
    path = root / "ILSVRC2012_img_train.tar"
    members = list_tar(path).members
    data = bytearray(path.read_bytes())
    data[members[1].offset - 512 : members[1].offset + 512] = bytes(1024)
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=f"class {members[1].name.removesuffix('.tar')}, which the training set does not"
    ):
        read_checked(root, bad_files="skip")


def test_two_archives_of_one_class(download: Download) -> None:
    root, _ = download
    kit_folder(root)
    path = root / "ILSVRC2012_img_train.tar"
    data = path.read_bytes()
    inner = {f"{folder}/{WNIDS[0]}.tar": inner_tar(path, data) for folder in ("a", "b")}
    pack(path, inner)
    with pytest.raises(UserError, match=f"holds two archives of class {WNIDS[0]}"):
        read_pictures(root)


def inner_tar(path: Path, data: bytes) -> bytes:
    member = list_tar(path).members[-1]
    return data[member.offset : member.offset + member.size]


def test_an_image_that_is_stored_twice_counts_once(download: Download) -> None:
    root, _ = download
    kit_folder(root)
    path = root / "ILSVRC2012_img_val.tar"
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"newer"))
    with pytest.raises(
        UserError, match=r"ILSVRC2012_val_00000001\.JPEG is replaced by a later copy in the same archive"
    ):
        read_pictures(root)
    _, val = read_pictures(root, bad_files="skip")
    assert len(val) == 6
    assert val.where(0).read() == b"newer"


def test_what_is_no_image_in_an_archive_is_noted(download: Download) -> None:
    root, _ = download
    kit_folder(root)
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("readme.txt"))
    checked = read_checked(root)
    assert [name for name, _ in checked.left_out] == [str(root / "readme.txt")]
