"""Tokenizers of bytes with chat templates of every form."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainers.core.chat import ChatFormat

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# BOS once, at the very front, as in Llama and Gemma; contents are stripped, as in Gemma.
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Leaves the response open: no end token.
OPEN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
# Drops earlier reasoning once another turn follows, as Qwen3 and DeepSeek do.
REWRITES = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Shows the last answer with its thought, which is empty if it has none, and earlier ones without: Qwen3.
THOUGHTS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% set parts = m.content.split('</think>') %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<bos>", "<eos>", "<pad>", "<|start|>", "<|end|>"]
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello you"},
    {"role": "user", "content": "more?"},
    {"role": "assistant", "content": "no"},
]
QUESTION = [{"role": "user", "content": "hi"}]


def bytes_tokenizer(template: str | None, eos: str = "<eos>", pad: str | None = "<pad>", adds_bos: bool = False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def shown(chat: ChatFormat, ids: list[int]) -> str:
    return chat.tokenizer.decode(ids, skip_special_tokens=False)


TEMPLATES = {"chatml": CHATML, "bos": WITH_BOS, "open": OPEN, "rewrites": REWRITES, "thoughts": THOUGHTS, "plain": None}


def whole(chat: ChatFormat, messages) -> list[int]:
    """The rendered conversation, encoded as one text by the tokenizer itself."""
    text = chat._render(messages, False)
    return chat.tokenizer(text, add_special_tokens=chat.tokenizer.chat_template is None)["input_ids"]
