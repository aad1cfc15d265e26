"""Labels of validation images: a wrong one is never given, an ambiguous list is refused by name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from sdnet.train.data.devkit import TRUTH, read_truth
from sdnet.train.errors import UserError

FILES = ["v1.JPEG", "v2.JPEG", "v3.JPEG"]
WNIDS = ["n01", "n02", "n03"]


@pytest.fixture
def labels(tmp_path: Path) -> Callable[..., list[int]]:
    """Return the labels that a list with this content gives."""

    def read(content: str | bytes, files: list[str] = FILES, classes: list[str] = WNIDS) -> list[int]:
        path = tmp_path / "val.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogateescape"))
        return read_truth(path, files, classes)

    return read


Labels = Callable[..., list[int]]


def refusal(labels: Labels, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        labels(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("classes", "listed", "expected"),
    [
        (["1", "2", "3"], "1 2 3", [0, 1, 2]),
        (["0", "1", "10", "2"], "10 2 0", [2, 3, 0]),
        (["10", "11", "7"], "7 7 10", [2, 2, 0]),
        (["2020", "2021"], "2021 2020 2021", [1, 0, 1]),
        (["0", "1", "2"], "2 0 1", [2, 0, 1]),
        (["00", "01", "02"], "02 00 01", [2, 0, 1]),
    ],
)
@pytest.mark.parametrize("named", [False, True], ids=["in order", "with names"])
def test_a_label_that_is_the_name_of_a_class_means_that_class(
    labels: Labels, classes: list[str], listed: str, expected: list[int], named: bool
) -> None:
    rows = [f"{file} {label}" if named else label for file, label in zip(FILES, listed.split(), strict=True)]
    assert labels("\n".join(rows), FILES, classes) == expected


SPACED = ["a", "a, b", "golden", "golden retriever"]


@pytest.mark.parametrize("listed", [["golden retriever", "golden", "golden"], ["a, b", "a", "golden retriever"]])
@pytest.mark.parametrize("row", ["{label}", "{file} {label}", "{file},{label}", "{file}\t{label} "])
def test_the_name_of_a_class_may_hold_spaces_and_commas(labels: Labels, listed: list[str], row: str) -> None:
    rows = [row.format(file=file, label=label) for file, label in zip(FILES, listed, strict=True)]
    assert labels("\n".join(rows), FILES, SPACED) == [SPACED.index(label) for label in listed]


def test_a_part_of_a_name_or_one_of_two_columns_is_no_class(labels: Labels) -> None:
    listed = "v1.JPEG golden retriever\nv2.JPEG golden\nv3.JPEG cat\n"
    assert "names the class golden retriever" in refusal(labels, listed, FILES, ["cat", "golden"])
    assert "names the class n01 n02" in refusal(labels, "v1.JPEG n01 n02\nv2.JPEG n02 n01\nv3.JPEG n03 n01\n")


@pytest.mark.parametrize("classes", [WNIDS, ["cat", "dog", "emu"], ["00", "01", "02"], ["000", "one", "two"]])
def test_numbers_from_0_are_indices_of_the_sorted_classes(labels: Labels, classes: list[str]) -> None:
    assert labels("2\n0\n1\n", FILES, classes) == [2, 0, 1]


@pytest.mark.parametrize(
    ("classes", "listed"),
    [
        (["1", "2", "3"], "0 1 2"),  # indices, or 0 is a mistake
        (["10", "20", "30"], "0 10 20"),
        (["001", "002", "003"], "0 1 2"),  # 1 may be class 001 or the class of index 1
        (["2", "cat", "dog"], "0 1 2"),
    ],
)
def test_numbers_beside_classes_that_are_called_by_others_are_refused(
    labels: Labels, classes: list[str], listed: str
) -> None:
    said = refusal(labels, listed.replace(" ", "\n"), FILES, classes)
    assert "labels in" in said
    assert "and so is the name of class" in said


@pytest.mark.parametrize("listed", ["1\n2\n3\n", "1\n2\n1\n", "v1.JPEG 1\nv2.JPEG 2\nv3.JPEG 3\n", "3\n3\n3\n"])
def test_numbers_that_may_count_from_1_are_refused(labels: Labels, listed: str) -> None:
    said = refusal(labels, listed)
    assert "may count from 0 (the sorted classes) or from 1 (the development kit's own numbers" in said


def test_the_kits_bare_list_is_read_with_its_table_beside_it(tmp_path: Path) -> None:
    (tmp_path / TRUTH).write_bytes(b"\xef\xbb\xbf1\n2\n1\n")
    with pytest.raises(UserError, match=rf"need its meta\.mat beside {TRUTH}"):
        read_truth(tmp_path / TRUTH, FILES, WNIDS)
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    synsets = np.array([[(2, "n01", 0)], [(1, "n03", 0)], [(3, "n02", 0)], [(4, "n00", 3)]], dtype=fields)
    savemat(tmp_path / "meta.mat", {"synsets": synsets})
    assert read_truth(tmp_path / TRUTH, FILES, WNIDS) == [2, 0, 2]
    (tmp_path / TRUTH).write_text("1\n4\n1\n")
    with pytest.raises(UserError, match="gives an image the number b'4', which is no class of it"):
        read_truth(tmp_path / TRUTH, FILES, WNIDS)
    (tmp_path / "meta.mat").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"meta\.mat of the development kit .* cannot be read"):
        read_truth(tmp_path / TRUTH, FILES, WNIDS)


def test_numbers_beyond_the_classes_are_refused(labels: Labels) -> None:
    assert "names the class 3, which the training set does not have" in refusal(labels, "0\n1\n3\n")


def test_names_and_numbers_are_not_mixed(labels: Labels) -> None:
    assert "names the class 1, which" in refusal(labels, "n01\n1\nn03\n")


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("listed", ["n03 n01 n02", "v1.JPEG,n03 v2.JPEG,n01 v3.JPEG,n02", "2 0 1"])
def test_a_byte_order_mark_is_no_part_of_a_name(labels: Labels, mark: str, end: str, listed: str) -> None:
    assert labels((listed.replace(" ", end).replace(",", " ") + end).encode(mark)) == [2, 0, 1]


def test_kaggles_table(labels: Labels) -> None:
    table = "ImageId,PredictionString\nv2,n01 1 2 3 4 n01 5 6 7 8 \nv1,n03 1 2 3 4 \nv3,n02 1 2 3 4 \n"
    assert labels(table) == labels(table.encode("utf-8-sig")) == [2, 0, 1]


def test_two_images_of_one_stem_have_a_row_each(labels: Labels) -> None:
    files = ["v1.JPEG", "v1.png", "v2.JPEG"]
    assert labels("v1.JPEG n01\nv1.png n02\nv2.JPEG n03\n", files) == [0, 1, 2]
    for listed in ("v1.JPEG n01\nv2.JPEG n03\n", "v1 n01\nv2 n03\n"):
        assert "has no label for v1." in refusal(labels, listed, files)
    assert "alone: 2 images are called v1" in refusal(labels, "v1 n01\nv2 n03\n", files)


def test_rows_may_name_paths_or_other_extensions_where_that_is_unambiguous(labels: Labels) -> None:
    assert labels("val/v1.JPEG n01\nval/v2.JPEG n02\nval/v3.JPEG n03\n") == [0, 1, 2]
    assert labels("v1.jpg n01\nv2.jpg n02\nv3.jpg n03\n") == [0, 1, 2]
    assert "no label for v1.JPEG" in refusal(labels, "a/v1.JPEG n01\nb/v1.JPEG n02\nv2 n01\nv3 n01\n")
    assert "no label for a/v1.JPEG" in refusal(labels, "v1.JPEG n01\n", ["a/v1.JPEG", "b/v1.JPEG"])
    assert labels("v1.0 n02\n", ["v1.0.JPEG"]) == [1]


def test_two_labels_for_one_image(labels: Labels) -> None:
    assert "gives v1.JPEG two labels: n01 and n02" in refusal(labels, "v1.JPEG n01\nv1.JPEG n02\nv2 n01\nv3 n01\n")
    assert labels("v1 n01\nv1 n01\nv2 n01\nv3 n01\n") == [0, 0, 0]


def test_names_that_are_not_utf8_are_matched_byte_by_byte(labels: Labels) -> None:
    file = b"caf\xe9.JPEG".decode(errors="surrogateescape")
    assert labels(b"caf\xe9.JPEG n02\n", [file]) == [1]
    assert r"no label for caf\xe9.JPEG" in refusal(labels, b"other.JPEG n02\n", [file])
