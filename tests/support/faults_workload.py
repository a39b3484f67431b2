"""Several deterministic clients at work, and the unharmed run that they are compared with."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import tinker

from tests.support.faults_client import API_KEY, GROUP, PATIENCE_S, Client, Diary, Progress


class Workload:
    """Several clients of one session, each in a thread of its own between start() and finish()."""

    def __init__(self, url: str, output_dir: Path, *, num_clients: int = 3) -> None:
        self.progress = Progress()
        self._service = tinker.ServiceClient(base_url=url, api_key=API_KEY)
        self.clients = [
            Client(self._service, output_dir, number=number, progress=self.progress) for number in range(num_clients)
        ]
        self._finishing = threading.Event()
        self._may_run = threading.Event()
        self._may_run.set()
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def open(self) -> None:
        """Create every client's model, in order."""
        for client in self.clients:
            client.open()

    def start(self) -> None:
        """Run rounds in the background until finish()."""
        for client in self.clients:
            thread = threading.Thread(target=self._run, args=(client,), name=f"client-{client.number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def pause(self) -> None:
        """Return when every client stands still behind a save, with nothing under way."""
        self._may_run.clear()
        deadline = time.monotonic() + PATIENCE_S
        while not all(client.is_paused for client in self.clients):
            self.check()
            assert time.monotonic() < deadline, "the clients did not come to a stand"
            time.sleep(0.02)

    def resume(self) -> None:
        """Let the clients go on."""
        self._may_run.set()

    def check(self) -> None:
        """Raise what ended a client."""
        for error in self._errors:
            raise error

    def finish(self, *, min_rounds: int = GROUP) -> None:
        """Let each client run on to the first save at or after min_rounds, and wait for that. Raises what ended a client."""
        for client in self.clients:
            client.min_rounds = min_rounds
        self._finishing.set()
        self.resume()
        for thread in self._threads:
            thread.join(2 * PATIENCE_S)
            assert self._errors or not thread.is_alive(), f"{thread.name} did not finish"
        self.check()

    def close(self) -> None:
        """End the SDK's background work."""
        self._finishing.set()
        self.resume()
        self._service.holder.close()

    def _run(self, client: Client) -> None:
        try:
            while not (self._finishing.is_set() and client.is_at_a_save and client.round >= client.min_rounds):
                if self._errors:
                    return
                if client.is_at_a_save and not self._may_run.is_set():
                    client.is_paused = True
                    self._may_run.wait()
                    client.is_paused = False
                client.run_round()
        except BaseException as error:  # noqa: BLE001  raised again by check()
            error.add_note(f"in client {client.number}, round {client.round}")
            self._errors.append(error)


class Reference:
    """What an unharmed server answers to the same program, computed as far as it is asked for."""

    def __init__(self, url: str, output_dir: Path) -> None:
        self._workload = Workload(url, output_dir)
        self._workload.open()

    def close(self) -> None:
        self._workload.close()

    def diary_of(self, number: int, *, rounds: int) -> Diary:
        """What client `number` notes in its first `rounds` rounds."""
        client = self._workload.clients[number]
        while client.round < rounds:
            client.run_round()
        return upto(client.diary, rounds=rounds)


def upto(diary: Diary, *, rounds: int) -> Diary:
    """The notes of the first `rounds` rounds."""
    return {name: value for name, value in diary.items() if int(name.split()[3]) < rounds}


def differences(found: Diary, expected: Diary) -> list[str]:
    """One line for each note that is missing, surplus or different, in the order of the rounds."""
    names = sorted(found.keys() | expected.keys(), key=lambda name: (int(name.split()[3]), name))
    return [
        f"{name}: {found.get(name, 'missing')} instead of {expected.get(name, 'nothing')}"
        for name in names
        if found.get(name) != expected.get(name)
    ]


def compare(workload: Workload, reference: Reference) -> Sequence[str]:
    """How the clients' notes differ from the unharmed run's; empty when every bit agrees."""
    lines = []
    for client in workload.clients:
        lines += differences(client.diary, reference.diary_of(client.number, rounds=client.round))
    return lines
