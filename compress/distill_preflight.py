"""What can be known before a distillation: whether it will work, and what it will take."""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch

from compress import texts
from compress.core.blocks import BlockModel
from compress.core.device import default_device
from compress.core.errors import InputError, reason_of
from compress.core.outfolder import OutputFolder
from compress.core.processes import processes
from compress.core.progress import say
from compress.core.resources import free_memory, in_words
from compress.core.source import resolve_model
from compress.core.tokenizer import difference
from compress.distill.checkpoint import KEPT
from compress.distill.head_loss import working_bytes
from compress.distill.lora import add_lora, check_lora
from compress.distill.memory import activation_bytes
from compress.distill.model_parts import inner_model
from compress.distill.preparation import check_trackers, settle_precision
from compress.distill.teacher import CacheIdentity
from compress.preflight import INTERPRETER_BYTES, Needs, check_latent_dtype
from compress.recipe import DistillConfig, DistillRecipe

FLOAT32 = 4
MOMENTS = 2  # of AdamW


@dataclass(frozen=True)
class DistillJob:
    """A recipe that can be carried out: its models, and what `auto` became here.

    precision   of forward passes, bfloat16 or float32
    dtype       of the weights that are written
    """

    recipe: DistillRecipe
    student: BlockModel
    teacher: BlockModel | None
    device: torch.device
    precision: str
    dtype: torch.dtype

    @property
    def config(self) -> DistillConfig:
        """Of the one stage."""
        return self.recipe.stages[0]

    @property
    def tokens(self) -> int:
        """How many are packed, if the data has them: those of all steps and the held-out ones."""
        train = self.config.train
        return (train.steps * train.step_sequences + self.config.data.held_out) * train.seq_len + 1

    @property
    def teacher_runs(self) -> bool:
        """Whether losses compare with a teacher, beside the student or from a cache."""
        return self.config.loss.needs_teacher

    def cache_identity(self, fingerprint: str) -> CacheIdentity:
        """What a cache of the teacher's likeliest tokens is of.  Raises InputError for a bad k."""
        loss = self.config.loss
        return CacheIdentity(
            teacher=fingerprint,
            k=loss.topk or 0,
            temperature=loss.temperature,
            vocabulary=vocabulary_of(self.student),
            seq_len=self.config.train.seq_len,
        )


def preflight(recipe: DistillRecipe) -> DistillJob:
    """Everything that can be refused in the first seconds; InputError then."""
    config = recipe.stages[0]
    if config.data.source != "self":
        texts.check_file(config.data.source, "training")
    check_trackers(config.train)
    if config.lora:
        check_lora()
        if _shards():
            raise InputError(
                "adapters are not merged into sharded weights; start without --use_fsdp, each "
                "process then holds the frozen model whole, or train all weights"
            )
    if config.teacher is None and config.needs_teacher:
        what = "a loss compares with" if config.loss.needs_teacher else "data 'self' comes from"
        raise InputError(f"no teacher is given, and {what} one; give --teacher")
    device = default_device()
    precision = settle_precision(config.train, device)
    compute = getattr(torch, precision)
    student = BlockModel(resolve_model(recipe.model), device, compute)
    teacher = None
    if config.teacher is not None:
        teacher = BlockModel(resolve_model(config.teacher), device, compute)
        check_pair(teacher, student)
    for model in (student, teacher):
        if model is not None:
            _check_context(model, config.train.seq_len)
    for name in student.unknown_names():
        say(f"Not carried over: {name} is in the checkpoint, but the model class does not use it")
    dtype = student.stored_dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    check_latent_dtype(student, dtype)
    job = DistillJob(recipe, student, teacher, device, precision, dtype)
    if config.loss.topk is not None:
        job.cache_identity("")
    return job


def vocabulary_of(model: BlockModel) -> int:
    """V, the number of tokens that a model predicts."""
    return model.config.get_text_config().vocab_size


def check_pair(teacher: BlockModel, student: BlockModel) -> None:
    """Raise InputError when two models do not mean the same by a token, or predict more of them."""
    refs = f"teacher '{teacher.source.ref}'", f"student '{student.source.ref}'"
    remedy = "distillation needs one vocabulary, take a student that was made from the teacher"
    sizes = vocabulary_of(teacher), vocabulary_of(student)
    if sizes[0] != sizes[1]:
        raise InputError(f"{refs[0]} predicts {sizes[0]} tokens, {refs[1]} {sizes[1]}; {remedy}")
    if found := difference(teacher.source.folder, student.source.folder):
        raise InputError(f"{refs[0]} and {refs[1]} have {found}; {remedy}")


def _check_context(model: BlockModel, seq_len: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and seq_len > context:
        raise InputError(
            f"seq_len is {seq_len}; '{model.source.ref}' allows at most {context} tokens, use less"
        )


def needs_of(job: DistillJob) -> Needs:
    """What a run will take, from shapes."""
    config, student = job.config, job.student
    parameters, on_gpu = student.num_parameters, job.device.type == "cuda"
    width = 2 if job.precision == "bfloat16" else 4
    weights = parameters * (width if config.lora else FLOAT32)
    trained, model = parameters, _trained_model(job)
    if config.lora:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        weights += trained * FLOAT32
    of_optimizer = trained * FLOAT32 * (MOMENTS + (config.train.ema is not None))
    kept = trained * FLOAT32 + of_optimizer  # in a checkpoint
    disk = parameters * job.dtype.itemsize + (KEPT + 1) * kept + FLOAT32 * job.tokens
    shards = processes().count if _shards() else 1  # of which each starts as the whole model
    gradients = trained * FLOAT32 // shards
    of_pass = _of_a_pass(job, model)
    # Of a step's one pass the gradients come as activations go.
    beside = gradients + of_pass if _passes(job) > 1 else max(gradients, of_pass)
    memory = max(weights, (weights + of_optimizer) // shards) + beside
    if job.teacher is not None and job.teacher_runs:
        of_teacher = job.teacher.num_parameters * width
        memory = memory + of_teacher if config.loss.topk is None else max(memory, of_teacher)
    if config.loss.topk is not None:
        sequences = -(-job.tokens // config.train.seq_len)
        disk += sequences * job.cache_identity("").bytes_per_sequence
    output = parameters * job.dtype.itemsize
    memory = max(memory, output)  # adapters are merged in the output's dtype
    # A GPU's model comes through this process's memory, and goes to the disk through it.
    host = INTERPRETER_BYTES + (max(weights, output) if on_gpu else memory)
    return Needs(output, disk, 0, host, memory if on_gpu else 0)


def _passes(job: DistillJob) -> int:
    """Forward and backward passes of a step in one process."""
    train = job.config.train
    return -(-train.step_sequences // (train.micro_batch * processes().count))


def _shards() -> bool:
    """Whether accelerate was started to share one model out over its processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _trained_model(job: DistillJob) -> Any:
    """The student without data, with what is trained requiring a gradient."""
    compute = getattr(torch, job.precision if job.config.lora else "float32")
    model = copy.deepcopy(job.student.skeleton).to(compute)
    return add_lora(model, job.config.lora) if job.config.lora else model.requires_grad_(True)


def _of_a_pass(job: DistillJob, model: Any) -> int:
    """What a micro-batch takes beside weights, gradients and moments; `model` is used up."""
    train, lowered = job.config.train, job.precision == "bfloat16"
    sequences = min(train.micro_batch, -(-train.step_sequences // processes().count))
    live = job.teacher_runs and job.config.loss.topk is None
    head = inner_model(model).get_output_embeddings()
    compute = getattr(torch, job.precision)
    of_losses = working_bytes(sequences * train.seq_len, head, compute, live, job.device)
    try:
        return of_losses + activation_bytes(model, train, sequences, lowered)
    except InputError:
        raise
    except Exception as error:  # a class that asks for tensors' values; it trains all the same
        say(f"The plan is without activations, which shapes alone do not tell: {reason_of(error)}")
        return of_losses


def check_resources(job: DistillJob, folder: OutputFolder) -> None:
    """Raise InputError where disk or memory will not do."""
    needs = needs_of(job)
    folder.check_disk(needs.disk)
    on_gpu = job.device.type == "cuda"
    taken = needs.device if on_gpu else needs.host
    free = torch.cuda.mem_get_info(job.device)[0] if on_gpu else free_memory()
    if taken > free:
        raise InputError(
            f"training takes {in_words(taken)} of memory, and {in_words(free)} are free; give a "
            "smaller --micro-batch or --set activation_checkpointing=true, train adapters with "
            "--lora 16, or shard over more GPUs with accelerate launch --use_fsdp --fsdp_version 2"
        )
