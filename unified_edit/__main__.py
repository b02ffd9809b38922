"""``python -m unified_edit``: the command line of `unified_edit.cli`."""

import sys

from unified_edit.command_line.cli import main

if __name__ == "__main__":
    sys.exit(main())
