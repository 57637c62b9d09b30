"""The same questions to a served model, over HTTP.

The server's selector is what it was started with; the ratio goes with each request.
"""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from vllm_covipal.config import KEEP_RATIO_KEY
from vllm_covipal.evaluation.methods import Said
from vllm_covipal.evaluation.questions import Question

TIMEOUT_S = 300.0


class Endpoint:
    """An OpenAI-compatible server."""

    def __init__(
        self,
        url: str,
        *,
        max_new_tokens: int = 4,
        num_parallel: int = 8,
        add_special_tokens: bool = False,
    ) -> None:
        """Ask the server what it serves.

        Args:
            url: with or without ``/v1``.
            max_new_tokens: of an answer.
            num_parallel: requests at a time.
            add_special_tokens: the tokenizer's own go in front of what the chat template writes:
                for templates without the begin-of-text token that the model was trained with.

        Raises:
            RuntimeError: if nothing there answers as such a server.
        """
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._max_new_tokens, self._num_parallel = max_new_tokens, num_parallel
        self._add_special_tokens = add_special_tokens
        # One for all requests: making one costs more than many an answer.
        self._client = httpx.Client(timeout=TIMEOUT_S)
        try:
            listed = self._client.get(f"{self._url}/models").raise_for_status().json()
            self.model = str(listed["data"][0]["id"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            raise RuntimeError(f"no server answers at {self._url}/models ({error})") from None

    def answer(self, questions: Sequence[Question], keep_ratio: float | None) -> Said:
        """Answers to every question, at this ratio; None leaves it to the server.

        Raises:
            RuntimeError: if a request fails.
        """
        with ThreadPoolExecutor(self._num_parallel) as pool:
            said = list(pool.map(lambda question: self._ask(question, keep_ratio), questions))
        return Said(said, None)

    def _ask(self, question: Question, keep_ratio: float | None) -> str:
        buffer = io.BytesIO()
        question.load().save(buffer, format="PNG")
        picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": question.text},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._max_new_tokens,
            "temperature": 0,
            "add_special_tokens": self._add_special_tokens,
        }
        if keep_ratio is not None:
            body["vllm_xargs"] = {KEEP_RATIO_KEY: keep_ratio}
        try:
            answer = self._client.post(f"{self._url}/chat/completions", json=body)
            answer.raise_for_status()
        except httpx.HTTPStatusError as error:
            raise RuntimeError(f"the server refused: {error.response.text[:300]}") from None
        except httpx.HTTPError as error:
            raise RuntimeError(f"the server did not answer: {error!r}") from None
        return str(answer.json()["choices"][0]["message"]["content"] or "")
