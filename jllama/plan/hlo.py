"""Reads the text of a compiled and scheduled HLO module: its instructions, and its loops' trips."""

import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.-]+) = (.*)$", re.S)
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_NO_ESTIMATE = 2**63 - 1  # what the compiler writes for a fusion whose cycles it cannot estimate


@dataclasses.dataclass(frozen=True)
class Array:
    """The dtype and the shape of one array on one device, such as bf16 [4096, 11008]."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes of its elements, without padding; a token or an opaque value has none."""
        if self.dtype == "pred":
            return self.elements
        bits = _BITS.search(self.dtype)
        return self.elements * int(bits[0]) / 8 if bits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      type: the type of the result as it is written; a tuple in parentheses.
      rest: all that follows the opcode: operands, attributes, metadata, backend_config.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The value of an attribute that is one word, such as the name of a called computation."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found[1] if found else None

    @property
    def called(self) -> str | None:
        """The computation that a fusion, a call or an asynchronous start runs."""
        is_call = self.opcode in ("call", "call-start")
        return self.attribute("to_apply" if is_call else "calls")

    @property
    def scope(self) -> str:
        """Where in the traced function it comes from; empty if the compiler made it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate of its cycles on a TPU: 0 where it gives none, and None for a
        fusion that it could not estimate.
        """
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        cycles = int(found[1]) if found else 0
        return None if cycles == _NO_ESTIMATE else cycles

    @property
    def constant(self) -> int | None:
        """The value, if this is an integer constant."""
        found = re.match(r"(-?\d+)\)", self.rest) if self.opcode == "constant" else None
        return int(found[1]) if found else None

    @property
    def parameter(self) -> int | None:
        """The index, if this is a parameter of its computation."""
        found = re.match(r"(\d+)\)", self.rest) if self.opcode == "parameter" else None
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations by name, each with its instructions in scheduled order, and the entry."""

    computations: dict[str, list[Instruction]]
    entry: str

    def root(self, computation: str) -> Instruction:
        (root,) = (i for i in self.computations[computation] if i.is_root)
        return root

    def by_name(self, computation: str) -> dict[str, Instruction]:
        return {i.name: i for i in self.computations[computation]}


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`."""
    lines: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = lines.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}" or line.startswith("}, execution_thread="):
            current = None
        elif current is not None:
            if _INSTRUCTION.match(line):
                current.append(line)
            elif current:  # an instruction may go on over several lines
                current[-1] += " " + line
    return Module({name: [_instruction(x) for x in body] for name, body in lines.items()}, entry)


def _instruction(line: str) -> Instruction:
    root, name, text = _INSTRUCTION.match(line).groups()
    if text.startswith("("):
        end = _closing(text, 0) + 1
        type_, text = text[:end], text[end + 1 :]
    else:
        type_, text = text.split(" ", 1)
    opcode, rest = re.match(r"([\w-]+)\((.*)$", text, re.S).groups()
    operands = re.findall(r"%([\w.-]+)", rest[: _closing("(" + rest, 0)])
    return Instruction(name, type_, opcode, tuple(operands), rest, bool(root))


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def arrays(type_: str) -> list[Array]:
    """The arrays of a type, in order."""
    return [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n))
        for dtype, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", type_))
    ]


def tuple_elements(type_: str) -> list[str]:
    """The types of a tuple's elements; a type that is no tuple is its own only element."""
    if not type_.startswith("("):
        return [type_]
    return list(_split(type_[1:-1]))


def _split(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for i, character in enumerate(text):
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    yield text[start:].strip()


def trips(module: Module, computation: str, loop: Instruction) -> int:
    """How often the body of a `while` in `computation` runs.

    It is the compiler's own count, or else what follows from the loop's counter: (limit - start) /
    step, rounded up. Raises `ValueError` if the loop has no such counter.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    limit, index = _limit(module, loop.attribute("condition"))
    start = step = None
    if limit is not None and index is not None:
        start = _initial(module.by_name(computation), loop, index)
        step = _step(module, loop.attribute("body"), index)
    if start is None or not step:
        raise ValueError(f"the loop {loop.name} has no counter with a constant start and step")
    return max(0, math.ceil((limit - start) / step))


def _limit(module: Module, condition: str) -> tuple[int | None, int | None]:
    """The constant below which a loop's counter stays, and the counter's place in the tuple."""
    compare, operands = _inner(module, condition, module.root(condition))
    limit = next((i.constant for i in operands if i.constant is not None), None)
    index = next((_tuple_index(i) for i in operands if i.opcode == "get-tuple-element"), None)
    direction = compare.attribute("direction")
    if compare.opcode != "compare" or direction not in ("LT", "LE") or limit is None:
        return None, None
    return limit + (direction == "LE"), index


def _inner(
    module: Module, computation: str, instruction: Instruction
) -> tuple[Instruction, list[Instruction]]:
    """An instruction and its operands; for a fusion, its root and the root's operands."""
    outer = module.by_name(computation)
    if instruction.opcode != "fusion":
        return instruction, [_through_copies(outer, name) for name in instruction.operands]
    fused, root = module.by_name(instruction.called), module.root(instruction.called)
    operands = []
    for name in root.operands:
        i = _through_copies(fused, name)
        if i.parameter is not None:
            i = _through_copies(outer, instruction.operands[i.parameter])
        operands.append(i)
    return root, operands


def _tuple_index(instruction: Instruction) -> int:
    return int(re.search(r"index=(\d+)", instruction.rest)[1])


def _initial(outer: dict[str, Instruction], loop: Instruction, index: int) -> int | None:
    initial = outer[loop.operands[0]]
    if initial.opcode != "tuple":
        return None
    return _through_copies(outer, initial.operands[index]).constant


def _step(module: Module, body: str, index: int) -> int | None:
    """The constant that the body adds to the counter."""
    root = module.root(body)
    if root.opcode != "tuple":
        return None
    following = _through_copies(module.by_name(body), root.operands[index])
    add, operands = _inner(module, body, following)
    if add.opcode != "add":
        return None
    return next((i.constant for i in operands if i.constant is not None), None)


def _through_copies(scope: dict[str, Instruction], name: str) -> Instruction:
    """The instruction whose value `name` is, beyond copies and changes of layout."""
    instruction = scope[name]
    while instruction.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        instruction = scope[instruction.operands[0]]
    return instruction
