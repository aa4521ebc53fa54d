"""optimum-intel in an environment of its own, as it needs an older transformers than fastgen has.

Its Python runs this file, which imports nothing of fastgen. A request is one line of JSON on stdin
and has one line of JSON as its answer on stdout: ``{"do": name, ...}``, ``{"error": ...}``.
"""

import json
import os
import sys
from typing import Any

CLASSES = {
    "seq2seq": "OVModelForSeq2SeqLM",
    "causal": "OVModelForCausalLM",
    "encoder": "OVModelForFeatureExtraction",
}


class Worker:
    """Its methods are what can be asked for; results are plain values."""

    def __init__(self) -> None:
        self.model: Any = None
        self.mask: Any = None
        self.output: Any = None

    def versions(self) -> str:
        from importlib.metadata import version

        return f"{version('openvino')} (optimum-intel {version('optimum-intel')})"

    def export(self, kind: str, checkpoint: str, folder: str, eight_bits: bool) -> None:
        """Write the checkpoint as OpenVINO's graphs and weights."""
        from optimum import intel

        made = getattr(intel, CLASSES[kind])
        model = made.from_pretrained(
            checkpoint, export=True, compile=False, load_in_8bit=eight_bits
        )
        model.save_pretrained(folder)

    def load(self, kind: str, folder: str, precision: str, threads: int) -> None:
        from optimum import intel

        settings = {
            "INFERENCE_NUM_THREADS": str(threads),
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        made = getattr(intel, CLASSES[kind])
        self.model = made.from_pretrained(folder, ov_config=settings)

    def call(self, inputs: list[list[int]], mask: list[list[int]], kwargs: Any, seed: int) -> None:
        """One whole call, of ``generate`` if there are arguments for it."""
        import torch

        torch.manual_seed(seed)
        ids, self.mask = torch.tensor(inputs), torch.tensor(mask)
        with torch.no_grad():
            if kwargs is None:
                self.output = self.model(input_ids=ids, attention_mask=self.mask)[0]
            else:
                self.output = self.model.generate(input_ids=ids, attention_mask=self.mask, **kwargs)

    def result(self) -> Any:
        """Of the last call: token ids, or hidden states of real tokens [T, E]."""
        if self.output.dtype.is_floating_point:
            return self.output[self.mask != 0].float().tolist()
        return self.output.tolist()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    del sys.path[0]  # this folder, whose modules have names of libraries
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
