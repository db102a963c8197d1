"""How far each stage of a chain takes a model from the original: perplexity and divergence.

All are scored on the same windows (evaluate.py): those of a text file, or pieces of text that the
original wrote itself, which are sampled once and committed.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.calibration import calibration_tokens, fingerprint
from compress.chain_recipe import EvalConfig
from compress.core.blocks import BlockModel
from compress.core.commits import Commits
from compress.core.shards import hashed_file
from compress.core.source import SELF, ModelSource
from compress.evaluate import TextEvalConfig, evaluate_text, evaluate_windows
from compress.recipe import CalibrationConfig

WINDOWS = "windows"


def text_config(config: EvalConfig) -> TextEvalConfig:
    """As evaluate.py takes it; the text is not read for `self`."""
    return TextEvalConfig(Path(config.text), config.seq_len, config.windows, dtype=config.dtype)


def sampling_config(config: EvalConfig) -> CalibrationConfig:
    """The text that the original is to write."""
    return CalibrationConfig(SELF, config.windows, config.seq_len, config.seed)


class Comparison:
    """Measures models against the original.

    commits   where windows that are sampled are kept, with `identity`, what the original is
    """

    def __init__(
        self,
        config: EvalConfig,
        original: BlockModel,
        commits: Commits,
        identity: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.original = original
        self.commits = commits
        self.identity = identity

    def settings(self) -> dict[str, Any]:
        """What a measurement is of, beside the model."""
        text = None if self.config.text == SELF else hashed_file(Path(self.config.text))
        return {"eval": asdict(self.config), "text file": text}

    def measure(self, model: ModelSource, against: ModelSource | None = None) -> dict[str, Any]:
        """What `evaluate_text` finds; of sampled windows, `windows_sha256` in place of the text's.

        Against the original, or another model.  Raises InputError as `evaluate_text` does.
        """
        settings, against = text_config(self.config), against or self.original.source
        if self.config.text != SELF:
            return evaluate_text(model, settings, against)
        windows = self._windows()
        found = evaluate_windows(model, windows.numpy(), settings, against)
        return found | {"windows_sha256": fingerprint(windows)}

    def _windows(self) -> Tensor:
        """Token ids, int64 [windows, seq_len], sampled from the original once."""
        self.commits.go_on({**self.settings(), "original": self.identity})
        if self.commits.get(WINDOWS) is None:
            vocabulary = self.original.config.get_text_config().vocab_size
            config, device = sampling_config(self.config), self.original.device
            tokens = calibration_tokens(config, self.original.source, vocabulary, device)
            self.commits.put(WINDOWS, tokens)
        return self.commits.get(WINDOWS)
