"""What an optimised program does, read from its text: kernels, loops, copies, bytes.

The text is XLA's (`jax.stages.Compiled.as_text`). A kernel is an instruction that a device is given
to do: a fusion on a TPU, a launch on a GPU. What a fusion holds is one kernel; what a loop's body
holds is counted in the loop.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

#: Instructions that only name or order what others make.
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
#: Instructions that are work though their result is one number.
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
#: Targets of custom calls that do nothing.
_NO_WORK = ("AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "token": 0}
#: Instructions by which a fusion reads a part of an operand.
_PARTS = ("dynamic-slice", "slice", "gather")


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    opcode: str
    shape: str  # of its result, as it is written
    operands: tuple[str, ...]
    attributes: str  # what is written after the operands
    root: bool  # whether it is its computation's result

    @property
    def bytes(self) -> int:
        """Of its result."""
        return shape_bytes(self.shape)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def kernel(self) -> bool:
        """Whether a device is given this to do."""
        if self.opcode == "custom-call":
            return not any(f'custom_call_target="{name}"' in self.attributes for name in _NO_WORK)
        if self.opcode in _FREE:
            return False
        # A number alone, a loop's counter say, is counted with what reads it.
        return self.opcode in _WORK or "[]" not in self.shape


Computations = dict[str, list[Instruction]]


class Part(NamedTuple):
    """A program, or the body of a loop: what it does once, without the loops in it."""

    name: str
    trips: int | None  # how often it runs when it is reached; None: data decide
    kernels: int
    copies: tuple[int, ...]  # bytes of each copy
    all_reduces: int
    carried: int  # bytes of what its kernels read from before it and write for after it
    moved: int  # bytes that its kernels read and write
    loops: tuple["Part", ...]

    def walk(self) -> Iterator["Part"]:
        """It, and all loops in it."""
        yield self
        for loop in self.loops:
            yield from loop.walk()

    def total(self, field: str, trips: int = 1) -> int:
        """Of `kernels`, `all_reduces` or `moved`: of one run, loops as often as they run.

        Args:
          trips: how often a loop is taken to run whose end depends on data.
        """
        inner = sum(
            (trips if loop.trips is None else loop.trips) * loop.total(field, trips)
            for loop in self.loops
        )
        return int(getattr(self, field)) + inner

    def main(self) -> "Part | None":
        """The loop of most work, of those that stand in it."""
        return max(
            (part for part in self.walk() if part is not self),
            key=lambda loop: (loop.trips or 1) * loop.kernels,
            default=None,
        )

    def traffic(self, cache: int, trips: int = 1) -> int:
        """Bytes that one run must at least move between memory and a chip with such a `cache`.

        Of what a program, or a round of a loop, reads from before it and writes for after it, the
        cache may hold the one and the other. What kernels hand on among themselves may stay there.
        """
        total = max(0, self.carried - 2 * cache)
        for loop in self.loops:
            total += (trips if loop.trips is None else loop.trips) * loop.traffic(cache, trips)
        return total


def shape_bytes(shape: str) -> int:
    """Bytes of a shape as it is written, a tuple's in all; padding is not counted."""
    total = 0
    for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        digits = re.match(r"[a-z]+(\d+)", kind)
        # Types are named by their bits.
        each = _BYTES.get(kind, int(digits[1]) // 8 if digits else 0)
        for size in filter(None, sizes.split(",")):
            each *= int(size)
        total += each
    return total


def _closing(text: str, start: int) -> int:
    """Where the bracket closes that opens at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at
    raise ValueError(f"a bracket is not closed: {text}")


_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")


def parse(text: str) -> tuple[str, Computations]:
    """The entry's name, and the instructions of every computation.

    Raises:
      ValueError: it is no program's text.
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
        raise ValueError("there is no entry in the program's text")
    return entry, computations


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else _end_of_shape(text)
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside, opcode = rest[opening + 1 : closing], rest[:opening]
    # A parameter's only operand is its number, a constant's its value.
    operands = (
        [inside] if opcode in ("parameter", "constant") else re.findall(r"%([\w.\-]+)", inside)
    )
    return Instruction(
        name,
        opcode,
        shape,
        tuple(operands),
        rest[closing + 1 :],
        root,
    )


def _end_of_shape(text: str) -> int:
    """A layout may hold spaces no more than a shape, so the first one ends it."""
    return text.index(" ")


def read(text: str) -> Part:
    """What a program does.

    Raises:
      ValueError: it is no program's text.
    """
    entry, computations = parse(text)
    return _part(computations, entry, "program", 1)


def _part(computations: Computations, name: str, label: str, trips: int | None) -> Part:
    kernels, all_reduces, moved = 0, 0, 0
    copies: list[int] = []
    loops: list[Part] = []
    carried: dict[tuple[str, bool], int] = {}
    outside, results = _ends(computations[name])
    for shapes, instruction in _flat(computations, name):
        if instruction.opcode == "while":
            body = instruction.called("body")
            assert body is not None
            rounds = _trips(computations, shapes, instruction)
            loops.append(_part(computations, body, instruction.name, rounds))
            continue
        if not instruction.kernel:
            continue
        kernels += 1
        all_reduces += instruction.opcode in ("all-reduce", "all-reduce-start")
        if instruction.opcode in ("copy", "copy-start"):
            copies.append(shape_bytes(_first(instruction.shape)))
        for array, size in _reads_and_writes(computations, shapes, instruction):
            moved += size
            written = array == instruction.name
            if array in (results if written else outside):
                carried[array, written] = max(size, carried.get((array, written), 0))
    return Part(
        label,
        trips,
        kernels,
        tuple(copies),
        all_reduces,
        sum(carried.values()),
        moved,
        tuple(loops),
    )


def _ends(computation: list[Instruction]) -> tuple[set[str], set[str]]:
    """Names of what a computation reads from before it, and of what it makes for after it."""
    inside = {i.name: i for i in computation}
    outside: set[str] = set()
    for i in computation:
        begins = i.opcode == "parameter"
        named = i.opcode in ("get-tuple-element", "bitcast") and i.operands[0] in outside
        if begins or named:
            outside.add(i.name)
    waiting, results = [i.name for i in computation if i.root], set()
    while waiting:
        i = inside[waiting.pop()]
        results.add(i.name)
        if i.opcode in ("tuple", "get-tuple-element", "bitcast"):
            waiting += i.operands
    return outside, results - outside


def _trips(
    computations: Computations, neighbours: dict[str, Instruction], loop: Instruction
) -> int | None:
    """How often a loop runs, if that is known: as the compiler says, or by a counter's two ends.

    JAX's loops count from one constant up to another by ones.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    condition = computations[loop.called("condition") or ""]
    inside = {i.name: i for i in condition}
    root = next(i for i in condition if i.root)
    operands = [inside[name] for name in root.operands if name in inside]
    if root.opcode == "fusion":
        fused = computations[root.called("calls") or ""]
        root = next(i for i in fused if i.root)
        parts = {i.name: i for i in fused}
        operands = [
            operands[int(i.operands[0])] if i.opcode == "parameter" else i
            for i in (parts[name] for name in root.operands)
        ]
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    begin = neighbours.get(loop.operands[0])
    ends = [_constant(neighbours, begin, i) for i in operands]
    if len(ends) != 2 or None in ends:
        return None
    return max(0, (ends[1] or 0) - (ends[0] or 0))


def _constant(
    neighbours: dict[str, Instruction], begin: Instruction | None, value: Instruction
) -> int | None:
    """What a number in a loop's condition is when the loop begins, where that is a constant."""
    if value.opcode == "get-tuple-element" and begin is not None and begin.opcode == "tuple":
        index = re.search(r"index=(\d+)", value.attributes)
        assert index is not None
        source = neighbours.get(begin.operands[int(index[1])])
        while source is not None and source.opcode == "copy":
            source = neighbours.get(source.operands[0])
        if source is None:
            return None
        value = source
    if value.opcode == "constant" and re.fullmatch(r"-?\d+", value.operands[0]):
        return int(value.operands[0])
    return None


def _first(shape: str) -> str:
    """A tuple's first part: what an asynchronous copy writes."""
    return re.findall(r"\w+\[[\d,]*\]", shape)[0]


def _flat(
    computations: Computations, name: str
) -> Iterator[tuple[dict[str, Instruction], Instruction]]:
    """A computation's instructions and those of what it calls, each with its neighbours by name.

    Of a branch's alternatives the longest.
    """
    neighbours = {i.name: i for i in computations[name]}
    for instruction in computations[name]:
        yield neighbours, instruction
        if instruction.opcode == "call" and (called := instruction.called("to_apply")):
            yield from _flat(computations, called)
        if instruction.opcode == "conditional":
            match = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = match[1].split(",") if match else []
            names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
            branches = [list(_flat(computations, n.strip().lstrip("%"))) for n in names]
            yield from max(branches, key=len)


def _reads_and_writes(
    computations: Computations,
    neighbours: dict[str, Instruction],
    instruction: Instruction,
) -> Iterator[tuple[str, int]]:
    """The arrays that a kernel reads and writes, by name, and how many bytes of each."""
    called = instruction.called("calls") if instruction.opcode == "fusion" else None
    inside = computations.get(called or "", [])
    for index, operand in enumerate(instruction.operands):
        if operand in neighbours:
            whole = neighbours[operand].bytes
            yield operand, min(whole, _read(inside, index, whole, instruction))
    update = next((i for i in inside if i.root and i.opcode == "dynamic-update-slice"), None)
    inner = {i.name: i for i in inside}
    if update is not None and update.operands[1] in inner:
        yield instruction.name, inner[update.operands[1]].bytes
    else:
        yield instruction.name, instruction.bytes


def _read(inside: list[Instruction], index: int, whole: int, instruction: Instruction) -> int:
    """Bytes of operand number `index`, of `whole` bytes, that a kernel reads."""
    if not inside:
        part = instruction.opcode in _PARTS and index == 0
        return instruction.bytes if part else whole
    name = next(
        (i.name for i in inside if i.opcode == "parameter" and i.operands == (str(index),)), ""
    )
    total = 0
    for reader in inside:
        if name not in reader.operands or reader.opcode == "parameter":
            continue
        first = reader.operands[0] == name
        if reader.opcode in _PARTS and first:
            total += reader.bytes
        elif reader.opcode != "dynamic-update-slice" or not first:
            return whole
    return total
