"""What the compiler says of a program: memory, donation, kernels, copies."""

import re
from typing import Any, NamedTuple

import jax


class Facts(NamedTuple):
    """Of a compiled program."""

    state_bytes: int  # of its arguments
    temporary_bytes: int
    donated: float  # the share of the arguments' bytes whose memory the results take over
    kernels: int  # instructions that do work, each counted once however often a loop runs it
    ring_copies: int  # copies of arrays as large as a replay's observations


def facts(program: jax.stages.Compiled, slots: set[int]) -> Facts:
    """Of a program whose state holds replays with such numbers of `slots`."""
    memory: Any = program.memory_analysis()
    text = program.as_text() or ""
    fused = re.sub(r"(?ms)^%?fused_computation.*?^}", "", text)
    kernels = re.findall(r" (?:fusion|dot|custom-call|copy|sort|scatter|reduce)\(", fused)
    return Facts(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes / memory.argument_size_in_bytes,
        len(kernels),
        ring_copies(program, slots),
    )


def ring_copies(program: jax.stages.Compiled, slots: set[int]) -> int:
    """Copies of arrays (S, N, D) as large as a replay's observations, N being one of `slots`."""
    shapes = re.findall(r"= \w+\[((?:\d+,)*\d+)\]\S* copy\(", program.as_text() or "")
    return sum(len(s.split(",")) == 3 and int(s.split(",")[1]) in slots for s in shapes)
