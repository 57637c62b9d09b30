"""The GPU kernels, run by Triton's interpreter, against attention over codebooks in torch.

The interpreter is chosen when triton is imported, for the whole process: a child it is, one for
all cases. Shapes: K kv heads, G query heads per kv head, N merged tokens, T dense tokens, Q query
tokens, D head size. Cache, spare blocks and unused slots hold NaN: whoever reads one shows it.
"""

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_child import in_child
from oracles_codebook import cos_sin_table
from vllm_spindle.core.codebook import Book, Codebook, reconstruct
from vllm_spindle.core.cover import UNCOVERED
from vllm_spindle.core.reference import attend_codebook
from vllm_spindle.core.rotary import rotate_keys
from vllm_spindle.kernels.region import pack_region, unpack_region
from vllm_spindle.kernels.region_shape import RegionShape

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

NUM_POSITIONS = 300
MAX_COLUMNS = 24
TOLERANCE = 1e-5  # the interpreter computes in float32 throughout


@dataclass(frozen=True)
class Case:
    """One launch. rows: merged tokens, dense tokens and query tokens of each row."""

    rows: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype = torch.bfloat16
    head_size: int = 32
    group: int = 4
    num_kv_heads: int = 2
    block_size: int = 16
    num_splits: int = 1
    tile_tokens: int = 32
    slots_outermost: bool = False
    prefix_blocks: int = 0  # of the dense tokens, in columns before the region
    empty_slots: int = 0  # of the first kv head; twice as many of the second


CASES = {
    "one row": Case(((100, 20, 1),)),
    "region only": Case(((70, 0, 1),)),
    "tail only": Case(((0, 45, 1),)),
    "rows of all kinds": Case(((100, 20, 1), (0, 33, 2), (37, 1, 1), (65, 18, 3)), num_splits=2),
    "several query tokens": Case(((40, 50, 11),), group=3, num_splits=2),
    "more queries than tail": Case(((40, 0, 3),), num_splits=2),
    "five splits": Case(((150, 70, 1), (5, 3, 1)), num_splits=5, tile_tokens=16),
    "float16": Case(((100, 20, 2),), dtype=torch.float16, num_splits=2),
    "slots outermost": Case(((90, 20, 1),), slots_outermost=True),
    "empty slots": Case(((100, 20, 1), (40, 5, 2)), empty_slots=20, num_splits=2),
    "prefix": Case(((100, 52, 1), (40, 33, 1), (0, 50, 2)), prefix_blocks=2, num_splits=2),
    "blocks of 32": Case(((90, 40, 1),), block_size=32, head_size=64),
    "head size 64, one head": Case(((90, 20, 1),), head_size=64, group=1, num_kv_heads=1),
    "head size 96, group of 7": Case(((60, 20, 2),), head_size=96, group=7, num_splits=2),
    "head size 128, group of 20": Case(((60, 20, 2),), head_size=128, group=20, num_kv_heads=1),
    "head size 256": Case(((40, 20, 1),), head_size=256, dtype=torch.float16),
}


@dataclass
class Batch:
    """A case's tensors, and what the kernel must give."""

    query: Tensor
    kv_cache: Tensor
    table: Tensor
    cos_sin: Tensor
    scale: float
    starts: list[list[int]] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    lse: list[Tensor] = field(default_factory=list)


def make_batch(case: Case) -> Batch:
    """Regions and tails in scattered blocks, and the oracle's outputs from what they hold."""
    torch.manual_seed(0)
    num_queries = sum(row[2] for row in case.rows)
    heads, d = case.num_kv_heads, case.head_size
    num_blocks = MAX_COLUMNS * len(case.rows) + 1
    if case.slots_outermost:
        kv_cache = torch.full((num_blocks, case.block_size, heads, 2 * d), torch.nan).to(case.dtype)
        kv_cache = kv_cache.transpose(1, 2)
    else:
        kv_cache = torch.full((num_blocks, heads, case.block_size, 2 * d), torch.nan).to(case.dtype)
    # Queries as a slice of the model's fused projection; wide, so that peaks move between tiles.
    projection = 2 * torch.randn(num_queries, heads * case.group + 2 * heads, d)
    batch = Batch(
        query=projection.to(case.dtype)[:, : heads * case.group],
        kv_cache=kv_cache,
        table=1 + torch.randperm(num_blocks - 1).view(len(case.rows), MAX_COLUMNS),
        cos_sin=cos_sin_table(NUM_POSITIONS, d),
        scale=d**-0.5,
    )
    first_query = 0
    for row, (num_merged, num_tail, row_queries) in enumerate(case.rows):
        queries = batch.query[first_query : first_query + row_queries].float()
        fill_row(batch, case, row, num_merged, num_tail, queries)
        first_query += row_queries
    return batch


def fill_row(
    batch: Batch, case: Case, row: int, num_merged: int, num_tail: int, queries: Tensor
) -> None:
    """One row's region and, after a gap, its tail, from columns of its own on."""
    region_first, tail_first = 2 + row, MAX_COLUMNS - 5 - row
    heads, d = case.num_kv_heads, case.head_size
    keys, values = torch.randn(2, heads, num_tail, d).to(case.dtype)
    slots = torch.arange(num_tail)
    columns = slots // case.block_size
    columns += torch.where(columns < case.prefix_blocks, 0, tail_first - case.prefix_blocks)
    blocks = batch.table[row, columns]
    batch.kv_cache[blocks, :, slots % case.block_size, :d] = keys.transpose(0, 1)
    batch.kv_cache[blocks, :, slots % case.block_size, d:] = values.transpose(0, 1)
    batch.starts.append([region_first, tail_first])
    batch.shapes.append([0, 0, 0])
    key_codebooks = value_codebooks = [
        Codebook(torch.zeros(1, d), torch.zeros(0, dtype=torch.int64), *torch.zeros(2, 0))
        for _ in range(heads)
    ]
    positions = [torch.zeros(0, dtype=torch.int64)] * heads
    if num_merged:
        shape = RegionShape(
            num_merged // 3 + 1, num_merged // 4 + 2, num_merged, case.block_size, d
        )
        counts = [num_merged - case.empty_slots * (head + 1) for head in range(heads)]
        books = [[similar(count, d, most) for count in counts]
                 for most in (shape.num_key_entries, shape.num_value_entries)]  # fmt: skip
        positions = [torch.randperm(NUM_POSITIONS)[:count] for count in counts]
        region = batch.table[row, region_first : region_first + shape.num_blocks]
        assert shape.num_blocks <= tail_first - region_first
        pack_region(batch.kv_cache, region, shape, *books, positions)
        batch.shapes[-1] = [shape.num_key_entries, shape.num_value_entries, num_merged]
        # Entries are bf16, whatever the cache's own type.
        content = unpack_region(batch.kv_cache.view(torch.bfloat16), region, shape)
        key_codebooks = stored(content.key_entries, content.key_codes, content.key_norms, counts)
        value_codebooks = stored(
            content.value_entries, content.value_codes, content.value_norms, counts
        )
        positions = [
            own[:count].long() for own, count in zip(content.positions, counts, strict=True)
        ]
    else:
        batch.starts[-1][0] = 0
    tail = (keys.transpose(0, 1).float(), values.transpose(0, 1).float())
    oracle = (key_codebooks, positions, tail[0], batch.cos_sin)
    batch.lse.append(log_sum_exp(queries, *oracle, scale=batch.scale))
    batch.outputs.append(
        attend_codebook(
            queries, key_codebooks, value_codebooks, positions, *tail, batch.cos_sin,
            scale=batch.scale,
        )
    )  # fmt: skip


def similar(num_vectors: int, head_size: int, capacity: int) -> Codebook:
    """A codebook of vectors around a few directions, with lengths of their own."""
    centres = torch.randn(capacity // 2 + 1, head_size)
    vectors = centres[torch.randint(len(centres), (num_vectors,))]
    vectors = vectors + 0.2 * torch.randn(num_vectors, head_size)
    book = Book(vectors * (0.5 + torch.rand(num_vectors, 1)), 0.95, capacity)
    book.add(torch.arange(num_vectors))
    left = (book.codes == UNCOVERED).nonzero().squeeze(-1)
    if len(left):
        book.codes[left] = (book.directions[left] @ book.entries.T).argmax(dim=-1)
    return book.codebook(torch.arange(num_vectors))


def stored(entries: Tensor, codes: Tensor, norms: Tensor, counts: list[int]) -> list[Codebook]:
    """Codebooks as a region remembers them, one per kv head."""
    return [
        Codebook(entries[head].float(), codes[head, :n], norms[head, :n].float(), norms[head, :n])
        for head, n in enumerate(counts)
    ]


def log_sum_exp(
    queries: Tensor,
    key_codebooks: list[Codebook],
    positions: list[Tensor],
    tail_keys: Tensor,
    cos_sin: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Of each head's and query's scaled products. [K * G, Q]."""
    num_queries, num_heads, _ = queries.shape
    num_tail, num_kv_heads, _ = tail_keys.shape
    lse = torch.empty(num_heads, num_queries)
    for head in range(num_heads):
        own = head // (num_heads // num_kv_heads)
        merged = rotate_keys(reconstruct(key_codebooks[own]), positions[own], cos_sin)
        for row in range(num_queries):
            seen = max(0, num_tail - num_queries + row + 1)
            keys = torch.cat([merged, tail_keys[:seen, own]])
            lse[head, row] = (keys @ queries[row, head] * scale).logsumexp(dim=0)
    return lse


def launch(case: Case, batch: Batch, output: Tensor, **changes: Any) -> Tensor:
    """Run the kernels over a batch, where its tensors are; the log-sum-exp."""
    from vllm_spindle.kernels.decode_rows import DeviceRows
    from vllm_spindle.kernels.device_decode import DeviceRegionDecoder

    query_lens = [0, *(row[2] for row in case.rows)]
    arrays = {
        "block_table": batch.table,
        "starts": torch.tensor(batch.starts),
        "shapes": torch.tensor(batch.shapes),
        "tail_lens": torch.tensor(
            [row[1] - case.prefix_blocks * case.block_size for row in case.rows]
        ),
        "prefix_blocks": torch.full((len(case.rows),), case.prefix_blocks),
        "query_start": torch.tensor(query_lens).cumsum(0),
    }
    device = output.device
    arrays = {name: array.int().to(device) for name, array in {**arrays, **changes}.items()}
    rows = DeviceRows(**arrays, max_query_len=max(query_lens))
    cos_sin, query = batch.cos_sin.to(device), batch.query.to(device)
    decoder = DeviceRegionDecoder(cos_sin, batch.scale, tile_tokens=case.tile_tokens)
    return decoder(query, output, batch.kv_cache.to(device), rows, num_splits=case.num_splits)


def case_errors(device: str = "cpu") -> dict[str, list[float]]:
    """Largest errors of each case's output, relative to the largest output, and log-sum-exp."""
    errors = {}
    for name, case in CASES.items():
        batch = make_batch(case)
        output = torch.full(batch.query.shape, torch.nan, device=device)
        lse = launch(case, batch, output).cpu()
        expected = torch.cat(batch.outputs)
        output_error = (output.cpu() - expected).abs().max() / expected.abs().max()
        errors[name] = [float(output_error), float((lse - torch.cat(batch.lse, dim=1)).abs().max())]
    return errors


def rounding_errors() -> list[float]:
    """Largest distances to the expected output, in units of the output's last place."""
    errors = []
    for dtype, case in ((torch.bfloat16, CASES["one row"]), (torch.float16, CASES["float16"])):
        batch = make_batch(case)
        output = torch.full(batch.query.shape, torch.nan, dtype=dtype)
        launch(case, batch, output)
        expected = torch.cat(batch.outputs)
        last_place = torch.exp2(expected.abs().log2().floor()) * torch.finfo(dtype).eps
        errors.append(float(((output.float() - expected).abs() / last_place).max()))
    return errors


def parts_error() -> float:
    """Region and tail apart, added up by their log-sum-exp, against both at once."""
    case = CASES["one row"]
    batch = make_batch(case)
    outputs, lses = [], []
    for only in ({"tail_lens": torch.zeros(1)}, {"shapes": torch.zeros(1, 3)}):
        outputs.append(torch.full(batch.query.shape, torch.nan))
        lses.append(launch(case, batch, outputs[-1], **only))
    shares = torch.softmax(torch.stack(lses), dim=0)  # [2, K * G, Q]
    merged = (torch.stack(outputs) * shares.transpose(1, 2).unsqueeze(-1)).sum(dim=0)
    return float((merged - torch.cat(batch.outputs)).abs().max())


def untouched_and_empty() -> list[bool]:
    """What padding leaves alone and what queries get that see nothing, for 1 and 3 splits."""
    found = []
    for num_splits in (1, 3):
        case = replace(CASES["rows of all kinds"], num_splits=num_splits)
        batch = make_batch(case)
        # The second row sees nothing, the last is padding, and so are its three tokens.
        tail_lens, query_start = torch.tensor([20, 0, 1, 18]), torch.tensor([0, 1, 3, 4, 4])
        output = torch.full(batch.query.shape, 7.0)
        lse = launch(case, batch, output, tail_lens=tail_lens, query_start=query_start)
        found.append(bool((output[4:] == 7).all()))
        found.append(bool((output[1:3] == 0).all() and (lse[:, 1:3] == -torch.inf).all()))
        found.append(torch.allclose(output[3:4], batch.outputs[2], rtol=0, atol=TOLERANCE))
    return found


def left_alone() -> list[bool]:
    """What rows that are not the kernel's keep, and that the others get theirs; 1 and 3 splits."""
    found = []
    for num_splits in (1, 3):
        case = replace(CASES["rows of all kinds"], num_splits=num_splits)
        batch = make_batch(case)
        shapes = torch.tensor(batch.shapes)
        shapes[[0, 2], 2] = -1
        output = torch.full(batch.query.shape, 7.0)
        launch(case, batch, output, shapes=shapes)
        found.append(bool((output[[0, 3]] == 7).all()))
        mine = (output[1:3], output[4:])
        expected = (batch.outputs[1], batch.outputs[3])
        found += map(lambda a, b: torch.allclose(a, b, rtol=0, atol=TOLERANCE), mine, expected)
    return found


def refusals() -> list[str]:
    """Messages about queries, outputs, caches and tables that do not fit."""
    case = CASES["one row"]
    batch = make_batch(case)
    good = torch.empty(batch.query.shape)
    every_second = torch.empty(*batch.query.shape[:2], 64)[..., ::2]
    attempts = [
        (replace(batch, query=batch.query.half()), good),
        (replace(batch, cos_sin=cos_sin_table(4, 64)), good),
        (replace(batch, cos_sin=cos_sin_table(4, 24)), good),
        (batch, good[:, 1:]),
        (batch, every_second),
    ]
    messages = []
    for attempt, output in attempts:
        with pytest.raises(ValueError) as refusal:
            launch(case, attempt, output)
        messages.append(str(refusal.value))
    return messages


def interpret() -> dict[str, Any]:
    """Everything that the tests look at, in the child."""
    torch.set_num_threads(1)
    asked = (case_errors, rounding_errors, parts_error, untouched_and_empty, left_alone, refusals)
    return {function.__name__: function() for function in asked}


def compile_for_hopper() -> list[int]:
    """Bytes of machine code of both kernels, from the compiler itself, in the child."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_spindle.kernels.triton_decode import decode_split, merge_splits

    constants = {
        decode_split: {"GROUP": 4, "N": 16, "D": 48, "HALF_PAD": 32, "HEAD_PAD": 64,
                       "NUM_QUERY_ROWS": 16, "TILE": 16},
        merge_splits: {"D": 48, "HEAD_PAD": 64},
    }  # fmt: skip
    types = {
        **dict.fromkeys(("lse_ptr", "split_output_ptr", "split_lse_ptr"), "*fp32"),
        **dict.fromkeys(("query_ptr", "output_ptr", "cos_sin_ptr"), "*bf16"),
        "cache_ptr": "*i16",
        "scale_log2": "fp32",
    }
    sizes = []
    for kernel, constant in constants.items():
        signature = {name: "*i32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
        signature |= {name: kind for name, kind in types.items() if name in signature}
        signature |= dict.fromkeys(constant, "constexpr")
        source = ASTSource(kernel, signature, constant)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        sizes.append(len(compiled.asm["cubin"]))
    return sizes


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What the interpreter found."""
    return in_child(interpret, env={"TRITON_INTERPRET": "1"}, imports_vllm_itself=True)


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_attend_codebook(interpreted: dict[str, Any], name: str) -> None:
    """Output and log-sum-exp are the oracle's over what the blocks hold, up to float32 error."""
    output_error, lse_error = interpreted["case_errors"][name]
    assert output_error < TOLERANCE and lse_error < TOLERANCE


def test_half_precision_outputs_are_rounded_once(interpreted: dict[str, Any]) -> None:
    """float16 outputs are within half a unit in the last place; bf16 within one."""
    bfloat16, float16 = interpreted["rounding_errors"]
    assert bfloat16 < 1.01 and float16 < 0.51  # the interpreter cuts bf16 off


def test_region_and_tail_apart_add_up_by_log_sum_exp(interpreted: dict[str, Any]) -> None:
    """What another kernel computed over the tail can be added to the region's output."""
    assert interpreted["parts_error"] < TOLERANCE


def test_padding_is_left_alone_and_nothing_seen_is_zero(interpreted: dict[str, Any]) -> None:
    """Tokens after the last row keep their output; no tokens give 0 and -inf, never NaN."""
    assert interpreted["untouched_and_empty"] == [True] * 6


def test_rows_of_another_kernel_are_left_alone(interpreted: dict[str, Any]) -> None:
    """In a batch with its own, split or not."""
    assert interpreted["left_alone"] == [True] * 6


def test_what_does_not_fit_is_refused_by_value(interpreted: dict[str, Any]) -> None:
    """Each refusal names what it got."""
    named = ["torch.float16", "got 64 and 64", "got 24", "(1, 7, 32)", "contiguous"]
    for part, message in zip(named, interpreted["refusals"], strict=True):
        assert part in message


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The compiler takes what the interpreter took, a padded head size included."""
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.skip("triton was built without its CUDA backend")
    sizes = in_child(compile_for_hopper, env={"TRITON_CACHE_DIR": str(tmp_path)})
    assert len(sizes) == 2 and min(sizes) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_on_the_device_equals_attend_codebook() -> None:
    """The same cases on the GPU, within tf32's rounding of products."""
    errors = in_child(case_errors, device="cuda")
    assert max(max(pair) for pair in errors.values()) < 1e-2
