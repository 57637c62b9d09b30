"""Run cells: only what their files lack, in this process or in several."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from vllm_spindle.evaluation.asking import Asker
from vllm_spindle.evaluation.cells import (
    CELLS,
    Cell,
    Line,
    append_line,
    cut_broken_line,
    read_lines,
)
from vllm_spindle.evaluation.protocols import make_sample, rights
from vllm_spindle.evaluation.tasks import make_item

OnSamples = Callable[[Cell, int], None]  # cell, samples more that are done
ORPHAN_POLL_SECONDS = 0.5


def run_cell(
    asker: Asker,
    cell: Cell,
    folder: Path,
    num_samples: int,
    *,
    num_parallel: int = 1,
    on_samples: OnSamples = lambda cell, count: None,
) -> None:
    """Ask what the cell's file lacks of ``num_samples``, and write a line for each."""
    path = folder / CELLS / cell.file_name
    cut_broken_line(path)
    done = {line.index for line in read_lines(path)}
    on_samples(cell, len([index for index in done if index < num_samples]))

    def ask(index: int) -> Line:
        item = make_item(
            cell.task,
            asker.dialect,
            prompt_tokens=cell.prompt_tokens,
            seed=cell.seed,
            index=index,
        )
        sample = make_sample(cell.protocol, asker.dialect, item, cell.seed)
        reply = asker.ask(cell, sample)
        right = rights(sample, reply.said)
        return Line(
            index, right, sample.depth, reply.true_bytes, reply.full_bytes, list(reply.said)
        )

    left = [index for index in range(num_samples) if index not in done]
    with ThreadPoolExecutor(num_parallel) as pool:
        lines = pool.map(ask, left) if num_parallel > 1 else map(ask, left)
        for line in lines:
            append_line(path, line)
            on_samples(cell, 1)


def run_cells(
    asker: Asker,
    cells: Sequence[Cell],
    folder: Path,
    num_samples: int,
    *,
    num_parallel: int,
    on_samples: OnSamples,
) -> None:
    """All of them, one after the other; a server is asked ``num_parallel`` samples at a time."""
    for cell in cells:
        run_cell(
            asker,
            cell,
            folder,
            num_samples,
            num_parallel=num_parallel,
            on_samples=on_samples,
        )


def run_cells_in_workers(
    make_asker: Callable[[], Asker],
    cells: Sequence[Cell],
    folder: Path,
    num_samples: int,
    *,
    num_workers: int,
    on_samples: OnSamples,
) -> None:
    """The same in several processes, each with an asker of its own. ``make_asker`` is pickled."""
    with ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=_start, initargs=(make_asker,)
    ) as pool:
        futures = {pool.submit(_run, cell, folder, num_samples): cell for cell in cells}
        try:
            for future in as_completed(futures):
                future.result()
                on_samples(futures[future], num_samples)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker: list[Asker] = []  # of this process, if it is a worker


def _start(make_asker: Callable[[], Asker]) -> None:
    # A worker whose parent was killed would go on, beside the run that takes its place.
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _worker.append(make_asker())


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHAN_POLL_SECONDS)
    os._exit(1)


def _run(cell: Cell, folder: Path, num_samples: int) -> None:
    run_cell(_worker[0], cell, folder, num_samples)
