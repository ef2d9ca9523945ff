"""What a network predicts for the tokens that carry a label; with a large vocabulary, nothing else is decoded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from immunize.data.batches import IGNORED

# 64 MB in float32. Up to here every position is decoded, which on the miniature takes a sixth longer: packing moves the
# last bits, and with them every committed record. It may go with the next version of the engine.
MOST_LOGITS = 2**24


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Logits for next tokens, in float32 whatever the model's dtype, and the tokens that follow.

    Either at every position, logits (batch, time - 1, vocabulary) and targets (batch, time - 1), or packed, only where
    there is a label, row after row: (labels, vocabulary) and (labels,). `labelled` (batch, time - 1) says where.
    `states` are the hidden states at all depths, (batch, time, hidden), if they were asked for.
    """

    logits: Tensor
    targets: Tensor
    labelled: Tensor
    states: Sequence[Tensor] = ()

    @property
    def packed(self) -> bool:
        return self.logits.dim() == 2

    def like_targets(self, values: Tensor) -> Tensor:
        """Values (batch, time - 1) in the shape of `targets`."""
        return values[self.labelled] if self.packed else values

    def sum_per_row(self, values: Tensor) -> Tensor:
        """Sums (batch,) of values in the shape of `targets`, which are zero where there is no label."""
        if not self.packed:
            return values.sum(1)
        return torch.zeros_like(self.labelled, dtype=values.dtype).masked_scatter(self.labelled, values).sum(1)


def at_every_position(logits: Tensor, labels: Tensor, *, states: Sequence[Tensor] = ()) -> Predictions:
    """Position t predicts token t + 1; logits are (batch, time, vocabulary), labels (batch, time)."""
    targets = labels[:, 1:]
    return Predictions(logits=logits[:, :-1].float(), targets=targets, labelled=targets != IGNORED, states=states)


def predict(network: Any, input_ids: Tensor, labels: Tensor, *, hidden_states: bool = False) -> Predictions:
    """Run `network` on right-padded conversations, which need no attention mask: no label looks at padding.

    Where all logits would be more than `MOST_LOGITS`, the hidden states are packed before they are decoded.
    """

    def run() -> Any:
        return network(input_ids=input_ids, output_hidden_states=hidden_states, use_cache=False)

    vocabulary = network.config.get_text_config().vocab_size
    if labels.numel() * vocabulary <= MOST_LOGITS:
        output = run()
        return at_every_position(output.logits, labels, states=output.hidden_states or ())
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    with _decoding(network, lambda hidden: hidden[:, :-1][labelled]):
        output = run()
    return Predictions(
        logits=output.logits.float(), targets=targets[labelled], labelled=labelled, states=output.hidden_states or ()
    )


def hidden_states(network: Any, input_ids: Tensor) -> Sequence[Tensor]:
    """At all depths, the embedding first, each (batch, time, hidden); nothing is decoded."""
    with _decoding(network, lambda hidden: hidden[:, :0]):
        output = network(input_ids=input_ids, output_hidden_states=True, use_cache=False)
    found: Sequence[Tensor] = output.hidden_states
    return found


@contextmanager
def _decoding(network: Any, chosen: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the unembedding is given `chosen` of the last hidden states only."""
    hook = network.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (chosen(inputs[0]),))
    try:
        yield
    finally:
        hook.remove()
