"""Published corrupted sets are read as they are laid out; damaged ones are refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdnet.robustness import corruptions_of, read_cifar_c, read_imagenet_c
from sdnet.robustness.published import read_npy

COUNT = 4


@pytest.fixture
def cifar_c(tmp_path: Path) -> Path:
    """A folder like CIFAR-10-C, with 4 images at each of 5 severities, which hold their own number."""
    images = np.arange(5 * COUNT, dtype=np.uint8).reshape(-1, 1, 1, 1) + np.zeros((1, 6, 5, 3), np.uint8)
    images[..., 2] += 100
    np.save(tmp_path / "gaussian_noise.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(np.arange(COUNT), 5))
    return tmp_path


def test_a_severity_of_cifar_c_is_its_part_of_the_file(cifar_c: Path) -> None:
    images, labels = read_cifar_c(cifar_c, "gaussian_noise", 3)
    assert images.shape == (COUNT, 3, 6, 5)
    assert labels.tolist() == [0, 1, 2, 3]
    assert images[:, 0, 0, 0].tolist() == [8, 9, 10, 11]
    assert images[:, 2, 5, 4].tolist() == [108, 109, 110, 111]
    assert corruptions_of(cifar_c) == ["gaussian_noise"]


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_arrays_are_read_as_numpy_wrote_them(tmp_path: Path, dtype: str) -> None:
    array = np.arange(60, dtype=dtype).reshape(3, 4, 5)
    np.save(tmp_path / "a.npy", array)
    assert read_npy(tmp_path / "a.npy").numpy().tolist() == array.tolist()


def test_arrays_of_python_objects_are_refused_unread(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy holds elements of type '\|O'; it must hold integers"):
        read_npy(tmp_path / "a.npy")


def test_an_array_in_fortran_order_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 5, 6, 3), np.uint8).transpose(3, 2, 1, 0))
    with pytest.raises(ValueError, match=r"a\.npy holds an array in Fortran order; it must be in C order"):
        read_npy(tmp_path / "a.npy")


@pytest.mark.parametrize("dtype", ["float32", ">i8", "bool", "U3"])
def test_elements_of_other_types_are_refused(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros(4, dtype))
    with pytest.raises(ValueError, match=r"a\.npy holds elements of type .*; it must hold integers of \|u1"):
        read_npy(tmp_path / "a.npy")


def test_hidden_files_are_no_corruptions_and_no_pictures(cifar_c: Path) -> None:
    (cifar_c / "._gaussian_noise.npy").write_bytes(b"of a file system")
    place = cifar_c / "fog" / "1"
    for name in (".git", "n01", "__MACOSX"):
        (place / name).mkdir(parents=True)
        (place / name / "._0.JPEG").touch()
    (place / "n01" / "0.JPEG").touch()
    assert corruptions_of(cifar_c) == ["fog", "gaussian_noise"]
    assert read_imagenet_c(cifar_c, "fog", 1).files == (place / "n01" / "0.JPEG",)


def test_a_class_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fog" / "1" / "n01").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"n01 holds no \.jpeg, \.jpg, \.png files"):
        read_imagenet_c(tmp_path, "fog", 1)
    (tmp_path / "fog" / "2").mkdir()
    with pytest.raises(ValueError, match=r"fog/2 holds no folders of classes"):
        read_imagenet_c(tmp_path, "fog", 2)


def test_a_file_that_is_cut_off_is_refused(cifar_c: Path) -> None:
    file = cifar_c / "gaussian_noise.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"gaussian_noise\.npy has \d+ bytes; its header asks for \d+"):
        read_cifar_c(cifar_c, "gaussian_noise", 1)


def header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00",
        header(b"{{{{{"),
        header(b"print('called')"),
        header(b"{'descr': int, 'fortran_order': False, 'shape': (1,)}"),
        header(b"{'descr': '|u1', 'fortran_order': False, 'shape': 1}"),
        header(b"['|u1', False, (1,)]"),
        header(b"{\x00}"),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        b"PK\x03\x04" * 9,
    ],
)
def test_a_file_that_is_no_array_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npy (is no \.npy file|cannot be used)"):
        read_npy(tmp_path / "a.npy")


def test_wrong_shapes_and_missing_files_are_refused(cifar_c: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no file .*fog\.npy"):
        read_cifar_c(cifar_c, "fog", 1)
    nowhere: Any = None
    for call in (lambda: read_cifar_c(nowhere, "fog", 1), lambda: read_imagenet_c(nowhere, "fog", 1)):
        with pytest.raises(ValueError, match="folder is None; it must be a path"):
            call()
    with pytest.raises(ValueError, match="folder is None; it must be a path"):
        corruptions_of(nowhere)
    with pytest.raises(ValueError, match="severity is 6; it must be at most 5"):
        read_cifar_c(cifar_c, "gaussian_noise", 6)
    with pytest.raises(ValueError, match="it must be the name of a file or folder"):
        read_cifar_c(cifar_c, "../labels", 1)
    np.save(cifar_c / "flat.npy", np.zeros((20, 30), np.uint8))
    with pytest.raises(ValueError, match=r"flat\.npy holds torch\.uint8 \[20, 30\]; it must hold uint8"):
        read_cifar_c(cifar_c, "flat", 1)
    np.save(cifar_c / "labels.npy", np.arange(19))
    with pytest.raises(ValueError, match=r"labels\.npy holds \[19\]; it must hold \[20\] labels"):
        read_cifar_c(cifar_c, "gaussian_noise", 1)


def test_folders_of_imagenet_c_are_listed_by_class(tmp_path: Path) -> None:
    for name, count in (("n02", 2), ("n01", 1)):
        folder = tmp_path / "shot_noise" / "1" / name
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i}.JPEG").touch()
        (folder / "notes.txt").touch()
    found = read_imagenet_c(tmp_path, "shot_noise", 1)
    assert [f"{file.parent.name}/{file.name}" for file in found.files] == ["n01/0.JPEG", "n02/0.JPEG", "n02/1.JPEG"]
    assert found.labels.tolist() == [0, 1, 1]
    assert found.classes == ("n01", "n02")
    assert corruptions_of(tmp_path) == ["shot_noise"]
    with pytest.raises(ValueError, match=r"There is no folder .*shot_noise/2"):
        read_imagenet_c(tmp_path, "shot_noise", 2)
