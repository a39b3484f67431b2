"""Which weights an adapter trains when its client names them."""

import pytest

from gradstream.engine.adapters.layout import Site, SiteGroup, SiteKind, layout_for
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.wire import LoraSpec

DENSE = {"q_proj": "attn", "v_proj": "attn", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}


def sites(*, experts: bool = False) -> list[Site]:
    """Two layers; the second one's MLP has experts when experts is true."""
    found = []
    for layer in range(2):
        for name, group in DENSE.items():
            is_expert = experts and layer == 1 and group == "mlp"
            if is_expert and name == "up_proj":
                continue
            last = "gate_up_proj" if is_expert and name == "gate_proj" else name
            part = "self_attn" if group == "attn" else "mlp.experts" if is_expert else "mlp"
            found.append(
                Site(
                    index=len(found),
                    name=f"model.layers.{layer}.{part}.{last}",
                    kind=SiteKind.EXPERTS if is_expert else SiteKind.LINEAR,
                    group=SiteGroup(group),
                    in_features=4,
                    out_features=4,
                    num_experts=2 if is_expert else 0,
                )
            )
    return found


def chosen(names: list[str] | None, *, experts: bool = False, **switches: bool) -> list[str]:
    layout = layout_for(sites(experts=experts), LoraSpec(rank=2, target_modules=names, **switches))
    return [site.name.removeprefix("model.layers.") for site in layout.sites]


def test_without_names_everything_that_the_switches_allow_is_trained():
    assert len(chosen(None)) == 10
    assert len(chosen(None, train_mlp=False)) == 4


def test_only_the_named_modules_are_trained_in_the_models_own_order():
    assert chosen(["v_proj", "q_proj"]) == [
        "0.self_attn.q_proj",
        "0.self_attn.v_proj",
        "1.self_attn.q_proj",
        "1.self_attn.v_proj",
    ]


def test_gate_and_up_together_mean_the_fused_weight_of_experts_too():
    names = ["gate_proj", "up_proj"]
    assert chosen(names, experts=True) == ["0.mlp.gate_proj", "0.mlp.up_proj", "1.mlp.experts.gate_up_proj"]


def test_the_fused_weight_has_a_name_of_its_own():
    assert chosen(["gate_up_proj"], experts=True) == ["1.mlp.experts.gate_up_proj"]


@pytest.mark.parametrize(
    ("names", "message"),
    [(["k_proj"], "k_proj; modules that can have an adapter here are down_proj"), ([], "empty; modules")],
)
def test_a_name_of_nothing_is_refused_with_the_names_there_are(names, message):
    with pytest.raises(InvalidRequest, match=message):
        chosen(names)


def test_a_module_that_a_switch_leaves_out_is_refused():
    with pytest.raises(InvalidRequest, match="down_proj; modules that can have an adapter here are q_proj, v_proj"):
        chosen(["down_proj"], train_mlp=False)
