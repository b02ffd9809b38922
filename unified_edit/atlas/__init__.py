"""The embedded model: its weights and tokenizer, the facts it knows, and records to test edits."""

from importlib.resources import files

#: Weights and tokenizer, as `transformers` reads them.
FOLDER = files("unified_edit.atlas").joinpath("model")
