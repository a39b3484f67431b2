"""The archive of a checkpoint's files."""

import tarfile
from pathlib import Path

from gradstream.api.files import Files, tar_size, tar_stream


def test_the_files_are_one_archive_of_the_size_that_was_told(tmp_path: Path) -> None:
    sizes = {".metadata": 700, "__0_0.distcp": 5000}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(range(250)) * (size // 250))
    files = Files(directory=tmp_path, sizes={name: (tmp_path / name).stat().st_size for name in sizes})
    archive = tmp_path / "archive.tar"
    archive.write_bytes(b"".join(tar_stream(files)))
    assert archive.stat().st_size == tar_size(files)
    with tarfile.open(archive) as tar:
        for name in sizes:
            member = tar.extractfile(name)
            assert member is not None
            assert member.read() == (tmp_path / name).read_bytes()


def test_a_file_of_more_than_8_gib_can_be_in_it(tmp_path: Path) -> None:
    size = 9 << 30
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)
    header = next(tar_stream(Files(directory=tmp_path, sizes={"large": size})))
    assert len(header) == tarfile.BLOCKSIZE
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").size == size
