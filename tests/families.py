"""What holds for each family of language models: ``python tests/families.py`` prints a table in markdown.

Models are built small, with random weights. ``packed``: sequences in one row are read as each alone. ``batched``:
answers in a batch are those of transformers' ``generate`` for each alone, and how the engine reads.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from builders import tiny_language
from transformers import AutoConfig, AutoModelForCausalLM

from mmphi.generation.engine import Engine
from mmphi.generation.sampling import SamplingParams
from mmphi.models.multimodal import Multimodal

SHAPE: dict[str, Any] = {
    **{
        "vocab_size": 260,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    **{"intermediate_size": 64, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 256, "eos_token_id": 256, "tie_word_embeddings": False},
}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 256}
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": None},
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "gemma": {},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 8},
    "smollm3": {},
    "olmo": {},
    "olmo2": {},
    "granite": {},
    "starcoder2": {},
    "stablelm": {},
    "cohere": {},
    "glm": {},
    "glm4": {},
    "falcon": {"head_dim": None, "ffn_hidden_size": 64, "alibi": False, "new_decoder_architecture": False},
    "gpt2": OLD,
    "gptj": {**OLD, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 16},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "gpt_bigcode": OLD,
    "codegen": {**OLD, "rotary_dim": 4, "n_ctx": 256},
}


def language_of(family: str) -> Any:
    """A small model of a family, with a tokenizer of bytes."""
    torch.manual_seed(0)
    shape = {**SHAPE, **FAMILIES[family]}
    left_out = [name for name in ("head_dim",) if shape[name] is None]  # It follows from others.
    config = AutoConfig.for_model(family, **{name: value for name, value in shape.items() if name not in left_out})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    width = model.get_input_embeddings().embedding_dim
    return replace(tiny_language(), model=model, width=width)


def line(family: str) -> str:
    """A row of the table."""
    language = language_of(family)
    packed = "yes" if language.packing_error < language.tolerance else "one sequence a row"
    model = Multimodal(language, None, None, max_length=200)
    engine = Engine(model, slots=2)
    questions = ["hi", "what is the colour of the third of them?", "a longer question " * 5]
    answers = [engine.submit(model.open_prompt(None, q), SamplingParams(max_tokens=20)) for q in questions]
    while engine.busy:
        engine.step()
    alone = [model.generate([(None, q)], 20)[0].text for q in questions]
    equal = all(a.error is None and a.text == b for a, b in zip(answers, alone, strict=True))
    return f"| `{family}` | {packed} | {'equal' if equal else 'DIFFERENT'}, {engine.reader.way} |"


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    print("| family | packed | batched |\n|---|---|---|")
    for family in FAMILIES:
        try:
            print(line(family), flush=True)
        except Exception as error:
            print(f"| `{family}` | {type(error).__name__}: {str(error)[:150]} | |", flush=True)


if __name__ == "__main__":
    main()
