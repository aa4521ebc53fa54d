"""A fall-back is said once per model and reason, at the user's line, with the right reason."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from fastgen.fallback import Asked, report
from tests.helpers import assert_equal_logits, copies, logits, refusal, sources, targets
from tests.surprises import SURPRISES, generate, said

NAME = "FastT5ForConditionalGeneration"


@pytest.mark.parametrize("case", SURPRISES)
def test_a_surprise_is_said_once_with_its_remedy(case: str) -> None:
    change, words = SURPRISES[case]
    model: Any = copies().fast
    change(model)
    with said() as found:
        for _ in range(2):
            model.generate(sources(), max_new_tokens=4)
            logits(model)
            with torch.no_grad():
                model.encoder(sources())
    assert len(found) == 1, [str(warning.message) for warning in found]
    message = str(found[0].message)
    assert all(word in message for word in (NAME, *words)), message
    assert found[0].filename == __file__
    explanation = model.explain(input_ids=sources())
    assert explanation.path == "torch"
    assert all(word in str(explanation) for word in words)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"decoder_attention_mask": torch.ones(3, 1).long()}, "decoder_attention_mask is given"),
    ],
)
def test_an_argument_that_costs_is_said(call: dict[str, Any], word: str) -> None:
    model = copies().fast
    with said() as found:
        generate(model, **call)
        generate(model, **call)
    assert len(found) == 1
    assert word in str(found[0].message)


def test_own_code_is_said_to_take_the_hf_loop() -> None:
    model: Any = copies().fast
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with said() as found:
        generate(model)
    assert len(found) == 1
    assert "Hugging Face's loop" in str(found[0].message)
    assert "forward is the program's own" in str(found[0].message)


def test_gradients_in_a_plain_forward_are_said() -> None:
    model: Any = copies().fast
    with said() as found:
        for _ in range(2):
            model(input_ids=sources(), decoder_input_ids=targets())
    assert len(found) == 1
    assert "torch.no_grad()" in str(found[0].message)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "call",
    [
        {"use_cache": False},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"inputs_embeds": torch.ones(3, 9, 32)},
    ],
    ids=lambda call: next(iter(call)),
)
def test_what_was_asked_for_is_not_said(call: dict[str, Any]) -> None:
    model: Any = copies().fast
    inputs = {} if "inputs_embeds" in call else {"input_ids": sources()}
    with said() as found:
        model.generate(**inputs, **call, max_new_tokens=3)
    assert not found


@pytest.mark.parametrize(
    "options", [{"backend": "torch"}, {"fast_loop": False}, {"warn_fallback": False}]
)
def test_options_that_ask_for_it(options: dict[str, Any]) -> None:
    model: Any = copies().fast
    model.engine_options = options
    if "warn_fallback" in options:
        model.double()
    with said() as found:
        generate(model)
        logits(model)
    assert not found


def test_the_environment_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_ENGINE_OPTIONS", "warn_fallback=false")
    model: Any = copies().fast
    model.engine_options = None
    model.double()
    with said() as found:
        generate(model)
    assert not found


def test_served_calls_say_nothing() -> None:
    model = copies().fast
    with said() as found:
        generate(model)
        generate(model, num_beams=2)
        logits(model)
    assert not found


def test_training_is_said_once() -> None:
    model: Any = copies().fast.train()
    with said() as found:
        for _ in range(3):
            model(input_ids=sources(), labels=targets()).loss.backward()
    assert len(found) == 1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_start_fresh(how: Callable[[Any], Any]) -> None:
    model: Any = copies().fast.double()
    for module in model.modules():  # recording hooks of other tests cannot be pickled
        module._forward_hooks.clear()
    generate(model)
    other = how(model)
    with said() as found:
        generate(other)
        generate(model)
    assert len(found) == 1


def test_each_reason_is_said_and_sizes_make_no_other() -> None:
    model: Any = copies().fast
    with said() as found:
        for rows in range(5):
            report(model, "torch", f"{rows} rows are more than EngineOptions(max_batch={rows})")
            report(model, "torch", "a second reason")
            report(model, "HF loop", "a second reason")
            report(model, "torch", Asked("this was asked for"))
            report(model.encoder, "torch", "a second reason")
    assert len(found) == 3


def test_threads_say_it_once() -> None:
    model: Any = copies().fast
    start = threading.Barrier(8)

    def call() -> None:
        start.wait()
        report(model, "torch", "many at once")

    with said() as found:
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 1


# Right reasons


def test_accelerate_and_its_autocast() -> None:
    pair, call = copies(), {"max_new_tokens": 4}
    AcceleratorState._reset_state(reset_partial_state=True)  # of a Trainer's, say
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    stock, fast = accelerator.prepare(pair.stock), accelerator.prepare(pair.fast)
    explanation = fast.explain(input_ids=sources())
    assert explanation.path == "torch"
    assert "autocast" in str(explanation)
    assert "program's own" not in str(explanation)
    with said() as found:
        tokens = fast.generate(sources(), **call)
    assert len(found) == 1
    assert "autocast" in str(found[0].message)
    assert tokens.tolist() == stock.generate(sources(), **call).tolist()
    plain = accelerator.unwrap_model(fast, keep_fp32_wrapper=False)
    assert plain.explain(input_ids=sources()).path == "fast loop"


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_is_named() -> None:
    pair = copies()
    stock, fast = (
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        for model in (pair.stock, pair.fast)
    )
    for model in (fast, fast.eval()):
        assert "quantize_dynamic" in str(model.explain(input_ids=sources()))
    assert generate(fast).tolist() == generate(stock.eval()).tolist()


@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing_leaves_the_engine_alone() -> None:
    pair = copies()
    for model in (pair.stock, pair.fast):
        model.gradient_checkpointing_enable()
        model.train()(input_ids=sources(), labels=targets()).loss.backward()
        model.eval()
    assert any(module._forward_hooks for module in pair.fast.modules()), "the hook is there"
    assert pair.fast.explain(input_ids=sources()).path == "fast loop"
    assert refusal(pair.fast) is None
    assert_equal_logits(pair)
    assert generate(pair.fast).tolist() == generate(pair.stock).tolist()


def test_input_gradients_of_a_frozen_model_are_kept() -> None:
    pair = copies()
    for model in (pair.stock, pair.fast):
        model.requires_grad_(False)
        model.enable_input_require_grads()
        call = {"input_ids": sources(), "decoder_input_ids": targets()}
        assert model(**call).logits.requires_grad
        assert model.encoder(input_ids=sources())[0].requires_grad
    assert refusal(pair.fast) is None


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model: Any = copies().fast
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"])
    adapted = peft.get_peft_model(model, config).eval()
    with said() as found:
        adapted.generate(input_ids=sources(), max_new_tokens=3)
    assert len(found) == 1
    assert "merge_and_unload()" in str(found[0].message)
    assert adapted.merge_and_unload().explain(input_ids=sources()).path == "fast loop"
