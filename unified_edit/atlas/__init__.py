"""The embedded model: weights, tokenizer, facts, and the scripts that built it."""
