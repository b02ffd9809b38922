"""Running: an edit of many facts by any number of processes, which share a folder."""

from unified_edit.running.pieces import Piece
from unified_edit.running.settings import Config, RunFolder, Settings
from unified_edit.running.status import RunState
from unified_edit.running.work import run
from unified_edit.running.workers import Seen, Share, Sign, Worker

__all__ = "Config Piece RunFolder RunState Seen Settings Share Sign Worker run".split()
