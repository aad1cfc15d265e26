"""Files of CIFAR: official archives, packed, unpacked and binary; damage, hostile pickles, several data sets."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdnet.train.cifar import main
from sdnet.train.data.cifar import read_small_pictures
from sdnet.train.data.cifar_files import load_restricted
from sdnet.train.errors import UserError
from sdnet.train.run_folder import RunFolder

NAMES = {10: "cifar-10-batches-py", 100: "cifar-100-python"}


def pixels(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def write_official(root: Path, classes: int, per_batch: int = 6) -> dict[str, bytes]:
    """The files of an official archive, pickled as Python 2 did, with random pixels."""
    fine = classes == 100
    key = b"fine_labels" if fine else b"labels"

    def batch(seed: int) -> bytes:
        labels = [(seed * per_batch + at) % classes for at in range(per_batch)]
        return pickle.dumps({b"data": pixels(per_batch, seed=seed).reshape(per_batch, -1), key: labels}, protocol=2)

    names = [f"class {label}".encode() for label in range(classes)]
    files = {"train": batch(0), "test": batch(9)} if fine else {f"data_batch_{at}": batch(at) for at in range(1, 6)}
    if not fine:
        files["test_batch"] = batch(9)
    files["meta" if fine else "batches.meta"] = pickle.dumps(
        {b"fine_label_names" if fine else b"label_names": names}, 2
    )
    folder = root / NAMES[classes]
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("classes", [10, 100])
def test_reads_the_official_archive_packed_or_unpacked(tmp_path: Path, classes: int, packed: bool) -> None:
    files = write_official(tmp_path / "made", classes)
    root = tmp_path / "made"
    if packed:
        root = tmp_path / "packed"
        root.mkdir()
        with tarfile.open(root / f"cifar-{classes}-python.tar.gz", "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(f"{NAMES[classes]}/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    found = read_small_pictures(root)
    assert found.classes == tuple(f"class {label}" for label in range(classes))
    seeds = range(1, 6) if classes == 10 else [0]
    assert np.array_equal(found.train.images, np.concatenate([pixels(6, seed=seed) for seed in seeds]))
    assert found.train.labels.tolist() == [(seed * 6 + at) % classes for seed in seeds for at in range(6)]
    assert np.array_equal(found.val.images, pixels(6, seed=9))


def write_binary(root: Path, classes: int, per_batch: int = 6) -> None:
    """The files of the binary version, with the pixels and labels of `write_official`."""
    fine = classes == 100
    folder = root / ("cifar-100-binary" if fine else "cifar-10-batches-bin")
    folder.mkdir(parents=True)
    seeds = {"train": 0, "test": 9} if fine else {**{f"data_batch_{at}": at for at in range(1, 6)}, "test_batch": 9}
    for name, seed in seeds.items():
        labels = np.array([(seed * per_batch + at) % classes for at in range(per_batch)], np.uint8)[:, None]
        coarse = [np.full_like(labels, 19)] if fine else []
        records = np.concatenate([*coarse, labels, pixels(per_batch, seed=seed).reshape(per_batch, -1)], 1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    names = "".join(f"class_{label}\n" for label in range(classes)) + "\n"
    (folder / ("fine_label_names.txt" if fine else "batches.meta.txt")).write_text(names)


def pack(folder: Path, archive: Path) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("classes", [10, 100])
def test_reads_the_binary_version(tmp_path: Path, classes: int, packed: bool) -> None:
    write_official(tmp_path / "pickled", classes)
    write_binary(tmp_path / "binary", classes)
    if packed:
        (folder,) = (tmp_path / "binary").iterdir()
        pack(folder, tmp_path / f"packed/cifar-{classes}-binary.tar.gz")
    found = read_small_pictures(tmp_path / ("packed" if packed else "binary"))
    expected = read_small_pictures(tmp_path / "pickled")
    assert found.classes == tuple(f"class_{label}" for label in range(classes))
    for split in ("train", "val"):
        ours, theirs = getattr(found, split), getattr(expected, split)
        assert np.array_equal(ours.images, theirs.images)
        assert np.array_equal(ours.labels, theirs.labels)


def test_a_binary_file_that_is_cut_off(tmp_path: Path) -> None:
    write_binary(tmp_path, 10)
    os.truncate(tmp_path / "cifar-10-batches-bin/data_batch_2.bin", 3000)
    with pytest.raises(UserError, match="not the official CIFAR-10: ValueError 3000 bytes are no whole number of"):
        read_small_pictures(tmp_path)
    (tmp_path / "cifar-10-batches-bin/data_batch_2.bin").unlink()
    with pytest.raises(UserError, match=r"cifar-10-batches-bin lacks the file data_batch_2\.bin"):
        read_small_pictures(tmp_path)


@pytest.mark.parametrize("step", range(7))
def test_a_damaged_archive_is_refused_wherever_the_damage_is(tmp_path: Path, step: int) -> None:
    """One bit is wrong, or the end is missing. gzip compares its checksum only where an archive is read to its end."""
    write_official(tmp_path, 10)
    archive = pack(tmp_path / NAMES[10], tmp_path / "packed/cifar-10-python.tar.gz")
    read_small_pictures(tmp_path / "packed")
    whole = archive.read_bytes()
    at = 40 + step * (len(whole) - 60) // 6
    archive.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz (cannot be read|is damaged)"):
        read_small_pictures(tmp_path / "packed")
    archive.write_bytes(whole[:at])
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz cannot be read"):
        read_small_pictures(tmp_path / "packed")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cifar-10-python.tar.gz", 170498071),
        ("cifar-100-python.tar.gz", 169001437),
        ("cifar-10-binary.tar.gz", 170052171),
    ],
)
def test_an_archive_of_the_official_size_must_have_the_official_content(tmp_path: Path, name: str, size: int) -> None:
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, size)  # takes no disk space
    with pytest.raises(
        UserError, match=rf"{name} is damaged: its MD5 sum is \w{{32}}, that of the official file \w{{32}}"
    ):
        read_small_pictures(tmp_path)


def test_an_unpacked_file_of_the_official_size_must_have_the_official_content(tmp_path: Path) -> None:
    write_official(tmp_path, 10)
    os.truncate(tmp_path / NAMES[10] / "data_batch_4", 31035696)
    with pytest.raises(UserError, match="data_batch_4 is damaged: its MD5 sum is"):
        read_small_pictures(tmp_path)


def test_a_subset_of_ones_own_is_read_and_the_user_told(tmp_path: Path) -> None:
    write_official(tmp_path, 100)
    archive = pack(tmp_path / NAMES[100], tmp_path / "packed/cifar-100-python.tar.gz")
    assert read_small_pictures(tmp_path).notes == (
        f"{tmp_path / NAMES[100]} is not the official CIFAR-100: the size of test, train differs.",
    )
    assert read_small_pictures(tmp_path / "packed").notes == read_small_pictures(archive).notes
    assert "the size of cifar-100-python.tar.gz differs" in read_small_pictures(archive).notes[0]


def test_a_subset_that_python_3_has_written_may_hold_text_in_place_of_bytes(tmp_path: Path) -> None:
    write_official(tmp_path, 10)
    names = ["plane", "car", *map(str, range(8))]
    (tmp_path / NAMES[10] / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    assert read_small_pictures(tmp_path).classes == tuple(names)


def test_two_data_sets_in_one_folder_are_not_chosen_from(tmp_path: Path) -> None:
    write_official(tmp_path, 10)
    write_official(tmp_path, 100)
    sentence = r"holds CIFAR-100 \(cifar-100-python\) and CIFAR-10 \(cifar-10-batches-py\): name the one to train on"
    with pytest.raises(UserError, match=sentence):
        read_small_pictures(tmp_path)
    assert len(read_small_pictures(tmp_path / NAMES[100]).classes) == 100
    assert len(read_small_pictures(tmp_path / NAMES[10]).classes) == 10
    pack(tmp_path / NAMES[10], tmp_path / "packed/cifar-10-python.tar.gz")
    write_binary(tmp_path / "packed", 100)
    with pytest.raises(UserError, match="name the one to train on"):
        read_small_pictures(tmp_path / "packed")
    assert len(read_small_pictures(tmp_path / "packed/cifar-10-python.tar.gz").classes) == 10
    (tmp_path / "both/train/cat").mkdir(parents=True)
    write_official(tmp_path / "both", 10)
    with pytest.raises(UserError, match=r"and an image folder \(train\): name the one"):
        read_small_pictures(tmp_path / "both")


def test_an_archive_beside_what_came_out_of_it_is_one_data_set(tmp_path: Path) -> None:
    write_official(tmp_path, 10)
    pack(tmp_path / NAMES[10], tmp_path / "cifar-10-python.tar.gz")
    write_binary(tmp_path, 10)
    assert len(read_small_pictures(tmp_path).train.labels) == 30


class Hostile:
    """Unpickling one of these would run a command."""

    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('executed').touch()",)


@pytest.mark.parametrize("where", ["data", "labels"])
def test_a_hostile_pickle_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_official(tmp_path, 10)
    stored = {b"data": pixels(6).reshape(6, -1), b"labels": [0] * 6} | {where.encode(): Hostile()}
    (tmp_path / NAMES[10] / "data_batch_3").write_bytes(pickle.dumps(stored, 2))
    with pytest.raises(UserError, match=r"not the official CIFAR-10: UnpicklingError it asks for .*eval"):
        read_small_pictures(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("admitted", [np.arange(6, dtype=np.uint8), [1, "two", b"three", 4.0], {"a": [1]}])
@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_lists_and_plain_values_are_admitted(admitted: bool, protocol: int) -> None:
    found = load_restricted(pickle.dumps({b"x": admitted}, protocol))["x"]
    assert np.array_equal(found, admitted)


@pytest.mark.parametrize("refused", [Path("/"), np.float64, print, Hostile(), {1, 2}.__class__, io.BytesIO()])
def test_anything_else_is_refused(refused: str) -> None:
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        load_restricted(pickle.dumps({b"x": refused}, 2))


def test_broken_official_files(tmp_path: Path) -> None:
    write_official(tmp_path, 10)
    for data, sentence in (
        (b"", "EOFError"),
        (b"text", "not the official"),
        (pickle.dumps({b"data": np.zeros((6, 10), np.uint8), b"labels": [0] * 6}, 2), r"images of shape \(6, 10\)"),
        (pickle.dumps({b"data": pixels(6).reshape(6, -1), b"labels": [11] * 6}, 2), "labels out of range"),
        (pickle.dumps([1, 2], 2), "holds no dictionary"),
    ):
        (tmp_path / NAMES[10] / "test_batch").write_bytes(data)
        with pytest.raises(UserError, match=sentence):
            read_small_pictures(tmp_path)


def test_reads_an_image_folder_with_test_for_val(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in range(2):
            folder = tmp_path / split / f"class {label}"
            folder.mkdir(parents=True)
            Image.fromarray(pixels(1, seed=label)[0].transpose(1, 2, 0)).save(folder / "one.png")
            Image.fromarray(pixels(1, seed=label)[0, 0]).save(folder / "gray.png")
    found = read_small_pictures(tmp_path)
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(found.train.images[3], pixels(1, seed=1)[0])
    assert np.array_equal(found.train.images[0], np.repeat(pixels(1)[:, 0], 3, axis=0))
    Image.fromarray(pixels(1, 40)[0].transpose(1, 2, 0)).save(tmp_path / "test/class 1/one.png")
    with pytest.raises(UserError, match=r"one\.png is 40 x 40, the first 32 x 32"):
        read_small_pictures(tmp_path)


def test_trains_and_resumes_from_the_command_line(tmp_path: Path) -> None:
    write_official(tmp_path, 10)
    settings = ["--model", "sdnet18", "--batch", "10", "--data", str(tmp_path), "--log-every", "1"]
    main([*settings, "--epochs", "1", "--out", str(tmp_path / "run")])
    (line,) = RunFolder(tmp_path / "run").metrics()
    assert line["step"] == 3
    with pytest.raises(SystemExit, match="batch: 15, not 10"):
        main(["--data", str(tmp_path), "--resume", str(tmp_path / "run"), "--batch", "15"])
