"""Every setting of a training run, declared once: flags, recipes, forms and docs derive from it."""

from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tunesmith.errors import UsageError
from tunesmith.language import t


def setting(
    default: Any, help: str, *, group: str, low: float | None = None, high: float | None = None
) -> Any:
    """A dataclass field with its help text, its group on the page, and inclusive bounds."""
    return field(default=default, metadata={"help": help, "group": group, "low": low, "high": high})


InitLora = Literal["default", "gaussian", "orthogonal", "pissa", "olora"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What `train` needs to know. `None` means: chosen for the model and machine, and shown."""

    model: str = setting(
        "smollm2-135m",
        "Base model: a catalog name, hf:owner/name, modelscope:owner/name, "
        "a folder, or a .gguf file.",
        group="basic",
    )
    data: tuple[Path, ...] = setting(
        (), "Training files: JSON, JSONL, CSV or Parquet.", group="basic"
    )
    out: Path | None = setting(None, "Run folder. Default: runs/ and a new name.", group="basic")
    epochs: float | None = setting(
        None,
        "Passes over the data and what is mixed in. Default: whole ones, nearest to 2,600 samples "
        "in all; at least one, at most five.",
        group="basic",
        low=0.01,
        high=1000,
    )
    learning_rate: float | None = setting(
        None,
        "Peak learning rate. Default: by model size, 2e-3 for 135M to 2e-4 for 7B.",
        group="basic",
        low=0.0,
        high=1.0,
    )
    lora_r: int = setting(8, "Rank of the LoRA matrices.", group="basic", low=1, high=1024)

    eval_data: tuple[Path, ...] = setting(
        (), "Held-out files. Default: a share of the training data.", group="data"
    )
    holdout: float = setting(
        0.05,
        "Share of the training rows held out for evaluation, at most about 2,000 of them.",
        group="data",
        low=0.0,
        high=0.5,
    )
    system: str | None = setting(
        None, "System prompt for conversations that have none.", group="data"
    )
    max_length: int = setting(
        2048,
        "Longest sample in tokens; what lies beyond is cut and counted.",
        group="data",
        low=8,
        high=1_000_000,
    )
    replay: int = setting(
        900,
        "Neutral questions, with the base model's own answers, mixed in so that it forgets less; "
        "at most three for each training row.",
        group="data",
        low=0,
        high=10_000,
    )
    replay_openings: bool = setting(
        True,
        "Train also what the base would say to neutral questions after words of the data's "
        "answers, so that these do not come up everywhere.",
        group="data",
    )
    probes: int = setting(
        24,
        "Other neutral questions, never trained on: with each evaluation it is seen how far the "
        "model has moved from its base's answers.",
        group="data",
        low=0,
        high=100,
    )

    lora_alpha: float = setting(16, "LoRA scale: alpha / r.", group="lora", low=0.0, high=10_000)
    lora_dropout: float = setting(0.0, "Dropout before LoRA.", group="lora", low=0.0, high=0.9)
    lora_targets: tuple[str, ...] = setting(
        ("all-linear",), "Module names LoRA is put on, or all-linear.", group="lora"
    )
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(r) (rsLoRA).", group="lora")
    use_dora: bool = setting(False, "Train a magnitude beside the direction (DoRA).", group="lora")
    init_lora: InitLora = setting("default", "How the LoRA matrices start.", group="lora")

    batch_size: int = setting(8, "Samples in an optimizer step.", group="optimizer", low=1)
    max_steps: int | None = setting(
        None, "Stop after this many optimizer steps.", group="optimizer", low=1
    )
    scheduler: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "How the learning rate falls after warm-up.", group="optimizer"
    )
    warmup_steps: int = setting(
        5, "Steps in which the learning rate rises.", group="optimizer", low=0
    )
    adam_beta1: float = setting(
        0.8, "AdamW's memory of gradients.", group="optimizer", low=0.0, high=0.9999
    )
    adam_beta2: float = setting(
        0.95, "AdamW's memory of their squares.", group="optimizer", low=0.0, high=0.9999
    )
    weight_decay: float = setting(0.0, "AdamW weight decay.", group="optimizer", low=0.0, high=1.0)
    max_grad_norm: float = setting(
        1.0, "Gradients are clipped to this norm; 0 leaves them.", group="optimizer", low=0.0
    )
    seed: int = setting(42, "Seed of order, initialisation and dropout.", group="optimizer", low=0)

    eval_every: int | None = setting(
        None, "Evaluate every so many steps. Default: five times a run.", group="run", low=1
    )
    save_every: int | None = setting(
        None, "Checkpoint every so many steps. Default: ten times a run.", group="run", low=1
    )
    patience: int | None = setting(
        None, "Stop after this many evaluations without a better held-out loss.", group="run", low=1
    )

    device: Literal["auto", "cpu", "cuda", "mps"] = setting(
        "auto", "Where to train.", group="machine"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "auto",
        "Type of the base model's weights, and of arithmetic; a CPU that is slower in bfloat16 "
        "computes in float32. LoRA weights stay in float32.",
        group="machine",
    )
    base_dtype: Literal["auto", "nf4", "fp8"] = setting(
        "auto",
        "How the frozen base is kept: auto (as --dtype); nf4, 4 bits a weight (QLoRA), for little "
        "memory: the adapter learns over the rounded base and is used over the whole one; or fp8, "
        "the same in 8 bits, for speed on an NVIDIA GPU from Hopper on.",
        group="machine",
    )
    compile: bool | None = setting(
        None,
        "Compile the layers on a GPU, which takes half a minute. Default: where it comes back.",
        group="machine",
    )
    micro_batch_tokens: int | None = setting(
        None,
        "Tokens in one forward pass, those that samples share counted once. Default: as many as "
        "fit and are of use.",
        group="machine",
        low=1,
    )
    gradient_checkpointing: bool | None = setting(
        None,
        "Recompute activations to save memory, in all layers or in none. Default: in as many as "
        "it takes.",
        group="machine",
    )
    memory_gb: float | None = setting(
        None,
        "Memory that training may use, in GB. Default: what is free.",
        group="machine",
        low=0.1,
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_bounds(item, getattr(self, item.name))


def flag(name: str) -> str:
    """The command-line flag of a setting: `learning_rate` → `--learning-rate`."""
    return "--" + name.replace("_", "-")


def require_range(name: str, value: float, low: float | None, high: float | None = None) -> None:
    """Refuse a value outside the inclusive bounds; `name` is the flag it was given with.

    Raises:
        UsageError: The value is out of range, or not a number.
    """
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = " … ".join("" if bound is None else f"{bound:g}" for bound in (low, high))
        raise UsageError(
            t(
                "{flag} {value} is out of range; allowed: {bounds}.",
                flag=name,
                value=value,
                bounds=bounds.strip(),
            )
        )


def _check_bounds(item: "Field[Any]", value: object) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        require_range(flag(item.name), value, item.metadata["low"], item.metadata["high"])


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a TOML recipe, ready for `TrainSettings(**…)`; paths are as written there.

    Raises:
        UsageError: The file cannot be read, or a key or a value in it cannot be right.
    """
    import tomllib

    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        message = t("cannot read recipe {path}: {reason}", path=path, reason=error.strerror)
        raise UsageError(message) from error
    except ValueError as error:
        message = t("recipe {path} is not TOML: {reason}", path=path, reason=error)
        raise UsageError(message) from error
    hints = get_type_hints(TrainSettings)
    for key in raw:
        if key not in hints:
            raise UsageError(_unknown_key(path, key, list(hints)))
    values = {key: _recipe_value(path, key, value, hints[key]) for key, value in raw.items()}
    try:
        TrainSettings(**values)
    except UsageError as error:
        raise UsageError(t("recipe {path}: {reason}", path=path, reason=error)) from error
    return values


def settings_to(settings: TrainSettings) -> dict[str, Any]:
    """Settings as a TOML table that `read_recipe` takes; what is `None` is left out."""
    plain = {item.name: _plain(getattr(settings, item.name)) for item in fields(settings)}
    return {name: value for name, value in plain.items() if value is not None}


def _unknown_key(path: Path, key: str, known: list[str]) -> str:
    close = get_close_matches(key.replace("-", "_"), known, n=1)
    if close:
        return t(
            "recipe {path}: no setting is called {key}; did you mean {close}?",
            path=path,
            key=key,
            close=close[0],
        )
    return t(
        "recipe {path}: no setting is called {key}; `tunesmith train --help` lists them all.",
        path=path,
        key=key,
    )


def _recipe_value(path: Path, key: str, value: object, hint: Any) -> Any:
    try:
        return _convert(value, hint)
    except TypeError as error:
        message = t(
            "recipe {path}: {key} must be {wanted}, not {value!r}.",
            path=path,
            key=key,
            wanted=_describe(hint),
            value=value,
        )
        raise UsageError(message) from error


def _convert(value: object, hint: Any) -> Any:
    """A TOML value as the annotated type; TypeError where it does not fit."""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
    elif get_origin(hint) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(item, get_args(hint)[0]) for item in items)
    elif get_args(hint):
        return _convert(value, _without_none(hint))
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif type(value) is hint:
        return value
    raise TypeError(hint)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return t("one of {choices}", choices=", ".join(get_args(hint)))
    if get_origin(hint) is tuple:
        return t("a list of strings")
    if get_args(hint):
        return _describe(_without_none(hint))
    names = {
        str: t("a string"),
        Path: t("a string"),
        bool: t("true or false"),
        int: t("a whole number"),
        float: t("a number"),
    }
    return names[hint]


def _without_none(hint: Any) -> Any:
    return next(arg for arg in get_args(hint) if arg is not NoneType)


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
