"""A causal language model of which one decoder block at a time is in memory.

The module tree is built on the meta device from config.json, so that blocks and linears are found
from the tree itself and no list of model classes is needed.  Weights come from the safetensors
shards when a block is asked for, and go when the caller drops it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.core.progress import track
from compress.core.shards import DTYPES, ShardReader, hashed
from compress.core.skeleton import build_skeleton, original_config
from compress.core.source import ModelSource

WEIGHT_DTYPES = ("F32", "BF16", "F16", "F64")  # by safetensors' names
LEAST_BUFFER_BYTES = 1 << 30  # computed tables of any model may be this large


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
        self.config = original_config(source, self.reader)
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
    def state_width(self) -> int:
        """The most numbers of a token that are handed from block to block: its hidden state, and
        with shared keys and values those (cross_layer.py)."""
        config = self.config.get_text_config()
        width = config.hidden_size
        if getattr(config, "kv_share", 1) > 1:
            width += 2 * config.num_key_value_heads * config.head_dim
        return width

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
        outer = self._load_outer(torch.cat([batch.flatten() for batch in batches]))
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
            self._unload_outer(outer)

    @contextmanager
    def predicting(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Inside, a function from what the last block gives, [B, S, D], to logits [B, S, V].

        The model's own forward runs with every block replaced by one that gives these states, so
        what comes after the blocks is that of the model's class; gradients pass through it.
        """
        outer = self._load_outer(None)
        states = torch.empty(0)
        for block in self._blocks:
            block.forward = lambda *_args, **_kwargs: states

        def predict(last: Tensor) -> Tensor:
            nonlocal states
            states = last.to(self.device)
            ids = torch.zeros(last.shape[:2], dtype=torch.int64, device=self.device)
            return self.skeleton(input_ids=ids, use_cache=False).logits

        try:
            yield predict
        finally:
            self._unload_outer(outer)

    def compute_copy(self, block: nn.Module) -> nn.Module:
        """A copy of a float32 block in the dtype that forwards run in."""
        if self.compute_dtype == torch.float32:
            return block
        return copy.deepcopy(block).to(self.compute_dtype)

    def run_block(self, block: nn.Module, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Run a block on one batch [B, S, D]; returns its output, the same shape, on the CPU."""
        return call_block(block, states.to(self.device), kwargs).to("cpu")

    def _load_outer(self, tokens: Tensor | None) -> dict[str, nn.Parameter]:
        """Materialize what is outside the blocks; returns the parameters without data by name.

        With `tokens` only what runs before the blocks, and of the embeddings only the rows of these
        tokens are filled in.
        """
        head = self.skeleton.get_output_embeddings()
        embeddings = self.skeleton.get_input_embeddings()
        skip: set[int] = set()
        if tokens is not None and isinstance(head, nn.Module):
            skip = {id(p) for p in head.parameters()} - {id(p) for p in embeddings.parameters()}
        looked_up = {id(p) for p in embeddings.parameters() if p.dim() == 2}
        inside = self.blocks_name + "."
        found = {
            name: parameter
            for name, parameter in self.skeleton.named_parameters()
            if not name.startswith(inside) and id(parameter) not in skip
        }
        sources = dict(getattr(self.skeleton, "all_tied_weights_keys", None) or {})
        loaded: dict[str, Tensor] = {}
        for name, parameter in found.items():
            source = name if self.stored_name(name) in self.reader else sources.get(name, name)
            if source not in loaded:
                rows = tokens if id(parameter) in looked_up else None
                loaded[source] = self._outer_tensor(source, parameter, rows)
            _set_parameter(self.skeleton, name, loaded[source])
        return found

    def _outer_tensor(self, name: str, parameter: nn.Parameter, tokens: Tensor | None) -> Tensor:
        """A parameter's value in the compute dtype; of an embedding perhaps only some rows."""
        stored = self.stored_name(name)
        if tokens is None:
            return self.reader.load(stored).to(self.device, self.compute_dtype)
        tensor = torch.empty_like(parameter, device=self.device, dtype=self.compute_dtype)
        looked_up, start = tokens.unique(), 0
        for rows in self.reader.rows(stored):
            here = looked_up[(looked_up >= start) & (looked_up < start + len(rows))]
            tensor[here] = rows[here - start].to(self.device, self.compute_dtype)
            start += len(rows)
        return tensor

    def _unload_outer(self, outer: Mapping[str, nn.Parameter]) -> None:
        """Undo `_load_outer`, and give the blocks their own forward again."""
        for block in self._blocks:
            del block.forward
        for name, parameter in outer.items():
            owner, _, leaf = name.rpartition(".")
            self.skeleton.get_submodule(owner)._parameters[leaf] = parameter

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


def largest_module_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The decoder blocks: the outermost module list that holds the most parameters, by name."""
    lists = {n: module for n, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        return None
    name = max(lists, key=lambda n: (sum(p.numel() for p in lists[n].parameters()), -len(n)))
    return name, lists[name]


def _find_blocks(model: nn.Module, source: ModelSource) -> tuple[str, nn.ModuleList]:
    found = largest_module_list(model)
    if found is None or not linears_of(found[1]):
        raise InputError(
            f"model '{source.ref}' ({type(model).__name__}) has no list of blocks with linear "
            "layers; it is not supported"
        )
    return found


def _set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
