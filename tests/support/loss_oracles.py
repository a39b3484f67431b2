"""Every loss as its formula reads, one token at a time in plain autograd, and arguments to try it on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstream.engine.losses._base import LOSSES, TARGETS, LossArguments
from gradstream.shared.loss_config import Value, loss_params

# What a card's inputs are drawn from; tokens 2 and 5 of 8 are switched off.
OFF = [2, 5]
LENGTHS = [5, 3]
SWITCHES = {"weights", "advantages", "sequence_ratio_mask"}
# Settings of each loss that take another path than its defaults do.
CONFIGS: Mapping[str, Sequence[Mapping[str, float | str]]] = {
    "ppo": [{"clip_low_threshold": 0.5, "clip_high_threshold": 3.0}],
    "cispo": [{"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}],
    "dro": [{"beta": 0.0}, {"beta": 2.0}],
    "gspo": [{"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}],
    "policy_loss": [
        {"eps_clip": 0.5, "eps_clip_high": 1.0},
        {"eps_clip_c": 1.5},
        {"use_tis": 1.0},
        {"use_tis": 1.0, "tis_clip_low": 0.9, "tis_clip_high": 1.1},
        {"icepop_beta": 2.0},
        {"eps_clip_c": 3.0, "use_tis": 1.0, "icepop_beta": 3.0},
    ],
    "drgrpo": [
        {"ratio_type": "sequence"},
        {"beta": 0.5},
        {"beta": 0.5, "kl_type": "k1"},
        {"beta": 0.5, "kl_type": "k2", "ratio_type": "sequence", "clip_low": 0.9, "clip_high": 9.0},
    ],
}
CASES = [(name, config) for name in sorted(LOSSES) for config in ({}, *CONFIGS.get(name, ()))]


def case_name(case: object) -> str:
    return case if isinstance(case, str) else ",".join(f"{key}={value}" for key, value in dict(case).items()) or "plain"  # type: ignore[call-overload]


def arguments_of(name: str, config: Mapping[str, float | str], *, candidates: int = 1, seed: int = 0) -> LossArguments:
    """Arguments of two datums in float64, with advantages and weights of both signs."""
    generator = torch.Generator().manual_seed(seed)
    card = LOSSES[name].card
    params = loss_params(card, config)
    inputs = {}
    for spec in card.inputs:
        if spec.name == TARGETS:
            continue
        values = torch.randn(8, candidates, dtype=torch.float64, generator=generator)
        if spec.name == "sequence_ratio_mask":
            values = (values > -1).double()
        if spec.name.endswith("logprobs"):
            values = -values.abs()
        if spec.name in SWITCHES:
            values[OFF] = 0.0
        if spec.fallback is not None:
            stand_in = params[spec.fallback]
            assert isinstance(stand_in, float)
            values = torch.full_like(values, stand_in)
        inputs[spec.name] = values
    logprobs = -torch.randn(8, candidates, dtype=torch.float64, generator=generator).abs()
    return LossArguments(logprobs_TC=logprobs, held_TC=logprobs, inputs=inputs, params=params, lengths=LENGTHS)


@dataclass(frozen=True, slots=True)
class Token:
    """One token's numbers: p the log-probability, and the loss's inputs by name."""

    p: Tensor
    inputs: Mapping[str, Tensor]
    params: Mapping[str, Value]

    def __getattr__(self, name: str) -> Tensor:
        return self.inputs[name]

    def number(self, name: str) -> float:
        value = self.params[name]
        assert isinstance(value, float)
        return value

    @property
    def ratio(self) -> Tensor:
        return torch.exp(self.p - self.inputs["logprobs"])


# The loss of one datum from its tokens that are on, differentiable by each p.
Oracle = Callable[[Sequence[Token]], Tensor]
ORACLES: dict[str, Oracle] = {}


def oracle(name: str) -> Callable[[Oracle], Oracle]:
    def enter(function: Oracle) -> Oracle:
        ORACLES[name] = function
        return function

    return enter


def total(tokens: Sequence[Token], term: Callable[[Token], Tensor]) -> Tensor:
    return sum((term(token) for token in tokens), start=torch.zeros((), dtype=torch.float64))


def surrogate(ratio: Tensor, advantage: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    bounded = torch.min(
        torch.max(ratio, torch.as_tensor(low, dtype=torch.float64)), torch.as_tensor(high, dtype=torch.float64)
    )
    return torch.min(ratio * advantage, bounded * advantage)


@oracle("cross_entropy")
@oracle("causallm_loss")
@oracle("per_token_ce")
def cross_entropy(tokens: Sequence[Token]) -> Tensor:
    return -total(tokens, lambda t: t.weights * t.p)


@oracle("importance_sampling")
def importance_sampling(tokens: Sequence[Token]) -> Tensor:
    return -total(tokens, lambda t: t.ratio * t.advantages)


@oracle("ppo")
def ppo(tokens: Sequence[Token]) -> Tensor:
    return -total(tokens, lambda t: surrogate(t.ratio, t.advantages, t.clip_low_threshold, t.clip_high_threshold))


@oracle("cispo")
def cispo(tokens: Sequence[Token]) -> Tensor:
    def term(t: Token) -> Tensor:
        weight = min(max(float(t.ratio.detach()), float(t.clip_low_threshold)), float(t.clip_high_threshold))
        return weight * t.advantages * t.p

    return -total(tokens, term)


@oracle("dro")
def dro(tokens: Sequence[Token]) -> Tensor:
    beta = tokens[0].number("beta")
    return -total(tokens, lambda t: t.p * t.advantages - 0.5 * beta * (t.p - t.logprobs) ** 2)


@oracle("gspo")
def gspo(tokens: Sequence[Token]) -> Tensor:
    masked = [t for t in tokens if float(t.sequence_ratio_mask)]
    mean = sum(float(t.p.detach() - t.logprobs) for t in masked) / len(masked)
    sequence_ratio = torch.exp(torch.tensor(mean, dtype=torch.float64))

    def term(t: Token) -> Tensor:
        ratio = sequence_ratio * torch.exp(t.p - t.p.detach())
        return surrogate(ratio, t.advantages, t.clip_low_threshold, t.clip_high_threshold)

    return -total(tokens, term)


@oracle("policy_loss")
def policy_loss(tokens: Sequence[Token]) -> Tensor:
    def term(t: Token) -> Tensor:
        loss = -surrogate(t.ratio, t.advantages, 1 - t.number("eps_clip"), 1 + t.number("eps_clip_high"))
        if t.params["eps_clip_c"] is not None and float(t.advantages) < 0:
            loss = torch.min(loss, -t.number("eps_clip_c") * t.advantages)
        gap = float(torch.exp(t.logprobs - t.rollout_logprobs))
        if t.params["use_tis"]:
            loss = loss * min(max(gap, t.number("tis_clip_low")), t.number("tis_clip_high"))
        beta = t.params["icepop_beta"]
        if isinstance(beta, float) and not 1 / beta <= gap <= beta:
            loss = loss * 0.0
        return loss

    return total(tokens, term)


@oracle("drgrpo")
def drgrpo(tokens: Sequence[Token]) -> Tensor:
    mean = total(tokens, lambda t: t.p - t.logprobs) / len(tokens)
    estimators: dict[Value, Callable[[Tensor], Tensor]] = {
        "k1": lambda x: -x,
        "k2": lambda x: x**2 / 2,
        "k3": lambda x: torch.exp(x) - x - 1,
    }

    def term(t: Token) -> Tensor:
        ratio = torch.exp(mean) if t.params["ratio_type"] == "sequence" else t.ratio
        gain = surrogate(ratio, t.advantages, 1 - t.number("clip_low"), 1 + t.number("clip_high"))
        return t.number("beta") * estimators[t.params["kl_type"]](t.ref_logprobs - t.p) - gain

    return total(tokens, term)


def true_loss(name: str, arguments: LossArguments, logprobs_TC: Tensor) -> Tensor:
    """The oracle's loss over all datums, without the tokens that are off."""
    switch = next(key for key in ("weights", "advantages") if key in arguments.inputs)
    losses = []
    ends = torch.tensor(arguments.lengths).cumsum(0).tolist()
    for end, length in zip(ends, arguments.lengths, strict=True):
        for c in range(logprobs_TC.shape[1]):
            tokens = [
                Token(logprobs_TC[t, c], {key: v[t, c] for key, v in arguments.inputs.items()}, arguments.params)
                for t in range(end - length, end)
                if float(arguments.inputs[switch][t, c])
            ]
            losses.append(ORACLES[name](tokens))
    return torch.stack(losses).sum()
