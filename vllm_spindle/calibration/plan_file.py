"""The YAML that calibration writes and serving loads: the plan, under a header that tells why."""

from collections.abc import Sequence
from typing import Any

import yaml

from vllm_spindle.config import SpindleConfig


def plan_text(config: SpindleConfig, report: dict[str, Any], command: str, out: str) -> str:
    """The file's text.

    Args:
        config: the plan.
        report: as the command prints it with ``--json``.
        command: that made it.
        out: path of the file, for the line that says how to serve it.
    """
    fields = config.model_dump(mode="json", exclude={"method"}, exclude_none=True)
    lengths = f"{report['shortest_prompt']} to {report['longest_prompt']}"
    header = [
        f"SpindleKV, calibrated: {config.keep_ratio:.0%} of every prompt's KV cache.",
        "",
        f"Model:    {report['model']}",
        f"Prompts:  {report['source']}, {report['num_prompts']} of {lengths} tokens",
        f"Made by:  {command}",
        "",
        "Measured: the error of each band's attention outputs at the answer's queries, relative,",
        "by method in the same blocks of cache (eviction keeps its place unless clearly beaten).",
        "",
        f"{'layers':<10}{'blocks':>8}{'evict':>9}{'merge':>9}{'both':>9}   chosen",
        *(_band_line(band) for band in report["bands"]),
        "",
        "All bands together: KL of the answer's next-token distributions (nats), and the share of",
        "the answer's tokens that stay the likeliest.",
        "",
        *(_whole_line(whole) for whole in report["wholes"]),
        "",
        "How alike: entries that a whole prompt needs over its tokens, layer by layer, mean over",
        f"kv heads, at theta {config.theta_key:g} (keys) and {config.theta_value:g} (values):",
        "",
        *(
            f"{'  ' + name:<10}" + " ".join(f"{_mean(c[name]):4.2f}" for c in report["covers"])
            for name in ("keys", "values")
        ),
        "",
        f"Run:      vllm serve {report['model']} --block-size {report['block_size']} \\",
        f'              --additional-config \'{{"spindle": "{out}"}}\'',
        'Override: edit a value below; for one request, "vllm_xargs": {"spindle_keep_ratio": 0.6}.',
    ]
    body = yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, width=100)
    return "".join(f"# {line}".rstrip() + "\n" for line in header) + body


def _band_line(band: dict[str, Any]) -> str:
    layers = f"{band['first_layer']}-{band['last_layer']}"
    errors = (band["methods"][name]["answer_error"] for name in ("evict", "merge", "both"))
    figures = "".join(f"{error:9.4f}" for error in errors)
    return (
        f"{layers:<10}{band['methods']['evict']['region_blocks']:8.1f}{figures}   {band['chosen']}"
    )


def _whole_line(whole: dict[str, Any]) -> str:
    return f"{plan_name(whole):<44} KL {whole['divergence']:.4f}   same {whole['agreement']:.3f}"


def plan_name(whole: dict[str, Any]) -> str:
    """The methods, band by band, or that the model's profile says who keeps what."""
    is_measured = whole.get("budget") == "measured"
    return "evict, by the profile" if is_measured else " ".join(whole["band_methods"])


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares)
