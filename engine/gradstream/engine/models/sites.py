"""The weights of a Hugging Face model that adapters can change, found by the names its families share."""

from torch import Tensor, nn

from gradstream.engine.adapters.layout import Site, SiteGroup, SiteKind
from gradstream.engine.adapters.modules import AdaptedExperts, AdaptedLinear, PassSlot
from gradstream.engine.models.fused import replace
from gradstream.shared.errors import Unsupported

_ATTN = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_EXPERT_FACTS = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
_HEAD = "lm_head"


def adapt(model: nn.Module, slot: PassSlot, *, is_grouped: bool = False) -> list[Site]:
    """Put our modules in the place of the model's linear layers and experts; returns all sites, the head last.

    is_grouped: experts go through torch's grouped product.

    Raises Unsupported when a layer does not have the projections that adapters are defined on.
    """
    sites: list[Site] = []
    layers = model.get_submodule("model.layers")
    for number, layer in enumerate(layers.children()):
        prefix = f"model.layers.{number}"
        found = _adapt_layer(layer, prefix=prefix, slot=slot, first_index=len(sites), is_grouped=is_grouped)
        names = {site.name.rpartition(".")[2] for site in found}
        missing = [name for name in _ATTN if name not in names]
        if missing:
            raise Unsupported(
                f"model: {type(model).__name__}: {prefix} has no {', '.join(missing)}; adapters need separate "
                "q_proj, k_proj, v_proj and o_proj, as in the Llama and Qwen3 families"
            )
        sites.extend(found)
    head = model.get_submodule(_HEAD)
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        raise Unsupported(f"model: {type(model).__name__}: lm_head must be a linear layer without bias")
    sites.append(_linear_site(head, name=_HEAD, kind=SiteKind.HEAD, group=SiteGroup.UNEMBED, index=len(sites)))
    return sites


def _adapt_layer(layer: nn.Module, *, prefix: str, slot: PassSlot, first_index: int, is_grouped: bool) -> list[Site]:
    sites: list[Site] = []
    for path, module in list(layer.named_modules()):
        name = path.rpartition(".")[2]
        full = f"{prefix}.{path}"
        index = first_index + len(sites)
        if isinstance(module, nn.Linear) and name in _ATTN + _MLP:
            group = SiteGroup.ATTN if name in _ATTN else SiteGroup.MLP
            site = _linear_site(module, name=full, kind=SiteKind.LINEAR, group=group, index=index)
            replace(layer, path, AdaptedLinear(module, site=site, slot=slot))
            sites.append(site)
        elif isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            check_experts(module, full)
            gate_up = _expert_site(module, "gate_up_proj", prefix=full, index=index)
            down = _expert_site(module, "down_proj", prefix=full, index=index + 1)
            experts = AdaptedExperts(module, gate_up_site=gate_up, down_site=down, slot=slot, is_grouped=is_grouped)
            replace(layer, path, experts)
            sites.extend((gate_up, down))
    return sites


def check_experts(module: nn.Module, name: str) -> None:
    """Raise Unsupported, naming the module, unless its experts are fused and gated as this engine computes them."""
    if not hasattr(module, "_apply_gate"):
        raise Unsupported(f"model: {name}: {type(module).__name__} has no gate that this engine can call")
    for fact, wanted in _EXPERT_FACTS.items():
        value = getattr(module, fact, wanted)
        if value is not wanted:
            raise Unsupported(
                f"model: {name}: experts with {fact}={value} are not supported; only fused, gated, concatenated experts "
                "without bias are"
            )


def _linear_site(module: nn.Linear, *, name: str, kind: SiteKind, group: SiteGroup, index: int) -> Site:
    return Site(
        index=index, name=name, kind=kind, group=group, in_features=module.in_features, out_features=module.out_features
    )


def _expert_site(module: nn.Module, parameter: str, *, prefix: str, index: int) -> Site:
    weight: Tensor = module.get_parameter(parameter)
    num_experts, out_features, in_features = weight.shape
    return Site(
        index=index,
        name=f"{prefix}.{parameter}",
        kind=SiteKind.EXPERTS,
        group=SiteGroup.MLP,
        in_features=in_features,
        out_features=out_features,
        num_experts=num_experts,
    )
