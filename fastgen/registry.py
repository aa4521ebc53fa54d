"""Which classes exist: one line a family, of what its classes' names begin with and end with.

A class is named as transformers names it, with ``Fast`` before it, and lives in the family's file,
``models/<model_type>.py``. Nothing is imported here: ``fastgen`` makes its public names by this.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """The Fast classes of a ``model_type``."""

    name: str
    tasks: tuple[str, ...]
    """How the names of its classes end; that of the class that stands for the family first."""

    def class_name(self, task: str = "") -> str:
        """Of the class for a task, or of the one that stands for the family."""
        return f"Fast{self.name}{task or self.tasks[0]}"


_ENCODER_HEADS = "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"
_T5 = "ForConditionalGeneration", "Model", "EncoderModel", *_ENCODER_HEADS
_BART = "ForConditionalGeneration", "Model", *_ENCODER_HEADS[::2]
_BERT = *_ENCODER_HEADS, "ForMaskedLM", "ForMultipleChoice", "ForNextSentencePrediction"

FAMILIES = {
    "t5": Family("T5", _T5),
    "mt5": Family("MT5", _T5),
    "umt5": Family("UMT5", _T5),
    "gpt2": Family("GPT2", ("LMHeadModel", "Model", *_ENCODER_HEADS[:2])),
    "bert": Family("Bert", ("Model", *_BERT)),
    "bart": Family("Bart", _BART),
}
"""By ``model_type``."""

AUTO = {
    "FastAutoModel": ("Model",),
    "FastAutoModelForCausalLM": ("LMHeadModel", "ForCausalLM"),
    "FastAutoModelForMaskedLM": ("ForMaskedLM",),
    "FastAutoModelForQuestionAnswering": ("ForQuestionAnswering",),
    "FastAutoModelForSeq2SeqLM": ("ForConditionalGeneration",),
    "FastAutoModelForSequenceClassification": ("ForSequenceClassification",),
    "FastAutoModelForTokenClassification": ("ForTokenClassification",),
}
"""How the names of the classes end that each auto class chooses from."""

HOMES = {
    **{"EngineOptions": "fastgen.options"},
    **dict.fromkeys(("FallbackWarning", "WeightsGoneError"), "fastgen.errors"),
    **dict.fromkeys(AUTO, "fastgen.auto"),
    "FastT5": "fastgen.models.t5",
    **{
        family.class_name(task): f"fastgen.models.{model_type}"
        for model_type, family in FAMILIES.items()
        for task in family.tasks
    },
}
"""Every public name, and the module that makes it."""


def classes_for(auto: str) -> dict[str, str]:
    """The classes that an auto class chooses from, by ``model_type``."""
    return {
        model_type: family.class_name(task)
        for model_type, family in FAMILIES.items()
        for task in family.tasks
        if task in AUTO[auto]
    }
