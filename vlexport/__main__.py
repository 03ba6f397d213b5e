"""``python -m vlexport``."""

from vlexport.cli.main import entry

entry()
