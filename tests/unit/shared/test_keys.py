"""API keys: their text, the file of their hashes, and the ring that is reloaded when the file changes."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gradstream.shared.clock import ManualClock
from gradstream.shared.ids import TenantId
from gradstream.shared.keys import KeyFileError, KeyRing, NewKey, WatchedKeys, change_keys, mint, read_keys

ALICE, BOB = TenantId("alice"), TenantId("bob")


def made(tenant: TenantId = ALICE) -> NewKey:
    return mint(tenant, created_ms=1_700_000_000_000)


def add(path: Path, key: NewKey) -> None:
    change_keys(path, lambda keys: (*keys, key.stored))


def test_a_key_starts_as_the_sdk_demands_and_no_two_are_alike() -> None:
    keys = [made() for _ in range(50)]
    assert all(key.text.startswith("tml-") for key in keys)
    assert len({key.text for key in keys}) == len({key.stored.digest for key in keys}) == 50


def test_a_ring_knows_its_own_keys_and_nothing_near_them() -> None:
    alice, bob, stranger = made(ALICE), made(BOB), made()
    ring = KeyRing([alice.stored, bob.stored])
    assert (ring.tenant_of(alice.text), ring.tenant_of(bob.text)) == (ALICE, BOB)
    assert ring.tenant_of(stranger.text) is None
    head, _, secret = bob.text.rpartition("-")
    last = "0" if secret[-1] != "0" else "1"
    wrong = [f"{head}-{secret[:-1]}{last}", f"{alice.text.rpartition('-')[0]}-{secret}", f"{bob.text}0", f" {bob.text}"]
    wrong += ["", "tml-", bob.stored.digest, bob.text.upper(), bob.text[:-1] + "\N{DIGIT ONE}\u0661", "x" * 10_000]
    assert [ring.tenant_of(text) for text in wrong] == [None] * len(wrong)


def test_the_same_secret_is_never_stored_alike(tmp_path: Path) -> None:
    key = made()
    add(tmp_path / "keys", key)
    text = (tmp_path / "keys").read_text()
    assert key.text not in text
    assert key.text.rpartition("-")[2] not in text
    assert key.text not in repr(key)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-a", "a" * 65, "a:b", "\u00e4"])
def test_a_tenant_that_could_not_be_stored_gets_no_key(name: str) -> None:
    with pytest.raises(ValueError, match="use 1 to 64 letters"):
        made(TenantId(name))


def test_the_file_is_private_and_keeps_the_order(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = [made(TenantId(f"t{n}")) for n in range(3)]
    for key in keys:
        add(path, key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_keys(path) == tuple(key.stored for key in keys)


def test_changes_at_the_same_time_all_count(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: add(tmp_path / "keys", made()), range(24)))
    assert len(read_keys(tmp_path / "keys")) == 24


def test_a_change_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    add(path, made())
    before = path.read_bytes()

    def fail(_keys: object) -> list:
        raise KeyFileError("no")

    with pytest.raises(KeyFileError, match="no"):
        change_keys(path, fail)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is no key file"),
        ("[]", "is no key file"),
        ("\xff", "is no key file"),
        ('{"version": 2, "keys": []}', "version 2; this gradstream reads version 1"),
        ('{"version": 1, "keys": [], "more": 1}', "is no key file"),
        (
            '{"version":1,"keys":[{"key_id":"a","tenant":"a b","salt":"","digest":"","created_ms":1}]}',
            "'a b' is no tenant's name",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(KeyFileError, match=problem):
        read_keys(path)


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    add(path, made())
    path.chmod(0o620)
    with pytest.raises(KeyFileError, match="chmod 600"):
        read_keys(path)


def test_a_change_counts_a_second_later_and_a_revoked_key_is_out(tmp_path: Path) -> None:
    path, clock, alice, bob = tmp_path / "keys", ManualClock(), made(ALICE), made(BOB)
    add(path, alice)
    watched = WatchedKeys(path, clock=clock)
    assert watched.ring().tenant_of(alice.text) == ALICE
    change_keys(path, lambda _: [bob.stored])
    clock.advance(1.0)
    assert (watched.ring().tenant_of(alice.text), watched.ring().tenant_of(bob.text)) == (None, BOB)


def test_a_broken_file_leaves_the_keys_in_force_and_a_missing_one_lets_nobody_in(tmp_path: Path) -> None:
    path, clock, alice = tmp_path / "keys", ManualClock(), made(ALICE)
    add(path, alice)
    watched = WatchedKeys(path, clock=clock)
    assert len(watched.ring()) == 1
    path.write_text("{")
    clock.advance(1.0)
    assert watched.ring().tenant_of(alice.text) == ALICE
    path.unlink()
    clock.advance(1.0)
    assert watched.ring().tenant_of(alice.text) is None
    add(path, alice)
    clock.advance(1.0)
    assert watched.ring().tenant_of(alice.text) == ALICE


def test_a_file_that_never_was_good_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("{")
    assert len(WatchedKeys(tmp_path / "keys", clock=ManualClock()).ring()) == 0
