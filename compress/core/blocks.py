"""A causal language model of which one decoder block at a time is in memory.

The module tree is built on the meta device from config.json, so that blocks and linears are found
from the tree itself and no list of model classes is needed.  Weights come from the safetensors
shards when a block is asked for, and go when the caller drops it.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from compress.core.errors import InputError, reason_of, shown
from compress.core.progress import track
from compress.core.shards import DTYPES, ShardReader, hashed
from compress.core.source import ModelSource, read_config

WEIGHT_DTYPES = ("F32", "BF16", "F16", "F64")  # by safetensors' names
LEAST_BUFFER_BYTES = 1 << 30  # computed tables of any model may be this large
MOST_LABELS = 1_000_000


class BlockModel:
    """The skeleton of a model, and its blocks on demand.

    The skeleton is built twice: first without any memory for tensors, to see whether config.json
    fits the checkpoint, then with the buffers that a class computes (rotary frequencies), of
    which a config.json gone wrong could ask for any amount.

    Raises InputError when the folder is not a causal language model that transformers knows, is
    already quantized, or lacks a tensor, a shape or a dtype that its config.json calls for.
    """

    def __init__(
        self, source: ModelSource, device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        self.source = source
        self.device = device
        self.compute_dtype = compute_dtype
        self.reader = ShardReader(source.folder)
        self.config = _load_config(source, self.reader)
        self.skeleton = build_skeleton(self.config, source, self.reader)
        self.blocks_name, self._blocks = _find_blocks(self.skeleton, source)
        self.tied_names = set(getattr(self.skeleton, "all_tied_weights_keys", None) or ())
        self.num_parameters = sum(
            p.numel() for name, p in self.skeleton.named_parameters() if name not in self.tied_names
        )
        self._prefix = self._checkpoint_prefix()
        self._check_tensors()
        self._check_buffers()
        self.skeleton = build_skeleton(self.config, source, self.reader, True)
        self._blocks = self.skeleton.get_submodule(self.blocks_name)

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the first block's weights in the checkpoint."""
        name = next(name for name, _ in self._blocks[0].named_parameters())
        return DTYPES[self.reader.dtypes[self.stored_name(f"{self.block_name(0)}.{name}")]]

    def block_name(self, index: int) -> str:
        """The block's path in the module tree, e.g. `model.layers.3`."""
        return f"{self.blocks_name}.{index}"

    def stored_name(self, name: str) -> str:
        """The name in the checkpoint of the parameter `name` of the module tree."""
        return name.removeprefix(self._prefix)

    def outer_names(self) -> list[str]:
        """Checkpoint tensors that belong to the model but to no block."""
        known = {self.stored_name(name) for name in self.skeleton.state_dict(keep_vars=True)}
        inside = self.stored_name(self.blocks_name) + "."
        return [n for n in self.reader.names if n in known and not n.startswith(inside)]

    def block_names(self, index: int) -> list[str]:
        """Checkpoint tensors of a block."""
        names = (f"{self.block_name(index)}.{n}" for n in self._blocks[index].state_dict())
        return [stored for name in names if (stored := self.stored_name(name)) in self.reader]

    def digest(self) -> str:
        """Read every tensor of the model once; a hash of names, shapes and contents.

        Raises InputError for one with a NaN or an infinity.
        """
        blocks = (self.block_names(index) for index in range(self.num_blocks))
        parts = [self.outer_names(), *blocks]
        read = track(parts, "Checking weights")
        return hashed("".join(self.reader.digest(names) for names in read).encode())

    def unknown_names(self) -> list[str]:
        """Checkpoint tensors that the model class does not have, and loading would ignore."""
        known = {self.stored_name(name) for name in self.skeleton.state_dict(keep_vars=True)}
        return [name for name in self.reader.names if name not in known]

    def meta_block(self, index: int) -> nn.Module:
        """The block without its weights, to look at names and shapes."""
        return self._blocks[index]

    def load_block(self, index: int) -> nn.Module:
        """Return a copy of block `index` on the device: weights in float32, buffers as stored.

        The system is asked to read the next block's weights from the disk in the meantime.
        """
        block = copy.deepcopy(self._blocks[index])
        parameters = {name for name, _ in block.named_parameters()}
        for name in block.state_dict(keep_vars=True):
            stored = self.stored_name(f"{self.block_name(index)}.{name}")
            if name in parameters:
                _set_parameter(block, name, self.reader.load(stored).to(self.device).float())
            elif stored in self.reader:
                owner, _, leaf = name.rpartition(".")
                block.get_submodule(owner)._buffers[leaf] = self.reader.load(stored)
        if index + 1 < self.num_blocks:
            self.reader.prefetch(self.block_names(index + 1))
        return block.to(self.device)

    @torch.no_grad()
    def capture_inputs(
        self, batches: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, list[dict[str, Any]]]]:
        """Run what comes before the blocks, and yield for each batch what the blocks get.

        `batches` holds token ids, int64 [B, S] each.  Yields the hidden states [B, S, D], on the
        CPU, and for each block the other arguments that it is called with (masks, position
        embeddings).  The model's own forward runs with every block replaced by a recorder that
        hands its input on, so these are those of the model's class, per block where they differ.
        Arguments equal to the first batch's are the first batch's.
        """
        outer = self._load_outer(batches)
        first: list[dict[str, Any]] = []
        kwargs: list[dict[str, Any]] = []
        hidden: Tensor | None = None

        def record(index: int):
            def forward(*args: Any, **kw: Any) -> Tensor:
                nonlocal hidden
                states = args[0] if args else kw.pop("hidden_states")
                if index == 0:
                    hidden = states.to("cpu", self.compute_dtype)
                kwargs.append(kw)
                if index == len(self._blocks) - 1:
                    raise _AllRecorded
                return states

            return forward

        for index, block in enumerate(self._blocks):
            block.forward = record(index)
        try:
            for batch in batches:
                kwargs.clear()
                try:
                    self.skeleton(input_ids=batch.to(self.device), use_cache=False)
                except _AllRecorded:
                    assert hidden is not None
                    first = first or list(kwargs)
                    yield hidden, _shared(kwargs, first, {})
        finally:
            for block in self._blocks:
                del block.forward
            for name in outer:
                _set_parameter(self.skeleton, name, self.skeleton.get_parameter(name).to("meta"))

    def compute_copy(self, block: nn.Module) -> nn.Module:
        """A copy of a float32 block in the dtype that forwards run in."""
        if self.compute_dtype == torch.float32:
            return block
        return copy.deepcopy(block).to(self.compute_dtype)

    def run_block(self, block: nn.Module, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Run a block on one batch [B, S, D]; returns its output, the same shape, on the CPU."""
        return call_block(block, states.to(self.device), kwargs).to("cpu")

    def _load_outer(self, batches: Sequence[Tensor]) -> list[str]:
        """Materialize what runs before the blocks; returns the names of those parameters.

        Of the embeddings only the rows of tokens in `batches` are filled in.
        """
        head = self.skeleton.get_output_embeddings()
        embeddings = self.skeleton.get_input_embeddings()
        skip = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
        skip -= {id(p) for p in embeddings.parameters()}
        looked_up = {id(p) for p in embeddings.parameters() if p.dim() == 2}
        tokens = torch.cat([batch.flatten() for batch in batches]).unique()
        inside = self.blocks_name + "."
        names = [
            name
            for name, parameter in self.skeleton.named_parameters()
            if not name.startswith(inside) and id(parameter) not in skip
        ]
        for name in names:
            stored, parameter = self.stored_name(name), self.skeleton.get_parameter(name)
            if id(parameter) in looked_up:
                tensor = torch.empty_like(parameter, device=self.device, dtype=self.compute_dtype)
                start = 0
                for rows in self.reader.rows(stored):
                    here = tokens[(tokens >= start) & (tokens < start + len(rows))]
                    tensor[here] = rows[here - start].to(self.device, self.compute_dtype)
                    start += len(rows)
            else:
                tensor = self.reader.load(stored).to(self.device, self.compute_dtype)
            _set_parameter(self.skeleton, name, tensor)
        return names

    def _checkpoint_prefix(self) -> str:
        """`model.` when the checkpoint was saved from the bare base model, else nothing."""
        sample = f"{self.block_name(0)}.{next(n for n, _ in self._blocks[0].named_parameters())}"
        prefix = f"{self.skeleton.base_model_prefix}."
        if sample not in self.reader and sample.removeprefix(prefix) in self.reader:
            return prefix
        return ""

    def _check_tensors(self) -> None:
        """Compare every tensor that the skeleton loads with what the checkpoint holds."""
        parameters = dict(self.skeleton.named_parameters(remove_duplicate=False))
        for name, tensor in self.skeleton.state_dict(keep_vars=True).items():
            stored = self.stored_name(name)
            if stored not in self.reader:
                if name in self.tied_names or name not in parameters:
                    continue
                raise InputError(
                    f"'{self.source.folder}' has no tensor {stored}, which "
                    f"{type(self.skeleton).__name__} needs: the checkpoint is "
                    "incomplete, or of a class whose tensors transformers renames on loading "
                    "(mixtures of experts), which is not supported"
                )
            if self.reader.shapes[stored] != tuple(tensor.shape):
                raise InputError(
                    f"tensor {stored} in '{self.source.folder}' has shape "
                    f"{list(self.reader.shapes[stored])}, config.json calls for "
                    f"{list(tensor.shape)}; the checkpoint does not fit its config.json"
                )
            dtype = self.reader.dtypes[stored]
            if name in parameters and dtype not in WEIGHT_DTYPES:
                raise InputError(
                    f"tensor {stored} in '{self.source.folder}' is stored as {dtype}; weights are "
                    f"{', '.join(WEIGHT_DTYPES)}; give the original, unquantized model"
                )

    def _check_buffers(self) -> None:
        """Refuse tables larger than the checkpoint that the class would compute on its own."""
        buffers = dict(self.skeleton.named_buffers())
        size = sum(buffer.numel() * buffer.element_size() for buffer in buffers.values())
        if size > max(LEAST_BUFFER_BYTES, self.reader.total_bytes):
            name = max(buffers, key=lambda n: buffers[n].numel())
            raise InputError(
                f"config.json of '{self.source.ref}' calls for {size / 2**30:,.0f} GiB of computed "
                f"tables, such as {name} {list(buffers[name].shape)}; correct its sizes, "
                "max_position_embeddings above all"
            )


class _AllRecorded(Exception):  # noqa: N818 (a signal, not an error)
    """Raised in the last block: what follows it need not run."""


def _shared(value: Any, first: Any, known: dict[int, Tensor]) -> Any:
    """Nested arguments, with each tensor that equals its counterpart in `first` replaced by it.

    `known` remembers by identity what was compared, since blocks mostly get the same tensors.
    """
    if isinstance(value, Tensor):
        if id(value) not in known:
            same = isinstance(first, Tensor) and value.dtype == first.dtype
            known[id(value)] = first if same and torch.equal(value, first) else value
        return known[id(value)]
    if isinstance(value, dict):
        others = first if isinstance(first, dict) else {}
        return {key: _shared(item, others.get(key), known) for key, item in value.items()}
    if type(value) in (list, tuple):
        others = first if isinstance(first, list | tuple) else ()
        pairs = zip_longest(value, others[: len(value)])
        return type(value)(_shared(item, other, known) for item, other in pairs)
    return value


def call_block(block: nn.Module, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Call a block; some classes return a tuple whose first entry is the hidden states."""
    output = block(states, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """All linears of a block by their name within it, in the module tree's order."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def _load_config(source: ModelSource, reader: ShardReader) -> Any:
    raw = read_config(source.folder)
    if quantization := raw.get("quantization_config"):
        named = isinstance(quantization, dict) and quantization.get("quant_method")
        raise InputError(
            f"model '{source.ref}' is already quantized ({named or 'method unknown'}); "
            "give the original model"
        )
    config = transformers_config(source, reader)
    _check_task(config, source)
    return config


def transformers_config(source: ModelSource, reader: ShardReader) -> Any:
    """config.json as transformers reads it; InputError when it does not."""
    from transformers import AutoConfig

    _check_counts(read_config(source.folder), source, reader)
    try:
        with _unlogged():
            return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # a broken config.json can fail anywhere inside transformers
        raise InputError(
            f"transformers cannot read config.json of '{source.ref}': {reason_of(error)}; "
            "correct it, or download the model again"
        ) from None


def _check_counts(raw: dict[str, Any], source: ModelSource, reader: ShardReader) -> None:
    """Refuse counts for which transformers would make lists while it reads config.json.

    A block has at least one tensor, so there are no more blocks than tensors.
    """
    from transformers import CONFIG_MAPPING

    limits = {"num_hidden_layers": len(reader.names), "num_labels": MOST_LABELS}
    for given in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        kind = given.get("model_type")
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            own_names = CONFIG_MAPPING[kind].attribute_map
            limits |= {own_names.get(key, key): limit for key, limit in tuple(limits.items())}
        for key, limit in limits.items():
            if isinstance(given.get(key), int | float) and given[key] > limit:
                raise InputError(
                    f"config.json of '{source.ref}' has {key} = {shown(given[key])}, with "
                    f"{len(reader.names)} tensors in the checkpoint; at most {limit} is possible"
                )


def _check_task(config: Any, source: ModelSource) -> None:
    """Refuse models of another task, some of which AutoModelForCausalLM would build regardless."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in causal:
        raise InputError(
            f"model '{source.ref}' is of type {kind}, for which transformers has no causal "
            "language model; give one that generates text from left to right"
        )
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(
            f"config.json of '{source.ref}' has architectures = {shown(named)}; it must be a list "
            "of class names"
        )
    bases = auto.MODEL_MAPPING_NAMES.get(kind, ())
    bases = (bases,) if isinstance(bases, str) else bases
    for name in named:
        if name not in causal.values() and name not in bases and name in dir(transformers):
            raise InputError(
                f"model '{source.ref}' is a {name} by its config.json, which is no causal language "
                f"model; of this type {causal[kind]} is"
            )
    masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    encodes = config.is_encoder_decoder or (masked and not getattr(config, "is_decoder", False))
    if encodes and not set(named) & set(causal.values()):
        raise InputError(
            f"model '{source.ref}' has an encoder by its config.json (type {kind}, neither "
            f"is_decoder nor a causal class under architectures); of this type {causal[kind]} "
            "is supported"
        )


def build_skeleton(
    config: Any, source: ModelSource, reader: ShardReader, real_buffers: bool = False
) -> Any:
    """The model of a transformers config, with its parameters and buffers on the meta device.

    `real_buffers` puts what is computed and not stored in the checkpoint on the CPU.  Raises
    InputError when there is no such model, or it has far more parameters than the checkpoint.
    """
    from transformers import AutoModelForCausalLM

    on_meta = init_empty_weights(include_buffers=False) if real_buffers else torch.device("meta")
    try:
        with _at_most(2 * len(reader.names) + 100, source), _unlogged(), on_meta:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # shapes that contradict each other fail inside the model class
        raise InputError(
            f"model '{source.ref}' cannot be built as a causal language model: "
            f"{reason_of(error)}; correct its config.json, or download it again"
        ) from None
    return model.eval().requires_grad_(False)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep transformers from logging: on a broken config.json it prints all of it."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def _at_most(limit: int, source: ModelSource) -> Iterator[None]:
    """Stop a model that is being built at `limit` parameters: a wrong config.json may ask for a
    billion of them.  Raises InputError.
    """
    count = 0

    def check(*_args: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise InputError(
                f"config.json of '{source.ref}' calls for more than {limit} tensors, far more than "
                "the checkpoint holds; the two do not belong together"
            )

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _find_blocks(model: nn.Module, source: ModelSource) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: the outermost module list that holds the most parameters."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and linears_of(module)
    }
    if not lists:
        raise InputError(
            f"model '{source.ref}' ({type(model).__name__}) has no list of blocks with linear "
            "layers; it is not supported"
        )
    name = max(lists, key=lambda n: (sum(p.numel() for p in lists[n].parameters()), -len(n)))
    return name, lists[name]


def _set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
