"""What is said of inputs that were rounded although they exceed the threshold for outliers."""

from compress.core.progress import say
from compress.kernels.lowbit_matmul.weight import MOST_FOUND
from compress.runtime.batch import Model, RoundingModel


def say_surplus(model: Model) -> None:
    """Say how many there were, if any; on a GPU this waits for its work."""
    count = model.surplus_outliers if isinstance(model, RoundingModel) else 0
    if count:
        say(
            f"{count:,} input elements above the outlier threshold were rounded to int8 (a token "
            f"has room for {MOST_FOUND} a layer); a lower --outlier-threshold at quantization "
            "stores more columns in 16 bits"
        )
