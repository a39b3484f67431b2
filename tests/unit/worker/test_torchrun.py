from pathlib import Path

from gradstream.worker.torchrun import _meeting_in_files


def test_ranks_of_one_machine_meet_in_files_and_not_at_a_port():
    arguments = ["--standalone", "--nproc-per-node", "2", "-m", "gradstream.worker", "--settings", "s.json"]
    changed = _meeting_in_files(arguments, Path("/private"))
    assert "--standalone" not in changed
    assert changed[:6] == [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "/private/rendezvous",
        "--rdzv-conf",
        "store_type=file",
    ]
    assert changed[8:] == ["--log-dir", "/private/logs", *arguments[1:], "--meet", "/private/ranks"]


def test_an_address_that_was_given_is_kept():
    arguments = ["--nnodes", "1", "--master-addr", "127.0.0.1", "-m", "gradstream.worker"]
    assert _meeting_in_files(arguments, Path("/private")) == arguments
