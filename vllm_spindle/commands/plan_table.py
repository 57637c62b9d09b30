"""The plan as a table on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

MOST_HEADS_SHOWN = 4
PARTS = {
    "entries": "entry_bytes",
    "indexes": "index_bytes",
    "norms": "norm_bytes",
    "positions": "position_bytes",
    "unused": "padding_bytes",
}


def print_plan(model: str, report: dict[str, Any]) -> None:
    """Print what ``plan.make_report`` found."""
    geometry = report["geometry"]
    console = Console()
    console.print(
        f"{model}: a prompt of {report['prompt_len']} tokens, keep_ratio "
        f"{report['asked_ratio']:g}, blocks of {report['block_size']} tokens",
        highlight=False,
    )
    table = Table(
        caption="tokens: protected (if any) + chosen by score (or merged) + recent; "
        f"bytes: true GQA cache, {geometry['num_layers']} layers x "
        f"{geometry['num_kv_heads']} kv heads x {geometry['head_size']} x 2, {geometry['dtype']}",
    )
    for title in (
        "layers",
        "tokens kept\nby each layer",
        "blocks\nheld",
        "blocks\nfreed",
        "KiB\nheld",
        "KiB\nfull",
        "held /\nfull",
    ):
        table.add_column(title, justify="right")
    is_measured = any(row["head_tokens"] for row in report["bands"])
    if is_measured:
        table.add_column("tokens chosen\nby each kv head")
    for row in report["bands"]:
        table.add_row(
            f"{row['first_layer']}-{row['last_layer']}",
            _tokens(row),
            str(row["held_blocks"]),
            str(row["freed_blocks"]),
            _kib(row["held_bytes"]),
            _kib(row["full_bytes"]),
            f"{row['held_bytes'] / row['full_bytes']:.3f}",
            *([_by_head(row)] if is_measured else []),
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        str(report["held_blocks"]),
        str(report["freed_blocks"]),
        _kib(report["allocated_bytes"]),
        _kib(report["full_bytes"]),
        f"{report['allocated_bytes'] / report['full_bytes']:.3f}",
    )
    console.print(table)
    if any(row["codebook"] for row in report["bands"]):
        console.print(_codebooks(report))
        console.print(_codebook_bytes(report))
    console.print(
        f"asked for {report['asked_ratio']:g} of the prompt's {_kib(report['prompt_bytes'])} KiB, "
        f"holds {_kib(report['allocated_bytes'])} KiB, every padding included: "
        f"{report['true_ratio']:.3f}",
        highlight=False,
    )
    for note in report["notes"]:
        console.print("note: " + note, highlight=False)


def _codebooks(report: dict[str, Any]) -> Table:
    table = Table(
        title="Codebooks",
        caption="entries: capacity per kv head, keys + values; ratios are of the context, true with"
        " padding, the paper's by its eq. 15",
    )
    for title in ("layers", "method", "tokens merged", "entries", "true ratio", "paper's ratio"):
        table.add_column(title, justify="right")
    for layers, book in _books(report):
        table.add_row(
            layers,
            book["method"],
            str(book["merged_tokens"]),
            f"{book['key_entries']} + {book['value_entries']}",
            f"{book['true_ratio']:.3f}",
            f"{book['paper_ratio']:.3f}",
        )
    table.add_section()
    table.add_row(
        "mean", "", "", "", *(f"{_mean_ratio(report, kind):.3f}" for kind in ("true", "paper"))
    )
    return table


def _codebook_bytes(report: dict[str, Any]) -> Table:
    table = Table(title="Where their KiB go", caption="of all layers and kv heads of a band")
    for title in ("layers", *PARTS):
        table.add_column(title, justify="right")
    for layers, book in _books(report):
        table.add_row(layers, *(f"{book[field] / 1024:,.1f}" for field in PARTS.values()))
    return table


def _books(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{row['first_layer']}-{row['last_layer']}", row["codebook"])
        for row in report["bands"]
        if row["codebook"]
    ]


def _mean_ratio(report: dict[str, Any], kind: str) -> float:
    """Of the layers with codebooks."""
    books = [
        (row["last_layer"] - row["first_layer"] + 1, row["codebook"][f"{kind}_ratio"])
        for row in report["bands"]
        if row["codebook"]
    ]
    return sum(count * ratio for count, ratio in books) / sum(count for count, _ in books)


def _tokens(row: dict[str, Any]) -> str:
    parts = [row["region_tokens"], row["recent_tokens"]]
    if row["protected_tokens"]:
        parts.insert(0, row["protected_tokens"])
    return " + ".join(map(str, parts))


def _by_head(row: dict[str, Any]) -> str:
    """A line for each layer; of many heads, the least and the most."""
    lines = []
    for heads in row["head_tokens"] or ():
        few = len(heads) <= MOST_HEADS_SHOWN
        lines.append(" ".join(map(str, heads)) if few else f"{min(heads)} to {max(heads)}")
    return "\n".join(lines)


def _kib(num_bytes: int) -> str:
    return f"{num_bytes / 1024:,.0f}"
