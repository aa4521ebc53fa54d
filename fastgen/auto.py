"""FastAutoModelForSeq2SeqLM: ``model_type`` -> Fast class, like transformers' auto classes."""

import importlib
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from fastgen.errors import UnsupportedConfigError

_SEQ2SEQ_LM = {
    "t5": ("fastgen.models.t5", "FastT5ForConditionalGeneration"),
    "mt5": ("fastgen.models.mt5", "FastMT5ForConditionalGeneration"),
    "umt5": ("fastgen.models.umt5", "FastUMT5ForConditionalGeneration"),
}


class FastAutoModelForSeq2SeqLM:
    """Picks the Fast class of a checkpoint or config; not instantiated itself."""

    def __init__(self) -> None:
        raise OSError(
            "FastAutoModelForSeq2SeqLM is made by FastAutoModelForSeq2SeqLM.from_pretrained(name) "
            "or FastAutoModelForSeq2SeqLM.from_config(config)."
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load a checkpoint into its Fast class; arguments as the Fast class takes them.

        Raises:
            UnsupportedConfigError: no Fast class for the checkpoint's model_type.
        """
        name = pretrained_model_name_or_path
        for remote_code in ("code_revision", "trust_remote_code"):  # Fast classes have none
            kwargs.pop(remote_code, None)
        hub = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        hub_kwargs = {key: kwargs[key] for key in (*hub, "subfolder") if key in kwargs}
        if isinstance(config, (str, Path)):
            config = AutoConfig.from_pretrained(config, **hub_kwargs)
        if config is not None:
            return _class_for(config).from_pretrained(name, *args, config=config, **kwargs)
        fast = _class_for(AutoConfig.from_pretrained(name, **hub_kwargs))
        return fast.from_pretrained(name, *args, **kwargs)  # which reads changes of config fields

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with random weights; arguments (``dtype``, say) as the stock class takes them."""
        kwargs.pop("trust_remote_code", None)
        return _class_for(config)._from_config(config, **kwargs)


def _class_for(config: Any) -> Any:
    if config.model_type not in _SEQ2SEQ_LM:
        raise UnsupportedConfigError(
            f"model_type={config.model_type!r} has no Fast class; there is one for "
            f"{', '.join(_SEQ2SEQ_LM)}. Use the stock transformers class for this checkpoint."
        )
    module, name = _SEQ2SEQ_LM[config.model_type]
    return getattr(importlib.import_module(module), name)
