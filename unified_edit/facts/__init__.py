"""Facts, the records that test an edit of them, and the files they are read from."""

from unified_edit.facts.batches import (
    Conflict,
    SharedSubject,
    check_batch,
    check_items,
    check_ways,
    members_of,
    settle,
    shared_subjects,
    subject_batches,
    subject_columns,
    subject_key,
)
from unified_edit.facts.facts import Fact, Probe, Record
from unified_edit.facts.readers import read_facts, read_records

__all__ = (
    "Conflict Fact Probe Record SharedSubject check_batch check_items check_ways members_of "
    "read_facts read_records settle shared_subjects subject_batches subject_columns subject_key"
).split()
