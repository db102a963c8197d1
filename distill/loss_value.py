"""What a training step gets from a model: a loss, as sums over tokens."""

from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True)
class Loss:
    """Sums over the predicted tokens of a micro-batch, so that parts of a batch add up.

    total   the weighted loss, a scalar with a gradient
    tokens  how many tokens were predicted, int64 scalar
    parts   each loss by itself, unweighted, scalars without a gradient
    """

    total: Tensor
    tokens: Tensor
    parts: dict[str, Tensor]


# FSDP and DDP look for tensors in what a forward returns.
_pytree.register_pytree_node(
    Loss,
    lambda loss: ([loss.total, loss.tokens, loss.parts], None),
    lambda leaves, _: Loss(*leaves),
)
