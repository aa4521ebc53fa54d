"""fastgen: Hugging Face text generation, many times faster by changing one import line."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "EngineOptions": "fastgen.options",
    "FallbackWarning": "fastgen.errors",
    "FastAutoModel": "fastgen.auto",
    "FastAutoModelForMaskedLM": "fastgen.auto",
    "FastAutoModelForQuestionAnswering": "fastgen.auto",
    "FastAutoModelForSeq2SeqLM": "fastgen.auto",
    "FastAutoModelForCausalLM": "fastgen.auto",
    "FastGPT2LMHeadModel": "fastgen.models.gpt2",
    "FastAutoModelForSequenceClassification": "fastgen.auto",
    "FastAutoModelForTokenClassification": "fastgen.auto",
    "FastBartForConditionalGeneration": "fastgen.models.bart",
    "FastBartForQuestionAnswering": "fastgen.models.bart",
    "FastBartForSequenceClassification": "fastgen.models.bart",
    "FastBartModel": "fastgen.models.bart",
    "FastBertForMaskedLM": "fastgen.models.bert",
    "FastBertForMultipleChoice": "fastgen.models.bert",
    "FastBertForNextSentencePrediction": "fastgen.models.bert",
    "FastBertForQuestionAnswering": "fastgen.models.bert",
    "FastBertForSequenceClassification": "fastgen.models.bert",
    "FastBertForTokenClassification": "fastgen.models.bert",
    "FastBertModel": "fastgen.models.bert",
    "FastMT5EncoderModel": "fastgen.models.mt5",
    "FastMT5ForConditionalGeneration": "fastgen.models.mt5",
    "FastMT5ForQuestionAnswering": "fastgen.models.mt5",
    "FastMT5ForSequenceClassification": "fastgen.models.mt5",
    "FastMT5ForTokenClassification": "fastgen.models.mt5",
    "FastMT5Model": "fastgen.models.mt5",
    "FastT5": "fastgen.models.t5",
    "FastT5EncoderModel": "fastgen.models.t5",
    "FastT5ForConditionalGeneration": "fastgen.models.t5",
    "FastT5ForQuestionAnswering": "fastgen.models.t5",
    "FastT5ForSequenceClassification": "fastgen.models.t5",
    "FastT5ForTokenClassification": "fastgen.models.t5",
    "FastT5Model": "fastgen.models.t5",
    "FastUMT5EncoderModel": "fastgen.models.umt5",
    "FastUMT5ForConditionalGeneration": "fastgen.models.umt5",
    "FastUMT5ForQuestionAnswering": "fastgen.models.umt5",
    "FastUMT5ForSequenceClassification": "fastgen.models.umt5",
    "FastUMT5ForTokenClassification": "fastgen.models.umt5",
    "FastUMT5Model": "fastgen.models.umt5",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:  # the same names again: type checkers do not read a dict
    from fastgen.auto import FastAutoModel as FastAutoModel
    from fastgen.auto import FastAutoModelForCausalLM as FastAutoModelForCausalLM
    from fastgen.auto import FastAutoModelForMaskedLM as FastAutoModelForMaskedLM
    from fastgen.auto import FastAutoModelForQuestionAnswering as FastAutoModelForQuestionAnswering
    from fastgen.auto import FastAutoModelForSeq2SeqLM as FastAutoModelForSeq2SeqLM
    from fastgen.auto import (
        FastAutoModelForSequenceClassification as FastAutoModelForSequenceClassification,
    )
    from fastgen.auto import (
        FastAutoModelForTokenClassification as FastAutoModelForTokenClassification,
    )
    from fastgen.errors import FallbackWarning as FallbackWarning
    from fastgen.models.bart import (
        FastBartForConditionalGeneration as FastBartForConditionalGeneration,
    )
    from fastgen.models.bart import FastBartForQuestionAnswering as FastBartForQuestionAnswering
    from fastgen.models.bart import (
        FastBartForSequenceClassification as FastBartForSequenceClassification,
    )
    from fastgen.models.bart import FastBartModel as FastBartModel
    from fastgen.models.bert import FastBertForMaskedLM as FastBertForMaskedLM
    from fastgen.models.bert import FastBertForMultipleChoice as FastBertForMultipleChoice
    from fastgen.models.bert import (
        FastBertForNextSentencePrediction as FastBertForNextSentencePrediction,
    )
    from fastgen.models.bert import FastBertForQuestionAnswering as FastBertForQuestionAnswering
    from fastgen.models.bert import (
        FastBertForSequenceClassification as FastBertForSequenceClassification,
    )
    from fastgen.models.bert import FastBertForTokenClassification as FastBertForTokenClassification
    from fastgen.models.bert import FastBertModel as FastBertModel
    from fastgen.models.gpt2 import FastGPT2LMHeadModel as FastGPT2LMHeadModel
    from fastgen.models.mt5 import FastMT5EncoderModel as FastMT5EncoderModel
    from fastgen.models.mt5 import (
        FastMT5ForConditionalGeneration as FastMT5ForConditionalGeneration,
    )
    from fastgen.models.mt5 import FastMT5ForQuestionAnswering as FastMT5ForQuestionAnswering
    from fastgen.models.mt5 import (
        FastMT5ForSequenceClassification as FastMT5ForSequenceClassification,
    )
    from fastgen.models.mt5 import FastMT5ForTokenClassification as FastMT5ForTokenClassification
    from fastgen.models.mt5 import FastMT5Model as FastMT5Model
    from fastgen.models.t5 import FastT5 as FastT5
    from fastgen.models.t5 import FastT5EncoderModel as FastT5EncoderModel
    from fastgen.models.t5 import FastT5ForConditionalGeneration as FastT5ForConditionalGeneration
    from fastgen.models.t5 import FastT5ForQuestionAnswering as FastT5ForQuestionAnswering
    from fastgen.models.t5 import FastT5ForSequenceClassification as FastT5ForSequenceClassification
    from fastgen.models.t5 import FastT5ForTokenClassification as FastT5ForTokenClassification
    from fastgen.models.t5 import FastT5Model as FastT5Model
    from fastgen.models.umt5 import FastUMT5EncoderModel as FastUMT5EncoderModel
    from fastgen.models.umt5 import (
        FastUMT5ForConditionalGeneration as FastUMT5ForConditionalGeneration,
    )
    from fastgen.models.umt5 import FastUMT5ForQuestionAnswering as FastUMT5ForQuestionAnswering
    from fastgen.models.umt5 import (
        FastUMT5ForSequenceClassification as FastUMT5ForSequenceClassification,
    )
    from fastgen.models.umt5 import FastUMT5ForTokenClassification as FastUMT5ForTokenClassification
    from fastgen.models.umt5 import FastUMT5Model as FastUMT5Model
    from fastgen.options import EngineOptions as EngineOptions
else:  # of a module with this function, they would take every name for one of its

    def __getattr__(name: str) -> Any:
        """Import a public name on first use, so that ``fastgen cache list`` does not load torch."""
        if name not in _HOMES:
            raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
