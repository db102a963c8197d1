"""The second phase of QAT: a fake-quantized model learns the original's predictions.

The loss of a token is the forward KL divergence KL(p₀ ‖ p) over the whole vocabulary, from the
original's p₀ (losses.py): what quantization changed is all that it sees, and the text that it is
measured on may be any.  Cross-entropy on the text would teach the text too.
"""

from pathlib import Path

from torch import nn
from torch.distributed.tensor import DTensor

from compress.distill.config import TrainConfig
from compress.distill.data import PackedData
from compress.distill.loop import TrainResult, train
from compress.distill.objective import LossConfig, Objective, Student
from compress.distill.teacher import LiveTeacher
from compress.quant.training import Rates, parameter_groups


def learn_predictions(
    model: nn.Module,
    original: nn.Module,
    data: PackedData,
    config: TrainConfig,
    rates: Rates,
    folder: Path,
) -> TrainResult:
    """Train a model with fake-quantized linears in place (see `compress.distill.loop.train`).

    model     its other parameters in float32
    original  of the same vocabulary, in any dtype
    rates     of what learns, at their peak; the schedule is the config's

    Raises InputError as the loop does, and where the objective cannot make out the model's head.
    """
    student = Student(model, Objective(LossConfig(), model, LiveTeacher(original)))
    result = train(
        student, data, config, folder, parameter_groups=lambda s: parameter_groups(s, rates)
    )
    _gather(model)
    return result


def _gather(model: nn.Module) -> None:
    """Make parameters that FSDP has sharded whole again, in every process."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                whole = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                module._parameters[name] = whole
