"""Relations as matrices: o is about beta W s + b (Hernandez et al., ICLR 2024, arXiv 2308.09124).

>>> import unified_edit as ue                                              # doctest: +SKIP
>>> data = ue.relations.atlas_relations()[1]                               # doctest: +SKIP
>>> known = ue.relations.known_pairs(model, tokenizer, data)               # doctest: +SKIP
>>> relation = ue.relations.estimate(model, tokenizer, known, layer=2)     # doctest: +SKIP
>>> relation.predict(model, tokenizer, ["Ada Lovelace"])                   # doctest: +SKIP
"""

from unified_edit.relations.data import (
    Pair,
    RelationData,
    atlas_relations,
    load_relation,
    read_relations,
)
from unified_edit.relations.estimating import estimate, known_pairs
from unified_edit.relations.inverse import low_rank_inverse
from unified_edit.relations.jacobian import Linearised, linearise
from unified_edit.relations.lens import Lens
from unified_edit.relations.prompts import FewShot, first_tokens, rows_of
from unified_edit.relations.relation import Relation
from unified_edit.relations.scores import Choice, Fold, RelationScores, share
from unified_edit.relations.states import States, log_probabilities_of, outputs_with, read_states
from unified_edit.relations.validation import cross_validate

__all__ = (
    "Choice Fold FewShot Lens Linearised Pair Relation RelationData RelationScores States "
    "atlas_relations cross_validate estimate first_tokens known_pairs linearise load_relation "
    "log_probabilities_of low_rank_inverse outputs_with read_relations read_states rows_of share"
).split()
