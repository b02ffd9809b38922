"""Everything that touches a transformers model: its parts, its tokens, its weights."""

from unified_edit.model.anatomy import Anatomy, NamedWeight, anatomy
from unified_edit.model.devices import free_bytes, halving, tokens_that_fit
from unified_edit.model.families import FAMILIES, Family
from unified_edit.model.fingerprints import model_fingerprint, tensor_hash
from unified_edit.model.hooks import (
    captured,
    hidden_of,
    quiet,
    read_last_token,
    replaced_output,
)
from unified_edit.model.ledger import Ledger, ledger_of
from unified_edit.model.likelihoods import Likelihood, likelihoods, log_probabilities, next_token
from unified_edit.model.memory import Memory, memory_of
from unified_edit.model.prompts import Encoded, Encoder, FactRows, Row

__all__ = (
    "FAMILIES Anatomy Encoded Encoder FactRows Family Ledger Likelihood Memory NamedWeight Row "
    "anatomy captured free_bytes halving hidden_of ledger_of likelihoods "
    "log_probabilities memory_of model_fingerprint next_token quiet read_last_token "
    "replaced_output tensor_hash tokens_that_fit"
).split()
