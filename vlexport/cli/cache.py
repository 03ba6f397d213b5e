"""``vlexport cache``: what is kept, and how to be rid of it."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from vlexport.cli.measure import JsonOption
from vlexport.cli.outcome import Outcome
from vlexport.core.cache import OFF, Cache


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every entry, and searches' journals.")] = False,
    json_output: JsonOption = False,
) -> Outcome:
    """Show the cache of exports: folder, entries, size; VLEXPORT_CACHE moves it, VLEXPORT_CACHE=off does without."""
    from vlexport.report.figures import size_phrase

    if os.environ.get("VLEXPORT_CACHE") == OFF:
        return Outcome(["the cache is off: VLEXPORT_CACHE=off"], {"off": True})
    found = Cache()
    freed = found.clear() if clear else 0
    entries = found.entries()
    size = sum(each for _, each in entries)
    journals = len(found.journals())
    counted = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
    kept = f"; {journals} {'search' if journals == 1 else 'searches'} to go on with (--resume)" if journals else ""
    limit = f"at most {size_phrase(found.cap_bytes)}; the least recently used go first"
    lines = [f"{found.folder}: {counted}, {size_phrase(size)} of {limit}{kept}"]
    lines = [f"{size_phrase(freed)} freed", *lines] if clear else lines
    payload = {
        "off": False,
        "folder": str(found.folder),
        "entries": len(entries),
        "searches": journals,
        "size_bytes": size,
        "cap_bytes": found.cap_bytes,
        "freed_bytes": freed,
    }
    return Outcome(lines, payload)
