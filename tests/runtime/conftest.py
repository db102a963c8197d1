"""A model for outputs under a grammar."""

import pytest

from compress.runtime.llm import LLM
from tests.runtime.spelling import byte_tokenizer, make_spelling_model


@pytest.fixture(scope="session")
def spelling_llm(tmp_path_factory):
    """A tiny random Llama whose tokenizer has every byte; float32, context 1024."""
    folder = make_spelling_model(tmp_path_factory.mktemp("spelling"), byte_tokenizer())
    with LLM(str(folder), dtype="float32", kv_cache_memory="64MiB", max_sequences=32) as llm:
        yield llm
