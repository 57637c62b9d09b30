"""The innermost loops of the decode kernel as explicit vector code, and one-instruction helpers.

LLVM's own vectoriser reloads the queries and sums the lanes of each product separately: a third
slower. So the loops are written out with LLVM's portable vector types, which it lowers to AVX-512,
AVX2 or NEON. One thing is not portable: products of pairs of bf16, which turn an entry in half the
steps where the rotary table is bf16 too. Rotated keys are never rounded.

Arrays are flat and float32, or uint16 for bf16 bits; offsets are uint64. ``dims`` and ``lanes``
are tuples whose lengths carry D / 16 and L into the compiled code.
"""

import functools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_spindle.kernels.llvm_vectors import FLOAT, INT32, INT64, Vectors, vector_of

PREFETCH_READ, PREFETCH_ALL_LEVELS, PREFETCH_DATA = 0, 3, 1
INDEX, NUMBER = types.uint64, types.float32
LINE_BYTES = 64
PART = 16  # numbers that the products of an entry with four queries are left in
UNROLL = 8  # dimensions per turn of ``dot_columns``


@intrinsic
def bits_to_float(typing_context, bits):
    """float32 with these bits (uint32)."""

    def emit(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.uint32), emit


@intrinsic
def float_to_bits(typing_context, number):
    """Bits of a float32, as uint32."""

    def emit(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], INT32)

    return types.uint32(types.float32), emit


@intrinsic
def prefetch(typing_context, dims, table, at):
    """Ask for the D elements from ``at`` on without waiting for them."""

    def emit(context, builder, signature, arguments):
        v = Vectors(context, builder)
        line = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [line, INT32, INT32, INT32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [line], kind)
        hints = [INT32(hint) for hint in (PREFETCH_READ, PREFETCH_ALL_LEVELS, PREFETCH_DATA)]
        data = v.data(signature.args[1], arguments[1])
        per_line = 8 * LINE_BYTES // signature.args[1].dtype.bitwidth
        for i in range(0, 16 * len(dims), per_line):
            pointer = builder.bitcast(v.at(data, arguments[2], i), line)
            builder.call(function, [pointer, *hints])
        return context.get_dummy_value()

    return types.void(dims, table, INDEX), emit


@intrinsic
def copy_bits(typing_context, bits, at, out, at_out, count):
    """``out[at_out + i] = bits[at + i]`` for ``count`` uint16."""

    def emit(context, builder, signature, arguments):
        v = Vectors(context, builder)
        source, target = (
            v.at(v.data(signature.args[i], arguments[i]), arguments[i + 1]) for i in (0, 2)
        )
        cgutils.raw_memcpy(builder, target, source, arguments[4], 2)
        return context.get_dummy_value()

    return types.void(bits, INDEX, out, INDEX, INDEX), emit


@intrinsic
def rotate_and_dot(typing_context, dims, lanes, bits, first, second, table, at_first, at_second,
                   queries, out, at_out):  # fmt: skip
    """Rotate two entries, each at its own position, and multiply both with all queries.

    The products of a query with an entry are left as some sums each; ``add_parts`` adds them.

    Args:
        bits: entries of D / 2 pairs (i, i + D / 2), bf16; they start at ``first`` and ``second``.
        table: rows of D / 2 cosines and D / 2 sines, float32; or of D / 2 pairs of a cosine and a
            sine, bf16, on a processor with AVX512_BF16 and for D a multiple of 32: it adds the
            products of such pairs, which are exact. ``at_first``, ``at_second``: the positions'.
        queries: [L * D].
        out: where the sums of both entries go, ``PART`` for each four lanes of an entry.
    """
    head_size, num_lanes = 16 * len(dims), len(lanes)
    half = head_size // 2
    width = 8 if half % 16 else 16
    is_paired = table.dtype == types.uint16

    def emit(context, builder, signature, arguments):
        v = Vectors(context, builder)
        entries, turns, query_data, out_data = (
            v.data(signature.args[i], arguments[i]) for i in (2, 5, 8, 9)
        )

        def rotated(entry, position) -> list:
            low, high = [], []
            for i in range(0, half, width):
                pairs = v.load_pairs(v.at(entries, entry, 2 * i), width)
                if is_paired:
                    turn = v.load_pairs(v.at(turns, position, 2 * i), width)
                    low.append(v.dot_pairs(pairs, v.conjugate(turn)))
                    high.append(v.dot_pairs(pairs, v.swapped(turn)))
                    continue
                x, y = v.first(pairs), v.second(pairs)
                cos, sin = (v.load(v.at(turns, position, i + j), width) for j in (0, half))
                low.append(v.sub(v.mul(x, cos), v.mul(y, sin)))
                high.append(v.add(v.mul(y, cos), v.mul(x, sin)))
            return low + high

        keys = [rotated(arguments[3], arguments[6]), rotated(arguments[4], arguments[7])]
        sums = [[ir.Constant(vector_of(width), [0.0] * width)] * num_lanes for _ in keys]
        for part in range(head_size // width):
            for lane in range(num_lanes):
                where = v.at(query_data, INT64(0), lane * head_size + part * width)
                query = v.load(where, width)
                for key, total in zip(keys, sums, strict=True):
                    total[lane] = v.add(total[lane], v.mul(key[part], query))
        groups = [four for of_key in sums for four in v.sums_of_four(of_key)]
        for i, group in enumerate(groups):
            v.store(group, v.at(out_data, arguments[10], i * PART))
        return context.get_dummy_value()

    return types.void(
        dims, lanes, bits, INDEX, INDEX, table, INDEX, INDEX, queries, out, INDEX
    ), emit


@intrinsic
def add_parts(typing_context, dims, lanes, parts, at, scale, out, at_out):
    """``out[at_out + g] = scale * product with query g``, from what ``rotate_and_dot`` left.

    Writes up to three numbers more. Apart from it, since adding the quarters of a vector is a chain
    of short steps, and from memory there is nothing to move between lanes.
    """
    num_lanes = len(lanes)
    width = 8 if len(dims) % 2 else 16

    def emit(context, builder, signature, arguments):
        v = Vectors(context, builder)
        source, target = (v.data(signature.args[i], arguments[i]) for i in (2, 5))
        scale = v.splat(arguments[4], 4)
        for i, lane in enumerate(range(0, num_lanes, 4)):
            quarters = [
                v.load(v.at(source, arguments[3], i * PART + start), 4)
                for start in range(0, width, 4)
            ]
            total = functools.reduce(v.add, quarters)
            v.store(v.mul(total, scale), v.at(target, arguments[6], lane))
        return context.get_dummy_value()

    return types.void(dims, lanes, parts, INDEX, NUMBER, out, INDEX), emit


@intrinsic
def dot_columns(typing_context, dims, lanes, bits, at, stride, queries, scale, out, at_out):
    """Products of 16 keys, stored transposed, with all queries.

    ``out[at_out + t * L + g] = scale * sum over d of key[d, t] * query[g, d]`` for t in 0 .. 15.

    Args:
        bits: dimension d of the 16 keys starts at ``at + d * stride``.
        queries: [L * D].
        out: where the 16 * L products go.
    """
    head_size, num_lanes = 16 * len(dims), len(lanes)

    def emit(context, builder, signature, arguments):
        v = Vectors(context, builder)
        keys, query_data, out_data = (v.data(signature.args[i], arguments[i]) for i in (2, 5, 7))
        zero = ir.Constant(vector_of(16), [0.0] * 16)
        before = builder.block
        loop, after = (builder.append_basic_block(name) for name in ("dims", "dims.end"))
        builder.branch(loop)
        builder.position_at_end(loop)
        dim, offset = builder.phi(INT64), builder.phi(INT64)
        sums = [builder.phi(vector_of(16)) for _ in range(num_lanes)]
        totals, place = list(sums), offset
        for step in range(UNROLL):
            key = v.load_bf16(builder.gep(keys, [place]), 16)
            place = builder.add(place, arguments[4])
            for lane in range(num_lanes):
                where = v.at(query_data, dim, lane * head_size + step)
                query = v.splat(builder.load(where), 16)
                totals[lane] = v.add(totals[lane], v.mul(key, query))
        next_dim = builder.add(dim, INT64(UNROLL))
        for phi, start, end in zip(
            (dim, offset, *sums),
            (INT64(0), arguments[3], *[zero] * num_lanes),
            (next_dim, place, *totals),
            strict=True,
        ):
            phi.add_incoming(start, before)
            phi.add_incoming(end, loop)
        builder.cbranch(builder.icmp_unsigned("<", next_dim, INT64(head_size)), loop, after)
        builder.position_at_end(after)
        for lane, total in enumerate(totals):
            scaled = v.mul(total, v.splat(arguments[6], 16))
            for token in range(16):
                where = v.at(out_data, arguments[8], token * num_lanes + lane)
                builder.store(builder.extract_element(scaled, INT32(token)), where)
        return context.get_dummy_value()

    arrays = (bits, INDEX, INDEX, queries, NUMBER, out, INDEX)
    return types.void(dims, lanes, *arrays), emit


@intrinsic
def add_rows(typing_context, dims, lanes, rows, bits, at, weights, at_weights, out):
    """``out[g] += sum over r of weights[r, g] * row r``, for R neighbouring rows.

    Args:
        rows: tuple of R integers.
        bits: the rows start at ``at``.
        weights: [R, L] from ``at_weights`` on.
        out: [L * D].
    """
    head_size, num_lanes, num_rows = 16 * len(dims), len(lanes), len(rows)

    def emit(context, builder, signature, arguments):
        v = Vectors(context, builder)
        data, weight_data, out_data = (v.data(signature.args[i], arguments[i]) for i in (3, 5, 7))
        factors = [
            v.splat(builder.load(v.at(weight_data, arguments[6], index)), 16)
            for index in range(num_rows * num_lanes)
        ]
        for dim in range(0, head_size, 16):
            starts = [row * head_size + dim for row in range(num_rows)]
            values = [v.load_bf16(v.at(data, arguments[4], start), 16) for start in starts]
            for lane in range(num_lanes):
                where = v.at(out_data, INT64(0), lane * head_size + dim)
                total = v.load(where, 16)
                for row, value in enumerate(values):
                    total = v.add(total, v.mul(value, factors[row * num_lanes + lane]))
                v.store(total, where)
        return context.get_dummy_value()

    return types.void(dims, lanes, rows, bits, INDEX, weights, INDEX, out), emit


@intrinsic
def add_scaled(typing_context, lanes, weights, at_weights, scale, out, at_out):
    """``out[at_out + g] += scale * weights[at_weights + g]`` for all L lanes."""

    def emit(context, builder, signature, arguments):
        v = Vectors(context, builder)
        source, target = (v.data(signature.args[i], arguments[i]) for i in (1, 4))
        where = v.at(target, arguments[5])
        more = v.load(v.at(source, arguments[2]), len(lanes))
        more = v.mul(more, v.splat(arguments[3], len(lanes)))
        v.store(v.add(v.load(where, len(lanes)), more), where)
        return context.get_dummy_value()

    return types.void(lanes, weights, INDEX, NUMBER, out, INDEX), emit
