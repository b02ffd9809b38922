"""Make once what several notebooks need of a real model: its weights, dequantised, and C0.

    python tools/prepare.py

The notebooks of the book's Part III edit "smollm2". They run side by side, each in a kernel of its
own, so what takes a while is made before: the copy of the weights, and the key statistics of all
layers that its settings name. Both are kept in the cache, found by the fingerprints of what they
were made from; what is there already is left as it is.
"""

from __future__ import annotations

import logging

import unified_edit as ue
from unified_edit.errors import MethodError, ModelError
from unified_edit.statistics import statistics_for

MODEL = "smollm2"


def main() -> None:
    """Load the model once, and collect or read its statistics."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        model, tokenizer = ue.load_model(MODEL)
    except ModelError as problem:
        print(f"nothing is prepared for {MODEL}: {problem}")
        return
    layers: set[int] = set()
    for method in ue.METHODS.values():
        try:
            layers.update(method.resolve(model).layers or ())
        except MethodError:  # no settings of this method for this model
            continue
    statistics = statistics_for(model, tokenizer, sorted(layers))
    print(f"{MODEL}: C0 of layers {sorted(layers)} from {statistics.source.tokens} tokens")


if __name__ == "__main__":
    main()
