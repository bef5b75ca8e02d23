"""Import traces from other tools' files: one module per format, detected from the content of the file.

Each format recognises a file from its first document (`knows`) and converts its documents to trajectories (`read`). Most formats are
conversations and use `conversation.trajectory`. Missing values are estimated, and the estimates are counted and reported to the user;
a value that cannot be estimated raises a `TraceError` with file, line and field. No text is kept: a trace holds counts, names and times.
"""

from verl_heddle.traces.importers.formats import FORMATS, Imported, imported

__all__ = ["FORMATS", "Imported", "imported"]
