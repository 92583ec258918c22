"""What draws the tokens of many texts at once: the model's own distribution, each text as if it were alone."""

import pytest
import torch
from builders import byte_tokenizer, tiny_language

from mmphi.errors import SettingsError
from mmphi.textgen import backends
from mmphi.textgen.backends import SamplingConfig, SamplingRequest, choose_backend, make_sampler
from mmphi.textgen.slot_sampler import sample_tokens

END = 256
BACKENDS = (pytest.param("transformers", marks=pytest.mark.slow), "slots")


@pytest.fixture(scope="module")
def model():
    return tiny_language(initializer_range=0.1).model


def wanted(count, longest=20, ends=(END,)):
    """Texts that follow others of different lengths."""
    draw = torch.Generator().manual_seed(1)
    for number in range(count):
        before = torch.randint(0, 250, (1 + number % 7,), generator=draw).tolist()
        yield SamplingRequest(str(number), tuple(before), ends, longest - number % 3)


def written(backend, model, asked, draw=None, batch=4):
    asked = list(asked)
    torch.manual_seed(3)
    made = list(make_sampler(backend, model, draw or SamplingConfig(), batch, 64)(iter(asked)))
    assert sorted(each.id for each in made) == sorted(each.id for each in asked)
    return {each.id: each for each in made}, asked


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_log_probability_is_that_of_a_pass_over_the_text_alone(model, backend):
    made, asked = written(backend, model, wanted(11, ends=tuple(range(200, 257))))
    lengths = set()
    for one in asked:
        ids = made[one.id].ids
        lengths.add(len(ids))
        assert len(ids) <= one.longest
        assert not set(ids[:-1]) & set(one.ends)
        assert len(ids) == one.longest or ids[-1] in one.ends
        with torch.inference_mode():
            logits = model(torch.tensor([[*one.ids, *ids]])).logits[0, len(one.ids) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum")
        assert float(loss) == pytest.approx(-made[one.id].logprob, abs=1e-3)
    assert len(lengths) > 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_one_likeliest_token_it_writes_what_generate_writes(model, backend):
    made, asked = written(backend, model, wanted(9), SamplingConfig(top_k=1))
    for one in asked:
        ids = torch.tensor([list(one.ids)])
        alone = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=one.longest,
            eos_token_id=END,
            pad_token_id=END,
        )
        assert list(made[one.id].ids) == alone[0, len(one.ids) :].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_come_as_often_as_the_model_has_them(model, backend):
    """Of texts of one token: by chance alone their frequencies are this near."""
    count = 1200
    asked = [SamplingRequest(str(number), (7, 8, 9), (END,), 1) for number in range(count)]
    made, _ = written(backend, model, asked, batch=64)
    found = torch.zeros(260)
    for each in made.values():
        found[each.ids[0]] += 1
    with torch.inference_mode():
        odds = model(torch.tensor([[7, 8, 9]])).logits[0, -1].softmax(-1)
    expected = odds * count
    common = expected > 5
    chi2 = float(((found - expected)[common] ** 2 / expected[common]).sum())
    free = int(common.sum()) - 1
    assert chi2 < free + 5 * (2 * free) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_likeliest_are_drawn_where_that_is_asked_for(model, backend):
    with torch.inference_mode():
        best = set(model(torch.tensor([[7, 8, 9]])).logits[0, -1].topk(3).indices.tolist())
    asked = [SamplingRequest(str(number), (7, 8, 9), (END,), 1) for number in range(60)]
    made, _ = written(backend, model, asked, SamplingConfig(top_k=3), batch=16)
    assert {each.ids[0] for each in made.values()} == best
    cold, _ = written(backend, model, asked, SamplingConfig(temperature=0.01), batch=16)
    assert len({each.ids[0] for each in cold.values()}) <= 2


def test_tokens_are_drawn_as_the_logits_have_them_however_rare():
    torch.manual_seed(5)
    logits = torch.randn(50_000) * 3
    logits[:100] = -torch.inf
    count = 5_000
    parts = [sample_tokens(logits.expand(500, -1)) for _ in range(count // 500)]
    tokens, logprobs = (torch.cat(each) for each in zip(*parts, strict=True))
    odds = logits.double().softmax(-1)
    torch.testing.assert_close(logprobs, odds.log()[tokens].float(), rtol=1e-5, atol=1e-5)
    assert int(tokens.min()) >= 100  # What has no probability is never drawn.
    found = torch.bincount(tokens, minlength=len(logits)).double()
    rest = torch.argsort(odds, descending=True)
    for part in (rest[:10], rest[10:1000], rest[1000:20_000], rest[20_000:]):
        share = float(odds[part].sum())
        assert abs(float(found[part].sum()) / count - share) < 5 * (share * (1 - share) / count) ** 0.5


def test_of_one_token_that_is_possible_it_is_drawn():
    logits = torch.full((3, 7), -torch.inf)
    logits[0, 0] = logits[1, 3] = logits[2, 6] = -40.0
    tokens, logprobs = sample_tokens(logits)
    assert tokens.tolist() == [0, 3, 6]
    assert logprobs.tolist() == [0, 0, 0]


def test_whoever_is_done_leaves_his_place_to_the_next(model):
    """Passes are as many as the longest queue of a place needs, not the sum of the longest of each batch."""
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    lengths = [1, 1, 1, 1, 1, 1, 12, 1, 1, 1, 1, 1]
    asked = [SamplingRequest(str(number), (5,), (), length) for number, length in enumerate(lengths)]
    written("slots", model, asked, batch=2)
    hook.remove()
    assert len(passes) <= 6 // 2 + 12


@pytest.mark.parametrize(
    ("there", "gpu", "asked", "expected"),
    [
        (False, False, "auto", "slots"),
        (False, True, "auto", "transformers"),
        (True, True, "auto", "vllm"),
        (True, False, "auto", "slots"),
        (True, True, "transformers", "transformers"),
        (False, True, "slots", "slots"),
    ],
)
def test_what_draws_is_chosen_and_told(monkeypatch, there, gpu, asked, expected):
    monkeypatch.setattr(backends, "find_spec", lambda _: object() if there else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    backend, why = choose_backend(asked)
    assert backend == expected
    assert why


def test_vllm_where_it_is_not_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match="not installed"):
        choose_backend("vllm")


def test_the_tokenizers_end_is_what_the_tests_call_so():
    assert byte_tokenizer().eos_token_id == END
