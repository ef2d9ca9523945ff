"""From text to ids: the mask is exact to the token, whatever the tokenizer and the template."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from immunize.data.batches import IGNORED, pad
from immunize.models.chat import encode, encode_texts, render_answer, render_prompt
from immunize.models.loading import ChatModel, load_folder

# The header ends in the middle of a word: the text "answer" is one token, "an" and "swer" are not.
MERGING_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' an' + message['content'] + '<end>' }}"
    "{% else %}{{ '<user>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' an' }}{% endif %}"
)
TURNED_TEMPLATE = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
PROMPT, ANSWER = "the other apple", "an answer"


@pytest.fixture
def chat(make_chat: Callable[..., ChatModel]) -> ChatModel:
    return make_chat()


def labelled_text(chat: ChatModel, prompt: str, answer: str) -> str:
    (item,) = encode(chat, [(prompt, answer)])
    return chat.tokenizer.decode(item.ids[item.answer_start :])


def test_answer_with_its_end_token_is_what_carries_labels(chat: ChatModel) -> None:
    assert labelled_text(chat, PROMPT, ANSWER) == ANSWER + "<end>"
    assert labelled_text(chat, PROMPT, "") == "<end>"


def test_merge_across_the_border_does_not_shift_the_mask(chat: ChatModel) -> None:
    """The border stays between the two texts, and the prompt's tokens are those that generation starts from."""
    chat.tokenizer.chat_template = MERGING_TEMPLATE
    (item,) = encode(chat, [(PROMPT, "swer is")])
    whole = chat.tokenizer(f"<user>{PROMPT} answer is<end>", add_special_tokens=False)["input_ids"]
    assert list(item.ids) != whole, "the tokenizer merges across the border; otherwise this test shows nothing"
    assert chat.tokenizer.decode(item.ids) == chat.tokenizer.decode(whole)
    assert chat.tokenizer.decode(item.ids[item.answer_start :]) == "swer is<end>"
    assert list(item.ids[: item.answer_start]) == encode_texts(chat, [render_prompt(chat, PROMPT)])[0]


def test_end_token_carries_a_label_where_padding_is_the_end_token(chat: ChatModel) -> None:
    chat.tokenizer.pad_token = chat.tokenizer.eos_token
    assert chat.pad_id in chat.end_ids
    encoded = encode(chat, [(PROMPT, ANSWER), ("the", "")])
    batch = pad(encoded, pad_id=chat.pad_id)
    for row, item in enumerate(encoded):
        labelled = [token for token in batch.labels[row].tolist() if token != IGNORED]
        assert labelled == list(item.ids[item.answer_start :])
        assert labelled[-1] == chat.tokenizer.eos_token_id


def test_text_after_the_end_token_is_cut(chat: ChatModel) -> None:
    assert render_answer(chat, PROMPT, ANSWER) == ANSWER + "<end>\n"
    (item,) = encode(chat, [(PROMPT, ANSWER)])
    assert item.ids[-1] == chat.tokenizer.eos_token_id


def test_further_end_tokens_of_the_model_end_an_answer(chat: ChatModel) -> None:
    """A model may list several; the one of its generation config counts like the tokenizer's."""
    line_break = encode_texts(chat, ["\n"])[0]
    chat.network.generation_config.eos_token_id = [chat.tokenizer.eos_token_id, *line_break]
    assert labelled_text(chat, PROMPT, ANSWER) == ANSWER + "<end>\n"


def test_template_whose_generation_prompt_is_no_prefix_is_refused(chat: ChatModel) -> None:
    chat.tokenizer.chat_template = TURNED_TEMPLATE
    with pytest.raises(ValueError, match=r"generation prompt.*'the<think>' is no beginning of 'apple'"):
        encode(chat, [("the", "apple")])


@pytest.mark.parametrize("answer", [ANSWER, "", "it is <user> plums"])
def test_mask_agrees_with_the_generation_marks_of_the_template(chat: ChatModel, answer: str) -> None:
    """The template's own {% generation %} marks, read by transformers, are a second opinion."""
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}]
    marked: Any = chat.tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    (item,) = encode(chat, [(PROMPT, answer)])
    mask = [int(position >= item.answer_start) for position in range(len(item.ids))]
    assert list(item.ids) == marked["input_ids"][: len(item.ids)]
    assert mask == marked["assistant_masks"][: len(item.ids)]
    assert not any(marked["assistant_masks"][len(item.ids) :])


def test_order_and_number_of_pairs_are_kept(chat: ChatModel) -> None:
    pairs = [("the", "apple"), ("the other", ""), ("", "plums")]
    assert encode(chat, pairs) == [encode(chat, [pair])[0] for pair in pairs]
    assert encode(chat, []) == []


def test_saved_model_encodes_and_ends_alike(chat: ChatModel, tmp_path: Path) -> None:
    chat.save(tmp_path)
    loaded = load_folder(tmp_path, dtype="float32", device="cpu")
    assert encode(loaded, [(PROMPT, ANSWER)]) == encode(chat, [(PROMPT, ANSWER)])
    assert (loaded.end_ids, loaded.pad_id, loaded.parameters) == (chat.end_ids, chat.pad_id, chat.parameters)


def test_a_folder_that_lacks_weights_is_refused_and_not_filled_at_random(chat: ChatModel, tmp_path: Path) -> None:
    chat.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"], weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 2 of its weights, first lm_head\.weight"):
        load_folder(tmp_path, dtype="float32", device="cpu")


def test_model_without_template_or_end_token_is_refused(chat: ChatModel, tmp_path: Path) -> None:
    chat.tokenizer.eos_token = None
    chat.network.generation_config.eos_token_id = chat.network.config.eos_token_id = None
    chat.save(tmp_path / "endless")
    with pytest.raises(ValueError, match="names no end token"):
        load_folder(tmp_path / "endless", dtype="float32", device="cpu")
    chat.tokenizer.chat_template = None
    chat.save(tmp_path / "bare")
    with pytest.raises(ValueError, match="no chat template"):
        load_folder(tmp_path / "bare", dtype="float32", device="cpu")
