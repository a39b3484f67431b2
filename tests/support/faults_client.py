"""One client of a server: the stock tinker SDK, a fixed program, and everything that came back.

The program goes in rounds. What a client notes in round r depends on the client's number and on r only, so two runs can be
compared round by round, however far each came.
"""

import hashlib
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import tinker
from safetensors.numpy import load, load_file
from tinker import types

BASE_MODEL = "gradstream/tiny-qwen3-shakespeare"
API_KEY = "tml-faults"
# Rounds come in groups that end with a save, so that the state at the end of every group is known.
GROUP = 4
# How long a client waits for one answer; the SDK itself gives up on a refused request after five minutes.
PATIENCE_S = 240.0
_SAMPLE_TOKENS = 12

T = TypeVar("T")
# What was noted under a name: numbers as repr, arrays and weights as digests.
Diary = dict[str, str]


@dataclass(slots=True)
class Progress:
    """When answers arrived, for recovery times. times_s: time.monotonic() of each."""

    times_s: list[float] = field(default_factory=list)

    def note(self) -> None:
        self.times_s.append(time.monotonic())

    def longest_pause_s(self, *, since_s: float, until_s: float) -> float:
        """The longest time without an answer to anybody, between the last one before since_s and the first one after until_s."""
        times = list(self.times_s)
        first = max(0, bisect_left(times, since_s) - 1)
        last = bisect_right(times, until_s)
        return max((later - earlier for earlier, later in pairwise(times[first : last + 1])), default=0.0)


class Client:
    """One client's program: trains one model after another, with saves, loads and samples between.

    Client 0 trains only; client 1 loads its saves again, and goes on in a new model made from one; client 2 samples.
    """

    def __init__(self, service: tinker.ServiceClient, output_dir: Path, *, number: int, progress: Progress) -> None:
        self.number = number
        self.round = 0
        # The end of the run: the first save at or after so many rounds.
        self.min_rounds = GROUP
        self.is_paused = False
        self.diary: Diary = {}
        self.model_ids: list[str] = []
        self._service = service
        self._output_dir = output_dir
        self._progress = progress
        self._training: tinker.TrainingClient | None = None
        self._saved: str | None = None

    @property
    def training(self) -> tinker.TrainingClient:
        assert self._training is not None, "open() was not called"
        return self._training

    @property
    def is_at_a_save(self) -> bool:
        return self.round % GROUP == 0

    def open(self) -> None:
        """Create the model."""
        self._take(
            self._service.create_lora_training_client(
                base_model=BASE_MODEL, rank=(4, 8, 2)[self.number % 3], seed=100 + self.number
            )
        )

    def run_round(self) -> None:
        """The next round, to its end."""
        number, name = self.round, f"client {self.number} round {self.round}"
        generator = np.random.default_rng([self.number, number])
        # All four are on their way before the first answer: pipelining, as training scripts do it.
        passes = [self.training.forward_backward(_data(generator), "cross_entropy") for _ in range(2)]
        step = self.training.optim_step(types.AdamParams(learning_rate=1e-3, grad_clip_norm=1.0))
        check = self.training.forward(_data(generator), "cross_entropy")
        for index, one in enumerate((*passes, check)):
            self._note_pass(f"{name} pass {index}", self._answer(one))
        metrics = self._answer(step).metrics or {}
        self.diary[f"{name} step"] = f"{metrics['step']:g} norm {metrics['grad_norm']!r}"
        if number % GROUP == GROUP - 1:
            self._save(name, number)
        if self.number == 2 and number % GROUP == 1:
            self._sample(name, number)
        if self.number == 1 and number % GROUP == 1 and self._saved is not None:
            self._go_back(name, number)
        self.round += 1

    def final_weights(self) -> str:
        """The digest of the weights as the client downloads them through the API, by an export."""
        path = self._answer(self.training.save_weights_external(f"final-{self.round}")).path
        links = self._answer(self._service.create_rest_client().get_external_weights_urls(path)).urls
        (url,) = [link for name, link in links.items() if name.endswith(".safetensors")]
        return tensors_digest(load(_download(url)))

    def _save(self, name: str, number: int) -> None:
        self._saved = self._answer(self.training.save_state(f"round-{number}", overwrite=False)).path
        directory = self.directory_of(self._saved)
        files = sorted(directory.glob("*.safetensors"))
        assert files, f"{self._saved} was saved without a file in {directory}"
        for file in files:
            self.diary[f"{name} saved {file.name}"] = tensors_digest(load_file(file))

    def directory_of(self, path: str) -> Path:
        """Where the server keeps the checkpoint of this tinker:// path."""
        model, kind, name = path.removeprefix("tinker://").split("/")
        return self._output_dir / "checkpoints" / model.replace(":", "+") / kind / name

    def _sample(self, name: str, number: int) -> None:
        path = self._answer(self.training.save_weights_for_sampler(f"round-{number}")).path
        sampler = self._service.create_sampling_client(model_path=path)
        params = types.SamplingParams(max_tokens=_SAMPLE_TOKENS, temperature=0.8, seed=number)
        prompt = types.ModelInput.from_ints([5, 6, 7 + number % 50])
        answer = self._answer(sampler.sample(prompt, num_samples=2, sampling_params=params))
        # The tokens only: their log-probabilities may differ in the last bit with those who sample beside.
        self.diary[f"{name} sampled"] = str([sequence.tokens for sequence in answer.sequences])

    def _go_back(self, name: str, number: int) -> None:
        assert self._saved is not None
        if number % (2 * GROUP) == 1:
            self._take(self._service.create_training_client_from_state_with_optimizer(self._saved))
        else:
            self._answer(self.training.load_state_with_optimizer(self._saved))
        self.diary[f"{name} went back"] = self._saved.rpartition("/")[2]

    def _take(self, training: tinker.TrainingClient) -> None:
        self._training = training
        self.model_ids.append(str(training.model_id))
        self._progress.note()

    def _answer(self, future: Any) -> Any:  # Any: the SDK's futures of many types
        answer = future.result(timeout=PATIENCE_S)
        self._progress.note()
        return answer

    def _note_pass(self, name: str, result: types.ForwardBackwardOutput) -> None:
        self.diary[f"{name} loss"] = repr(result.metrics["loss:sum"])
        logprobs = [np.asarray(out["logprobs"].data, dtype="<f4").tobytes() for out in result.loss_fn_outputs]
        self.diary[f"{name} logprobs"] = digest(b"".join(logprobs))


def tensors_digest(tensors: dict[str, "np.ndarray[Any, Any]"]) -> str:
    """The digest of names, types, shapes and bits."""
    parts = [
        f"{name} {tensors[name].dtype} {tensors[name].shape}".encode() + tensors[name].tobytes()
        for name in sorted(tensors)
    ]
    return digest(b"".join(parts))


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _data(generator: np.random.Generator) -> list[types.Datum]:
    """Two to four datums of 8 to 48 random tokens."""
    data = []
    for length in generator.integers(8, 49, size=int(generator.integers(2, 5))):
        tokens = [int(token) for token in generator.integers(3, 200, size=int(length) + 1)]
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * int(length)},
            )
        )
    return data


def _download(url: str) -> bytes:
    """The file behind a link; a server that is away is waited for."""

    def get() -> httpx.Response:
        return httpx.get(url, timeout=30, trust_env=False)

    return patiently(get, lambda answer: answer.status_code == 200).content


def patiently(call: Callable[[], T], accepts: Callable[[T], bool], *, timeout_s: float = PATIENCE_S) -> T:
    """The first accepted answer; transport errors and refusals are tried again until timeout_s is over."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            answer = call()
            if accepts(answer):
                return answer
            last = answer
        except httpx.TransportError as error:
            last = error
        time.sleep(0.2)
    raise AssertionError(f"no answer that counts within {timeout_s:g} s; the last: {last!r}")
