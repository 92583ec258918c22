"""What draws the tokens of many texts at once: transformers' continuous batching, or vLLM where it is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from mmphi.errors import ModelError, SettingsError

WAIT_S = 1.0
PAGE = 32  # Tokens of a page of transformers' cache.


@dataclass(frozen=True)
class SamplingRequest:
    """A text to be written.

    Attributes:
        id: Its own.
        ids: What it follows.
        ends: Tokens that end it.
        longest: Of its tokens.
    """

    id: str
    ids: tuple[int, ...]
    ends: tuple[int, ...]
    longest: int


@dataclass(frozen=True)
class Generation:
    """A text that was written.

    Attributes:
        id: As it was wanted.
        ids: Its tokens, the one that ends it among them.
        logprob: Sum over its tokens under what they were drawn from, in nats.
    """

    id: str
    ids: tuple[int, ...]
    logprob: float


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn.

    Attributes:
        temperature: Logits are divided by it.
        top_p: Only the likeliest tokens that have this share together; 1 for all.
        top_k: Only so many likeliest ones; 0 for all.
        seed: Of the random numbers.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    @property
    def as_it_is(self) -> bool:
        """Whether tokens are drawn from the model's own distribution, so that their log-probabilities are its loss."""
        return self.temperature == 1.0 and self.top_p == 1.0 and not self.top_k


class Sampler(Protocol):
    """Writes texts, many at once."""

    def __call__(self, wanted: Iterator[SamplingRequest]) -> Iterator[Generation]:
        """Texts in the order in which they are done; asks for the next one when it has a place for it."""


def make_sampler(backend: str, model: Any, draw: SamplingConfig, batch: int, longest: int) -> Sampler:
    """What draws the tokens.

    Args:
        backend: ``transformers``, ``slots`` or ``vllm``.
        model: Of transformers; for vLLM its folder or name.
        draw: How.
        batch: Texts at once.
        longest: Tokens of a text, with what it follows.

    Raises:
        ModelError: If the model cannot be run by it.
    """
    from mmphi.textgen.slot_sampler import SlotSampler

    kinds: dict[str, type[_Vllm] | type[_Transformers] | type[SlotSampler]]
    kinds = {"vllm": _Vllm, "transformers": _Transformers, "slots": SlotSampler}
    return kinds[backend](model, draw, batch, longest)


def choose_backend(asked: str) -> tuple[str, str]:
    """The backend, and why it is that one.

    Raises:
        SettingsError: If vLLM is asked for and not installed.
    """
    there, gpu = find_spec("vllm") is not None, torch.cuda.is_available()
    if asked == "vllm" and not there:
        raise SettingsError("textgen.backend = vllm, but vLLM is not installed", "pip install vllm, or take auto")
    if asked != "auto":
        return asked, "asked for"
    if not gpu:
        return "slots", "there is no GPU"
    return ("vllm", "it is installed") if there else ("transformers", "vLLM is not installed")


class _Transformers:
    """Continuous batching of transformers: whoever is done leaves the batch, whoever comes joins it."""

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
            eos_token_id=-1,  # Each request has its own.
        )
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=pages * self.batch,
            max_batch_tokens=max(self.batch, self.longest),
            max_requests_per_batch=self.batch,
            return_logprobs=True,
            allow_block_sharing=False,  # What texts follow is short.
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
                while more and open_ < 2 * self.batch:  # As many wait as are written: no place is ever empty.
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
                        raise ModelError("continuous batching ended before its texts did")
                    continue
                open_ -= 1
                if done.error:
                    raise ModelError(f"a text was not written: {done.error}")
                yield Generation(done.request_id, tuple(done.generated_tokens), float(sum(done.logprobs)))


class _Vllm:
    """vLLM's engine, a block of texts at a time."""

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
                    ignore_eos=True,  # What ends a text is said by ``ends``.
                    logprobs=0,  # Of the drawn token alone.
                    detokenize=False,
                )
                engine.add_request(one.id, TokensPrompt(prompt_token_ids=list(one.ids)), how)
                open_ += 1
            for output in engine.step():
                if output.finished:
                    open_ -= 1
                    best = output.outputs[0]
                    yield Generation(output.request_id, tuple(best.token_ids), float(best.cumulative_logprob))
