"""What a run may use, and what came of it. Plain records; they mean the same on this machine and on a remote sandbox."""

from dataclasses import dataclass
from enum import StrEnum

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one run may use. Raises ValueError for anything that is not positive.

    A Python interpreter alone needs about 20 MiB of `address_mb`, NumPy several hundred.
    """

    wall_s: float = 10.0
    """Seconds from start to end; then everything of the run is killed."""
    cpu_s: int = 10
    """CPU seconds of each process."""
    address_mb: int = 512
    """Address space of each process, MiB."""
    memory_mb: int = 512
    """Resident memory of all processes together, MiB; looked at every `usage.LOOK_S` seconds, so it can be passed for that long."""
    disk_mb: int = 64
    """Files of the run together, and each one, MiB."""
    processes: int = 16
    """Processes and threads at one time."""
    open_files: int = 64
    """File descriptors of each process."""
    output_kb: int = 256
    """Standard output and standard error together, KiB; more ends the run."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"sandbox limit {name} must be positive, got {value!r}")


class Status(StrEnum):
    """How a run ended."""

    OK = "ok"
    """Exit code 0."""
    FAILED = "failed"
    """Another exit code: an exception, a wrong command line, `sys.exit(3)`."""
    SIGNAL = "signal"
    """Killed by a signal that the sandbox did not send on purpose, such as a segmentation fault."""
    TIMEOUT = "timeout"
    """`wall_s` or `cpu_s` is over."""
    MEMORY = "memory"
    """`memory_mb` is over. A single process that asks for more than `address_mb` is told so instead (Python: MemoryError) and may go on."""
    DISK = "disk"
    """`disk_mb` is over, found from outside. Where writing itself fails, the program sees that error and may go on."""
    OUTPUT = "output"
    """`output_kb` is over."""
    CANCELLED = "cancelled"
    """The caller did not want it any more."""
    UNAVAILABLE = "unavailable"
    """The sandbox could not run it: not the program's fault."""


@dataclass(frozen=True)
class Result:
    """What one run printed and how it ended. Text is cut at `output_kb`; bytes that are not UTF-8 are replaced."""

    status: Status
    exit_code: int | None
    """The program's, 128 + n after signal n; None when the sandbox ended it."""
    stdout: str
    stderr: str
    wall_s: float

    @property
    def ok(self) -> bool:
        return self.status is Status.OK

    def explain(self) -> str:
        """One line for a person or a model: why this is not `ok`; "ok" if it is."""
        last = self.stderr.strip().rpartition("\n")[2][:300]
        texts = {
            Status.OK: "ok",
            Status.FAILED: last or f"exit code {self.exit_code}",
            Status.SIGNAL: f"killed by signal {(self.exit_code or 128) - 128}",
            Status.TIMEOUT: "time limit exceeded",
            Status.MEMORY: "memory limit exceeded",
            Status.DISK: "disk limit exceeded",
            Status.OUTPUT: "too much output",
            Status.CANCELLED: "cancelled",
            Status.UNAVAILABLE: f"the sandbox failed: {last}",
        }
        return texts[self.status]
