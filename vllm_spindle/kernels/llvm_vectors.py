"""Short vectors of float32 in LLVM: what numba's intrinsics are written with.

``Values`` are numbers of the code that is being emitted; offsets are uint64, counted in elements.
"""

from collections.abc import Sequence

from llvmlite import ir
from numba.core import cgutils

Value = ir.Value
FLOAT, INT32, INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def vector_of(width: int) -> ir.VectorType:
    """Type of ``width`` float32."""
    return ir.VectorType(FLOAT, width)


def _all(kind: ir.VectorType, number: int) -> ir.Constant:
    return ir.Constant(kind, [number] * kind.count)


class _BFloat(ir.Type):
    """A type that llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


class Vectors:
    """Emits vector instructions through one builder."""

    def __init__(self, context, builder) -> None:
        self._context = context
        self.builder = builder

    def data(self, kind, array: Value) -> Value:
        """Pointer to a numba array's first element; take it once, each time costs code."""
        return self._context.make_array(kind)(self._context, self.builder, array).data

    def at(self, data: Value, offset: Value, plus: int = 0) -> Value:
        """Pointer to element ``offset + plus``."""
        return self.builder.gep(data, [self.builder.add(offset, INT64(plus))])

    def load(self, pointer: Value, width: int) -> Value:
        """``width`` float32."""
        pointer = self.builder.bitcast(pointer, vector_of(width).as_pointer())
        return self.builder.load(pointer, align=4)

    def store(self, vector: Value, pointer: Value) -> None:
        """As many float32 as the vector has."""
        pointer = self.builder.bitcast(pointer, vector.type.as_pointer())
        self.builder.store(vector, pointer, align=4)

    def load_bf16(self, pointer: Value, width: int) -> Value:
        """``width`` bf16 as float32: a bf16 is the upper half of a float32."""
        short, wide = ir.VectorType(ir.IntType(16), width), ir.VectorType(INT32, width)
        bits = self.builder.load(self.builder.bitcast(pointer, short.as_pointer()), align=2)
        return self._as_floats(self.builder.shl(self.builder.zext(bits, wide), _all(wide, 16)))

    def load_pairs(self, pointer: Value, width: int) -> Value:
        """``width`` pairs of bf16, each pair one int32, the first of it in the lower half."""
        pointer = self.builder.bitcast(pointer, ir.VectorType(INT32, width).as_pointer())
        return self.builder.load(pointer, align=2)

    def first(self, pairs: Value) -> Value:
        """Of each pair, as float32."""
        return self._as_floats(self.builder.shl(pairs, _all(pairs.type, 16)))

    def second(self, pairs: Value) -> Value:
        """Of each pair, as float32."""
        return self._as_floats(self.builder.and_(pairs, _all(pairs.type, 0xFFFF0000)))

    def swapped(self, pairs: Value) -> Value:
        """(y, x) for (x, y)."""
        kind = ir.FunctionType(pairs.type, [pairs.type] * 3)
        function = self._declared(f"llvm.fshl.v{pairs.type.count}i32", kind)
        return self.builder.call(function, [pairs, pairs, _all(pairs.type, 16)])

    def conjugate(self, pairs: Value) -> Value:
        """(x, -y) for (x, y)."""
        return self.builder.xor(pairs, _all(pairs.type, 0x80000000))

    def dot_pairs(self, left: Value, right: Value, total: Value | None = None) -> Value:
        """``total + x * u + y * v`` for (x, y) and (u, v), as float32; without a total, of 0.

        Of 16 pairs, with AVX512_BF16.
        """
        pairs = ir.VectorType(_BFloat(), 32)
        kind = ir.FunctionType(vector_of(16), [vector_of(16), pairs, pairs])
        function = self._declared("llvm.x86.avx512bf16.dpbf16ps.512", kind)
        both = [self.builder.bitcast(vector, pairs) for vector in (left, right)]
        total = ir.Constant(vector_of(16), [0.0] * 16) if total is None else total
        return self.builder.call(function, [total, *both])

    def _as_floats(self, vector: Value) -> Value:
        return self.builder.bitcast(vector, vector_of(vector.type.count))

    def _declared(self, name: str, kind: ir.FunctionType) -> Value:
        return cgutils.get_or_insert_function(self.builder.module, kind, name)

    # LLVM may fuse a product and a sum where the machine can. Not "fast", which forbids NaN: lanes
    # of tokens that do not exist may hold any bits, and are thrown away.
    def mul(self, left: Value, right: Value) -> Value:
        """left * right."""
        return self.builder.fmul(left, right, flags=("contract",))

    def add(self, left: Value, right: Value) -> Value:
        """left + right."""
        return self.builder.fadd(left, right, flags=("contract",))

    def sub(self, left: Value, right: Value) -> Value:
        """left - right."""
        return self.builder.fsub(left, right, flags=("contract",))

    def splat(self, number: Value, width: int) -> Value:
        """The number in every lane."""
        one = ir.Constant(ir.VectorType(number.type, 1), ir.Undefined)
        one = self.builder.insert_element(one, number, INT32(0))
        return self.shuffle(one, one, [0] * width)

    def shuffle(self, left: Value, right: Value, lanes: Sequence[int]) -> Value:
        """Lanes of both vectors, numbered through."""
        mask = ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(left, right, mask)

    def sums_of_four(self, vectors: Sequence[Value]) -> list[Value]:
        """Per four vectors one, whose lanes i, i + 4, ... add up to vector i's sum; zeros behind.

        A transpose while adding: quarters of four lanes stay by themselves, as moving lanes within
        them is what a processor does best.
        """
        zero = ir.Constant(vectors[0].type, [0.0] * vectors[0].type.count)
        found = []
        for start in range(0, len(vectors), 4):
            four = vectors[start : start + 4]
            a, b, c, d = [*four, *[zero] * (4 - len(four))]
            pairs = self._add_interleaved(a, c), self._add_interleaved(b, d)
            found.append(self._add_interleaved(*pairs))
        return found

    def _add_interleaved(self, a: Value, b: Value) -> Value:
        """[a0 + a2, b0 + b2, a1 + a3, b1 + b3] of each quarter."""
        count = a.type.count
        low, high = (
            [quarter + lane + of * count for quarter in range(0, count, 4)
             for lane in half for of in range(2)]
            for half in ((0, 1), (2, 3))
        )  # fmt: skip
        return self.add(self.shuffle(a, b, low), self.shuffle(a, b, high))
