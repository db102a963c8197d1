"""What the tests of chains share: a recipe of three stages on a tiny model, and what was run."""

from pathlib import Path
from typing import Any

from compress import chain
from compress.chain_eval import Comparison
from compress.recipe import method_of

TRAIN = {
    "tokens": 4 * 4 * 32,
    "seq_len": 32,
    "batch_size": 4,
    "micro_batch": 2,
    "learning_rate": 1e-3,
    "precision": "float32",
    "save_every": 2,
}
METHODS = ["prune", "distill", "gptq"]
PRUNE, DISTILL, GPTQ = range(3)


def three_stages(model: Path, text_file: Path, out: Path) -> dict[str, Any]:
    """A recipe's values: prune, distill, gptq on a tiny model of four blocks, and little text."""
    return {
        "model": str(model),
        "out": str(out),
        "calibration": {"source": str(text_file), "samples": 8, "seq_len": 32},
        "eval": {"text": str(text_file), "windows": 4, "seq_len": 32},
        "stages": [
            {"method": "prune", "layers_out": 1, "ffn": 64},
            {
                "method": "distill",
                "data": {"source": str(text_file), "held_out": 4},
                "train": TRAIN,
            },
            {"method": "gptq", "group_size": 16, "calibration": {"samples": 6}},
        ],
    }


def noting_runs(monkeypatch: Any) -> list[str]:
    """A list to which the method of each stage is added that is carried out, and `measure`."""
    found: list[str] = []
    for name in ("run_recipe", "run_pruning", "run_distillation"):
        run = getattr(chain, name)

        def noted(recipe, *arguments, run=run, **named):
            found.append(method_of(recipe.stages[0]))
            return run(recipe, *arguments, **named)

        monkeypatch.setattr(chain, name, noted)
    measure = Comparison.measure

    def measured(self, *models):
        found.append("measure")
        return measure(self, *models)

    monkeypatch.setattr(Comparison, "measure", measured)
    return found
