"""One side of the demo: start a server, ask, measure, stop it."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_spindle.evaluation.needle import NeedleQuestion, is_exact
from vllm_spindle.serving.load import ask_all
from vllm_spindle.serving.server import VllmServer

STATUS_LINE_CHARS = 90
HELD = "vllm:spindle_held_blocks_total"
PROMPT_TOKENS = "vllm:prompt_tokens_total"


@dataclass(frozen=True)
class DemoSide:
    """What to start."""

    name: str
    model: str
    flags: list[str]
    log_path: Path


@dataclass(frozen=True)
class SideResult:
    """What one server did; ``serving.load.LoadResult`` and ``_held_blocks`` say how."""

    num_questions: int
    num_exact: int
    num_blocks: int
    held_blocks: int
    peak_running: int
    peak_used_ratio: float
    preemptions: int
    output_tokens: int
    seconds: float
    start_seconds: float


def run_side(
    side: DemoSide, questions: list[NeedleQuestion], output_len: int, block_size: int
) -> SideResult:
    """Start the server, measure one request alone, then all questions at once.

    Raises:
        RuntimeError: if the server fails, with the end of its log.
    """
    console = Console()
    start = time.monotonic()
    with console.status(f"{side.name}: vllm serve is starting") as status:

        def on_wait(seconds: float, line: str) -> None:
            # The log's own colours and brackets are no markup of ours.
            said = line[-STATUS_LINE_CHARS:].replace("[", "(").replace("\x1b", "")
            status.update(f"{side.name}: vllm serve is starting ({seconds:.0f} s) {said}")

        server = VllmServer(side.model, side.flags, side.log_path, on_wait=on_wait)
        server.__enter__()
    start_seconds = time.monotonic() - start
    try:
        console.print(f"{side.name}: ready after {start_seconds:.0f} s", highlight=False)
        prompts = [question.prompt for question in questions]
        # The first request also warms the server up.
        held = _held_blocks(server, prompts[0], block_size)
        with _progress(console) as progress:
            bar = progress.add_task(f"{side.name}: questions", total=len(prompts))
            load = ask_all(
                server,
                prompts,
                output_len=output_len,
                on_answer=lambda done: progress.update(bar, completed=done),
            )
        num_blocks = server.metrics().num_blocks
    finally:
        server.stop()
    return SideResult(
        num_questions=len(questions),
        num_exact=sum(map(is_exact, load.texts, questions)),
        num_blocks=num_blocks,
        held_blocks=held,
        peak_running=load.peak_running,
        peak_used_ratio=load.peak_used_ratio,
        preemptions=load.preemptions,
        output_tokens=load.output_tokens,
        seconds=load.seconds,
        start_seconds=start_seconds,
    )


def _held_blocks(server: VllmServer, prompt: str, block_size: int) -> int:
    """Blocks that one request's prompt holds after prefill.

    The plugin counts them in the request's rows. Stock vLLM has no such count; it frees nothing
    before the end, so it holds what the prompt fills.
    """
    before = server.metrics()
    ask_all(server, [prompt], output_len=4)
    after = server.metrics()
    held = after.by_label(HELD, "band")
    if held:
        return round(sum(held.values()) - sum(before.by_label(HELD, "band").values()))
    num_tokens = round(after.total(PROMPT_TOKENS) - before.total(PROMPT_TOKENS))
    return -(-num_tokens // block_size)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
