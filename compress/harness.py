"""Our runtime as a model of lm-eval: what its own `HFLM` answers, computed by `compress.runtime`.

How texts become tokens, what is cut off and where a generation ends are HFLM's choices [1], so that
both give the same numbers up to rounding:

    loglikelihood          the continuation's tokens are those that follow the context's own number
                           of tokens in the encoding of both together; an empty context is the
                           prefix token (bos, or else eos); what is too long loses its beginning
    loglikelihood_rolling  windows of the whole context length, each token predicted once
    generate_until         at most `max_gen_toks` tokens, up to the first of the stop strings; what
                           gen_kwargs leave open comes from generation_config.json

[1] EleutherAI, lm-evaluation-harness 0.4, lm_eval/models/huggingface.py and lm_eval/api/model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import GenerationConfig

from compress.core.device import AS_STORED, ServedAs, default_device
from compress.core.errors import InputError
from compress.core.progress import track
from compress.core.source import ModelSource
from compress.core.tokenizer import load_tokenizer
from compress.runtime.engine import Engine
from compress.runtime.llm import LLM, cache_memory, stop_tokens
from compress.runtime.loading import load_decoder
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.scoring import MOST_TOKENS, Span, score

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    Pair = tuple[Any, list[int], list[int]]  # a name, the context's tokens, the continuation's

MOST_SEQUENCES = 64  # that generate at once
DRAWING = ("top_k", "top_p", "min_p")  # settings that matter where tokens are drawn
TOP_K = 50  # transformers draws from so many tokens where nothing says otherwise


class RuntimeLM(TemplateLM):
    """A model on the runtime, for `lm_eval.evaluator.simple_evaluate`."""

    def __init__(
        self,
        source: ModelSource,
        dtype: str = "float32",
        seed: int = 0,
        served: ServedAs = AS_STORED,
    ) -> None:
        super().__init__()
        self.tokenizer: Any = load_tokenizer(source.folder)
        self._decoder = load_decoder(source, default_device(), dtype, **asdict(served))
        self._stop_tokens = stop_tokens(source.folder, self.tokenizer)
        self._defaults = _generation_defaults(source)
        self._seed = seed
        prefix = self.prefix_token_id
        self._prefix = None if prefix is None else self.tokenizer.decode(prefix)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self._decoder.max_context

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any
    ) -> list[int]:
        """Token ids; special tokens are added unless the text begins with the prefix already."""
        if add_special_tokens is None:
            add_special_tokens = self._prefix is None or not string.startswith(self._prefix)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        spans = [self._span(*request) for request in requests]
        answers = [(0.0, False)] * len(spans)
        for index, found in track(score(self._decoder, spans), "Scoring", total=len(spans)):
            answers[index] = (float(found.log_probabilities.sum()), bool(found.likeliest.all()))
        return answers

    def _span(self, name: Any, context: list[int], continuation: list[int]) -> Span:
        if not 0 < len(continuation) <= self.max_length:
            raise InputError(
                f"a task asks how likely a text of {len(continuation)} tokens is ({name!r:.80}); "
                f"the model's context allows 1 to {self.max_length}"
            )
        # One more than the model reads: the last token is only predicted.
        tokens = np.array((context + continuation)[-(self.max_length + 1) :], dtype=np.int64)
        return Span(tokens, first=len(tokens) - len(continuation))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each whole text."""
        windows: list[Pair] = []
        owners = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to its stop strings."""
        prompts, params, stops = [], [], []
        for request in requests:
            arguments: Any = request.args
            context, gen_kwargs = arguments
            settings: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs))
            stop = handle_stop_sequences(settings.pop("until"), eos=self._eos_text())
            stops.append(stop)
            params.append(self._params(settings, stop))
            room = self.max_length - (params[-1].max_tokens or 0)
            if room < 1:
                raise InputError(
                    f"a task wants {params[-1].max_tokens} new tokens, which the model's context "
                    f"of {self.max_length} does not hold beside a prompt"
                )
            prompts.append(self.tok_encode(context)[-room:])
        answers = []
        for tokens, stop in zip(self._generate(prompts, params), stops, strict=True):
            # In one piece, as HFLM does, without what the prompt's end does to the first token.
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            answers.append(postprocess_generated_text(text, stop, think_end_token=None))
        return answers

    def _eos_text(self) -> str | None:
        return None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)

    def _params(self, settings: dict[str, Any], stop: list[str]) -> SamplingParams:
        """What the runtime is asked for, from normalized gen_kwargs."""
        draws = settings.pop("do_sample")
        taken = {"max_tokens": settings.pop("max_gen_toks")}
        temperature = settings.pop("temperature", 0.0)
        taken["temperature"] = temperature if draws else 0.0
        for name, value in self._defaults.items():
            given = settings.pop(name, value)
            if draws or name not in DRAWING:
                taken[name] = given
        if settings:
            raise InputError(
                f"a task sets {', '.join(settings)} for generation; the runtime takes until, "
                f"max_gen_toks, do_sample, temperature, {', '.join(self._defaults)}; "
                "for others use --engine transformers"
            )
        special = [ids[0] for ids in map(self._special, stop) if ids]
        texts = tuple(text for text in stop if text)
        return SamplingParams(stop=texts, stop_token_ids=tuple(special), **taken)

    def _special(self, text: str) -> list[int]:
        """The special token that a stop string is; these never show in text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        hidden = len(ids) == 1 and not self.tokenizer.decode(ids, skip_special_tokens=True)
        return ids if hidden else []

    def _generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
        """The tokens that follow each prompt."""
        decoder = self._decoder
        longest = max(
            len(prompt) + (asked.max_tokens or 0)
            for prompt, asked in zip(prompts, params, strict=True)
        )
        each = decoder.layout.blocks_for(longest, MOST_TOKENS)
        wanted = min(len(prompts), MOST_SEQUENCES) * each
        room = cache_memory(default_device()) // decoder.bytes_per_block
        engine = Engine(
            decoder,
            min(wanted, room),
            max_sequences=MOST_SEQUENCES,
            seed=self._seed,
            tokenizer=self.tokenizer,
            eos_ids=self._stop_tokens,
        )
        with LLM.from_engine(engine, self.tokenizer) as llm:
            found = [output.outputs[0] for output in llm.generate(prompts, params, progress=True)]
        if errors := [output.error for output in found if output.error]:
            raise InputError(
                f"{len(errors)} of {len(found)} answers failed; the first: {errors[0]}"
            )
        return [output.token_ids for output in found]


def _generation_defaults(source: ModelSource) -> dict[str, Any]:
    """Settings that transformers takes from generation_config.json where a task leaves them out."""
    defaults: dict[str, Any] = {
        "top_k": TOP_K,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    if not (source.folder / "generation_config.json").is_file():
        return defaults
    stored = GenerationConfig.from_pretrained(source.folder)
    given = {name: getattr(stored, name, None) for name in defaults}
    return defaults | {name: value for name, value in given.items() if value is not None}
