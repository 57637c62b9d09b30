"""``vllm-spindle plan``: what a keep ratio keeps of one prompt, in tokens, blocks and bytes."""

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

from vllm_spindle.commands.dials import add_dials, read_dials
from vllm_spindle.commands.geometry import ModelGeometry, read_geometry
from vllm_spindle.config import with_profile
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.codebook_bytes import paper_ratio
from vllm_spindle.engine.codebook_shape import codebook_shape
from vllm_spindle.kernels.region_shape import CODE_ELEMENTS, ELEMENT_BYTES
from vllm_spindle.policy import SpindlePolicy


@dataclass(frozen=True)
class CodebookRow:
    """A band's codebooks of one prompt. Bytes are of all the band's layers and kv heads.

    Attributes:
        method: ``merge`` or ``both``.
        merged_tokens: context tokens with a code, in each layer.
        key_entries, value_entries: capacity, per kv head; similarity decides how it is filled.
        entry_bytes: of both tables.
        index_bytes, norm_bytes, position_bytes: of each token: two indexes, two norms, where it
            stood.
        padding_bytes: what is left of the region's blocks.
        true_ratio: the region's bytes over the context's, padding included.
        paper_ratio: the same by the paper's eq. 15, which charges an index and a norm for each
            entry, not for each token, and no positions.
    """

    method: str
    merged_tokens: int
    key_entries: int
    value_entries: int
    entry_bytes: int
    index_bytes: int
    norm_bytes: int
    position_bytes: int
    padding_bytes: int
    true_ratio: float
    paper_ratio: float


@dataclass(frozen=True)
class BandRow:
    """One band's share of one prompt. Bytes are of all the band's layers, true GQA cache.

    Attributes:
        first_layer, last_layer: the band's layers, both included.
        region_tokens: context tokens kept by each layer, chosen by score, or merged; of measured
            budgets, the mean of its kv heads.
        head_tokens: by each kv head of each layer, where budgets are measured. [layers][kv heads].
        recent_tokens: last tokens of the prompt, always kept, natural order: ``recent`` of them,
            and what shares the first one's block.
        held_blocks, freed_blocks: of the band's KV-cache group.
        protected_tokens: of the protected prefix, held whole, its blocks shared by who has it.
        held_bytes, full_bytes: whole blocks, the last one's empty places included.
        codebook: what the region is made of where it is no plain tokens.
    """

    first_layer: int
    last_layer: int
    region_tokens: int
    head_tokens: tuple[tuple[int, ...], ...] | None
    recent_tokens: int
    held_blocks: int
    freed_blocks: int
    protected_tokens: int
    held_bytes: int
    full_bytes: int
    codebook: CodebookRow | None


def codebook_row(
    layers: range, method: str, plan: BandPlan, policy: SpindlePolicy, geometry: ModelGeometry
) -> CodebookRow | None:
    """The codebooks of one band; None where it evicts or keeps the prompt whole."""
    if method == "evict" or not plan.is_reduced:
        return None
    num_heads, head_size = geometry.num_kv_heads, geometry.head_size
    shape = codebook_shape(policy.config, method, plan, policy.block_size, head_size)
    layer_bytes = policy.block_size * geometry.token_bytes
    entries = shape.num_key_entries + shape.num_value_entries
    entry_bytes = len(layers) * num_heads * entries * head_size * ELEMENT_BYTES
    of_tokens = {
        name: len(layers) * num_heads * shape.num_tokens * elements * ELEMENT_BYTES
        for name, elements in CODE_ELEMENTS.items()
    }
    paper = paper_ratio(
        num_tokens=plan.context_blocks * policy.block_size * num_heads,
        num_kept=shape.num_tokens * num_heads,
        num_key_entries=shape.num_key_entries * num_heads,
        num_value_entries=shape.num_value_entries * num_heads,
        head_size=head_size,
    )
    return CodebookRow(
        method=method,
        merged_tokens=shape.num_tokens,
        key_entries=shape.num_key_entries,
        value_entries=shape.num_value_entries,
        entry_bytes=entry_bytes,
        **of_tokens,
        padding_bytes=(
            plan.reduced_blocks * layer_bytes * len(layers) - entry_bytes - sum(of_tokens.values())
        ),
        true_ratio=plan.reduced_blocks / plan.context_blocks,
        paper_ratio=float(paper),
    )


def band_row(
    band: int, plan: BandPlan, policy: SpindlePolicy, geometry: ModelGeometry, prompt_len: int
) -> BandRow:
    """The figures of one band."""
    layers = policy.bands[band]
    block_bytes = policy.block_size * geometry.token_bytes * len(layers)
    copies = policy.num_queries_per_kv if policy.config.gqa == "unfold" else 1
    codebook = codebook_row(layers, policy.method_of_band(band), plan, policy, geometry)
    # Nothing freed: the row is whole, and its region is simply the context.
    region_tokens = plan.reduced_blocks * policy.block_size // (copies if plan.is_reduced else 1)
    return BandRow(
        first_layer=layers.start,
        last_layer=layers.stop - 1,
        region_tokens=region_tokens if codebook is None else codebook.merged_tokens,
        head_tokens=_head_tokens(layers, plan, policy, geometry),
        recent_tokens=prompt_len - plan.tail_block * policy.block_size,
        held_blocks=plan.held_blocks,
        freed_blocks=plan.freed_blocks,
        protected_tokens=plan.prefix_blocks * policy.block_size,
        held_bytes=plan.held_blocks * block_bytes,
        full_bytes=plan.prompt_blocks * block_bytes,
        codebook=codebook,
    )


def _head_tokens(
    layers: range, plan: BandPlan, policy: SpindlePolicy, geometry: ModelGeometry
) -> tuple[tuple[int, ...], ...] | None:
    if policy.profile is None or not plan.is_reduced:
        return None
    heads = range(geometry.num_kv_heads)
    return tuple(
        tuple(count * policy.block_size for count in policy.head_blocks(layer_idx, plan, heads))
        for layer_idx in layers
    )


def make_report(policy: SpindlePolicy, geometry: ModelGeometry, prompt_len: int) -> dict[str, Any]:
    """Everything that ``plan`` prints, ready for JSON.

    ``allocated_bytes`` is what vLLM sets aside: it pads the groups of shorter bands to the
    longest one's layers. ``true_ratio`` is that over the bytes of the prompt's tokens: it counts
    every padding, and so can pass 1 where nothing is evicted.
    """
    plans = policy.plan(prompt_len)
    rows = [band_row(band, plan, policy, geometry, prompt_len) for band, plan in enumerate(plans)]
    longest = max(len(layers) for layers in policy.bands)
    padded_block_bytes = policy.block_size * geometry.token_bytes * longest
    prompt_bytes = prompt_len * geometry.token_bytes * geometry.num_layers
    allocated_bytes = sum(row.held_blocks for row in rows) * padded_block_bytes
    return {
        "geometry": asdict(geometry),
        "config": policy.config.model_dump(),
        "block_size": policy.block_size,
        "prompt_len": prompt_len,
        "bands": [asdict(row) for row in rows],
        "held_blocks": sum(row.held_blocks for row in rows),
        "freed_blocks": sum(row.freed_blocks for row in rows),
        "held_bytes": sum(row.held_bytes for row in rows),
        "allocated_bytes": allocated_bytes,
        "full_bytes": sum(row.full_bytes for row in rows),
        "prompt_bytes": prompt_bytes,
        "asked_ratio": policy.config.keep_ratio,
        "true_ratio": allocated_bytes / prompt_bytes,
        "is_reduced": any(plan.is_reduced for plan in plans),
        "notes": _notes(policy, geometry, plans, prompt_len),
    }


def _notes(
    policy: SpindlePolicy, geometry: ModelGeometry, plans: tuple[BandPlan, ...], prompt_len: int
) -> list[str]:
    config, notes = policy.config, []
    protected = config.protected_prefix_tokens
    if protected == "auto":
        notes.append("a prefix found by 'auto' is not known before the traffic: planned without")
        protected = 0
    elif plans[0].prefix_blocks:
        notes.append(_protected_note(policy, geometry, plans))
    if len({len(layers) for layers in policy.bands}) > 1:
        sizes = ", ".join(str(len(layers)) for layers in policy.bands)
        notes.append(
            f"{policy.num_layers} layers do not divide into {len(policy.bands)} equal bands "
            f"({sizes}): vLLM pads the shorter groups, and the budget is charged for it"
        )
    if not config.is_on:
        notes.append("keep_ratio is 1.0: spindle is off and the cache is stock")
    elif protected and not any(plan.is_reduced for plan in plans):
        notes.append(f"what follows the protected prefix of {protected} tokens is kept whole")
    elif prompt_len < config.min_prompt_len:
        notes.append(f"prompts under min_prompt_len={config.min_prompt_len} tokens are kept whole")
    elif all(plan.tail_block == 0 for plan in plans):
        notes.append(f"the {config.recent} recent tokens reach into the first block: all kept")
    elif all(plan.reduced_blocks == 0 for plan in plans):
        notes.append("recent tokens alone fill the budget: no context token is kept")
    if config.is_on and config.merges and geometry.dtype != "bfloat16":
        notes.append(f"codebook bands are served in bfloat16, not in {geometry.dtype}")
    return notes


def _protected_note(
    policy: SpindlePolicy, geometry: ModelGeometry, plans: tuple[BandPlan, ...]
) -> str:
    num_tokens = plans[0].prefix_blocks * policy.block_size
    num_bytes = num_tokens * geometry.token_bytes * geometry.num_layers
    return (
        f"{num_tokens} tokens of protected prefix ({num_bytes // 1024:,} KiB) are held whole on "
        "top of keep_ratio, which speaks of the rest; requests that share the prefix share them"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the prompt, the block size and every dial."""
    parser.add_argument("model", metavar="MODEL", help="folder or name; only config.json is read")
    parser.add_argument("--prompt-len", type=int, required=True, metavar="P", help="prompt tokens")
    parser.add_argument("--block-size", type=int, default=32, help="as for vllm serve (default 32)")
    parser.add_argument("--dtype", help="of the cache; default: the model's")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead")
    add_dials(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ValueError: for a bad option or model.
    """
    for flag, value in (("--prompt-len", args.prompt_len), ("--block-size", args.block_size)):
        if value < 1:
            raise ValueError(f"{flag}={value}: must be at least 1")
    config = with_profile(read_dials(args), args.model)
    geometry = read_geometry(args.model, args.dtype)
    if geometry.max_len is not None and args.prompt_len > geometry.max_len:
        raise ValueError(
            f"--prompt-len={args.prompt_len}: the model takes at most {geometry.max_len} tokens"
        )
    policy = SpindlePolicy(
        config, geometry.num_layers, args.block_size, geometry.num_queries_per_kv
    )
    report = make_report(policy, geometry, args.prompt_len)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        from vllm_spindle.commands.plan_table import print_plan

        print_plan(args.model, report)
    return 0
