"""C0 of a run: from a file, or counted in shares of the text that are added up at the end.

    FOLDER/pieces/statistics/*.safetensors   a file for each share and layer, until they are joined
    FOLDER/statistics/*-layer-N.safetensors  C0 of a layer

A share is every n-th group of texts, and how many there are has nothing to do with the number of
processes. The sums of all shares are added in one order, so C0 is the same to the last bit, whoever
counted them. One matrix at a time is read: those of GPT-J take 2 GiB each.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from unified_edit.editing import Editor
from unified_edit.errors import StatisticsFileError
from unified_edit.model.fingerprints import sha256_of
from unified_edit.model.prompts import Encoder
from unified_edit.running.pieces import PIECES, STATISTICS, Piece
from unified_edit.running.settings import Settings
from unified_edit.statistics import KeyStatistics, check_texts, chosen_texts
from unified_edit.statistics.collect import GROUP
from unified_edit.statistics.sums import room

log = logging.getLogger(__name__)


class StatisticsStage:
    """C0 of the method's layers; no pieces where it is in a file, or counted already."""

    def __init__(self, folder: Path, editor: Editor, settings: Settings) -> None:
        self.editor, self.settings = editor, settings
        self.layers: tuple[int, ...] = settings.method.resolve(editor.parts).layers or ()
        self.given: KeyStatistics | None = None
        self.folder, self.joined = folder / PIECES / STATISTICS, folder / STATISTICS
        self.pieces: tuple[Piece, ...] = ()
        if settings.statistics is not None:
            self.given = KeyStatistics.lazily(settings.statistics)
            self.given.check_model(editor.ledger.fingerprint(), editor.parts.name)
            for layer in self.layers:
                self.given.convergence(layer)  # says which layers there are
            return
        check_texts(self._paths)
        self._shares = self._count()
        self._name = self._digest(editor.ledger.fingerprint())
        if all(self._joined(layer).exists() for layer in self.layers):
            return
        self.pieces = tuple(
            Piece(
                f"{STATISTICS} {number + 1}",
                STATISTICS,
                tuple(f"{STATISTICS}/{self._path(number, layer).name}" for layer in self.layers),
                1,
            )
            for number in range(self._shares)
        )

    @property
    def _paths(self) -> list[Path]:
        return [Path(path) for path in self.settings.texts]

    def _chosen(self) -> tuple[Iterator[str], int | None]:
        """The texts from their beginning, and how many tokens of them."""
        asked = self.settings
        return chosen_texts(
            self.editor.model, self.layers, files=self._paths, split=asked.split,
            dataset=asked.dataset, config=asked.dataset_config, column=asked.column,
            tokens=asked.tokens,
        )  # fmt: skip

    def _count(self) -> int:
        """So many shares as are asked for, but none of them empty; what is shrunk is short."""
        if self.settings.shrinkage or self.settings.shares == 1:
            return 1
        most = self.settings.shares * GROUP
        some = sum(1 for _ in islice(self._chosen()[0], most))
        return max(1, min(self.settings.shares, math.ceil(some / GROUP)))

    def _digest(self, fingerprint: str) -> str:
        tokenizer = Encoder(self.editor.tokenizer, self.editor.parts).signature
        about: list[Any] = [fingerprint, tokenizer, version("unified_edit")]
        about += [self.layers, self._chosen()[1]]
        asked = self.settings
        about += [self._shares, asked.shrinkage, asked.split]
        about += [asked.dataset, asked.dataset_config, asked.column]
        about += [sha256_of(path) for path in self._paths]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:20]

    def _path(self, share: int, layer: int) -> Path:
        return self.folder / f"{self._name}-{share + 1}-{layer}.safetensors"

    def _joined(self, layer: int) -> Path:
        return self.joined / f"{self._name}-layer-{layer}.safetensors"

    def make(self, place: int) -> None:
        """One share of the text, at all layers."""
        texts, tokens = self._chosen()
        found = KeyStatistics.collect(
            self.editor.model,
            self.editor.tokenizer,
            texts,
            self.layers,
            tokens=tokens,
            shrinkage=self.settings.shrinkage,
            part=(place, self._shares),
            max_memory=room(),
            folder=self.folder,
        )
        for layer in self.layers:
            found.only(layer).save(self._path(place, layer))

    def statistics(self) -> KeyStatistics | None:
        """C0 of all layers; None where shares are missing.

        Shares that are damaged are taken away, with a warning, and are missing from then on.
        """
        if self.given is not None:
            return self.given
        for layer in self.layers if self.pieces else ():
            each = [self._part(share, layer) for share in range(self._shares)]
            there = [one for one in each if one is not None]
            if len(there) < len(each):
                return None
            KeyStatistics.joined(there).save(self._joined(layer))
        try:
            return KeyStatistics.joined(
                [KeyStatistics.lazily(self._joined(layer)) for layer in self.layers]
            )
        except StatisticsFileError:
            for layer in self.layers:
                self._joined(layer).unlink(missing_ok=True)
            log.error("C0 is counted anew when the run is started again")
            raise

    def _part(self, share: int, layer: int) -> KeyStatistics | None:
        path = self._path(share, layer)
        try:
            return KeyStatistics.lazily(path)
        except StatisticsFileError as problem:
            log.warning("a share of the text is counted again: %s", problem)
            path.unlink(missing_ok=True)
            return None

    def clear(self) -> None:
        """Delete the shares: they are in the files of the layers."""
        if self.given is None:
            for path in self.folder.glob(f"{self._name}-*.safetensors"):
                path.unlink(missing_ok=True)
