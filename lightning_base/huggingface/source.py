"""Where a model of ``transformers`` comes from: its configuration, and its weights if there are any.

Nothing is downloaded, and no code of a model's folder is run.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lightning_base.instantiation import ConfigError, did_you_mean

# What architectures call the width inside a feed-forward layer; GPT-2 has none unless it is not 4 D.
HIDDEN_WIDTHS = ("n_inner", "intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff")


@lru_cache
def transformers() -> ModuleType:
    """The package, without its announcements and bars.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
        import transformers.models.auto.modeling_auto
    except ImportError as error:
        raise ConfigError(
            "model=huggingface needs a package that is not installed: "
            "pip install 'lightning-base[huggingface]', or choose another model"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def read_config(source: str | Mapping[str, Any], vocab_size: int | None = None) -> Any:
    """A ``PreTrainedConfig``.

    Dropout is off: its masks would depend on ranks and on where a run was resumed. So is ``pad_token_id``, whose
    embedding would not learn: here padding is a mask.

    Args:
        source: a folder, a file or the values, as in ``model.config``.
        vocab_size: of a model whose values do not say.

    Raises:
        ConfigError: it cannot be read, or is of no causal language model.
    """
    values = dict(source) if isinstance(source, Mapping) else _read_file(Path(source))
    known = transformers().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind = values.pop("model_type", None)
    if kind is None:
        raise ConfigError("model.config has no model_type: name an architecture, such as gpt2, llama or qwen2")
    if kind not in known:
        where = "model.config.model_type" if isinstance(source, Mapping) else f"the model_type of model.config={source}"
        raise ConfigError(f"{where} is {kind}, no causal language model of transformers{did_you_mean(kind, known)}")
    found = transformers().CONFIG_MAPPING[kind]
    try:
        config = found.from_dict(sized(values, found, vocab_size) if isinstance(source, Mapping) else values)
    except ConfigError:
        raise
    except Exception as error:  # of whatever kind the architecture's checks are
        raise ConfigError(f"model.config cannot be used: {' '.join(str(error).split())}") from error
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, int | float) and value:
            setattr(config, key, type(value)(0))
    for needed in ("hidden_size", "vocab_size"):
        value = getattr(config, needed, None)
        if value is not None and not isinstance(value, int):
            raise ConfigError(f"model.config.{needed}={value!r} should be a whole number")
        if value is None:
            raise ConfigError(
                f"model.config of {kind} has no {needed} of its own, as a model of several parts: name its text part, "
                f"as {kind}_text"
            )
    if hasattr(config, "is_decoder"):
        config.is_decoder = True  # or an encoder would look ahead
    config.use_cache, config.pad_token_id = False, None
    return config


def _read_file(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        what = "has no config.json" if path.is_dir() else "does not exist"
        raise ConfigError(f"model.config={path} {what}: give a folder as save_pretrained writes it, or its config.json")
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.config={path} cannot be read: {error}") from error
    return values


def sized(values: Mapping[str, Any], found: Any, vocab_size: int | None) -> dict[str, Any]:
    """Values for a new model of a class, where those that follow from others need not be given."""
    defaults, names = found(), dict(found.attribute_map)
    known = {*defaults.to_dict(), *names} - {"transformers_version", "model_type"}
    result: dict[str, Any] = {} if vocab_size is None else {"vocab_size": vocab_size}
    result |= {key: None for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in known}
    for key, value in values.items():
        if key not in known and key == "intermediate_size" and "n_inner" in known:
            key = "n_inner"
        if key not in known:
            raise ConfigError(f"model.config.{key} is not an option of {found.__name__}{did_you_mean(key, known)}")
        if "drop" in key and value:
            raise ConfigError(
                f"model.config.{key}={value}: dropout would differ with the ranks and after a resume; set it to 0"
            )
        alias = names.get(key)
        if alias in values:
            raise ConfigError(f"model.config.{alias} and model.config.{key} are the same option: give one of them")
        result[key] = value
    width, heads = (result.get(key, result.get(names.get(key, ""))) for key in ("hidden_size", "num_attention_heads"))
    if heads and "num_key_value_heads" in known:
        result.setdefault("num_key_value_heads", heads)
    if width and heads and "head_dim" in known:
        result.setdefault("head_dim", width // heads)
    return result


def weights_folder(source: str | Mapping[str, Any]) -> Path | None:
    """The folder to load weights from; None for a model to be drawn.

    Raises:
        ConfigError: there are weights in a format that runs code when it is read.
    """
    if not isinstance(source, str) or not Path(source).is_dir():
        return None
    if any(Path(source).glob("*.safetensors")):
        return Path(source)
    if any(Path(source).glob("pytorch_model*.bin")):
        raise ConfigError(
            f"model.config={source} has its weights as pytorch_model.bin, which is code: save them as safetensors, or "
            f"give {source}/config.json to draw new ones"
        )
    return None


def check_weights(folder: Path, network: nn.Module) -> None:
    """Whether files of weights can be read and fit a model, from their headings alone.

    Names that an architecture stores otherwise are left to ``load``.

    Raises:
        ConfigError: a file is damaged, or a tensor has another shape.
    """
    from safetensors import SafetensorError, safe_open

    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as stored:
                found = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"model.config={folder}: {file.name} is damaged ({error}): copy it again") from error
        for name in sorted(found.keys() & shapes.keys()):
            if found[name] != shapes[name]:
                raise ConfigError(
                    f"model.config={folder}: {name} in {file.name} is of the shape {found[name]}, and {shapes[name]} "
                    f"by config.json: take both from one model, or give {folder}/config.json to draw new weights"
                )


def draw(config: Any, seed: int) -> nn.Module:
    """A model with the weights that ``transformers`` draws after ``torch.manual_seed(seed)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(config)


def outline(config: Any) -> nn.Module:
    """The same model without any values."""
    with torch.device("meta"):
        return _build(config)


def _build(config: Any) -> nn.Module:
    try:
        built: nn.Module = transformers().AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.float32
        )
    except Exception as error:  # of whatever kind
        raise ConfigError(f"model.config cannot be built: {' '.join(str(error).split())}") from error
    return built.train()


def load(folder: Path, config: Any) -> nn.Module:
    """The model in a folder, in float32.

    Raises:
        ConfigError: its weights are not all there, or of other shapes.
    """
    try:
        network, told = transformers().AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            attn_implementation="sdpa",
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # of whatever kind
        raise ConfigError(f"model.config={folder} cannot be loaded: {' '.join(str(error).split())}") from error
    for what in ("missing_keys", "mismatched_keys"):
        if told[what]:
            some = ", ".join(sorted(map(str, told[what]))[:3])
            raise ConfigError(f"the weights in model.config={folder} do not fit its config.json ({what}: {some})")
    return network.train()


def hidden_width(config: Any) -> tuple[str, int] | None:
    """What a configuration calls the width inside a feed-forward layer, and how wide it is; None if it does not say."""
    for key in HIDDEN_WIDTHS:
        if hasattr(config, key):
            value = getattr(config, key)
            value = 4 * config.hidden_size if value is None else value
            return (key, value) if isinstance(value, int) else None
    return None
