"""Archives are read where they lie; what would reach outside of them is refused."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from sdnet.train.data.archives import list_tar, read_members
from sdnet.train.errors import UserError

HOSTILE = {
    "absolute path": tarfile.TarInfo("/etc/passwd"),
    "path upwards": tarfile.TarInfo("pictures/../../outside.jpg"),
    "symbolic link": tarfile.TarInfo("link.jpg"),
    "hard link": tarfile.TarInfo("hard.jpg"),
    "device": tarfile.TarInfo("device.jpg"),
    "fifo": tarfile.TarInfo("fifo.jpg"),
}
HOSTILE["symbolic link"].type, HOSTILE["symbolic link"].linkname = tarfile.SYMTYPE, "/etc/passwd"
HOSTILE["hard link"].type, HOSTILE["hard link"].linkname = tarfile.LNKTYPE, "../outside.jpg"
HOSTILE["device"].type, HOSTILE["fifo"].type = tarfile.CHRTYPE, tarfile.FIFOTYPE


def write_tar(path: Path, contents: dict[str, bytes], extra: tarfile.TarInfo | None = None) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if extra:
            tar.addfile(extra)
    return path


def test_members_are_at_their_recorded_offsets(tmp_path: Path) -> None:
    contents = {"a/one.jpg": b"1" * 700, "a/two.jpg": b"", "three.jpg": b"3"}
    path = write_tar(tmp_path / "plain.tar", contents)
    data = path.read_bytes()
    found = {member.name: data[member.offset : member.offset + member.size] for member in list_tar(path).members}
    assert found == contents


def test_a_tar_inside_a_tar_is_read_in_place(tmp_path: Path) -> None:
    inner = {
        name: write_tar(tmp_path / name, {f"{name}.jpg": name.encode()}).read_bytes() for name in ("a.tar", "b.tar")
    }
    path = write_tar(tmp_path / "outer.tar", inner)
    outer = {member.name: member for member in list_tar(path).members}
    (member,) = list_tar(path, outer["b.tar"].offset, outer["b.tar"].size).members
    assert member.name == "b.tar.jpg"
    assert path.read_bytes()[member.offset : member.offset + member.size] == b"b.tar"


@pytest.mark.parametrize("extra", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", ["hostile.tar", "hostile.tar.gz"])
def test_a_hostile_member_is_refused(tmp_path: Path, name: str, extra: tarfile.TarInfo) -> None:
    path = write_tar(tmp_path / name, {"fine.jpg": b"1"}, extra)
    with pytest.raises(UserError, match=f"{path} is refused: its member {extra.name} "):
        read_members(path, lambda name: True)
    if path.suffix == ".tar":
        with pytest.raises(UserError, match="is refused"):
            list_tar(path)


BLOCK, RECORD = 512, 10240
FOUR = {f"{number}.jpg": bytes([number]) * 1000 for number in range(1, 5)}  # members of three blocks each


def damaged(path: Path, at: int, data: bytes) -> Path:
    """The file with other bytes from `at` on."""
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)
    return path


def names(path: Path) -> list[str]:
    return [member.name for member in list_tar(path).members]


@pytest.mark.parametrize("filling", [b"\0", b"\xff"], ids=["zeros", "garbage"])
@pytest.mark.parametrize(("first", "blocks", "left"), [(3, 1, "134"), (3, 4, "14"), (2, 2, "134"), (0, 3, "234")])
def test_a_hole_costs_the_members_whose_headers_it_covers(
    tmp_path: Path, first: int, blocks: int, left: str, filling: bytes
) -> None:
    path = damaged(write_tar(tmp_path / "hole.tar", FOUR), first * BLOCK, filling * blocks * BLOCK)
    if filling != b"\0" and first == 0:
        with pytest.raises(UserError, match=r"hole\.tar cannot be read"):
            list_tar(path)
        return
    assert names(path) == [f"{number}.jpg" for number in left]
    (lost,) = list_tar(path).lost
    assert lost.name == str(path)
    header = -(-first // 3) * 3  # the first header within the hole; the next one that is whole comes after the hole
    following = (-(-(first + blocks) // 3)) * 3
    assert lost.reason == f"is damaged from byte {header * BLOCK} to byte {following * BLOCK}: what lay there is lost"


def test_a_hole_up_to_the_end(tmp_path: Path) -> None:
    contents = {f"{number:02}.jpg": bytes([number + 1]) * 1000 for number in range(20)}
    path = write_tar(tmp_path / "hole.tar", contents)
    damaged(path, 6 * BLOCK, bytes(path.stat().st_size - 6 * BLOCK))
    assert names(path) == ["00.jpg", "01.jpg"]
    assert [lost.reason for lost in list_tar(path).lost] == [
        "holds nothing but zeros from byte 3072 on: what lay there is lost"
    ]
    path.write_bytes(bytes(50_000))
    assert [lost.reason for lost in list_tar(path).lost] == [
        "holds nothing but zeros from byte 0 on: what lay there is lost"
    ]


@pytest.mark.parametrize("end", [3 * BLOCK, 3 * BLOCK + 100, 4 * BLOCK, 5 * BLOCK])
def test_an_archive_that_breaks_off(tmp_path: Path, end: int) -> None:
    path = write_tar(tmp_path / "cut.tar", FOUR)
    os.truncate(path, end)
    listing = list_tar(path)
    (lost,) = listing.lost
    assert lost.name == str(path)
    assert lost.reason.startswith(("breaks off at byte", "is damaged from byte"))
    whole = [member.name for member in listing.members if member.offset + member.size <= end]
    assert whole == ["1.jpg"], "a member that is cut off is listed, and cannot be read"


def test_a_damaged_tar_inside_a_tar_is_not_read_beyond_its_end(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", FOUR).read_bytes()
    outer = write_tar(tmp_path / "outer.tar", {"a.tar": inner[: 6 * BLOCK], "b.tar": inner})
    first, second = list_tar(outer).members
    listing = list_tar(outer, first.offset, first.size)
    assert [member.name for member in listing.members] == ["1.jpg", "2.jpg"]
    assert [lost.reason[:24] for lost in listing.lost] == ["breaks off at byte 3072,"]
    assert list_tar(outer, second.offset, second.size).lost == []


def test_of_two_copies_of_a_member_the_later_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.jpg", b"old"), ("b.jpg", b"b"), ("./a.jpg", b"new")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    listing = list_tar(path)
    data = path.read_bytes()
    assert [data[member.offset : member.offset + member.size] for member in listing.members] == [b"b", b"new"]
    assert [tuple(lost) for lost in listing.lost] == [
        (f"{path}/a.jpg", "is replaced by a later copy in the same archive")
    ]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_settings_of_the_whole_archive_are_no_damage(tmp_path: Path, form: int) -> None:
    names = ["short.jpg", "n" * 90 + "/" + "m" * 60 + ".jpg"]
    names += ["ä" * 80 + ".jpg"] if form != tarfile.USTAR_FORMAT else []
    headers = {"comment": "made by a test"} if form == tarfile.PAX_FORMAT else None
    with tarfile.open(tmp_path / "long.tar", "w", format=form, pax_headers=headers) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    listing = list_tar(tmp_path / "long.tar")
    assert [member.name for member in listing.members] == names
    assert listing.lost == []


@pytest.mark.parametrize("name", ["kit.tar.gz", "kit.tar"])
def test_a_compressed_archive_is_read_to_its_checksum(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / name, {"a.txt": b"one" * 100, "b.txt": b"two" * 100})
    assert read_members(path, lambda name: name == "a.txt") == {"a.txt": b"one" * 100}
    data = path.read_bytes()
    if path.suffix == ".gz":
        damaged(path, len(data) - 6, bytes([data[-6] ^ 1]))  # the checksum itself: every byte before it is right
    else:
        damaged(path, 2 * BLOCK, bytes(BLOCK))
    with pytest.raises(UserError, match=f"{name} (cannot be read|is damaged)"):
        read_members(path, lambda name: name == "a.txt")


def test_two_members_of_one_name_are_not_chosen_from(tmp_path: Path) -> None:
    path = tmp_path / "kit.tar"
    with tarfile.open(path, "w") as tar:
        for data in (b"old", b"new"):
            info = tarfile.TarInfo("a.txt")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match=r"holds a\.txt twice"):
        read_members(path, lambda name: True)


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "text.tar"
    path.write_text("not an archive" * 100)
    for read in (lambda: list_tar(path), lambda: read_members(path, lambda name: True)):
        with pytest.raises(UserError, match=r"text\.tar cannot be read"):
            read()
