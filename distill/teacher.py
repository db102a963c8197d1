"""The teacher of a distillation: a model that runs beside the student."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.distill.head_loss import TeacherStates
from compress.distill.model_parts import Head, last_hidden, recording


class LiveTeacher:
    """A model that runs beside the student, without gradients, in evaluation mode.

    Its parameters are frozen here.  It is no module of the student's, so that no wrapper shards or
    saves it: each process holds it whole, in the dtype that it was loaded in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = Head.of(model)

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens."""
        return self.head.vocabulary

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, record: Mapping[str, nn.Module] | None = None
    ) -> tuple[TeacherStates, dict[str, Tensor]]:
        """Last hidden states [B * S, D], and the outputs of the modules in `record`, [B, S, D].

        input_ids, position_ids int64 [B, S], on the device that the model is moved to.
        """
        if self.head.linear.weight.device != input_ids.device:
            self.model.to(input_ids.device)
        with recording(record or {}) as outputs:
            hidden = last_hidden(self.model, input_ids, position_ids)
        return TeacherStates(hidden.flatten(0, 1), self.head), outputs
