"""Sampling backends for many texts at once: transformers' continuous batching, cache slots on a CPU, or vLLM."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from mmphi.errors import ModelError, SettingsError

WAIT_S = 1.0
PAGE = 32  # Tokens per page of transformers' cache.


@dataclass(frozen=True)
class SamplingRequest:
    """A request for one text.

    Attributes:
        id: Unique ID of the request.
        ids: Token IDs of the prompt.
        ends: IDs of the tokens that end the text.
        longest: Maximum number of new tokens.
    """

    id: str
    ids: tuple[int, ...]
    ends: tuple[int, ...]
    longest: int


@dataclass(frozen=True)
class Generation:
    """A generated text.

    Attributes:
        id: ID of its request.
        ids: Token IDs, including the end token.
        logprob: Sum of the log-probabilities of its tokens, in nats.
    """

    id: str
    ids: tuple[int, ...]
    logprob: float


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling parameters.

    Attributes:
        temperature: Divisor of the logits.
        top_p: Total probability of the likeliest tokens to draw from; 1 for all tokens.
        top_k: Number of the likeliest tokens to draw from; 0 for all tokens.
        seed: Seed of the random numbers.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    @property
    def unmodified(self) -> bool:
        """Whether tokens are drawn from the model's own distribution, so that log-probabilities give its loss."""
        return self.temperature == 1.0 and self.top_p == 1.0 and not self.top_k


class Sampler(Protocol):
    """Generates many texts at once."""

    def __call__(self, wanted: Iterator[SamplingRequest]) -> Iterator[Generation]:
        """Yields texts in the order of completion; takes requests only when it has room for them."""


def make_sampler(backend: str, model: Any, draw: SamplingConfig, batch: int, longest: int) -> Sampler:
    """Returns the sampler of a backend.

    Args:
        backend: ``transformers``, ``slots`` or ``vllm``.
        model: A transformers model; for vLLM its folder or name.
        draw: Sampling parameters.
        batch: Number of texts generated at once.
        longest: Maximum number of tokens of a text, including its prompt.

    Raises:
        ModelError: While sampling, if transformers cannot batch the model continuously.
    """
    from mmphi.textgen.slot_sampler import SlotSampler

    kinds: dict[str, type[_Vllm] | type[_Transformers] | type[SlotSampler]]
    kinds = {"vllm": _Vllm, "transformers": _Transformers, "slots": SlotSampler}
    return kinds[backend](model, draw, batch, longest)


def choose_backend(requested: str) -> tuple[str, str]:
    """Returns the backend and the reason for it.

    Raises:
        SettingsError: If vLLM is asked for and not installed.
    """
    there, gpu = find_spec("vllm") is not None, torch.cuda.is_available()
    if requested == "vllm" and not there:
        raise SettingsError(
            "textgen.backend = vllm, but vLLM is not installed", "pip install vllm, or set textgen.backend to auto"
        )
    if requested != "auto":
        return requested, "set by textgen.backend"
    if not gpu:
        return "slots", "no GPU was found"
    return ("vllm", "vLLM is installed") if there else ("transformers", "vLLM is not installed")


class _Transformers:
    """transformers' continuous batching: finished texts leave the batch, and new ones join it."""

    def __init__(self, model: Any, draw: SamplingConfig, batch: int, longest: int) -> None:
        self.model, self.draw, self.batch, self.longest = model, draw, batch, longest

    @contextlib.contextmanager
    def _running(self) -> Iterator[Any]:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        draw, pages = self.draw, -(-self.longest // PAGE) + 1
        how = GenerationConfig(
            do_sample=True,
            temperature=draw.temperature,
            top_p=draw.top_p,
            top_k=draw.top_k,
            max_new_tokens=self.longest,
            eos_token_id=-1,  # Set per request.
        )
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=pages * self.batch,
            max_batch_tokens=max(self.batch, self.longest),
            max_requests_per_batch=self.batch,
            return_logprobs=True,
            allow_block_sharing=False,  # Prompts are short.
            seed=draw.seed,
        )
        try:
            with self.model.continuous_batching_context_manager(
                generation_config=how, continuous_batching_config=config
            ) as manager:
                yield manager
        except (AttributeError, ValueError, NotImplementedError) as error:
            raise ModelError(
                f"{type(self.model).__name__} cannot be batched continuously: {error}", "choose another model"
            ) from error

    def __call__(self, wanted: Iterator[SamplingRequest]) -> Iterator[Generation]:
        """See :class:`Sampler`."""
        open_, more = 0, True
        with self._running() as manager:
            while open_ or more:
                while more and open_ < 2 * self.batch:  # As many wait as are running: no place is empty.
                    one = next(wanted, None)
                    if one is None:
                        more = False
                        break
                    manager.add_request(list(one.ids), one.id, max_new_tokens=one.longest, eos_token_id=list(one.ends))
                    open_ += 1
                if not open_:
                    return
                done = manager.get_result(timeout=WAIT_S)
                if done is None:
                    if not manager.is_running():
                        raise ModelError("continuous batching stopped before all texts were complete")
                    continue
                open_ -= 1
                if done.error:
                    raise ModelError(f"generation of a text failed: {done.error}")
                yield Generation(done.request_id, tuple(done.generated_tokens), float(sum(done.logprobs)))


class _Vllm:
    """vLLM's engine, with at most twice ``batch`` open requests."""

    def __init__(self, model: Any, draw: SamplingConfig, batch: int, longest: int) -> None:
        from vllm import LLM

        self.draw, self.batch = draw, batch
        self.engine: Any = LLM(model=str(model), max_model_len=longest, max_num_seqs=batch, seed=draw.seed)

    def __call__(self, wanted: Iterator[SamplingRequest]) -> Iterator[Generation]:
        """See :class:`Sampler`."""
        from vllm import SamplingParams, TokensPrompt

        draw, engine = self.draw, self.engine.llm_engine
        open_, more = 0, True
        while open_ or more:
            while more and open_ < 2 * self.batch:
                one = next(wanted, None)
                if one is None:
                    more = False
                    break
                how = SamplingParams(
                    temperature=draw.temperature,
                    top_p=draw.top_p,
                    top_k=draw.top_k or -1,
                    max_tokens=one.longest,
                    stop_token_ids=list(one.ends),
                    ignore_eos=True,  # ``ends`` defines the end tokens.
                    logprobs=0,  # Only of the drawn token.
                    detokenize=False,
                )
                engine.add_request(one.id, TokensPrompt(prompt_token_ids=list(one.ids)), how)
                open_ += 1
            for output in engine.step():
                if output.finished:
                    open_ -= 1
                    best = output.outputs[0]
                    yield Generation(output.request_id, tuple(best.token_ids), float(best.cumulative_logprob))
