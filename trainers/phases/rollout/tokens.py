"""The tokenisation check: do prompts become the tokens that the model was trained to continue?"""

from array import array
from collections.abc import Iterable
from typing import Any

from trainers.contract import BadInput
from trainers.core.chat import ChatFormat
from trainers.core.rollouts import Prompt


def check_tokens(chat: ChatFormat, prompts: Iterable[Prompt], whose: str) -> dict[str, float]:
    """Check every prompt with one tokenizer and count its tokens. Raises BadInput at the first that is wrong."""
    # Raises when the assistant's turn does not begin where the rendered prompt ends.
    chat.answer([{"role": "user", "content": "x"}], "x")
    unknown = 0
    lengths = array("q")
    for prompt in prompts:
        ids = chat.prompt(prompt.messages)
        problem = _problem(chat, ids, chat.prompt_text(prompt.messages))
        if problem:
            raise BadInput(f"{whose}: {problem}; prompt {prompt.text[:60]!r}")
        unknown += sum(token == chat.tokenizer.unk_token_id for token in ids)
        lengths.append(len(ids))
    return {
        "promptTokensMin": min(lengths),
        "promptTokensMean": sum(lengths) / len(lengths),
        "promptTokensMax": max(lengths),
        "unknownTokens": unknown,
    }


def _problem(chat: ChatFormat, ids: list[int], text: str) -> str | None:
    return _wrong_bos(chat.tokenizer, ids) or _wrong_end(chat, ids) or _no_round_trip(chat.tokenizer, ids, text)


def _wrong_bos(tokenizer: Any, ids: list[int]) -> str | None:
    """One BOS, at the start. Where BOS is also the end token, later ones may end earlier turns."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    if ids[:2] == [bos, bos]:
        return f"two begin tokens {tokenizer.bos_token!r}: the chat template writes one and the tokenizer adds another"
    if bos in ids[1:] and bos != tokenizer.eos_token_id:
        return f"the begin token {tokenizer.bos_token!r} is inside the prompt"
    if "bos_token" in (tokenizer.chat_template or "") and ids[0] != bos:
        return f"the chat template has a begin token, but the prompt starts with {tokenizer.decode(ids[:1])!r}"
    return None


def _wrong_end(chat: ChatFormat, ids: list[int]) -> str | None:
    if ids[-1] in chat.stop_ids:
        return "the prompt ends with an end token, so the model has nothing to answer: the template adds no generation prompt"
    return None


def _no_round_trip(tokenizer: Any, ids: list[int], rendered: str) -> str | None:
    """Decoded and encoded again, a prompt is the same tokens; otherwise stored text and tokens drift apart.

    SentencePiece tokenizers decode the blank mark behind a special token as a blank more, which is no loss.
    """
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if again == ids or _letters(text) == _letters(rendered):
        return None
    at = next((i for i, (a, b) in enumerate(zip(ids, again, strict=False)) if a != b), min(len(ids), len(again)))
    return (
        f"tokens change from position {at} when decoded and encoded again ({ids[at : at + 4]} to {again[at : at + 4]})"
    )


def _letters(text: str) -> str:
    return "".join(text.split())
