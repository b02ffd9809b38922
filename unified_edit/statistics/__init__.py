"""C0, the second moment of the keys to preserve: the container, the job, the cache."""

from unified_edit.statistics.cache import cache_folder, statistics_for
from unified_edit.statistics.collect import Source
from unified_edit.statistics.corpora import (
    TOKENS_PER_DIMENSION,
    check_texts,
    chosen_texts,
    dataset_texts,
    default_corpus,
    file_texts,
    wikipedia,
    wikitext_extract,
)
from unified_edit.statistics.key_statistics import KeyStatistics

__all__ = (
    "TOKENS_PER_DIMENSION KeyStatistics Source cache_folder check_texts chosen_texts dataset_texts "
    "default_corpus file_texts statistics_for wikipedia wikitext_extract".split()
)
