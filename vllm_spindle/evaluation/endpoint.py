"""The same samples to a served model, over HTTP.

Which method reduces is what the server was started with; the share goes with each request.
"""

from typing import Any

import httpx

from vllm_spindle.config import KEEP_RATIO_KEY
from vllm_spindle.evaluation.asking import Reply, dialect_for, most_new_tokens
from vllm_spindle.evaluation.cells import Cell
from vllm_spindle.evaluation.tasks.item import Sample

TIMEOUT_S = 600.0
SERVED = "served"


class Endpoint:
    """An OpenAI-compatible server.

    Attributes:
        model: name that it serves.
        dialect: what it reads.
        shows_spindle: whether its ``/metrics`` has our counters. Without the plugin a server takes
            the ratio and does nothing with it.
    """

    def __init__(self, url: str, tokenizer: Any | None = None, config: Any = None) -> None:
        """Ask the server what it serves.

        Args:
            url: with or without ``/v1``.
            tokenizer, config: of the model, to count tokens and to know the bundled ones; without
                them it is plain text, four characters a token.

        Raises:
            RuntimeError: if nothing there answers as such a server.
        """
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.dialect = dialect_for(tokenizer, config)
        self._client = httpx.Client(timeout=TIMEOUT_S)
        try:
            listed = self._client.get(f"{self._url}/models").raise_for_status().json()
            self.model = str(listed["data"][0]["id"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            raise RuntimeError(f"no server answers at {self._url}/models ({error})") from None
        metrics = self._client.get(self._url.removesuffix("/v1") + "/metrics")
        self.shows_spindle = metrics.is_success and "vllm:spindle" in metrics.text

    def ask(self, cell: Cell, sample: Sample) -> Reply:
        """The answer; the follow-up, if any, ends the prompt.

        Raises:
            RuntimeError: if the request fails.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": sample.prompt + sample.followups[0],
            "max_tokens": most_new_tokens(self.dialect.num_tokens, sample),
            "temperature": 0,
            "vllm_xargs": {KEEP_RATIO_KEY: cell.budget},
        }
        if not sample.is_exact:
            body["stop"] = ["\n"]
        try:
            answer = self._client.post(f"{self._url}/completions", json=body)
            answer.raise_for_status()
        except httpx.HTTPStatusError as error:
            raise RuntimeError(f"the server refused: {error.response.text[:300]}") from None
        except httpx.HTTPError as error:
            raise RuntimeError(f"the server did not answer: {error!r}") from None
        return Reply([str(answer.json()["choices"][0]["text"] or "")])
