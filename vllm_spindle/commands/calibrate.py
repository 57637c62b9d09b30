"""``vllm-spindle calibrate``: evict, merge or both per band, measured on the user's prompts."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_spindle.commands.dials import add_dials, read_dials
from vllm_spindle.commands.geometry import ModelGeometry, read_geometry
from vllm_spindle.config import SpindleConfig, with_profile
from vllm_spindle.core.bands import MAX_DEFAULT_BANDS, default_num_bands, usable_num_bands
from vllm_spindle.policy import SpindlePolicy

DEFAULT_KEEP_RATIO = 0.25
KEY_SHARES = (0.5, 0.35, 0.65)  # of equals the first: the default
BY_PROFILE = {"budget": "auto", "head_shares": None, "num_bands": None, "band_methods": None}
"""Dials of a plan that leaves it all to the profile beside the model."""
CHOSEN_HERE = ("method", "band_methods", "num_bands", "reduce_after")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the prompts, and every dial that is not chosen here."""
    parser.add_argument("model", metavar="MODEL", help="folder or name; its weights are loaded")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='one a line: text, or JSON with "prompt" or "prompt_token_ids"; default: generated '
        "questions, for models/needle only",
    )
    parser.add_argument(
        "--num-prompts", type=int, default=8, metavar="N", help="most prompts to use (default 8)"
    )
    parser.add_argument(
        "--prompt-len", type=int, default=1024, metavar="P", help="of generated prompts, tokens"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=8, metavar="N", help="of each answer (default 8)"
    )
    parser.add_argument("--block-size", type=int, default=32, help="as for vllm serve (default 32)")
    parser.add_argument(
        "--num-bands",
        metavar="N[,N]",
        help="numbers of bands to try; default: the default, and one a layer in small models",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", metavar="FILE", help="write the plan as YAML")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead")
    add_dials(parser, leave_out=CHOSEN_HERE)


def run(args: argparse.Namespace) -> int:
    """Calibrate, print, and write the plan if asked to.

    Raises:
        ValueError: for a bad option, model or prompt.
    """
    for name in ("num_prompts", "prompt_len", "new_tokens", "block_size"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}={getattr(args, name)}: must be at least 1")
    base = read_dials(args)
    if not base.is_on:
        if args.keep_ratio is not None:
            raise ValueError(f"--keep-ratio={args.keep_ratio}: must be below 1, or nothing is lost")
        base = base.model_copy(update={"keep_ratio": DEFAULT_KEEP_RATIO})
    if base.budget == "measured":
        raise ValueError(
            "--budget=measured: kv heads that differ cannot have codebooks to compare with; use "
            "uniform or pyramid here, and 'vllm-spindle profile' for measured budgets"
        )
    if base.gqa == "unfold":
        raise ValueError(
            "--gqa=unfold: is measured beside whatever is chosen, and cannot be served with "
            "codebooks; use union or mean"
        )
    # Measured without: a prefix is kept as it is, whatever is chosen for the rest.
    protected = {"protected_prefix_tokens": base.protected_prefix_tokens}
    base = base.model_copy(update={"protected_prefix_tokens": 0})
    geometry = read_geometry(args.model)

    def make_policy(config: SpindleConfig) -> SpindlePolicy:
        return SpindlePolicy(
            config, geometry.num_layers, args.block_size, geometry.num_queries_per_kv
        )

    profiled = with_profile(base, args.model)
    # A codebook's kv heads are alike, so all methods are compared with heads alike.
    budget = "uniform" if base.budget == "auto" else base.budget
    alike = base.model_copy(update={"budget": budget, "head_shares": None})
    key_shares = KEY_SHARES if args.key_share is None else (base.key_share,)
    band_numbers = _band_numbers(args.num_bands, geometry)
    policies = [make_policy(config) for config in _candidates(alike, band_numbers, key_shares)]
    source, prompts = _read(args)
    _check_lengths(prompts, geometry, args.new_tokens, policies[0])
    config, report = calibrate(
        args.model,
        args.dtype,
        prompts,
        policies,
        args.new_tokens,
        profiled=make_policy(profiled) if profiled.budget == "measured" else None,
    )
    given = {"head_shares": base.head_shares} if config.budget == "auto" else {}
    config = config.model_copy(update=protected | given)
    report = {
        "model": args.model,
        "source": source,
        **report,
        "config": config.model_dump(mode="json"),
    }
    if args.out:
        from vllm_spindle.calibration.plan_file import plan_text

        command = shlex.join(["vllm-spindle", *sys.argv[1:]])
        text = plan_text(config, report, command, args.out)
        Path(args.out).write_text(text, encoding="utf-8")
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        from vllm_spindle.commands.calibrate_table import print_calibration

        print_calibration(report)
        if args.out:
            print(f"written: {args.out}")
    return 0


def calibrate(
    model: str,
    dtype: str,
    prompts: Sequence[Sequence[int]],
    policies: Sequence[SpindlePolicy],
    num_new: int,
    profiled: SpindlePolicy | None = None,
) -> tuple[SpindleConfig, dict[str, Any]]:
    """Run the model and choose.

    Args:
        model: folder or name.
        dtype: of its weights.
        prompts: token ids.
        policies: configurations to try, all with the same window.
        num_new: most tokens of each answer.
        profiled: eviction by the model's profile, which competes with the best of them as a whole;
            of equals it wins: nothing is built at its reductions.

    Returns:
        The plan (``budget`` auto where the profile wins), and what was measured, ready for JSON.
    """
    from vllm_spindle.calibration.capture import capture, load_model
    from vllm_spindle.calibration.choice import choose_plan, choose_whole, measure_bands
    from vllm_spindle.calibration.measure import Bench, mean_covers, mean_unfolded

    loaded = load_model(model, dtype)
    window = policies[0].config.window
    # Observers lie in a prompt's last half.
    captured = [
        capture(loaded, prompt, max(window, len(prompt) // 2 + 1), num_new) for prompt in prompts
    ]
    measured = [measure_bands(Bench(loaded, captured, policy)) for policy in policies]
    best = choose_plan(measured)
    config, wholes = best.plan, [whole.as_report() for whole in best.wholes]
    if profiled is not None:
        evicts = Bench(loaded, captured, profiled).whole(("evict",) * len(profiled.bands))
        wholes.append(evicts.as_report() | {"budget": "measured"})
        if choose_whole([evicts, best.chosen]) is evicts:
            config = profiled.config.model_copy(update=BY_PROFILE)
    lengths = [len(prompt) for prompt in prompts]
    is_grouped = policies[0].num_queries_per_kv > 1
    report = {
        "num_prompts": len(prompts),
        "shortest_prompt": min(lengths),
        "longest_prompt": max(lengths),
        "answer_tokens": sum(len(prompt.answer) for prompt in captured),
        "block_size": policies[0].block_size,
        "config": config.model_dump(mode="json"),
        **best.as_report(),
        "wholes": wholes,
        "covers": mean_covers(policies[0], captured),
        "unfolded": mean_unfolded(policies[0], captured) if is_grouped else [],
        "tried": [
            {
                "num_bands": len(each.bands),
                "key_share": each.config.key_share,
                **each.chosen.as_report(),
            }
            for each in measured
        ],
    }
    return config, report


def _candidates(
    base: SpindleConfig, band_numbers: Sequence[int], key_shares: Sequence[float]
) -> Iterator[SpindleConfig]:
    for num_bands in band_numbers:
        for key_share in key_shares:
            yield base.model_copy(
                update={
                    "num_bands": num_bands,
                    "key_share": key_share,
                    "method": "evict",
                    "band_methods": None,
                }
            )


def _band_numbers(text: str | None, geometry: ModelGeometry) -> list[int]:
    """Numbers of bands to try; one a layer sets layer 0 apart, whose vectors repeat by token."""
    if text is not None:
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = [0]
        if min(numbers) < 1:
            raise ValueError(f"--num-bands={text}: must be numbers, for example 3 or 3,6")
        return numbers
    numbers = [default_num_bands(geometry.num_layers)]
    if 1 < geometry.num_layers <= MAX_DEFAULT_BANDS and geometry.num_layers not in numbers:
        numbers.append(geometry.num_layers)
    return [number for number in numbers if number in usable_num_bands(geometry.num_layers)]


def _read(args: argparse.Namespace) -> tuple[str, list[list[int]]]:
    """Where the prompts are from, and their token ids."""
    from vllm_spindle.calibration.prompts import (
        load_tokenizer,
        needle_prompts,
        read_prompts,
        speaks_needle,
    )

    tokenizer = load_tokenizer(args.model)
    if args.prompts is not None:
        return args.prompts, read_prompts(args.prompts, tokenizer, args.num_prompts)
    if not speaks_needle(args.model, tokenizer):
        raise ValueError(
            f"MODEL={args.model}: give --prompts FILE, some prompts as you serve them (questions "
            "are generated for models/needle only)"
        )
    return "generated needle questions", needle_prompts(
        tokenizer, args.num_prompts, args.prompt_len
    )


def _check_lengths(
    prompts: Sequence[Sequence[int]],
    geometry: ModelGeometry,
    num_new: int,
    policy: SpindlePolicy,
) -> None:
    for i, prompt in enumerate(prompts, 1):
        if geometry.max_len is not None and len(prompt) + num_new > geometry.max_len:
            raise ValueError(
                f"prompt {i}: {len(prompt)} tokens and {num_new} new ones, the model takes at most "
                f"{geometry.max_len}"
            )
        if not any(plan.is_reduced for plan in policy.plan(len(prompt))):
            raise ValueError(
                f"prompt {i}: with {len(prompt)} tokens nothing of it is reduced (min_prompt_len="
                f"{policy.config.min_prompt_len}, window={policy.config.window}); give longer ones"
            )
