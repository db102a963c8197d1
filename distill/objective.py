"""What a student is trained for: a weighted sum of losses against a teacher and the text.

    total = Σ over predicted tokens of  Σ over losses of  weight * loss

`Student` is the model and its objective in one forward, which is what a loop wraps for several
devices: the product with the head, chunk by chunk, then happens where the wrapped model's
parameters are whole.
"""

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.distill import losses
from compress.distill.head_loss import IGNORED, Term, head_loss
from compress.distill.loss_value import Loss
from compress.distill.model_parts import Head, last_hidden, recording
from compress.distill.state_losses import StateLosses
from compress.distill.teacher import LiveTeacher, TopKCache

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ON_STATES = ("hidden_mse", "hidden_cosine", "attention_mse", "attention_error")
AGAINST_TEACHER = ("forward_kl", "reverse_kl", "jsd", *ON_STATES)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LossConfig:
    """Weights of the losses (see losses.py), and their settings.

    forward_kl, reverse_kl, jsd, cross_entropy   on logits; at least one is above 0
    hidden_mse, hidden_cosine                    on the outputs of blocks, mean over the pairs
    attention_mse, attention_error               on the outputs of their attention; the error is
                                                 relative, so that one weight does for all models
    jsd_beta     β of jsd
    temperature  τ of the divergences; cross_entropy has none
    topk         forward_kl on the teacher's k likeliest tokens and the lumped rest, from a cache
    layers       which blocks are compared: pairs (student's, teacher's), counted from 0, or `even`,
                 where student block i of n stands for teacher block round((i + 1) N / n) - 1 of N
                 (TinyBERT, arXiv 1909.10351, section 3.1)
    """

    forward_kl: Weight = 1.0
    reverse_kl: Weight = 0.0
    jsd: Weight = 0.0
    cross_entropy: Weight = 0.0
    hidden_mse: Weight = 0.0
    hidden_cosine: Weight = 0.0
    attention_mse: Weight = 0.0
    attention_error: Weight = 0.0
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    topk: Annotated[int, Field(ge=1)] | None = None
    layers: Literal["even"] | tuple[tuple[int, int], ...] = "even"

    def __post_init__(self) -> None:
        if not (self.forward_kl or self.reverse_kl or self.jsd or self.cross_entropy):
            raise ValueError(
                "no loss on logits, without which the last blocks and the head learn nothing; "
                "give forward_kl, reverse_kl, jsd or cross_entropy a weight above 0"
            )
        if self.topk is None:
            return
        if others := [n for n in AGAINST_TEACHER if n != "forward_kl" and getattr(self, n)]:
            raise ValueError(
                f"topk serves forward_kl alone, since the teacher does not run; drop topk or "
                f"{', '.join(others)}"
            )
        if not self.forward_kl:
            raise ValueError("topk needs a weight of forward_kl above 0")

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is compared with a teacher."""
        return any(getattr(self, name) for name in AGAINST_TEACHER)

    def terms(self) -> dict[str, Term]:
        """The losses on logits that have a weight, by name."""
        tau = self.temperature
        divergences = {
            "forward_kl": partial(losses.forward_kl, temperature=tau),
            "reverse_kl": partial(losses.reverse_kl, temperature=tau),
            "jsd": partial(losses.jsd, beta=self.jsd_beta, temperature=tau),
        }
        terms = {
            name: Term(weight, lambda z, teacher, _, loss=loss: loss(z, teacher))
            for name, loss in divergences.items()
            if (weight := getattr(self, name))
        }
        if self.topk is not None:
            terms["forward_kl"] = Term(
                self.forward_kl,
                lambda z, top, _: losses.topk_kl(z, top.log_probs, top.indices, tau),
            )
        if self.cross_entropy:
            terms["cross_entropy"] = Term(
                self.cross_entropy, lambda z, _, labels: losses.cross_entropy(z, labels)
            )
        return terms


class Objective(nn.Module):
    """The losses of a student against a teacher and the text.

    Its parameters, if it has any, are the projections of `StateLosses`, trained with the student.

    Raises InputError where the teacher is missing, has another vocabulary or, for its states,
    does not run, and for models whose head or blocks cannot be made out.
    """

    def __init__(
        self, config: LossConfig, model: nn.Module, teacher: LiveTeacher | TopKCache | None = None
    ) -> None:
        super().__init__()
        _check(config, teacher)
        self.teacher = teacher if config.needs_teacher else None
        self.terms = config.terms()
        self.head = Head.of(model)
        self.states: StateLosses | None = None
        if self.teacher and self.teacher.vocabulary != self.head.vocabulary:
            raise InputError(
                f"the teacher has {self.teacher.vocabulary} tokens and the student "
                f"{self.head.vocabulary}; distillation needs one vocabulary, take a student with "
                "the teacher's tokenizer"
            )
        weights = {name: weight for name in ON_STATES if (weight := getattr(config, name))}
        if weights and isinstance(self.teacher, LiveTeacher):
            self.states = StateLosses(weights, config.layers, model, self.teacher.model)

    def forward(
        self,
        model: nn.Module,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        index: Tensor | None = None,
    ) -> Loss:
        """Run the student, and the teacher if there is one, and compare (see `Loss`).

        input_ids, position_ids, labels int64 [B, S]; index int64 [B], places in the data, for a
        teacher that was cached.  Positions restart at 0 with every document; the label at t is the
        token that t predicts, IGNORED where there is none.
        """
        labels = labels.flatten()
        of_teacher: Any = None
        their_states: dict[str, Tensor] = {}
        if isinstance(self.teacher, LiveTeacher):
            record = self.states.of_teacher if self.states else {}
            of_teacher, their_states = self.teacher(input_ids, position_ids, record)
        elif self.teacher is not None:
            assert index is not None, "a cached teacher is asked by places in the data"
            of_teacher = self.teacher.read(index, input_ids, position_ids)
        with recording(self.states.of_student if self.states else {}) as states:
            hidden = last_hidden(model, input_ids, position_ids).flatten(0, 1)
        total, parts = head_loss(hidden, self.head, labels, of_teacher, self.terms)
        if self.states:
            more, sums = self.states(states, their_states, labels != IGNORED)
            total, parts = total + more, parts | sums
        return Loss(total, (labels != IGNORED).sum(), parts)


class Student(nn.Module):
    """A model and its objective, in one forward."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        index: Tensor | None = None,
    ) -> Loss:
        """The loss of a micro-batch (see `Objective.forward`)."""
        return self.objective(self.model, input_ids, position_ids, labels, index)


def _check(config: LossConfig, teacher: LiveTeacher | TopKCache | None) -> None:
    if not config.needs_teacher:
        return
    if teacher is None:
        named = ", ".join(name for name in AGAINST_TEACHER if getattr(config, name))
        raise InputError(f"{named} compare with a teacher; give one, or only cross_entropy")
    if config.topk is None:
        if isinstance(teacher, TopKCache):
            raise InputError("the teacher is a cache of its top-k; give the loss a topk to match")
        return
    asked = f"top-{config.topk} at temperature {config.temperature:g}"
    if not isinstance(teacher, TopKCache):
        raise InputError(f"the loss asks for the teacher's {asked}, from a cache; build it first")
    held = teacher.identity
    if (held.k, held.temperature) != (config.topk, config.temperature):
        raise InputError(
            f"the loss asks for the teacher's {asked}, and the cache '{teacher.folder}' holds "
            f"top-{held.k} at temperature {held.temperature:g}; build another"
        )
