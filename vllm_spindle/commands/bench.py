"""``vllm-spindle bench``: measurements that run stock and plugin in one run, one file per kind."""

import argparse

from vllm_spindle.commands import bench_capacity, bench_gpu, bench_kernel

KINDS = {
    "capacity": (bench_capacity, "requests running in the same KV memory, stock against plugin"),
    "gpu": (bench_gpu, "an 8B model's shape with graphs on, stock against plugin, by context"),
    "kernel": (bench_kernel, "decode attention over a codebook band against vLLM's own kernel"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmarks, one sub-command each."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, (module, help_text) in KINDS.items():
        module.add_arguments(kinds.add_parser(name, help=help_text))


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark, print its table, write its JSON."""
    return KINDS[args.kind][0].run(args)
