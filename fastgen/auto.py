"""FastAutoModelForSeq2SeqLM: ``model_type`` -> Fast class, like transformers' auto classes."""

import importlib
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForSeq2SeqLM

from fastgen.errors import FallbackWarning, UnsupportedConfigError
from fastgen.options import EngineOptions

_SEQ2SEQ_LM = {
    "t5": ("fastgen.models.t5", "FastT5ForConditionalGeneration"),
    "mt5": ("fastgen.models.mt5", "FastMT5ForConditionalGeneration"),
    "umt5": ("fastgen.models.umt5", "FastUMT5ForConditionalGeneration"),
}
_REMOTE_CODE = ("code_revision", "trust_remote_code")


class FastAutoModelForSeq2SeqLM:
    """Picks the Fast class of a checkpoint or config; not instantiated itself."""

    def __init__(self) -> None:
        raise OSError(
            "FastAutoModelForSeq2SeqLM is made by FastAutoModelForSeq2SeqLM.from_pretrained(name) "
            "or FastAutoModelForSeq2SeqLM.from_config(config)."
        )

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
        if fallback and found.model_type not in _SEQ2SEQ_LM:
            stock = AutoModelForSeq2SeqLM.from_pretrained
            return _stock_model(stock, name, *args, **known, **kwargs, **remote_code)
        # without one the class reads the config itself, and changes of its fields in kwargs
        return _class_for(found).from_pretrained(name, *args, **known, **kwargs)

    @classmethod
    def from_config(cls, config: Any, *, fallback: bool = False, **kwargs: Any) -> Any:
        """A model with random weights; arguments (``dtype``, say) as the stock class takes them.

        Args:
            fallback: as in ``from_pretrained``.

        Raises:
            UnsupportedConfigError: no Fast class for the config's model_type.
        """
        if fallback and config.model_type not in _SEQ2SEQ_LM:
            return _stock_model(AutoModelForSeq2SeqLM.from_config, config, **kwargs)
        kwargs.pop("trust_remote_code", None)
        return _class_for(config)._from_config(config, **kwargs)


def _stock_model(make: Any, *args: Any, engine_options: Any = None, **kwargs: Any) -> Any:
    EngineOptions.resolve(engine_options)  # wrong ones are refused as a Fast class refuses them
    made = make(*args, **kwargs)
    model = made[0] if isinstance(made, tuple) else made  # output_loading_info=True
    warnings.warn(
        f"{_without_fast_class(model.config)}: the stock {type(model).__name__} is used, at the "
        "stock speed.",
        FallbackWarning,
        stacklevel=3,
    )
    return made


def _class_for(config: Any) -> Any:
    if config.model_type not in _SEQ2SEQ_LM:
        raise UnsupportedConfigError(
            f"{_without_fast_class(config)}. Pass fallback=True to get the stock class for this "
            "checkpoint, or use AutoModelForSeq2SeqLM of transformers."
        )
    module, name = _SEQ2SEQ_LM[config.model_type]
    return getattr(importlib.import_module(module), name)


def _without_fast_class(config: Any) -> str:
    others = ", ".join(_SEQ2SEQ_LM)
    return f"model_type={config.model_type!r} has no Fast class (there is one for {others})"
