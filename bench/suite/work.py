"""What records and tables share, free of PyTorch: reading a record loads none."""

from dataclasses import dataclass

OURS = "ours"  # the provider that the others are measured against
AGAIN = "ours again"  # timed a second time it tells how much of a difference is noise


@dataclass(frozen=True)
class Work:
    """The least that an op must do: every input read once, every output written once."""

    bytes: int
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The floor: the longer of moving the bytes and doing the arithmetic."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)
