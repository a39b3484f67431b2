"""The unmodified tinker SDK with API keys: a good one works, a bad one fails at once and clearly, tenants do not meet."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tinker
from tests.support.cards import MODEL_NAME
from tests.support.rig import FAST, running_rig
from tinker import types

from gradstream.shared.ids import TenantId
from gradstream.shared.keys import change_keys, mint


@dataclass(frozen=True, slots=True)
class Guarded:
    """A server and a key for each of two tenants."""

    url: str
    alice: str
    bob: str


@pytest.fixture
def guarded(redis_url: str, engine_name: str, tmp_path: Path) -> Iterator[Guarded]:
    made = {name: mint(TenantId(name), created_ms=0) for name in ("alice", "bob")}
    change_keys(tmp_path / "keys", lambda _: [key.stored for key in made.values()])
    with running_rig(redis_url, engine=engine_name, config=replace(FAST, keys_file=tmp_path / "keys")) as rig:
        yield Guarded(url=rig.base_url, **{name: key.text for name, key in made.items()})


@contextlib.contextmanager
def client(guarded: Guarded, key: str) -> Iterator[tinker.ServiceClient]:
    service = tinker.ServiceClient(base_url=guarded.url, api_key=key)
    try:
        yield service
    finally:
        service.holder.close()


def test_a_key_of_ours_passes_the_sdks_own_check_and_trains(guarded: Guarded) -> None:
    with client(guarded, guarded.alice) as service:
        trainer = service.create_lora_training_client(base_model=MODEL_NAME, rank=8)
        assert trainer.optim_step(types.AdamParams()).result().metrics == {"grad_norm": 0.0}


def test_a_wrong_key_fails_at_once_with_the_reason(guarded: Guarded) -> None:
    wrong = f"tml-00000000-{48 * '0'}"
    with pytest.raises(Exception, match=r"401|not known here") as caught:
        tinker.ServiceClient(base_url=guarded.url, api_key=wrong).create_lora_training_client(
            base_model=MODEL_NAME, rank=8
        )
    assert wrong not in str(caught.value)


def test_another_tenants_checkpoint_does_not_exist_for_the_sdk(guarded: Guarded) -> None:
    with client(guarded, guarded.alice) as alice, client(guarded, guarded.bob) as bob:
        trainer = alice.create_lora_training_client(base_model=MODEL_NAME, rank=8)
        path = trainer.save_state("mine").result().path
        assert alice.create_training_client_from_state(path).get_info().is_lora
        with pytest.raises(Exception, match="there is no checkpoint"):
            bob.create_training_client_from_state(path).get_info()
        with pytest.raises(Exception, match="there is no checkpoint"):
            bob.create_sampling_client(model_path=path.replace("/weights/", "/sampler_weights/")).sample(
                prompt=types.ModelInput.from_ints([1]),
                num_samples=1,
                sampling_params=types.SamplingParams(max_tokens=1),
            ).result()
