"""Outputs under a grammar: they parse and fit, whatever the schema; and nothing ends the engine."""

import itertools
import json
import random
import re
import subprocess
import sys
import time

import jsonschema
import numpy as np
import pytest

from compress.runtime import grammar as module
from compress.runtime import grammar_trial
from compress.runtime.engine import Engine
from compress.runtime.grammar import Grammar, GrammarCompiler, GrammarError
from compress.runtime.llm import LLM
from compress.runtime.sampling_params import SamplingParams, SettingError
from tests.runtime.fakes import VOCAB, FakeAsyncModel, FakeModel, naive, run, tokens_of
from tests.runtime.schemas import HARD, HOSTILE, as_text, random_schema
from tests.runtime.spelling import (
    ascii_tokenizer,
    byte_tokenizer,
    make_spelling_model,
    sentencepiece_tokenizer,
)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
VALIDATOR = jsonschema.Draft202012Validator


def schema_of(schema):
    return Grammar("json_schema", as_text(schema))


def unique(pairs):
    """A JSON object's members; no name may come twice."""
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def parsed(text):
    text.encode()  # no lone surrogates
    return json.loads(text, object_pairs_hook=unique)


def white_space(text):
    """The longest run of white space outside of strings, and the most line breaks in one."""
    outside = re.sub(r'"(\\.|[^"\\])*"', "string", text)
    runs = ["".join(group) for blank, group in itertools.groupby(outside, str.isspace) if blank]
    return max(map(len, runs), default=0), max((run.count("\n") for run in runs), default=0)


def test_random_schemas_are_kept_to(spelling_llm):
    source = random.Random(0)
    tokenizer = spelling_llm.tokenizer
    unlikely = {tokenizer.convert_tokens_to_ids(token): -9 for token in ("Ġ", "ĉ")}  # for time
    schemas = [random_schema(source) for _ in range(40)]
    params = [
        SamplingParams(
            grammar=schema_of(schema), max_tokens=900, n=2, seed=number, logit_bias=unlikely,
            temperature=source.choice([0, 1, 3]), top_k=source.choice([0, 3]),
            repetition_penalty=source.choice([1, 1.1]), logprobs=source.choice([None, 2]),
        )
        for number, schema in enumerate(schemas)
    ]  # fmt: skip
    outputs = spelling_llm.generate([f"prompt {number}" for number in range(40)], params)
    distinct = set()
    for output, schema in zip(outputs, schemas, strict=True):
        for completion in output.outputs:
            assert completion.finish_reason == "stop", (schema, completion)
            VALIDATOR(schema).validate(parsed(completion.text))
            distinct.add(completion.text)
    assert len(distinct) > 40, "the model has no say"


def test_any_object_parses_and_what_is_cut_off_is_its_beginning(spelling_llm):
    """A random model seldom ends a string, so quotes and braces are made likely."""
    likely = {spelling_llm.tokenizer.convert_tokens_to_ids(c): 4 for c in ('"', "}", '"}', '":')}
    params = SamplingParams(
        grammar=Grammar("json_object"), max_tokens=200, n=32, seed=1, logit_bias=likely
    )
    (output,) = spelling_llm.generate("x", params)
    reasons = [completion.finish_reason for completion in output.outputs]
    assert reasons.count("stop") > 5
    matcher = spelling_llm.engine.grammars.compile(Grammar("json_object"))
    for completion in output.outputs:
        if completion.finish_reason == "stop":
            assert isinstance(json.loads(completion.text), dict)
        follower = matcher.copy()
        for token in completion.token_ids:
            assert follower.allowed[token]
            follower.accept(token)
        assert follower.complete == (completion.finish_reason == "stop")


def test_log_probabilities_stay_the_models_own(spelling_llm):
    free = SamplingParams(temperature=0, logprobs=3, max_tokens=1)
    bound = SamplingParams(temperature=0, logprobs=3, max_tokens=1, grammar=schema_of(PERSON))
    unbound, constrained = (spelling_llm.generate("x", p)[0].outputs[0] for p in (free, bound))
    assert constrained.text in ("{", '{"')
    assert constrained.logprobs[0].top == unbound.logprobs[0].top
    assert constrained.logprobs[0].logprob < unbound.logprobs[0].logprob


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_tokenizer])
def test_tokenizers_and_a_vocabulary_larger_than_theirs(make, tmp_path):
    tokenizer = make()
    folder = make_spelling_model(tmp_path, tokenizer)
    wild = SamplingParams(max_tokens=60, temperature=5, seed=3, n=8)
    with LLM(str(folder), dtype="float32", kv_cache_memory="16MiB") as llm:
        free = llm.generate("x", wild)[0].outputs
        assert any(max(output.token_ids) >= len(tokenizer) for output in free)
        params = SamplingParams(
            max_tokens=200, temperature=5, seed=3, n=8, grammar=schema_of(PERSON)
        )
        for output in llm.generate("x", params)[0].outputs:
            assert max(output.token_ids) < len(tokenizer)
            VALIDATOR(PERSON).validate(parsed(output.text))


GRAMMARS = [
    schema_of(PERSON),
    schema_of({"type": "integer"}),
    schema_of({"enum": ["ab", "abc", 7]}),
]


def ascii_engine(model, blocks=500, eos_ids=(96,), **settings):
    return Engine(model, blocks, tokenizer=ascii_tokenizer(), eos_ids=eos_ids, **settings)


@pytest.mark.parametrize("kind", [FakeModel, FakeAsyncModel])
@pytest.mark.parametrize(("blocks", "budget"), [(500, 512), (60, 9)], ids=["batch", "preempted"])
def test_outputs_equal_the_naive_loop(kind, blocks, budget):
    """Whatever is in the batch beside, in parts, after preemptions, and a step ahead or not."""
    engine = ascii_engine(kind(), blocks, max_tokens_per_step=budget, max_sequences=8)
    source = random.Random(3)
    asked = {}
    for number in range(30):
        params = SamplingParams(
            max_tokens=40, temperature=source.choice([0, 1, 2]), seed=number,
            n=source.choice([1, 1, 3]), top_p=source.choice([1, 0.5]),
            grammar=source.choice([None, *GRAMMARS]), min_tokens=source.choice([0, 0, 4]),
            frequency_penalty=source.choice([0, 0.5]), ignore_eos=source.random() < 0.2,
        )  # fmt: skip
        prompt = [source.randrange(VOCAB) for _ in range(source.randint(1, 20))]
        asked[str(number)] = (prompt, params)
        engine.add_request(str(number), prompt, params)
    got = run(engine)
    for name, (prompt, params) in asked.items():
        for index in range(params.n):
            made = params.grammar and engine.grammars.compile(params.grammar).copy()
            expected = naive(prompt, params, index=index, eos=(96,), matcher=made)
            increments = got[name, index]
            assert tokens_of(increments) == expected, params
            if params.grammar and increments[-1].finish_reason == "stop":
                parsed("".join(increment.text for increment in increments))
    assert bool(engine.statistics().preemptions) == (blocks < 500)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_output_ends_where_nothing_may_follow_and_may_end_where_it_is_whole(ignore_eos):
    engine = ascii_engine(FakeModel())
    fixed = SamplingParams(grammar=schema_of({"const": "ab"}), seed=1, ignore_eos=ignore_eos)
    digits = SamplingParams(
        grammar=schema_of({"type": "integer"}), seed=1, max_tokens=60, ignore_eos=ignore_eos,
        logit_bias={96: 3},
    )  # fmt: skip
    least = SamplingParams(
        grammar=schema_of({"const": "ab"}), seed=1, min_tokens=30, ignore_eos=ignore_eos
    )
    exact = SamplingParams(grammar=schema_of({"const": "ab"}), seed=1, max_tokens=4)
    for name, params in {"fixed": fixed, "digits": digits, "least": least, "exact": exact}.items():
        engine.add_request(name, [1, 2], params)
    got = {name: increments for (name, _), increments in run(engine).items()}
    for name in ("fixed", "least", "exact"):
        assert "".join(increment.text for increment in got[name]) == '"ab"'
        assert got[name][-1].finish_reason == "stop"
        assert 96 not in tokens_of(got[name]), "that it ends is no token"
    text = "".join(increment.text for increment in got["digits"])
    assert int(text) or text == "0"
    assert got["digits"][-1].finish_reason == ("length" if ignore_eos else "stop")
    assert (tokens_of(got["digits"])[-1] == 96) != ignore_eos


def test_a_stop_token_is_allowed_only_where_the_output_is_whole():
    """Even where the model wants nothing else."""
    engine = ascii_engine(FakeModel())
    params = SamplingParams(grammar=schema_of(PERSON), logit_bias={96: 100}, max_tokens=100, seed=2)
    engine.add_request("a", [1], params)
    increments = run(engine)["a", 0]
    VALIDATOR(PERSON).validate(parsed("".join(increment.text for increment in increments)))


def test_bad_grammars_are_refused_by_name():
    with pytest.raises(SettingError, match="kind = 'regex'; allowed are json_object, json_schema"):
        Grammar("regex")
    with pytest.raises(SettingError, match="give JSON text"):
        Grammar("json_schema", {"type": "object"})
    engine = Engine(FakeModel(), 60)
    with pytest.raises(SettingError, match="needs a tokenizer"):
        engine.prepare("a", [1], SamplingParams(grammar=Grammar("json_object")))
    with pytest.raises(SettingError, match="logit_bias of token 97; allowed are tokens 0 to 96"):
        engine.prepare("a", [1], SamplingParams(logit_bias={97: 1}))


def test_a_tokenizer_that_cannot_spell_json_is_refused(model_folder):
    with LLM(str(model_folder("llama")), dtype="float32", kv_cache_memory="1MiB") as llm:
        with pytest.raises(SettingError, match="it cannot spell JSON"):
            llm.generate("w1", SamplingParams(grammar=Grammar("json_object")))
        assert llm.generate("w1", SamplingParams(max_tokens=2))[0].outputs[0].token_ids


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingError, match=r"pip install 'compress-llm\[grammar\]'"):
        GrammarCompiler(ascii_tokenizer(), VOCAB).compile(Grammar("json_object"))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused_in_one_line_and_in_time(spelling_llm, name, monkeypatch):
    params = SamplingParams(grammar=schema_of(HOSTILE[name]), max_tokens=5)
    began = time.monotonic()
    with pytest.raises(SettingError) as caught:
        spelling_llm.generate("x", params)
    # 0.75 s of processor time in the trial; the rest is for a machine that is busy with others.
    assert time.monotonic() - began < 15
    message = str(caught.value)
    assert caught.value.name == "grammar"
    assert message.startswith("grammar: ")
    assert "\n" not in message
    assert len(message) <= 1000
    monkeypatch.setattr(module, "_try", None)  # what was refused is remembered, not tried again
    with pytest.raises(SettingError) as again:
        spelling_llm.generate("x", params)
    assert str(again.value) == message


def test_hard_schemas_end_their_own_request_alone(spelling_llm):
    """One that the lexer gives up on in the middle ends as an error; the others do not notice."""
    params = [
        SamplingParams(grammar=schema_of(schema), max_tokens=150, seed=1, n=2)
        for schema in HARD.values()
    ]
    fine = SamplingParams(grammar=schema_of(PERSON), max_tokens=150, seed=5)
    alone = spelling_llm.generate("x", fine)[0].outputs
    *outputs, beside = spelling_llm.generate(["x"] * (len(params) + 1), [*params, fine])
    assert beside.outputs == alone
    found = dict(zip(HARD, outputs, strict=True))
    assert {o.finish_reason for o in found["explodes"].outputs} == {"error"}
    for completion in found["explodes"].outputs:
        assert "the grammar cannot go on: lexer error" in completion.error
        assert "\n" not in completion.error
    assert "error" in {o.finish_reason for o in found["explodes later"].outputs}
    assert {o.finish_reason for o in found["recursive"].outputs} == {"length"}
    for completion in found["many values"].outputs:
        VALIDATOR(HARD["many values"]).validate(parsed(completion.text))
    assert spelling_llm.statistics().blocks_in_use == 0


def test_white_space_is_bounded_even_where_the_model_wants_nothing_else(spelling_llm):
    tokenizer = spelling_llm.tokenizer
    likely = {tokenizer.convert_tokens_to_ids(token): 100 for token in ("Ġ", "Ċ", "ĉ")}
    schema = PERSON | {"x-guidance": {"whitespace_pattern": "[ \\n]*", "key_separator": "="}}
    params = SamplingParams(
        grammar=schema_of(schema), max_tokens=900, logit_bias=likely, seed=1, n=4
    )
    for completion in spelling_llm.generate("x", params)[0].outputs:
        assert completion.finish_reason == "stop"
        VALIDATOR(PERSON).validate(parsed(completion.text))
        longest, breaks = white_space(completion.text)
        assert breaks <= 1
        assert 20 < longest <= 25, "the test is of something"


def test_grammars_are_kept_and_forgotten_by_their_last_use(monkeypatch):
    monkeypatch.setattr(module, "MOST_KEPT", 2)
    tried = []
    monkeypatch.setattr(module, "_try", tried.append)
    compiler = GrammarCompiler(ascii_tokenizer(), VOCAB)
    a, b, c = (schema_of({"const": name}) for name in "abc")
    for grammar in (a, b, a, c, a, b):
        compiler.compile(grammar)
    assert [json.loads(schema)["const"] for schema in tried] == ["a", "b", "c", "b"]


def test_a_trial_that_had_no_time_is_tried_again(spelling_llm, monkeypatch):
    def busy(command, **_):
        raise subprocess.TimeoutExpired(command, 60)

    grammar = Grammar("json_schema", '{"const": "tried again"}')
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", busy)
        with pytest.raises(SettingError, match="try again"):
            spelling_llm.engine.grammars.compile(grammar)
    assert spelling_llm.engine.grammars.compile(grammar)


def test_a_copy_goes_on_by_itself():
    compiler = GrammarCompiler(ascii_tokenizer(), VOCAB)
    first = compiler.compile(schema_of({"enum": ["ab", "cd"]}))
    one, other = first.copy(), first.copy()
    before = first.allowed.copy()
    for token in ascii_tokenizer()('"ab"')["input_ids"]:
        one.accept(token)
    assert one.complete
    assert np.array_equal(first.allowed, before)
    assert np.array_equal(other.allowed, before)
    with pytest.raises(GrammarError, match="the grammar cannot go on"):
        other.accept(50)


def test_a_trial_that_breaks_is_a_refusal():
    """Without anything on its standard output the trial has not passed, whatever it returns."""
    code = grammar_trial.__file__
    done = subprocess.run([sys.executable, "-P", code], input=b"\xff", capture_output=True)
    assert done.stdout.decode() != grammar_trial.PASSED
    done = subprocess.run([sys.executable, "-P", code], input=b"{}", capture_output=True)
    assert done.stdout.decode() == grammar_trial.PASSED
