"""What a server and a gang that was started by hand must have configured alike."""

from pathlib import Path

import msgspec
import pytest

from gradstream.shared.config import Settings, resolve
from gradstream.shared.config.agreement import (
    LOCAL,
    decode_terms,
    disagreements,
    encode_terms,
    terms_of_engine,
    terms_of_gang,
)
from gradstream.shared.config.fields import FIELDS
from gradstream.shared.config.machine import Machine

MODEL = str(Path(__file__).parents[3] / "tests/models/tiny-qwen3-shakespeare")


def settings(*, has_cuda: bool = False, **values: object) -> Settings:
    given = {"model_path": MODEL, "model_name": "tiny", "enable_lora": True, "output_dir": "out", **values}
    written = msgspec.convert({**given, "explicit": sorted(given)}, Settings)
    return resolve(written, Machine(num_cores=2, has_cuda=has_cuda, cache_dir=Path(MODEL))).settings


def test_the_same_config_agrees_on_machines_that_resolve_it_differently() -> None:
    head, node = settings(), settings(has_cuda=True)
    assert head.attn_implementation != node.attn_implementation
    assert disagreements(terms_of_engine(node), terms_of_engine(head)) == []


def test_ranks_on_machines_that_resolve_a_config_differently_do_not_agree() -> None:
    found = disagreements(terms_of_gang(settings(has_cuda=True)), terms_of_gang(settings()))
    assert "device: cuda here, cpu there" in found


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lora_alpha": 8.0}, "lora_alpha: 8.0 here, 16.0 there"),
        ({"batch_isolation": "strict"}, "batch_isolation: strict here, shared there"),
        ({"num_ranks": 2}, "num_ranks: 2 here, 1 there"),
        ({"model_aliases": ["a"]}, 'model_aliases: ["a"] here, [] there'),
        ({"storage_limit": 5}, "storage_limit: 5 here, 10995116277760 there"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_field_that_differs_is_named_with_both_values(values: dict[str, object], sentence: str) -> None:
    assert disagreements(terms_of_engine(settings(**values)), terms_of_engine(settings()))[0] == sentence


@pytest.mark.parametrize(
    "values", [{"num_ranks": 2}, {"data_parallel_replicate_size": 2}], ids=["num_ranks", "data_parallel_replicate_size"]
)
def test_the_number_of_ranks_may_be_written_either_way(values: dict[str, object]) -> None:
    assert disagreements(terms_of_engine(settings(num_ranks=2)), terms_of_engine(settings(**values))) == []


def test_local_fields_may_differ_and_stay_private() -> None:
    mine, theirs = settings(redis_url="redis://me:secret@h", api_port=1, log_level="DEBUG"), settings(api_port=2)
    for terms in (terms_of_engine, terms_of_gang):
        assert disagreements(terms(mine), terms(theirs)) == []
        assert b"secret" not in encode_terms(terms(mine))


def test_every_local_field_exists() -> None:
    assert FIELDS.keys() >= LOCAL


def test_terms_survive_being_written_and_read() -> None:
    terms = terms_of_engine(settings(foundation={}, session_grace_s=1.5))
    assert decode_terms(encode_terms(terms)) == terms


def test_a_field_that_the_other_side_does_not_know_differs() -> None:
    mine = terms_of_engine(settings())
    theirs = {name: value for name, value in mine.items() if name != "seed"}
    assert disagreements(mine, theirs) == ["seed: 42 here, unknown there"]
