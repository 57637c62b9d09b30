"""Products of a few queries with many keys, both pairs of bf16, on a processor with AVX512_BF16.

Keys lie transposed, so that a vector holds one pair of dimensions of 16 keys: nothing is added
across lanes. Written with LLVM's vectors as ``numba_vector`` is.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_spindle.kernels.llvm_vectors import INT64, Vectors, vector_of

INDEX = types.uint64
STRIP = 64  # keys at a time: four vectors, which with four queries leave no sum in memory
ROWS = 4


@intrinsic
def dot_strip(typing_context, queries, at_query, num_pairs, keys, at_key, stride, out, at_out,
              out_stride):  # fmt: skip
    """``out[at_out + m * out_stride + t] = sum over d of query m [d] * key t [d]``, float32.

    For ``ROWS`` queries m and ``STRIP`` keys t. Products of bf16 are exact, and added in float32.

    Args:
        queries: int32, two bf16 each; query m's begin at ``at_query + m * num_pairs``.
        num_pairs: D / 2, at least 1.
        keys: int32, two bf16 each; pair i of the keys begins at ``at_key + i * stride``.
        out: float32.
    """

    def emit(context, builder, signature, arguments):
        v = Vectors(context, builder)
        query_data, key_data, out_data = (
            v.data(signature.args[i], arguments[i]) for i in (0, 3, 6)
        )
        _, at_query, num_pairs, _, at_key, stride, _, at_out, out_stride = arguments
        parts = STRIP // 16
        before = builder.block
        loop, after = (builder.append_basic_block(name) for name in ("pairs", "pairs.end"))
        builder.branch(loop)
        builder.position_at_end(loop)
        pair, place = builder.phi(INT64), builder.phi(INT64)
        sums = [builder.phi(vector_of(16)) for _ in range(ROWS * parts)]
        columns = [v.load_pairs(v.at(key_data, place, 16 * part), 16) for part in range(parts)]
        totals = []
        for row in range(ROWS):
            where = builder.add(at_query, builder.mul(num_pairs, INT64(row)))
            query = v.splat(builder.load(v.at(query_data, builder.add(where, pair))), 16)
            for part, column in enumerate(columns):
                totals.append(v.dot_pairs(query, column, sums[row * parts + part]))
        next_pair, next_place = builder.add(pair, INT64(1)), builder.add(place, stride)
        zero = ir.Constant(vector_of(16), [0.0] * 16)
        for phi, start, end in zip(
            (pair, place, *sums),
            (INT64(0), at_key, *[zero] * len(sums)),
            (next_pair, next_place, *totals),
            strict=True,
        ):
            phi.add_incoming(start, before)
            phi.add_incoming(end, loop)
        builder.cbranch(builder.icmp_unsigned("<", next_pair, num_pairs), loop, after)
        builder.position_at_end(after)
        for row in range(ROWS):
            where = builder.add(at_out, builder.mul(out_stride, INT64(row)))
            for part in range(parts):
                v.store(totals[row * parts + part], v.at(out_data, where, 16 * part))
        return context.get_dummy_value()

    return types.void(queries, INDEX, INDEX, keys, INDEX, INDEX, out, INDEX, INDEX), emit
