"""A chat template taken apart composes, around any messages, to what transformers renders."""

from __future__ import annotations

import pytest

from mobilellm.errors import UserError
from mobilellm.export.turns import Piece, Turns, turns_of
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role']"
    " + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n'"
    " + m.content | trim + '<|im_end|>' }}{% endfor %}{{ '<|im_start|>assistant\n\n' }}"
)
PLAIN = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ ('User: ' if m.role == 'user' else ' Bot: ') + m.content }}"
    "{% if m.role == 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}{{ ' Bot: ' }}"
)
TALK = [
    {"role": "user", "content": "  Who <|im_end|> is there?\n"},
    {"role": "assistant", "content": "A friend."},
    {"role": "user", "content": "Say more"},
    {"role": "assistant", "content": "No"},
    {"role": "user", "content": "Please"},
]


def tokenizer_with(template: str | None, sample_text: str) -> Tokenizer:
    made = train_bpe([sample_text[:20_000]], 400)
    made.fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    bos = made.fast.token_to_id("<|im_start|>")
    return Tokenizer(made.fast, name="test", bos_id=bos, eos_id=made.eos_id, chat_template=template)


def composed(turns: Turns, talk: list[dict[str, str]], system: str = "") -> list[Piece]:
    """As page.js composes it."""
    trim = str.strip if turns.trim else str
    found = list(turns.head)
    if system:
        assert turns.system is not None
        found = [*turns.system[0], trim(system), *turns.system[1]]
    for number, message in enumerate(talk):
        found.append(trim(message["content"]))
        last = number == len(talk) - 1
        user = message["role"] == "user"
        found += (turns.ask if last else turns.reply) if user else turns.next
    return found


def spelled(pieces: list[Piece], tokenizer: Tokenizer) -> str:
    return "".join(str(tokenizer.token(p)) if isinstance(p, int) else p for p in pieces)


def by_transformers(tokenizer: Tokenizer, talk: list[dict[str, str]]) -> str:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.fast,
        bos_token="<|im_start|>",
        chat_template=tokenizer.chat_template,
    )
    return fast.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template", [CHATML, TRIMMED, PLAIN])
def test_turns_compose_to_what_transformers_renders(template: str, sample_text: str) -> None:
    tokenizer = tokenizer_with(template, sample_text)
    turns = turns_of(tokenizer)
    assert turns is not None
    for length in (1, 3, 5):
        talk = TALK[:length]
        expected = by_transformers(tokenizer, talk)
        assert spelled(composed(turns, talk), tokenizer) == expected
        if turns.system is not None:
            told = by_transformers(tokenizer, [{"role": "system", "content": "Rhyme."}, *talk])
            assert spelled(composed(turns, talk, "Rhyme."), tokenizer) == told
    assert turns.trim == (template == TRIMMED)
    assert (turns.system is None) == (template == PLAIN)
    assert turns.stop == (["\nUser: "] if template == PLAIN else [])


def test_special_tokens_of_the_template_are_ids_and_other_text_is_text(sample_text: str) -> None:
    tokenizer = tokenizer_with(CHATML, sample_text)
    turns = turns_of(tokenizer)
    assert turns is not None
    start, end = (tokenizer.fast.token_to_id(f"<|im_{name}|>") for name in ("start", "end"))
    assert turns.ask == [end, "\n", start, "assistant\n"]
    assert turns.head == [start, "system\nBe kind.", end, "\n", start, "user\n"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ nothing.at.all }}", "cannot be rendered"),
        ("{% for", "cannot be rendered"),
        ("hello", "leaves out"),
        ("{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}", "depends"),
        ("{{ messages[0].content.__class__.__mro__ }}", "cannot be rendered"),
    ],
)
def test_a_template_that_cannot_be_taken_apart_is_named(
    template: str, said: str, sample_text: str
) -> None:
    with pytest.raises(UserError, match=said):
        turns_of(tokenizer_with(template, sample_text))


def test_without_a_template_there_are_no_turns(sample_text: str) -> None:
    assert turns_of(tokenizer_with(None, sample_text)) is None
