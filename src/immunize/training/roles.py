"""From examples to the encoded data roles that a method needs."""

from collections.abc import Callable, Sequence

from immunize.data.batches import Encoded
from immunize.models.chat import encode
from immunize.models.loading import ChatModel
from immunize.training.role_names import ROLES
from immunize.training.tune import Roles
from immunize.types import Example


def encode_pairs(chat: ChatModel, examples: Sequence[Example]) -> list[Encoded]:
    """Prompts with their answers."""
    return encode(chat, [(example.prompt, example.answer) for example in examples])


def encode_roles(
    chat: ChatModel, needs: Sequence[str], *, pairs: Sequence[Example], retain: Sequence[Example]
) -> Roles:
    """The roles a defense needs: `harmful`, `refusals`, `paired` (both) from `pairs`, and `retain`."""

    def harmful() -> list[Encoded]:
        return encode_pairs(chat, pairs)

    def refusals() -> list[Encoded]:
        unpaired = [example.id for example in pairs if example.refusal is None]
        if unpaired:
            raise ValueError(f"the defense needs refusals, and {len(unpaired)} examples have none, first {unpaired[0]}")
        return encode(chat, [(example.prompt, example.refusal or "") for example in pairs])

    makers: dict[str, Callable[[], list[Encoded] | tuple[list[Encoded], list[Encoded]]]] = {
        "harmful": harmful,
        "refusals": refusals,
        "paired": lambda: (harmful(), refusals()),
        "retain": lambda: encode_pairs(chat, retain),
    }
    assert set(makers) == set(ROLES), "a configuration is refused by these names when it is built"
    return {role: makers[role]() for role in needs}
