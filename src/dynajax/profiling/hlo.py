"""Kernels, loops, copies and bytes of a compiled program, parsed from its text.

The text is optimised HLO (`jax.stages.Compiled.as_text`). A kernel is an instruction that the
device executes: a fusion on a TPU, a launch on a GPU. A fusion is one kernel, whatever it contains.
Kernels of a loop's body are counted in the loop.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

#: Instructions that do no work: they only name or order the results of others.
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "domain",
        "opt-barrier",
        "add-dependency",
        "partition-id",
        "replica-id",
        "copy-done",
        "all-reduce-done",
        "all-gather-done",
        "collective-permute-done",
        "async-update",
        "async-done",
        "send-done",
        "recv-done",
    )
)
#: Instructions that are kernels even if their result is a scalar.
_WORK = frozenset(
    (
        "fusion",
        "custom-call",
        "dot",
        "convolution",
        "copy",
        "copy-start",
        "sort",
        "scatter",
        "gather",
        "reduce",
        "reduce-window",
        "all-reduce",
        "all-reduce-start",
        "async-start",
    )
)
#: Targets of custom calls that do no work.
_NO_WORK = ("AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")
#: Bytes of types whose size is not in their name.
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "token": 0}
#: Instructions that read only a part of their first operand.
_SLICES = ("dynamic-slice", "slice", "gather")


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    opcode: str
    shape: str  # of its result, as text
    operands: tuple[str, ...]
    attributes: str  # the text after the operands
    is_root: bool  # whether it is the result of its computation

    @property
    def bytes(self) -> int:
        """Return the size of its result."""
        return shape_bytes(self.shape)

    def called(self, attribute: str) -> str | None:
        """Return the name of the computation in an attribute such as `body`."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def is_kernel(self) -> bool:
        """Return whether the device executes this instruction as a kernel."""
        if self.opcode == "custom-call":
            return not any(f'custom_call_target="{name}"' in self.attributes for name in _NO_WORK)
        if self.opcode in _FREE:
            return False
        # A scalar, such as a loop's counter, is counted with the kernel that reads it.
        return self.opcode in _WORK or "[]" not in self.shape


Computations = dict[str, list[Instruction]]


class Summary(NamedTuple):
    """The work of a program, or of one iteration of a loop, without that of the loops in it."""

    name: str
    trip_count: int | None  # iterations of a loop; None if they depend on data
    kernels: int
    copies: tuple[int, ...]  # bytes of each copy
    all_reduces: int
    boundary_bytes: int  # of inputs that its kernels read and results that they write
    kernel_bytes: int  # that its kernels read and write, intermediate results included
    loops: tuple["Summary", ...]

    def walk(self) -> Iterator["Summary"]:
        """Yield this summary and those of all nested loops."""
        yield self
        for loop in self.loops:
            yield from loop.walk()

    def total(self, field: str, trip_count: int = 1) -> int:
        """Return the total of a field in one run, with each loop counted as often as it iterates.

        Args:
          field: "kernels", "all_reduces" or "kernel_bytes".
          trip_count: assumed trip count of loops whose length depends on data.
        """
        inner = sum(
            (trip_count if loop.trip_count is None else loop.trip_count)
            * loop.total(field, trip_count)
            for loop in self.loops
        )
        return int(getattr(self, field)) + inner

    def main_loop(self) -> "Summary | None":
        """Return the nested loop that executes the most kernels, if there is a loop."""
        return max(
            (summary for summary in self.walk() if summary is not self),
            key=lambda loop: (loop.trip_count or 1) * loop.kernels,
            default=None,
        )

    def min_bytes(self, cache: int, trip_count: int = 1) -> int:
        """Return the bytes that one run must at least move between memory and the chip.

        The cache may hold inputs and results of the program, and of each iteration of a loop, up to
        its size each. Intermediate results may stay in the cache.

        Args:
          cache: bytes of the chip's cache.
          trip_count: assumed trip count of loops whose length depends on data.
        """
        total = max(0, self.boundary_bytes - 2 * cache)
        for loop in self.loops:
            trips = trip_count if loop.trip_count is None else loop.trip_count
            total += trips * loop.min_bytes(cache, trip_count)
        return total


def shape_bytes(shape: str) -> int:
    """Return the bytes of a shape given as text, summed over a tuple, without padding."""
    total = 0
    for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        digits = re.match(r"[a-z]+(\d+)", kind)
        # The name of a type contains its number of bits.
        size = _BYTES.get(kind, int(digits[1]) // 8 if digits else 0)
        for length in filter(None, sizes.split(",")):
            size *= int(length)
        total += size
    return total


def _closing(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at
    raise ValueError(f"a bracket is not closed: {text}")


_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")


def parse(text: str) -> tuple[str, Computations]:
    """Return the name of the entry computation, and the instructions of all computations.

    Raises:
      ValueError: the text is not that of a program.
    """
    computations: Computations = {}
    entry, current = None, None
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (match := _LINE.match(line)):
            current.append(_instruction(match[2], match[3], bool(match[1])))
    if entry is None:
        raise ValueError("the text has no entry computation, so it is not a program")
    return entry, computations


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    # The shape ends at its closing bracket, or at a space, because layouts contain no spaces.
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside, opcode = rest[opening + 1 : closing], rest[:opening]
    # The only operand of a parameter is its index, and that of a constant is its value.
    operands = (
        [inside] if opcode in ("parameter", "constant") else re.findall(r"%([\w.\-]+)", inside)
    )
    return Instruction(name, opcode, shape, tuple(operands), rest[closing + 1 :], is_root)


def summarize(text: str) -> Summary:
    """Return the work of a program.

    Raises:
      ValueError: the text is not that of a program.
    """
    entry, computations = parse(text)
    return _summary(computations, entry, "program", 1)


def replay_copies(text: str, capacities: set[int]) -> int:
    """Count the copies of arrays as large as a replay buffer.

    Args:
      text: the text of a compiled program.
      capacities: slots N of the replay buffers, whose arrays have shape (S, N, D).
    """
    _, computations = parse(text)
    copies = [i.shape for c in computations.values() for i in c if i.opcode == "copy"]
    lengths = [re.findall(r"\d+", re.findall(r"\[([\d,]*)\]", shape)[0]) for shape in copies]
    return sum(len(x) == 3 and int(x[1]) in capacities for x in lengths)


def _summary(computations: Computations, name: str, label: str, trip_count: int | None) -> Summary:
    kernels, all_reduces, kernel_bytes = 0, 0, 0
    copies: list[int] = []
    loops: list[Summary] = []
    boundary: dict[tuple[str, bool], int] = {}  # bytes by (array, whether it is written)
    inputs, results = _inputs_and_results(computations[name])
    for neighbours, instruction in _executed(computations, name):
        if instruction.opcode == "while":
            body = instruction.called("body")
            assert body is not None
            trips = _trip_count(computations, neighbours, instruction)
            loops.append(_summary(computations, body, instruction.name, trips))
            continue
        if not instruction.is_kernel:
            continue
        kernels += 1
        all_reduces += instruction.opcode in ("all-reduce", "all-reduce-start")
        if instruction.opcode in ("copy", "copy-start"):
            copies.append(shape_bytes(_first_array(instruction.shape)))
        for array, size in _reads_and_writes(computations, neighbours, instruction):
            kernel_bytes += size
            written = array == instruction.name
            if array in (results if written else inputs):
                boundary[array, written] = max(size, boundary.get((array, written), 0))
    return Summary(
        label,
        trip_count,
        kernels,
        tuple(copies),
        all_reduces,
        sum(boundary.values()),
        kernel_bytes,
        tuple(loops),
    )


def _inputs_and_results(computation: list[Instruction]) -> tuple[set[str], set[str]]:
    """Return the names of a computation's inputs and results; an unchanged input is no result."""
    by_name = {i.name: i for i in computation}
    inputs: set[str] = set()
    for i in computation:
        is_alias = i.opcode in ("get-tuple-element", "bitcast") and i.operands[0] in inputs
        if i.opcode == "parameter" or is_alias:
            inputs.add(i.name)
    waiting, results = [i.name for i in computation if i.is_root], set()
    while waiting:
        i = by_name[waiting.pop()]
        results.add(i.name)
        if i.opcode in ("tuple", "get-tuple-element", "bitcast"):
            waiting += i.operands
    return inputs, results - inputs


def _trip_count(
    computations: Computations, neighbours: dict[str, Instruction], loop: Instruction
) -> int | None:
    """Return the trip count of a loop, or None if it depends on data.

    It is taken from the compiler's annotation or, because JAX's loops count by one, from the
    constants at which the counter begins and ends.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    condition = computations[loop.called("condition") or ""]
    by_name = {i.name: i for i in condition}
    root = next(i for i in condition if i.is_root)
    operands = [by_name[name] for name in root.operands if name in by_name]
    if root.opcode == "fusion":
        fused = computations[root.called("calls") or ""]
        root = next(i for i in fused if i.is_root)
        fused_by_name = {i.name: i for i in fused}
        operands = [
            operands[int(i.operands[0])] if i.opcode == "parameter" else i
            for i in (fused_by_name[name] for name in root.operands)
        ]
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    initial = neighbours.get(loop.operands[0])
    ends = [_initial_constant(neighbours, initial, i) for i in operands]
    if len(ends) != 2 or None in ends:
        return None
    return max(0, (ends[1] or 0) - (ends[0] or 0))


def _initial_constant(
    neighbours: dict[str, Instruction], initial: Instruction | None, value: Instruction
) -> int | None:
    """Return the initial value of a scalar in a loop's condition, or None if it is not constant."""
    if value.opcode == "get-tuple-element" and initial is not None and initial.opcode == "tuple":
        index = re.search(r"index=(\d+)", value.attributes)
        assert index is not None
        source = neighbours.get(initial.operands[int(index[1])])
        while source is not None and source.opcode == "copy":
            source = neighbours.get(source.operands[0])
        if source is None:
            return None
        value = source
    if value.opcode == "constant" and re.fullmatch(r"-?\d+", value.operands[0]):
        return int(value.operands[0])
    return None


def _first_array(shape: str) -> str:
    """Return the first array of a tuple's shape, which an asynchronous copy writes."""
    return re.findall(r"\w+\[[\d,]*\]", shape)[0]


def _executed(
    computations: Computations, name: str
) -> Iterator[tuple[dict[str, Instruction], Instruction]]:
    """Yield the instructions of a computation and of those that it calls.

    Each comes with the instructions of its own computation by name. A conditional is represented by
    its longest branch.
    """
    neighbours = {i.name: i for i in computations[name]}
    for instruction in computations[name]:
        yield neighbours, instruction
        if instruction.opcode == "call" and (called := instruction.called("to_apply")):
            yield from _executed(computations, called)
        if instruction.opcode == "conditional":
            match = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = match[1].split(",") if match else []
            names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
            branches = [list(_executed(computations, n.strip().lstrip("%"))) for n in names]
            yield from max(branches, key=len)


def _reads_and_writes(
    computations: Computations,
    neighbours: dict[str, Instruction],
    instruction: Instruction,
) -> Iterator[tuple[str, int]]:
    """Yield the names of the arrays that a kernel reads and writes, with the bytes of each."""
    called = instruction.called("calls") if instruction.opcode == "fusion" else None
    fused = computations.get(called or "", [])
    for index, operand in enumerate(instruction.operands):
        if operand in neighbours:
            size = neighbours[operand].bytes
            yield operand, min(size, _read_bytes(fused, index, size, instruction))
    by_name = {i.name: i for i in fused}
    update = next((i for i in fused if i.is_root and i.opcode == "dynamic-update-slice"), None)
    if update is not None and update.operands[1] in by_name:
        yield instruction.name, by_name[update.operands[1]].bytes
    else:
        yield instruction.name, instruction.bytes


def _read_bytes(fused: list[Instruction], index: int, size: int, instruction: Instruction) -> int:
    """Return how many of the `size` bytes of operand number `index` a kernel reads.

    Args:
      fused: the instructions inside the kernel, if it is a fusion.
      index, size: the operand.
      instruction: the kernel.
    """
    if not fused:
        return instruction.bytes if instruction.opcode in _SLICES and index == 0 else size
    name = next(
        (i.name for i in fused if i.opcode == "parameter" and i.operands == (str(index),)), ""
    )
    total = 0
    for reader in fused:
        if name not in reader.operands or reader.opcode == "parameter":
            continue
        is_first = reader.operands[0] == name
        if reader.opcode in _SLICES and is_first:
            total += reader.bytes
        elif reader.opcode != "dynamic-update-slice" or not is_first:
            return size
    return total
