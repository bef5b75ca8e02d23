"""Traces out of files that people have: one module a format, told apart by what is in the file.

A format says whether it knows a file (`knows`, from its first document) and turns its documents into trajectories (`read`). Most are
conversations, and go through `conversation.trajectory`. What is not told is estimated and counted, so that the user is told; what cannot
be is a `TraceError` with file, line and field. No text is kept: a trace holds counts, names and times.
"""

from verl_heddle.traces.importers.formats import FORMATS, Imported, imported

__all__ = ["FORMATS", "Imported", "imported"]
