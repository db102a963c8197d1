"""Is a text the same with speculation?  Greedily, on all questions of Spec-Bench, with each draft.

    python benchmarks/speculative_identity.py WORK_FOLDER --dense smollm2 --w4 smollm2-w4 \\
        --draft smollm2-draft --dataset spec_bench_question.jsonl

The dense model in float32 and in bfloat16, and the one in 4 bits: 16 questions at a time
(continuous batching, so drafts are verified beside plain decodes and prompts), and each answer
compared token by token with that of an engine without speculation.  Where one differs, the logits
of the two tokens are taken, by the plain engine on the same prefix: only where these are equal but
for rounding may a choice differ.

Questions go chunk by chunk.  The engine with drafts keeps a chunk's prompts in its prefix cache, so
all drafts after the first begin from blocks that were found; the plain one has no such cache.
A chunk that is done is not repeated, if the command comes again.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from runtime_cpu import processor

from compress.bench.prompts import read_prompts
from compress.bench.speculative import Question, tokenized
from compress.bench.speculative_runs import Arm
from compress.core.progress import say, track
from compress.core.source import ModelSource, resolve_model
from compress.core.tokenizer import load_tokenizer
from compress.runtime.decoder import Decoder
from compress.runtime.engine import Engine
from compress.runtime.llm import stop_tokens
from compress.runtime.loading import MOST_TOKENS, make_decoder
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.sequence import Sequence
from compress.runtime.speculation.lengths import FixedLength
from compress.runtime.speculation.making import choose, make_speculator
from compress.runtime.speculation.proposer import Draft, Proposer
from compress.runtime.speculation.speculator import Speculator
from compress.runtime.weights import load_weights

TOGETHER = 16
CHUNK = 96  # questions
TOP = 20  # tokens among which the other choice is looked for
PLAIN = "plain"


class OneOfSeveral:
    """A proposer that is now this and now that, so that all share one engine and its cache."""

    bytes_per_block = 0  # nobody counts memory here

    def __init__(self, proposers: dict[str, Proposer], most: int) -> None:
        self.proposers, self.most = proposers, most
        self.now = next(iter(proposers.values()))

    @property
    def description(self) -> str:
        return self.now.description

    def allocate(self, num_blocks: int) -> None:
        for proposer in self.proposers.values():
            proposer.allocate(num_blocks)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        for proposer in self.proposers.values():
            proposer.copy_blocks(pairs)

    def outlook(self, sequence: Sequence, most: int) -> list[float]:
        return self.now.outlook(sequence, most)

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[Draft]:
        return self.now.propose(asked)

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        self.now.verified(sequence, drafted, accepted)

    def forget(self, sequence: Sequence) -> None:
        self.now.forget(sequence)

    def seconds(self, counts: list[int]) -> float:
        return self.now.seconds(counts)

    def behind(self, sequence: Sequence) -> float:
        return self.now.behind(sequence)


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    texts = [str(prompt.content) for prompt in read_prompts(options.dataset, "completions")]
    texts = texts[: options.count]
    models = {
        "float32": (options.dense, "float32", None),
        "bfloat16": (options.dense, "bfloat16", None),
        "W4, bfloat16": (options.w4, "bfloat16", 8),
    }
    results = {
        name: list(chunks(options, name, models[name], texts)) for name in options.only or models
    }
    text = page(options, results)
    (options.out or options.work / "speculative-identity.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--dense", required=True, help="a model, not quantized")
    parser.add_argument("--w4", required=True, help="the same model in 4 bits")
    parser.add_argument("--draft", required=True, help="a smaller model of the same vocabulary")
    parser.add_argument("--dataset", required=True, type=Path, help="Spec-Bench's questions")
    parser.add_argument("--only", action="append", help="float32, bfloat16, or 'W4, bfloat16'")
    parser.add_argument("--tokens", type=int, default=3, help="to propose")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--count", type=int, default=480)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="[default: speculative-identity.md in WORK]")
    return parser.parse_args()


def chunks(
    options: argparse.Namespace,
    name: str,
    kind: tuple[str, str, int | None],
    texts: list[str],
) -> Iterator[dict[str, Any]]:
    """What came of each chunk of the questions; those that are done are read."""
    model, dtype, head_bits = kind
    source = resolve_model(model)
    questions = tokenized(load_tokenizer(source.folder), {"": texts})
    groups = [questions[at : at + CHUNK] for at in range(0, len(questions), CHUNK)]
    asked = {"model": model, "draft": options.draft, "tokens": options.tokens,
             "max_tokens": options.max_tokens, "count": len(texts)}  # fmt: skip
    bench = None
    for number, group in enumerate(track(groups, name)):
        path = options.work / f"{name.replace(', ', '-')}-{number}.json"
        done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if done.get("asked") != asked:
            bench = bench or Bench(options, source, dtype, head_bits, questions)
            done = {"asked": asked, "found": bench.compare(group)}
            path.write_text(json.dumps(done, indent=1), encoding="utf-8")
        yield done["found"]


class Bench:
    """A model, and two engines that take turns with its cache: without and with drafts."""

    def __init__(
        self,
        options: argparse.Namespace,
        source: ModelSource,
        dtype: str,
        head_bits: int | None,
        questions: list[Question],
    ) -> None:
        torch.set_num_threads(options.threads)
        self.params = SamplingParams(max_tokens=options.max_tokens, temperature=0)
        tokenizer: Any = load_tokenizer(source.folder)
        weights = load_weights(source, head_bits)
        device, most_tokens = torch.device("cpu"), MOST_TOKENS["cpu"]
        decoder: Decoder = make_decoder(weights, device, getattr(torch, dtype), most_tokens)
        proposers = {}
        for draft in ("ngram", "self", options.draft):
            choice = choose(draft, options.tokens, source, tokenizer)
            assert choice is not None
            most = most_tokens, TOGETHER
            speculator = make_speculator(choice, decoder, weights.head, device, dtype, most)
            proposers[draft] = speculator.proposer
        self.proposer = OneOfSeveral(proposers, options.tokens)
        rooms = sorted(len(question.tokens) for question in questions)[-CHUNK:]
        blocks = sum(
            decoder.layout.blocks_for(room + options.max_tokens, most_tokens) for room in rooms
        )

        def engine(speculator: Speculator | None) -> Engine:
            return Engine(
                decoder,
                blocks,
                max_tokens_per_step=most_tokens,
                max_sequences=TOGETHER,
                prefix_caching=speculator is not None,
                tokenizer=tokenizer,
                eos_ids=stop_tokens(source.folder, tokenizer),
                speculator=speculator,
            )

        self.plain = Arm(PLAIN, engine(None))
        self.drafting = engine(Speculator(self.proposer, FixedLength(options.tokens)))

    def compare(self, questions: list[Question]) -> dict[str, Any]:
        """Answer them without drafts, then with each kind."""
        prompts = [question.tokens for question in questions]
        params = [self.params] * len(prompts)
        right = self.plain.answer(prompts, params).outputs
        outputs: dict[str, list[list[int]]] = {}
        found: dict[str, Any] = {}
        self.drafting.reset()  # the plain engine has written over its cache
        for draft, proposer in self.proposer.proposers.items():
            self.proposer.now = proposer
            before = self.drafting.statistics()
            outputs[draft] = Arm(draft, self.drafting).answer(prompts, params).outputs
            after = self.drafting.statistics()
            self.drafting.check()
            found[draft] = {
                "drafted": after.drafted_tokens - before.drafted_tokens,
                "accepted": after.accepted_tokens - before.accepted_tokens,
                "steps": after.steps - before.steps,
                "prompt_tokens_found": after.cached_prompt_tokens - before.cached_prompt_tokens,
            }
        for draft, answers in outputs.items():
            gaps = [
                self.gap(prompt, ours, theirs)
                for prompt, ours, theirs in zip(prompts, answers, right, strict=True)
                if ours != theirs
            ]
            found[draft]["gaps"] = gaps
            if gaps:
                say(f"{draft}: {len(gaps)} of {len(prompts)} differ; gaps of logits: {gaps}")
        return {"questions": len(prompts), "tokens": sum(map(len, right)), "drafts": found}

    def gap(self, prompt: list[int], ours: list[int], theirs: list[int]) -> float | None:
        """Logit of the plain choice minus that of ours, where they part; None beyond TOP tokens."""
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if at is None:  # one ended, and the other went on
            return None
        engine = self.plain.engine
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=TOP)
        engine.add_request("gap", prompt + theirs[:at], params)
        increments = []
        while engine.has_work():
            increments += engine.step()
        (logprob,) = increments[-1].logprobs
        top = dict(logprob.top)
        if ours[at] not in top or theirs[at] not in top:
            return None
        return round(top[theirs[at]] - top[ours[at]], 4)


def page(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> str:
    """The record, in Markdown."""
    lines = [
        "# Is a text the same with speculation?",
        "",
        f"Greedy answers of up to {options.max_tokens} tokens to Spec-Bench's questions (first "
        f"turns, chat template), {TOGETHER} at a time, {options.tokens} tokens proposed at once; "
        f"{processor()}, {options.threads} threads.",
        "",
        "| model | draft | questions | tokens | drafted | accepted | texts differ | largest gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, parts in results.items():
        for draft in parts[0]["drafts"]:
            each = [part["drafts"][draft] for part in parts]
            gaps = [gap for one in each for gap in one["gaps"]]
            cells = [
                name,
                Path(draft).name,
                sum(part["questions"] for part in parts),
                f"{sum(part['tokens'] for part in parts):,}",
                f"{sum(one['drafted'] for one in each):,}",
                f"{sum(one['accepted'] for one in each):,}",
                f"**{len(gaps)}**",
                largest(gaps),
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "Gap: logit of the token that the plain run took, less that of the other, by the plain "
        "run's own logits after the same prefix, at the first difference.",
        "",
    ]
    return "\n".join(lines)


def largest(gaps: list[float | None]) -> str:
    """Of the gaps where texts differ."""
    if not gaps:
        return ""
    known = [gap for gap in gaps if gap is not None]
    return f"beyond the {TOP} likeliest" if len(known) < len(gaps) else f"{max(known):.4f}"


if __name__ == "__main__":
    main()
