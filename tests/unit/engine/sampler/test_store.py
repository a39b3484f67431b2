import pytest
import torch

from gradstream.engine.adapters.adapter import FrozenAdapter
from gradstream.engine.adapters.layout import AdapterLayout
from gradstream.engine.sampler.store import Resident, SamplerStore
from gradstream.shared.errors import UnknownModel
from gradstream.shared.ids import TenantId

ME = TenantId("me")


def resident(num_params):
    layout = AdapterLayout(sites=(), rank=1)
    return Resident(adapter=FrozenAdapter(layout=layout, scale=1.0, weights=torch.zeros(num_params)), tenant=ME)


def kept(store, *uris):
    return [uri for uri in uris if store.get(uri, ME) is not None]


def test_the_least_recently_used_adapters_make_room():
    store = SamplerStore(max_bytes=12)
    for uri in "abc":
        store.put(uri, resident(1))
    store.get("a", ME)
    store.put("d", resident(1))
    assert kept(store, *"abcd") == ["a", "c", "d"]


def test_the_newest_adapter_stays_even_if_it_is_too_large():
    store = SamplerStore(max_bytes=12)
    store.put("a", resident(1))
    store.put("b", resident(100))
    assert kept(store, *"ab") == ["b"]


def test_an_adapter_put_again_replaces_the_old_one_and_counts_once():
    store = SamplerStore(max_bytes=12)
    store.put("b", resident(1))
    for _ in range(5):
        store.put("a", resident(2))
    assert kept(store, *"ab") == ["a", "b"]


def test_a_dropped_adapter_is_gone():
    store = SamplerStore()
    store.put("a", resident(1))
    store.drop("a")
    store.drop("never there")
    assert store.get("a", ME) is None


def test_another_tenant_is_told_that_there_is_no_such_checkpoint():
    store = SamplerStore()
    store.put("a", resident(1))
    with pytest.raises(UnknownModel, match="no checkpoint a"):
        store.get("a", TenantId("other"))
