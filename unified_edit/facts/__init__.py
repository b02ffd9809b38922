"""Facts, the records that test an edit of them, and the files they are read from."""

from unified_edit.facts.batches import check_batch, check_items, shared_subjects
from unified_edit.facts.facts import Fact, Probe, Record
from unified_edit.facts.readers import read_facts, read_records

__all__ = (
    "Fact Probe Record check_batch check_items read_facts read_records shared_subjects".split()
)
