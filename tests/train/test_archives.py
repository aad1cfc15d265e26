"""Archives are read where they lie; what would reach outside of them is refused."""

import io
import tarfile
from pathlib import Path

import pytest

from sdnet.train.data.archives import read_members, tar_members
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


def test_members_lie_where_they_are_said_to(tmp_path):
    contents = {"a/one.jpg": b"1" * 700, "a/two.jpg": b"", "three.jpg": b"3"}
    path = write_tar(tmp_path / "plain.tar", contents)
    data = path.read_bytes()
    found = {member.name: data[member.offset : member.offset + member.size] for member in tar_members(path)}
    assert found == contents


def test_a_tar_inside_a_tar_is_read_in_place(tmp_path):
    inner = {
        name: write_tar(tmp_path / name, {f"{name}.jpg": name.encode()}).read_bytes() for name in ("a.tar", "b.tar")
    }
    path = write_tar(tmp_path / "outer.tar", inner)
    outer = {member.name: member for member in tar_members(path)}
    (member,) = tar_members(path, outer["b.tar"].offset, outer["b.tar"].size)
    assert member.name == "b.tar.jpg"
    assert path.read_bytes()[member.offset : member.offset + member.size] == b"b.tar"


@pytest.mark.parametrize("extra", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", ["hostile.tar", "hostile.tar.gz"])
def test_a_hostile_member_is_refused(tmp_path, name, extra):
    path = write_tar(tmp_path / name, {"fine.jpg": b"1"}, extra)
    with pytest.raises(UserError, match=f"{path} is refused: its member {extra.name} "):
        read_members(path, lambda name: True)
    if path.suffix == ".tar":
        with pytest.raises(UserError, match="is refused"):
            list(tar_members(path))


def test_an_archive_that_breaks_off(tmp_path):
    path = write_tar(tmp_path / "cut.tar", {"one.jpg": b"1" * 5000})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cut\.tar"):
        list(tar_members(path))


def test_a_file_that_is_no_archive(tmp_path):
    path = tmp_path / "text.tar"
    path.write_text("not an archive" * 100)
    for read in (lambda: list(tar_members(path)), lambda: read_members(path, lambda name: True)):
        with pytest.raises(UserError, match=r"text\.tar cannot be read"):
            read()
