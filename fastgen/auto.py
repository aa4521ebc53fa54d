"""Auto classes: ``model_type`` and task -> Fast class, like transformers' auto classes."""

import warnings
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

import fastgen
from fastgen import registry
from fastgen.errors import FallbackWarning, UnsupportedConfigError
from fastgen.options import EngineOptions

__all__ = [
    "FastAutoModel",
    "FastAutoModelForCausalLM",
    "FastAutoModelForMaskedLM",
    "FastAutoModelForQuestionAnswering",
    "FastAutoModelForSeq2SeqLM",
    "FastAutoModelForSequenceClassification",
    "FastAutoModelForTokenClassification",
]

_REMOTE_CODE = ("code_revision", "trust_remote_code")


class _FastAuto:
    """Picks the Fast class of a checkpoint or config; not instantiated itself."""

    def __init__(self) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is made by {name}.from_pretrained(name) or .from_config(config).")

    @classmethod
    def _stock(cls) -> Any:
        return getattr(transformers, cls.__name__.removeprefix("Fast"))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any = None,
        fallback: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint into its Fast class; arguments as the Fast class takes them.

        Args:
            fallback: load a checkpoint without Fast class into the stock class, with a warning
                (``FallbackWarning``).

        Raises:
            UnsupportedConfigError: no Fast class for the checkpoint's model_type.
        """
        name = pretrained_model_name_or_path
        remote_code = {key: kwargs.pop(key) for key in _REMOTE_CODE if key in kwargs}
        hub = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        hub_kwargs = {key: kwargs[key] for key in (*hub, "subfolder") if key in kwargs}
        if fallback:  # Fast classes have no code of their own on the hub
            hub_kwargs |= remote_code
        if isinstance(config, (str, Path)):
            config = AutoConfig.from_pretrained(config, **hub_kwargs)
        known = {} if config is None else {"config": config}
        found = AutoConfig.from_pretrained(name, **hub_kwargs) if config is None else config
        if fallback and found.model_type not in cls._families():
            return cls._stock_model(
                "from_pretrained", name, *args, **known, **kwargs, **remote_code
            )
        # without one the class reads the config itself, and changes of its fields in kwargs
        return cls._class_for(found).from_pretrained(name, *args, **known, **kwargs)

    @classmethod
    def from_config(cls, config: Any, *, fallback: bool = False, **kwargs: Any) -> Any:
        """A model with random weights; arguments (``dtype``, say) as the stock class takes them.

        Args:
            fallback: as in ``from_pretrained``.

        Raises:
            UnsupportedConfigError: no Fast class for the config's model_type.
        """
        if fallback and config.model_type not in cls._families():
            return cls._stock_model("from_config", config, **kwargs)
        kwargs.pop("trust_remote_code", None)
        return cls._class_for(config)._from_config(config, **kwargs)

    @classmethod
    def _families(cls) -> dict[str, str]:
        """The names of the task's Fast classes, by model_type."""
        return registry.classes_for(cls.__name__)

    @classmethod
    def _stock_model(cls, make: str, *args: Any, engine_options: Any = None, **kwargs: Any) -> Any:
        EngineOptions.resolve(engine_options)  # wrong ones are refused as a Fast class refuses them
        made = getattr(cls._stock(), make)(*args, **kwargs)
        model = made[0] if isinstance(made, tuple) else made  # output_loading_info=True
        warnings.warn(
            f"{cls._without_fast_class(model.config)}: the stock {type(model).__name__} is used, "
            "at the stock speed.",
            FallbackWarning,
            stacklevel=3,
        )
        return made

    @classmethod
    def _class_for(cls, config: Any) -> Any:
        if config.model_type not in cls._families():
            raise UnsupportedConfigError(
                f"{cls._without_fast_class(config)}. Pass fallback=True to get the stock class for "
                f"this checkpoint, or use {cls._stock().__name__} of transformers."
            )
        return getattr(fastgen, cls._families()[config.model_type])

    @classmethod
    def _without_fast_class(cls, config: Any) -> str:
        kind, others = config.model_type, ", ".join(cls._families())
        return f"model_type={kind!r} has no Fast class (there is one for {others})"


class FastAutoModel(_FastAuto):
    """As AutoModel."""


class FastAutoModelForCausalLM(_FastAuto):
    """As AutoModelForCausalLM."""


class FastAutoModelForMaskedLM(_FastAuto):
    """As AutoModelForMaskedLM."""


class FastAutoModelForQuestionAnswering(_FastAuto):
    """As AutoModelForQuestionAnswering."""


class FastAutoModelForSeq2SeqLM(_FastAuto):
    """As AutoModelForSeq2SeqLM."""


class FastAutoModelForSequenceClassification(_FastAuto):
    """As AutoModelForSequenceClassification."""


class FastAutoModelForTokenClassification(_FastAuto):
    """As AutoModelForTokenClassification."""
