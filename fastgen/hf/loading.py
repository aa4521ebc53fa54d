"""Whole Hugging Face models whose stacks are Fast ones: made, loaded, saved and named."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel

from fastgen.calibration import FILE_NAME, Calibration
from fastgen.hf.module import EngineModule
from fastgen.hf.stock import is_ours, stock_class
from fastgen.options import EngineOptions


class FastPreTrained(EngineModule):
    """Mixin of a whole Hugging Face model whose stacks are Fast ones.

    Programs that write down a model's class, to load it again later, find the stock one: a class
    of fastgen has the stock class's ``__name__``, and its models that one's ``__module__``. What
    they wrote loads without fastgen too. Pickles go by ``__qualname__``, which is its own.
    """

    _stacks: tuple[type[EngineModule], ...] = ()
    """What takes the place of its stacks: of an encoder, and of a decoder."""
    _reads_padding = False
    """Whether its head reads the hidden states of padding."""
    get_output_embeddings: Any
    _shift_right: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if is_ours(cls) and issubclass(cls, PreTrainedModel):
            cls.__name__ = stock_class(cls).__name__

    def __init__(
        self,
        config: Any,
        *args: Any,
        engine_options: EngineOptions | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As the stock constructor.

        Args:
            engine_options: EngineOptions, a dict of them, or None for the defaults.

        Raises:
            OptionError: an option that does not exist, or a value that is not allowed.
        """
        options = None if engine_options is None else EngineOptions.resolve(engine_options)
        super().__init__(config, *args, **kwargs)
        for part in self.modules():
            for stack in self._stacks:
                if type(part) is stock_class(stack) and stack.is_of(part):
                    part.__class__ = stack
                    if self._reads_padding:
                        vars(part)["reads_padding"] = True
        if is_ours(type(self)):
            self.__module__ = stock_class(type(self)).__module__
        if options is not None:
            self.engine_options = options

    def __repr__(self) -> str:
        """As the stock class's, under the Fast class's own name."""
        return type(self).__qualname__ + super().__repr__().removeprefix(self._get_name())

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: or transformers would not initialise the weights as it does the stock class's."""
        return False

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        engine_options: EngineOptions | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """As the stock ``from_pretrained``; a calibration in the checkpoint's folder is taken up.

        Args:
            engine_options: as in the constructor.
        """
        options = EngineOptions.resolve(engine_options)
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        model.engine_options = options
        folder = Path(str(args[0] if args else kwargs["pretrained_model_name_or_path"]))
        if (folder / FILE_NAME).is_file() and model._calibrated_parts():
            model.calibration = Calibration.load(folder)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock ``save_pretrained``; the checkpoint names the stock class, and a calibration
        lies in a file of its own."""
        fast = self.__class__
        calibration, folder = self.calibration, args[0] if args else kwargs["save_directory"]
        self.__class__ = stock_class(fast)
        try:
            saved = self.save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = fast
        if calibration is not None:
            calibration.save(folder)
        else:  # one of other weights may lie there
            (Path(folder) / FILE_NAME).unlink(missing_ok=True)
        return saved
