import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TEXTS, make_lm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from loop import model as m
from loop import sample as s

GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 20, "seed": 0, "round_index": 0}
PROMPTS = [(TEXTS[0],), None, (TEXTS[1],), (TEXTS[0],), (TEXTS[2], TEXTS[1], "Hello"), ("a",)]


def adapted(seed=0):
    """A random model with a random adapter, so that merging is exercised."""
    lm = make_lm(seed)
    m.fresh_adapter(lm, r=4, alpha=8, seed=1)
    generator = torch.Generator().manual_seed(5)
    for value in m.lora_parameters(lm).values():
        value.data.add_(torch.randn(value.shape, generator=generator) * 0.05)
    return lm


def generated(lm, turns, n):
    """transformers' own greedy tokens."""
    ids = torch.tensor([m.encode(lm, turns)[0]])
    with torch.no_grad():
        out = lm.net.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, eos_token_id=2, pad_token_id=2
        )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_greedy_text_is_that_of_generate(batch_size):
    # Three models, so that some texts end by themselves and rows are moved and refilled.
    ended = 0
    for seed in range(3):
        lm = adapted(seed)
        for turns, got in zip(PROMPTS, s.complete(lm, PROMPTS, **GREEDY, batch_size=batch_size), strict=True):
            want = generated(lm, turns, 20)
            assert got.n_tokens == len(want)
            assert got.finished == (want[-1] == 2)
            assert got.text == m.decode(lm, want[:-1] if got.finished else want)
            ended += got.finished
    assert 0 < ended < 3 * len(PROMPTS)


def test_logprob_is_that_of_the_text_at_temperature_one():
    lm = adapted()
    for got, turns in zip(s.complete(lm, PROMPTS, **(GREEDY | {"max_new_tokens": 6})), PROMPTS, strict=True):
        prompt, new = m.encode(lm, turns)[0], generated(lm, turns, 6)
        with torch.no_grad():
            logp = lm.net(torch.tensor([prompt + new])).logits[0].log_softmax(-1)
        want = sum(float(logp[len(prompt) + k - 1, token]) for k, token in enumerate(new))
        assert got.logprob_nats == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6), (1.4, 0.8)])
def test_draws_follow_the_exact_distribution(temperature, top_p):
    # 200,000 one-token draws. By Bretagnolle-Huber-Carol P(L1 distance >= e) <= 2^k exp(-n e^2 / 2), k = 24 tokens:
    # e = 0.0176 at a false-fail rate of 1e-6. Leaving temperature or top_p out moves the distribution by far more.
    n, k = 200_000, 24
    e = math.sqrt(2 * (k * math.log(2) + math.log(1e6)) / n)
    logits = torch.randn(k, generator=torch.Generator().manual_seed(3)) * 1.5
    keys = s._mix(np.arange(n, dtype=np.uint64) * s._GOLDEN)
    drawn, logprob = s._draw(logits.expand(n, k), keys, np.zeros(n, dtype=np.uint64), temperature, top_p)
    observed = np.bincount(drawn, minlength=k) / n

    def exact(t, p):
        q = torch.softmax(logits.double() / t, -1).numpy()
        order = np.argsort(-q)
        kept = order[np.cumsum(q[order]) - q[order] < p]
        out = np.zeros(k)
        out[kept] = q[kept] / q[kept].sum()
        return out

    assert np.abs(observed - exact(temperature, top_p)).sum() < e
    for wrong in ((1.0, 1.0), (0.7, 1.0), (1.0, 0.6), (1.4, 0.8)):
        if wrong != (temperature, top_p):
            assert np.abs(observed - exact(*wrong)).sum() > 3 * e
    np.testing.assert_allclose(logprob, torch.log_softmax(logits, -1).numpy()[drawn], atol=1e-5)


def test_noise_at_successive_positions_is_independent():
    # Two tokens in a row from a fair coin: four pairs at 1/4 each. L1 bound as above with k = 4, n = 100,000: 0.018.
    n = 100_000
    keys = s._mix(np.arange(n, dtype=np.uint64) * s._GOLDEN)
    first, second = (s._draw(torch.zeros(n, 2), keys, np.full(n, t, dtype=np.uint64), 1.0, 1.0)[0] for t in (0, 1))
    observed = np.bincount(2 * first + second, minlength=4) / n
    assert np.abs(observed - 0.25).sum() < math.sqrt(2 * (4 * math.log(2) + math.log(1e6)) / n)
    again = s._draw(torch.zeros(n, 2), keys, np.zeros(n, dtype=np.uint64), 1.0, 1.0)[0]
    assert np.abs(np.bincount(2 * first + again, minlength=4) / n - 0.25).sum() > 0.5  # the same step: the same noise


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_gpu_form_of_the_draw_picks_the_same_tokens(top_p):
    mass = torch.softmax(torch.randn(300, 500, generator=torch.Generator().manual_seed(0)) * 3, -1)
    mass = mass / mass.amax(-1, keepdim=True)
    keys = s._mix(np.arange(300, dtype=np.uint64) * s._GOLDEN)
    assert s._race(mass.numpy(), keys, top_p).tolist() == s._race_torch(mass, keys, top_p).tolist()


def test_nucleus_breaks_ties_by_token_number():
    mass = np.array([0.5, 1.0, 1.0, 1.0, 0.25], dtype=np.float32)
    assert s._nucleus(mass, 0.5) == (1.0, 2)  # 2 / 3.75 >= 0.5 > 1 / 3.75
    drawn = {int(s._race(mass[None], s._mix(np.array([i], dtype=np.uint64)), 0.5)[0]) for i in range(200)}
    assert drawn == {1, 2}


def test_text_does_not_depend_on_batch_order_or_company():
    lm = adapted()
    prompts = PROMPTS * 3
    settings = GREEDY | {"temperature": 1.0, "top_p": 0.95}
    whole = s.complete(lm, prompts, **settings)
    assert [c.text for c in s.complete(lm, prompts, **settings, batch_size=3)] == [c.text for c in whole]
    back = s.complete(lm, prompts[::-1], **settings, ids=list(range(len(prompts)))[::-1])[::-1]
    assert [c.text for c in back] == [c.text for c in whole]
    alone = s.complete(lm, prompts[7:8], **settings, ids=[7])
    assert alone[0].text == whole[7].text
    assert whole[0].text != whole[3].text  # the same prompt under another number is another draw
    other = s.complete(lm, prompts, **(settings | {"round_index": 1}))
    assert sum(a.text != b.text for a, b in zip(whole, other, strict=True)) > len(prompts) // 2


def test_running_out_of_memory_halves_the_documents_at_once_and_changes_no_text(monkeypatch):
    lm = adapted()
    settings = GREEDY | {"temperature": 1.0}
    want, plain, tried = s.complete(lm, PROMPTS, **settings), s._KeyValues, []

    def scarce(model, slots, length):
        tried.append(slots)
        if slots > room:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return plain(model, slots, length)

    monkeypatch.setattr(s, "_KeyValues", scarce)
    room = 2
    assert [c.text for c in s.complete(lm, PROMPTS, **settings)] == [c.text for c in want]
    assert tried == [6, 3, 1]
    room = 0
    with pytest.raises(m.OutOfMemory, match=r"one document of .* can't allocate memory"):
        s.complete(lm, PROMPTS, **settings)
    assert all(module.served is None for module in m._adapted(lm).values())


@pytest.mark.parametrize(
    "read",
    [
        lambda lm: s.surprisal(lm, [((a,), b) for a in TEXTS[:3] for b in TEXTS[1:4]])[0],
        lambda lm: s.hidden_mean(lm, TEXTS),
        lambda lm: s.next_token_logodds(lm, [(text,) for text in TEXTS], ["Hello"], ["The"]),
    ],
)
def test_running_out_of_memory_halves_what_is_read_at_once_and_changes_nothing(monkeypatch, read):
    lm = adapted()
    want, plain, whole, calls, asked = read(lm), m.Packed.hidden, s.pack, [], []

    def small(rows, *, batch_tokens, blocks):
        asked.append(batch_tokens)
        return whole(rows, batch_tokens=batch_tokens // 64, blocks=m.Blocks(32))

    def scarce(batch, model, *rest):
        calls.append(batch)
        if len(calls) in fails:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return plain(batch, model, *rest)

    monkeypatch.setattr(s, "pack", small)
    monkeypatch.setattr(m.Packed, "hidden", scarce)
    fails = {2}  # when a first batch has been read
    np.testing.assert_allclose(read(lm), want, rtol=1e-4, atol=1e-5)
    assert asked == [2048, 1024]
    assert len(calls) > 3
    fails = set(range(1000))
    with pytest.raises(m.OutOfMemory, match=r"a text of \d+ tokens while it is read, .* shorten the texts"):
        read(lm)
    assert all(module.served is None for module in m._adapted(lm).values())


def test_of_the_prompts_that_were_read_only_one_that_waits_again_is_kept(monkeypatch):
    # Ten times the longest prompt in three slots: it is read once, and so are the others.
    lm, read = adapted(), []
    plain = s._read_prompts

    def counted(model, prompts):
        read.extend(prompts)
        return plain(model, prompts)

    monkeypatch.setattr(s, "_read_prompts", counted)
    many = s.complete(lm, [PROMPTS[4]] * 10 + PROMPTS, **GREEDY, batch_size=3)
    assert len(read) == len(set(read)) == len({tuple(p or ()) for p in PROMPTS})
    assert [c.text for c in many[10:]] == [c.text for c in s.complete(lm, PROMPTS, **GREEDY)]


def test_finished_rows_leave_others_enter_and_the_longest_prompts_go_first(monkeypatch):
    lm, rows, read, waited = adapted(), [], [], []
    plain_logits, plain_read = lm.logits, s._read_prompts

    def logits(hidden):
        rows.append(len(hidden))
        out = plain_logits(hidden)
        out[:, 2] += 3  # ends that come early, and not together
        return out

    def reading(model, prompts):
        read.extend([max(map(len, prompts))] if prompts else [])
        waited.append(len(rows))
        steps = list(rows)
        out = plain_read(model, prompts)
        rows[:] = steps  # what prompts cost is counted elsewhere
        return out

    monkeypatch.setattr(lm, "logits", logits)
    monkeypatch.setattr(s, "_read_prompts", reading)
    prompts, settings = PROMPTS * 4, GREEDY | {"temperature": 1.0}
    lengths = [c.n_tokens for c in s.complete(lm, prompts, **settings)]
    assert len(set(lengths)) > 4
    # Every prompt gives the first token; of step k only the rows that have more than k tokens are computed.
    assert rows == [sum(n > k for n in lengths) for k in range(1, max(lengths))]
    read.clear()
    rows.clear()
    again = [c.n_tokens for c in s.complete(lm, prompts, **settings, batch_size=8)]
    assert again == lengths
    assert sum(rows) == sum(n - 1 for n in lengths)
    assert max(rows) <= 8
    assert min(rows[: waited[-1]]) >= 7  # as long as others wait, a quarter of the rows is never free
    assert read == sorted(read, reverse=True)


def test_sampled_sequences_have_the_frequencies_of_generate():
    # Two tokens in a row, as `generate` draws them with the same temperature and top_p. Of n draws each, frequencies of
    # k kinds lie within e of the truth (bound above, 1e-6 both together), so within 2 e of each other.
    lm, n, k = adapted(), 8_000, 21
    e = math.sqrt(2 * (k * math.log(2) + math.log(2e6)) / n)
    prompt = m.encode(lm, PROMPTS[0])[0]
    kept, settings = {}, {"max_new_tokens": 2, "temperature": 0.3, "top_p": 0.9}

    def by_generate(draws, **changes):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draws)
            rows = lm.net.generate(
                torch.tensor([prompt] * n),
                attention_mask=torch.ones(n, len(prompt)),
                do_sample=True,
                top_k=0,
                eos_token_id=2,
                pad_token_id=2,
                **(settings | changes),
            )
        return [tuple(row) for row in rows[:, len(prompt) :].tolist()]

    def frequencies(rows):
        shares = np.array([sum(row == one for row in rows) for one in kept]) / n
        return np.append(shares, 1 - shares.sum())

    texts = by_generate(5)
    kept = [row for row, _ in Counter(by_generate(6)).most_common(k - 1)]  # chosen by other draws
    ours = []
    plain = s.decode

    def tokens(model, row):
        ours.append(tuple(row) if len(row) == 2 else (*row, 2, 2)[:2])
        return plain(model, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s, "decode", tokens)
        s.complete(lm, [PROMPTS[0]] * n, **(GREEDY | settings | {"seed": 11}))
    got, want = frequencies(ours), frequencies(texts)
    assert np.abs(got - want).sum() < 2 * e
    assert want[:-1].sum() > 0.3
    for wrong in ({"temperature": 0.4}, {"top_p": 1.0}):
        assert np.abs(frequencies(by_generate(7, **wrong)) - got).sum() > 2 * e


class Recorded(TorchDispatchMode):
    """Stands for a CUDA graph: the operations of a step with the very memory they had, and no Python between them."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.done:
            again = function(*args, **kwargs)
            for old, new in zip(*(tree_flatten(value)[0] for value in (out, again)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def one_kernel(monkeypatch):
    """Attention to a cache as on a GPU."""
    plain = m._attend_to_cache
    monkeypatch.setattr(m, "_attend_to_cache", lambda *given, one_kernel: plain(*given, one_kernel=True))


@pytest.mark.usefixtures("one_kernel")
def test_shapes_of_a_graph_are_few_and_change_no_text(monkeypatch):
    lm, made, played = adapted(), [], []
    prompts, settings = PROMPTS * 6, GREEDY | {"temperature": 1.0, "max_new_tokens": 40}
    plain_logits = lm.logits
    early = torch.nn.functional.one_hot(torch.tensor(2), lm.net.config.vocab_size)  # texts that end soon
    monkeypatch.setattr(lm, "logits", lambda hidden: plain_logits(hidden) + 2 * early)
    want = {size: s.complete(lm, prompts, **settings, batch_size=size) for size in (None, 8)}

    def record(step, n, length):
        made.append((n, length))
        with Recorded() as graph:
            hidden = step.compute(n, length)
        plain = graph.replay
        graph.replay = lambda: (played.append((n, length)), plain())
        return graph, hidden

    step = s._Step
    monkeypatch.setattr(step, "_record", record)
    monkeypatch.setattr(s, "_Step", lambda model, cache, graphs: step(model, cache, graphs=True))
    for size in (None, 8):
        made.clear()
        got = s.complete(lm, prompts, **settings, batch_size=size)
        assert [(c.text, c.finished) for c in got] == [(c.text, c.finished) for c in want[size]]
        np.testing.assert_allclose([c.logprob_nats for c in got], [c.logprob_nats for c in want[size]], rtol=1e-4)
        assert len(made) == len(set(made)) > 1
        assert len({n for n, _ in made}) <= 4
    assert len(played) > 20


@pytest.mark.usefixtures("one_kernel")
def test_a_step_never_waits_for_the_device():
    # Tensors without values stop whatever would look at one, as a graph cannot hold it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    lm = make_lm()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        step = s._Step(lm, s._KeyValues(lm, 4, 32), graphs=True)
        assert step.compute(2, 32).shape == (2, lm.net.config.hidden_size)
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            bool(step.compute(2, 32).isfinite().all())


def test_end_token_ends_the_text_and_counts(monkeypatch):
    lm = make_lm()
    plain, calls = lm.logits, []

    def ending(hidden):
        logits = plain(hidden)
        calls.append(len(hidden))
        logits[:, 2] = 1e4 if len(calls) == 3 else -1e4
        return logits

    monkeypatch.setattr(lm, "logits", ending)
    got = s.complete(lm, [("a",)] * 4, **GREEDY)
    assert [(c.n_tokens, c.finished) for c in got] == [(3, True)] * 4
    assert all("<|im_end|>" not in c.text for c in got)
    assert calls == [1, 4, 4]  # one reading of the prompt they share, then one row each; none after the end
    calls.clear()
    cut = s.complete(lm, [("a",)], **(GREEDY | {"max_new_tokens": 2}))
    assert (cut[0].n_tokens, cut[0].finished) == (2, False)


def test_sampling_leaves_base_adapter_and_random_state_alone():
    lm = adapted()
    torch.manual_seed(1)
    state, base = torch.get_rng_state(), m.fingerprint(lm)
    lora = {n: v.clone() for n, v in m.lora_parameters(lm).items()}
    s.complete(lm, PROMPTS, **GREEDY)
    assert m.fingerprint(lm) == base
    assert all(torch.equal(v, lora[n]) for n, v in m.lora_parameters(lm).items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.served is None for module in m._adapted(lm).values())


def test_surprisal_is_the_summed_nll_of_completion_and_end(lm, monkeypatch):
    lm = adapted()
    pairs = [(turns, TEXTS[i % 4]) for i, turns in enumerate(PROMPTS)]
    nats, n_tokens = s.surprisal(lm, pairs)
    with monkeypatch.context() as few:
        few.setattr(m, "LOGITS", 3 * lm.net.config.vocab_size)  # logits of 3 hidden states at once
        np.testing.assert_allclose(s.surprisal(lm, pairs)[0], nats, rtol=1e-6)
    for (turns, text), got, n in zip(pairs, nats, n_tokens, strict=True):
        prompt, completion = m.encode(lm, turns, text)
        with torch.no_grad():
            logp = lm.net(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        want = -sum(float(logp[len(prompt) + k - 1, token]) for k, token in enumerate(completion))
        assert n == len(completion)
        assert got == pytest.approx(want, rel=1e-5)
    bare = s.surprisal(make_lm(), pairs)[0]
    np.testing.assert_allclose(s.surprisal(lm, pairs, base=True)[0], bare, rtol=1e-6)
    assert not np.allclose(nats, bare, rtol=1e-3)


def test_hidden_mean_reads_the_base(lm):
    want = []
    for text in TEXTS:
        ids = [0, *m.encode(lm, None, text)[1][:-1]]
        with torch.no_grad():
            want.append(lm.net.base_model(torch.tensor([ids])).last_hidden_state[0, 1:].mean(0).numpy())
    np.testing.assert_allclose(s.hidden_mean(adapted(), TEXTS), want, atol=1e-5)


def test_next_token_logodds_reads_the_base(lm):
    yes, no = (lm.tokenizer.encode(word)[0] for word in ("Hello", "The"))
    got = s.next_token_logodds(adapted(), PROMPTS, ["Hello"], ["The"])
    for turns, value in zip(PROMPTS, got, strict=True):
        with torch.no_grad():
            logits = lm.net(torch.tensor([m.encode(lm, turns)[0]])).logits[0, -1]
        assert value == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
    with pytest.raises(ValueError, match="first token"):
        s.next_token_logodds(lm, PROMPTS, ["Hello"], ["Hello"])
    with pytest.raises(ValueError, match="no_words"):
        s.next_token_logodds(lm, PROMPTS, ["Hello"], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 506}, "leave room"),
        ({"ids": [1]}, "one per prompt"),
        ({"ids": [1] * 6}, "distinct"),
    ],
)
def test_bad_input_is_refused(lm, changes, message):
    with pytest.raises(ValueError, match=message):
        s.complete(lm, PROMPTS, **(GREEDY | changes))


def test_diverged_adapter_is_refused(lm):
    m.fresh_adapter(lm, r=4, alpha=8, seed=0)
    for value in m.lora_parameters(lm).values():
        value.data.fill_(math.nan)
    with pytest.raises(ValueError, match="logits must be finite"):
        s.complete(lm, PROMPTS, **GREEDY)


def test_no_prompts_no_completions(lm):
    assert s.complete(lm, [], **GREEDY) == []
