"""When a sequence ends.

given by the client           EOS ends it    the given ids end it    the given texts end it
nothing (both None)           yes            -                       -
empty list                    no             -                       -
ids                           no             yes                     -
texts                         yes            -                       yes
ids and texts                 no             yes                     yes

Whatever ends it, the token that did stays in the sequence as its last one, exactly once; a stop text may begin many tokens earlier,
and the text of the last token may go on behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gradstream.engine.sampler.text import TextDecoder
from gradstream.shared.errors import Unsupported
from gradstream.shared.wire import SamplingParams

# A decoder may drop a leading space or spoil a cut character at the start of what it is given; these tokens take the damage.
_SLACK_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """The ids and texts that end one sequence. decoder is set when there are texts."""

    token_ids: frozenset[int]
    texts: tuple[str, ...] = ()
    decoder: TextDecoder | None = None

    def ends(self, tokens: Sequence[int]) -> bool:
        """True when the last of the generated tokens ends the sequence; asked once after every token."""
        if tokens[-1] in self.token_ids:
            return True
        return bool(self.texts) and self._has_text(tokens)

    def _has_text(self, tokens: Sequence[int]) -> bool:
        """A token stands for at least one byte, so a text that ends in the last token lies within its own byte count of tokens."""
        assert self.decoder is not None
        reach = max(len(text.encode()) for text in self.texts) + _SLACK_TOKENS
        tail = self.decoder.text(tokens[-reach:])
        return any(text in tail for text in self.texts)


def stop_rule(params: SamplingParams, *, eos_token_ids: frozenset[int], decoder: TextDecoder | None) -> StopRule:
    """The rule of the table above. Raises Unsupported for stop texts when the model has no tokenizer."""
    if params.stop_token_ids is None and params.stop_texts is None:
        return StopRule(token_ids=eos_token_ids)
    texts = tuple(params.stop_texts or ())
    if texts and decoder is None:
        raise Unsupported(
            "stop texts need a tokenizer, and this server's model directory has no tokenizer.json; give token ids"
        )
    if params.stop_token_ids:
        return StopRule(token_ids=frozenset(params.stop_token_ids), texts=texts, decoder=decoder)
    return StopRule(token_ids=eos_token_ids if texts else frozenset(), texts=texts, decoder=decoder)
