"""Trace schema, trace files, trace statistics, and generated workloads."""

from verl_heddle.traces.describe import summary
from verl_heddle.traces.generate import generate
from verl_heddle.traces.io import read, segment, segments, trace_files, trace_of, write
from verl_heddle.traces.replay import episodes, replayable
from verl_heddle.traces.schema import PSEUDO_TOOLS, TraceError, decode, encode, from_dict, to_dict
from verl_heddle.traces.steps import training_steps
from verl_heddle.traces.workloads import CODING, MATH, SEARCH, WORKLOADS, Tool, Workload, split_variance

__all__ = [
    "CODING",
    "MATH",
    "PSEUDO_TOOLS",
    "SEARCH",
    "WORKLOADS",
    "Tool",
    "TraceError",
    "Workload",
    "decode",
    "encode",
    "episodes",
    "from_dict",
    "generate",
    "read",
    "replayable",
    "segment",
    "segments",
    "split_variance",
    "summary",
    "to_dict",
    "trace_files",
    "trace_of",
    "training_steps",
    "write",
]
