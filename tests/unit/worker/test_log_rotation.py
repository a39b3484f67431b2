"""A log begins anew above its size, under its writer's hands, and a few old ones stay."""

from gradstream.worker.echo import LogTail
from gradstream.worker.log_rotation import rotate

WARNING = b'{"level": "warning", "event": "%s"}\n'


def test_a_log_within_its_size_and_one_that_is_not_there_stay_as_they_are(tmp_path):
    path = tmp_path / "a.log"
    assert not rotate(path, max_bytes=3)
    path.write_bytes(b"abc")
    assert not rotate(path, max_bytes=3)
    assert [file.name for file in tmp_path.iterdir()] == ["a.log"]


def test_its_writer_goes_on_and_the_oldest_goes(tmp_path):
    path = tmp_path / "a.log"
    with path.open("ab", buffering=0) as writer:
        for number in range(5):
            writer.write(b"%d...\n" % number)
            assert rotate(path, max_bytes=3, num_kept=2)
        writer.write(b"now\n")
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert files == {"a.log": b"now\n", "a.log.1": b"4...\n", "a.log.2": b"3...\n"}


def test_a_follower_of_the_log_reads_on_after_it_was_rotated(tmp_path):
    path = tmp_path / "a.log"
    path.touch()
    tail = LogTail(path)
    with path.open("ab", buffering=0) as writer:
        writer.write(WARNING % b"first" * 3)
        assert [line.text for line in tail.read()] == ["first"] * 3
        rotate(path, max_bytes=10)
        writer.write(WARNING % b"second")
        assert [line.text for line in tail.read()] == ["second"]
