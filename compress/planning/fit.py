"""`compress plan --fit`: which recipes make a model fit, what they give, and what they cost.

A recipe is one choice each of weights, KV type, attention, pruning and speculation.  All of them
are tried; those that hold one sequence of the context in the memory are ranked by

    1. standing   measured and within the loss allowed, or the model as it is; quality unknown, or
                  of a draft how often it is right; something that this version cannot make;
                  measured, and worse than allowed
    2. how many of its choices nobody has measured
    3. tokens/s at the largest batch that fits, of up to MOST_SEQUENCES, or seconds a token at 1

Quality is what quality.json holds, measured on one small model: for others it is the expectation
at hand, and is printed with that model's name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal

from compress.core.errors import InputError
from compress.planning.case import Case, Draft, Load
from compress.planning.quality import Quality, is_measured_model, measured
from compress.planning.question import ACCEPTANCE, DRAFT_TOKENS, Question
from compress.planning.report import rounded
from compress.precision import precision
from compress.roofline import Device, Mla, ModelShape, kv_bytes_per_token, shard
from compress.shapes import known_models

Objective = Literal["throughput", "latency"]
Standing = Literal["ready", "unknown", "costly"]
STANDINGS: tuple[Standing, ...] = ("ready", "unknown", "costly")

TOP = 10  # recipes that are shown
MOST_LOSS = 1.1  # perplexity over the original's
MOST_SEQUENCES = 256  # answered together, as servers are usually set
WEIGHTS = ((16, 0), (8, 64), (8, 128), (4, 64), (4, 128), (3, 64), (2, 64))  # bits, group
KV = ("bf16", "int8")
ATTENTIONS = ("as it is", "GQA", "MLA")
PRUNINGS = ("none", "1/4 of the layers", "1/2 of the MLP")
# A draft where none was given: a model of a tenth of the cost, which agrees 7 times in 10.
ASSUMED_DRAFT = Draft(DRAFT_TOKENS, ACCEPTANCE, cost=0.1)


@dataclass(frozen=True)
class Recipe:
    """Choices, by name; `draft` is None without speculation."""

    bits: int
    group: int
    kv: str
    attention: str
    pruning: str
    draft: Draft | None

    @property
    def weights(self) -> str:
        """The precision's name."""
        return "bf16" if self.bits == 16 else f"int{self.bits}-g{self.group}"

    @property
    def unmeasured(self) -> list[str]:
        """What changes besides the weights' precision: nobody has measured what that costs."""
        found = [f"KV {self.kv}"] if self.kv != "bf16" else []
        found += [self.attention] if self.attention != "as it is" else []
        found += [f"pruning {self.pruning}"] if self.pruning != "none" else []
        return found

    @property
    def words(self) -> str:
        speculation = ["speculation"] if self.draft else []
        return " + ".join([self.weights, *self.unmeasured, *speculation])

    def applied_to(self, shape: ModelShape) -> ModelShape | None:
        """The shape it makes; None where it changes nothing that it says it does."""
        if self.attention == "GQA":
            kv_heads = max(1, shape.heads // 8)
            if shape.mla or kv_heads >= shape.kv_heads or shape.kv_heads % kv_heads:
                return None
            shape = replace(shape, kv_heads=kv_heads)
        if self.attention == "MLA":
            H = shape.head_dim  # DeepSeek-V2's proportions: 512 + 64 for heads of 128
            latent = Mla(kv_rank=4 * H, rope_dim=H // 2, nope_dim=H, v_dim=H)
            changed = replace(shape, mla=latent)
            if shape.mla or changed.kv_numbers >= shape.kv_numbers:
                return None
            shape = changed
        if self.pruning == PRUNINGS[1]:
            layers = shape.layers - shape.layers // 4
            if layers == shape.layers:
                return None
            shape = replace(shape, layers=layers, windows=shape.windows[:layers])
        if self.pruning == PRUNINGS[2]:
            shape = replace(shape, ffn=max(1, shape.ffn // 2))
        return shape

    def commands(self, model: str, shape: ModelShape) -> list[str]:
        """What makes it, on the command line.

        `shape` is what comes out.  Each command starts from what the one before it made.
        """
        made = re.sub(r"[^\w.-]", "-", model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf"))
        found = []
        for command, flags, suffix in self._steps(shape):
            made += suffix
            found.append(shlex.join(["compress", command, model, *flags, "--out", made]))
            model = made
        if self.kv != "bf16":
            found.append(shlex.join(["compress", "serve", model, "--kv-cache-dtype", self.kv]))
        return found

    def _steps(self, shape: ModelShape) -> Iterator[tuple[str, list[str], str]]:
        """Command, flags, and what the name of the output ends in, in the order they are given."""
        if self.pruning == PRUNINGS[1]:
            yield "prune", ["--depth", str(shape.layers)], f"-{shape.layers}-layers"
        if self.pruning == PRUNINGS[2]:
            yield "prune", ["--ffn", str(shape.ffn)], f"-ffn{shape.ffn}"
        if self.attention == "GQA":
            heads = str(shape.kv_heads)
            yield "convert", ["--to", "gqa", "--kv-heads", heads], f"-kv{heads}"
        if self.attention == "MLA" and (latent := shape.mla):
            rank, rope = str(latent.kv_rank), str(latent.rope_dim)
            yield "convert", ["--to", "mla", "--kv-rank", rank, "--rope-dim", rope], f"-mla{rank}"
        if self.bits < 16:
            quality = measured(self.bits, self.group)
            flags = ["--method", quality.method if quality else "gptq", "--bits", str(self.bits)]
            flags += ["--group-size", str(self.group)]
            yield "quantize", flags, f"-w{self.bits}-g{self.group}"


@dataclass(frozen=True)
class Proposal:
    """A recipe on a model and a device; `case` is at the batch that the objective takes."""

    recipe: Recipe
    case: Case
    quality: Quality | None
    own: bool  # measured on this very model
    most_loss: float

    @cached_property
    def standing(self) -> Standing:
        ratio = self.quality.perplexity_ratio if self.quality else None
        if ratio is not None and ratio > self.most_loss:
            return "costly"
        if self.recipe.draft or self.recipe.unmeasured:
            return "unknown"
        return "ready" if ratio is not None or self.recipe.bits == 16 else "unknown"

    @property
    def quality_in_words(self) -> str:
        """What it costs, as far as is known."""
        unknown = self.recipe.unmeasured  # speculation is not: its output is the model's own
        if self.recipe.bits == 16:
            said = "" if unknown else "as it is"
        elif self.quality is None:
            said = f"{self.recipe.weights}: unknown"
        else:
            where = "" if self.own else f", on {self.quality.model}"
            said = f"perplexity x{self.quality.perplexity_ratio:.3f}{where}"
        parts = [said] if said else []
        return "; ".join(parts + ([f"{' and '.join(unknown)}: unknown"] if unknown else []))

    def report(self, model: str | None) -> dict[str, Any]:
        """For --json; without a model there is nothing that a command could be given."""
        case, quality = self.case, self.quality
        return {
            "recipe": self.recipe.words,
            "standing": self.standing,
            "weights": self.recipe.weights,
            "kv": self.recipe.kv,
            "attention": self.recipe.attention,
            "pruning": self.recipe.pruning,
            "speculation": self.recipe.draft is not None,
            "batch": case.load.batch,
            "largest_batch": case.largest_batch,
            "tokens_per_s": rounded(case.throughput),
            "seconds_per_token": rounded(case.token),
            "weight_bytes": case.memory.weights,
            "kv_bytes_per_token": kv_bytes_per_token(case.shape, case.precision),
            "memory_bytes": case.held,
            "quality": self.quality_in_words,
            "perplexity_ratio": quality.perplexity_ratio if quality else None,
            "perplexity_ratio_interval": quality.interval if quality else None,
            "kl_mean": quality.kl_mean if quality else None,
            "measured_on": quality.model if quality else None,
            "results": quality.source if quality else None,
            "commands": self.recipe.commands(model, case.shape) if model else [],
        }


def propose(
    shape: ModelShape,
    device: Device,
    load: Load,
    objective: Objective,
    most_loss: float,
    draft: Draft | None = None,
) -> list[Proposal]:
    """All recipes that fit, best first.  `device.memory` is what they are to fit in.

    Of `load` the context and the devices count; a batch is one, or the largest.  Raises InputError
    when none fits, with the least that one takes.
    """
    fitting: list[Proposal] = []
    least: Case | None = None
    own = is_measured_model(shape)
    one = replace(load, batch=1)
    if load.devices > 1:
        shard(shape, load.devices)  # raises for a number that does not divide the model
    for recipe in _recipes(shape, draft or ASSUMED_DRAFT):
        changed = recipe.applied_to(shape)
        if changed is None:
            continue
        bits = precision(recipe.weights, recipe.kv)
        case = Case(changed, bits, device, one, recipe.draft)
        try:
            held = case.held
        except InputError:  # its heads or widths do not divide by the devices
            continue
        if least is None or held < least.held:
            least = case
        if not case.fits:
            continue
        if objective == "throughput":
            batch = min(case.largest_batch, MOST_SEQUENCES)
            case = replace(case, load=replace(case.load, batch=batch))
        quality = measured(recipe.bits, recipe.group)
        fitting.append(Proposal(recipe, case, quality, own, most_loss))
    if not fitting:
        assert least is not None
        raise InputError(
            f"no recipe fits: the smallest of them takes {least.held / 1e9:,.2f} GB with one "
            f"sequence of {load.context + load.new_tokens:,} tokens, and there are "
            f"{device.memory / 1e9:,.2f} GB; give more memory, or a lower --min-context"
        )

    def rank(found: Proposal) -> tuple[int, int, float]:
        case = found.case
        best = case.token if objective == "latency" else -case.throughput
        return STANDINGS.index(found.standing), len(found.recipe.unmeasured), best

    return sorted(fitting, key=rank)


def _recipes(shape: ModelShape, draft: Draft) -> Iterator[Recipe]:
    """All of them; a group that does not divide the linears' widths is left out."""
    widths = {shape.hidden, shape.ffn, shape.heads * shape.head_dim}
    grids = [(b, g) for b, g in WEIGHTS if not g or all(width % g == 0 for width in widths)]
    for (bits, group), kv, attention, pruning, drafted in product(
        grids, KV, ATTENTIONS, PRUNINGS, (None, draft)
    ):
        yield Recipe(bits, group, kv, attention, pruning, drafted)


def fit_report(
    question: Question,
    device: Device,
    load: Load,
    objective: Objective,
    most_loss: float,
    top: int,
) -> dict[str, Any]:
    """The best recipes, for tables and scripts.  Raises InputError for a quantized checkpoint."""
    if question.is_quantized:
        raise InputError(
            f"'{question.model}' is quantized already; give the original to look for recipes"
        )
    shape = question.model_shape
    found = propose(shape, device, load, objective, most_loss, question.proposal)
    source = repository(question.model)
    notes = list(question.notes)
    if question.model is not None and source is None:
        notes.append(f"'{question.model}' is known by its shape alone, so no commands are given")
    if question.proposal is None:
        notes.append(
            f"speculation is with a draft that takes {ASSUMED_DRAFT.cost:.0%} of a step and is "
            f"right {ASSUMED_DRAFT.acceptance:.0%} of the time (--draft, --acceptance)"
        )
    return {
        "model": shape.name,
        "device": device.name,
        "memory_bytes": device.memory,
        "tensor_parallel": load.devices,
        "context": load.context + load.new_tokens,
        "optimize": objective,
        "max_loss": most_loss,
        "fitting": len(found),
        "recipes": [one.report(source) for one in found[:top]],
        "notes": notes,
    }


def repository(model: str | None) -> str | None:
    """What `compress quantize` takes for a model: of one known by name its Hugging Face id."""
    known = known_models().get(model or "")
    if known is None:
        return model
    link = re.search(r"huggingface\.co/([\w.-]+/[\w.-]*\w)", known["source"])
    return link[1] if link else None
