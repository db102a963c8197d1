"""A causal language model of which one decoder block at a time is in memory.

The module tree is built on the meta device from config.json, so that blocks and linears are found
from the tree itself and no list of model classes is needed.  Weights come from the safetensors
shards when a block is asked for, and go when the caller drops it.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from compress.core.errors import InputError, reason_of
from compress.core.shards import ShardReader
from compress.core.source import ModelSource, read_config


@dataclass(frozen=True)
class BlockInputs:
    """What enters the blocks.

    `hidden` is one tensor [B, S, D] a batch, on the CPU; `kwargs[i][b]` holds the other arguments
    of block i for batch b (masks, position embeddings), as the model's own forward passes them.
    """

    hidden: list[Tensor]
    kwargs: list[list[dict[str, Any]]]


class BlockModel:
    """The skeleton of a model, and its blocks on demand.

    Raises InputError when the folder is not a causal language model that transformers knows, is
    already quantized, or lacks a tensor or a shape that its config.json calls for.
    """

    def __init__(
        self, source: ModelSource, device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        self.source = source
        self.device = device
        self.compute_dtype = compute_dtype
        self.reader = ShardReader(source.folder)
        self.config = _load_config(source)
        self.skeleton = build_skeleton(self.config, source)
        self.blocks_name, self._blocks = _find_blocks(self.skeleton, source)
        self.tied_names = set(getattr(self.skeleton, "all_tied_weights_keys", None) or ())
        self.num_parameters = sum(
            p.numel() for name, p in self.skeleton.named_parameters() if name not in self.tied_names
        )
        self._prefix = self._checkpoint_prefix()
        self._check_shapes()

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the first block's weights in the checkpoint."""
        name = next(name for name, _ in self._blocks[0].named_parameters())
        return self.reader.load(self.stored_name(f"{self.block_name(0)}.{name}")).dtype

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

    def unknown_names(self) -> list[str]:
        """Checkpoint tensors that the model class does not have, and loading would ignore."""
        known = {self.stored_name(name) for name in self.skeleton.state_dict(keep_vars=True)}
        return [name for name in self.reader.names if name not in known]

    def meta_block(self, index: int) -> nn.Module:
        """The block without its weights, to look at names and shapes."""
        return self._blocks[index]

    def load_block(self, index: int) -> nn.Module:
        """Return a copy of block `index` on the device: weights in float32, buffers as stored."""
        block = copy.deepcopy(self._blocks[index])
        parameters = {name for name, _ in block.named_parameters()}
        for name in block.state_dict(keep_vars=True):
            stored = self.stored_name(f"{self.block_name(index)}.{name}")
            if name in parameters:
                _set_parameter(block, name, self.reader.load(stored).to(self.device, torch.float32))
            elif stored in self.reader:
                owner, _, leaf = name.rpartition(".")
                block.get_submodule(owner)._buffers[leaf] = self.reader.load(stored)
        return block.to(self.device)

    @torch.no_grad()
    def capture_inputs(self, batches: list[Tensor]) -> BlockInputs:
        """Run what comes before the blocks and record what each block would be called with.

        `batches` holds token ids, int64 [B, S] each.  The model's own forward runs with every
        block replaced by a recorder that hands its input on, so masks and position embeddings
        are those of the model's class, per block where they differ.
        """
        outer = self._load_outer()
        hidden: list[Tensor] = []
        kwargs: list[list[dict[str, Any]]] = [[] for _ in self._blocks]

        def record(index: int):
            def forward(*args: Any, **kw: Any) -> Tensor:
                states = args[0] if args else kw.pop("hidden_states")
                if index == 0:
                    hidden.append(states.to("cpu", self.compute_dtype))
                kwargs[index].append(kw)
                if index == len(self._blocks) - 1:
                    raise _AllRecorded
                return states

            return forward

        for index, block in enumerate(self._blocks):
            block.forward = record(index)
        try:
            for batch in batches:
                try:
                    self.skeleton(input_ids=batch.to(self.device), use_cache=False)
                except _AllRecorded:
                    continue
        finally:
            for block in self._blocks:
                del block.forward
            for name in outer:
                _set_parameter(self.skeleton, name, self.skeleton.get_parameter(name).to("meta"))
        return BlockInputs(hidden, kwargs)

    def compute_copy(self, block: nn.Module) -> nn.Module:
        """A copy of a float32 block in the dtype that forwards run in."""
        if self.compute_dtype == torch.float32:
            return block
        return copy.deepcopy(block).to(self.compute_dtype)

    @torch.no_grad()
    def run_block(
        self, block: nn.Module, hidden: list[Tensor], kwargs: list[dict[str, Any]]
    ) -> list[Tensor]:
        """Run a block over all batches; returns its outputs, [B, S, D] each, on the CPU."""
        outputs = []
        for states, kw in zip(hidden, kwargs, strict=True):
            outputs.append(call_block(block, states.to(self.device), kw).to("cpu"))
        return outputs

    def _load_outer(self) -> list[str]:
        """Materialize what runs before the blocks; returns the names of those parameters."""
        head = self.skeleton.get_output_embeddings()
        embeddings = self.skeleton.get_input_embeddings()
        skip = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
        skip -= {id(p) for p in embeddings.parameters()}
        inside = self.blocks_name + "."
        names = [
            name
            for name, parameter in self.skeleton.named_parameters()
            if not name.startswith(inside) and id(parameter) not in skip
        ]
        for name in names:
            tensor = self.reader.load(self.stored_name(name))
            _set_parameter(self.skeleton, name, tensor.to(self.device, self.compute_dtype))
        return names

    def _checkpoint_prefix(self) -> str:
        """`model.` when the checkpoint was saved from the bare base model, else nothing."""
        sample = f"{self.block_name(0)}.{next(n for n, _ in self._blocks[0].named_parameters())}"
        prefix = f"{self.skeleton.base_model_prefix}."
        if sample not in self.reader and sample.removeprefix(prefix) in self.reader:
            return prefix
        return ""

    def _check_shapes(self) -> None:
        for name, parameter in self.skeleton.named_parameters(remove_duplicate=False):
            stored = self.stored_name(name)
            if stored not in self.reader:
                if name in self.tied_names:
                    continue
                raise InputError(
                    f"'{self.source.folder}' has no tensor {stored}, which "
                    f"{type(self.skeleton).__name__} needs: the checkpoint is "
                    "incomplete, or of a class whose tensors transformers renames on loading "
                    "(mixtures of experts), which is not supported"
                )
            if self.reader.shapes[stored] != tuple(parameter.shape):
                raise InputError(
                    f"tensor {stored} in '{self.source.folder}' has shape "
                    f"{list(self.reader.shapes[stored])}, config.json calls for "
                    f"{list(parameter.shape)}; the checkpoint does not fit its config.json"
                )


class _AllRecorded(Exception):  # noqa: N818 (a signal, not an error)
    """Raised in the last block: what follows it need not run."""


def call_block(block: nn.Module, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Call a block; some classes return a tuple whose first entry is the hidden states."""
    output = block(states, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """All linears of a block by their name within it, in the module tree's order."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def _load_config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    raw = read_config(source.folder)
    if "quantization_config" in raw:
        method = (raw["quantization_config"] or {}).get("quant_method", "unknown")
        raise InputError(
            f"model '{source.ref}' is already quantized ({method}); give the original model"
        )
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # a broken config.json can fail anywhere inside transformers
        raise InputError(
            f"transformers cannot read config.json of '{source.ref}': {reason_of(error)}"
        ) from None


def build_skeleton(config: Any, source: ModelSource) -> Any:
    """The model of a transformers config, its parameters on the meta device; InputError if none."""
    from transformers import AutoModelForCausalLM

    try:
        # Buffers (rotary frequencies) stay real: they are computed, not stored in the checkpoint.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # shapes that contradict each other fail inside the model class
        raise InputError(
            f"model '{source.ref}' cannot be built as a causal language model: {reason_of(error)}"
        ) from None
    return model.eval().requires_grad_(False)


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
