"""Preference step: the same numbers as TRL's DPOTrainer and as the formula, pairs by hand, three rounds in a row."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TEXTS, make_lm

from loop import corpus, rng, steer
from loop import model as m
from loop.learner import LM
from loop.records import Document, Prompt
from loop.steer import Pair
from loop.toy import Toy
from loop.train import finetune

SETTINGS = {"beta": 0.1, "lr": 1e-2, "epochs": 1, "batch_size": 4, "max_length": 200, "seed": 3, "round_index": 0}
PROMPTS = [(TEXTS[0],), None, (TEXTS[1], TEXTS[2], TEXTS[0])]
DOCUMENTS = [Document(f"d{i}", "real", None, (TEXTS[i],), TEXTS[i + 1]) for i in range(3)]


def some_pairs(n=10):
    """Pairs over plain, single and multi-turn prompts; chosen and rejected of one prompt begin alike in every third."""
    out = []
    for i in range(n):
        chosen, rejected = TEXTS[i % 4], TEXTS[(i + 1 + i // 4) % 4]
        if i % 3 == 0:
            rejected = chosen[:20] + rejected
        out.append(Pair(PROMPTS[i % 3], chosen, rejected, own=i % 2 == 0))
    return out


def fine_tuned(seed=0, dropout=0.0):
    """A random network with an adapter that a fine-tune has moved: B is no longer 0."""
    lm = make_lm(seed)
    m.fresh_adapter(lm, r=4, alpha=8, dropout=dropout, seed=0)
    finetune(lm, DOCUMENTS, epochs=2, lr=1e-2, batch_size=2, max_length=200, seed=1, round_index=0)
    return lm


def weights(lm):
    return {n: v.detach().clone() for n, v in m.lora_parameters(lm).items()}


def logp(lm, prompt, answer):
    """log p of an answer from one whole, unpacked forward pass of the network itself."""
    p, c = m.encode(lm, prompt, answer)
    with torch.no_grad():
        table = lm.net(torch.tensor([p + c]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(table[len(p) + j - 1, token]) for j, token in enumerate(c))


@pytest.mark.filterwarnings("ignore")  # trl and transformers warn of their own deprecations
@pytest.mark.parametrize("reference", ["base", "previous"])
def test_stock_trl_ends_at_the_same_losses_and_adapter(tmp_path, reference):
    from datasets import Dataset, disable_progress_bars
    from peft import PeftModel
    from trl import DPOConfig, DPOTrainer

    class Encoded(DPOTrainer):  # our token ids as they are: trl would put them through a chat template
        def _prepare_dataset(self, dataset, *rest):
            return dataset

    disable_progress_bars()
    given, ours = some_pairs(22), fine_tuned()
    before = weights(ours)
    m.save_adapter(ours, tmp_path / "start")
    log = steer.dpo(ours, given, reference=reference, **SETTINGS)

    order = rng.stream(SETTINGS["seed"], "steer", 0).permutation(22)  # six steps; the last holds two pairs
    both = [m.encode_all(ours, [(p.prompt, p.chosen), (p.prompt, p.rejected)]) for p in (given[i] for i in order)]
    theirs = make_lm()
    net = PeftModel.from_pretrained(theirs.net, str(tmp_path / "start"), is_trainable=True)
    config = DPOConfig(
        output_dir=str(tmp_path / "out"),
        beta=0.1,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-2,
        train_sampling_strategy="sequential",
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Encoded(
        model=net,
        # A PeftModel alone is its own reference, frozen as adapter "ref"; the bare base is the network once more.
        ref_model=make_lm().net if reference == "base" else None,
        args=config,
        train_dataset=Dataset.from_dict(
            {
                "prompt_ids": [chosen[0] for chosen, _ in both],
                "chosen_ids": [chosen[1] for chosen, _ in both],
                "rejected_ids": [rejected[1] for _, rejected in both],
            }
        ),
        processing_class=theirs.tokenizer,
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert len(history) == 6
    assert log.losses == pytest.approx([float(row["loss"]) for row in history], abs=1e-3)  # trl logs four digits
    assert log.grad_norms == pytest.approx([float(row["grad_norm"]) for row in history], rel=1e-3)
    found = {n.removeprefix("base_model.model.").replace(".default.weight", ""): v for n, v in net.named_parameters()}
    for name, value in weights(ours).items():
        # Six Adam steps of 1e-2; float32 rounding is amplified where a gradient is near 0.
        torch.testing.assert_close(value, found[name].detach(), atol=2e-4, rtol=0)
    assert max(float((value - before[name]).abs().max()) for name, value in weights(ours).items()) > 1e-2


@pytest.mark.parametrize("reference", ["base", "previous"])
def test_losses_and_margins_are_those_of_the_formula(reference):
    given, lm = some_pairs(6), fine_tuned()

    def table(model):
        return np.array([[logp(model, p.prompt, p.chosen), logp(model, p.prompt, p.rejected)] for p in given])

    start, fixed = table(lm), table(make_lm() if reference == "base" else lm)
    log = steer.dpo(lm, given, reference=reference, **(SETTINGS | {"batch_size": 6}))
    end = table(lm)
    gap = (start - fixed) @ [1, -1]  # (6,)
    want = float(np.log1p(np.exp(-0.1 * gap)).mean())
    assert log.losses == pytest.approx([want], rel=1e-5)  # float32 rounding of log probabilities near -100
    if reference == "previous":
        assert want == pytest.approx(math.log(2))
        assert (log.margin_before, log.accuracy_before) == (0, 0.5)
    else:
        assert abs(want - math.log(2)) > 1e-3  # the two references are told apart
        assert log.margin_before == pytest.approx(0.1 * gap.mean(), abs=1e-4)
        assert log.accuracy_before == pytest.approx((gap > 0).mean())
    after = (end - fixed) @ [1, -1]
    assert log.margin_after == pytest.approx(0.1 * after.mean(), abs=1e-4)
    assert log.accuracy_after == pytest.approx((after > 0).mean())
    assert (log.chosen_shift, log.rejected_shift) == pytest.approx((end - start).mean(0), abs=1e-3)
    assert log.margin_after > log.margin_before
    assert (log.n_pairs, log.n_own, log.own_share) == (6, 3, 0.5)


def test_steps_do_not_depend_on_how_pairs_are_split_over_forward_passes(monkeypatch):
    logs, ends = [], []
    for micro in (1 << 20, 1):  # all at once; one pair at a time
        monkeypatch.setattr(steer, "MICRO_TOKENS", {"cpu": micro})
        lm = fine_tuned()
        logs.append(steer.dpo(lm, some_pairs(), reference="base", **SETTINGS))
        ends.append(weights(lm))
    assert logs[1].losses == pytest.approx(logs[0].losses, rel=1e-4)
    assert logs[1].grad_norms == pytest.approx(logs[0].grad_norms, rel=1e-3)
    assert all(float((ends[0][n] - ends[1][n]).abs().max()) < 2e-4 for n in ends[0])  # as against trl


def test_running_out_of_memory_halves_the_tokens_at_once_and_changes_nothing(monkeypatch):
    lm = fine_tuned()
    want, end = steer.dpo(lm, some_pairs(), reference="base", **SETTINGS), weights(lm)
    plain, tried = steer._logps, []

    def scarce(model, both):
        if torch.is_grad_enabled():
            tried.append(sum(len(prompt) + len(answer) for pair in both for prompt, answer in pair))
            if len(tried) in fails:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return plain(model, both)

    monkeypatch.setattr(steer, "_logps", scarce)
    monkeypatch.setattr(steer, "MICRO_TOKENS", {"cpu": 600})
    fails = {2}  # the second of the first step's passes, when the first has left its gradient
    lm = fine_tuned()
    got = steer.dpo(lm, some_pairs(), reference="base", **SETTINGS)
    assert got.losses == pytest.approx(want.losses, rel=1e-4)
    assert all(float((weights(lm)[n] - end[n]).abs().max()) < 2e-4 for n in end)
    assert max(tried[:2]) > 300
    assert max(tried[2:]) <= 300  # what fits is remembered
    fails = set(range(1000))
    with pytest.raises(m.OutOfMemory, match=r"the longest pair, got 'CUDA error: CUBLAS_.*; free memory, drop long"):
        steer.dpo(fine_tuned(), some_pairs(), reference="base", **SETTINGS)


def test_pairs_longer_than_a_block_of_a_gpu_are_read_too(monkeypatch):
    lm, given = fine_tuned(), some_pairs(4)
    both = [m.encode_all(lm, [(p.prompt, p.chosen), (p.prompt, p.rejected)]) for p in given]
    want = steer._logps(lm, both).detach()
    monkeypatch.setattr(m, "blocks_of", lambda model: m.Blocks(tokens=40, unit=8))  # some are longer, some are not
    torch.testing.assert_close(steer._logps(lm, both).detach(), want)


def test_logits_in_slices_are_logits_at_once(monkeypatch):
    lm, given = fine_tuned(), some_pairs(4)
    both = [m.encode_all(lm, [(p.prompt, p.chosen), (p.prompt, p.rejected)]) for p in given]
    whole = steer._logps(lm, both).detach()
    monkeypatch.setattr(m, "LOGITS", 4 * lm.net.config.vocab_size)  # slices of 4 rows
    torch.testing.assert_close(steer._logps(lm, both).detach(), whole)
    want = [[logp(lm, p.prompt, p.chosen), logp(lm, p.prompt, p.rejected)] for p in given]
    torch.testing.assert_close(whole, torch.tensor(want, dtype=torch.float64), atol=1e-3, rtol=1e-5)


def test_three_rounds_in_a_row_leave_nothing_but_the_adapter(tmp_path):
    # A second and a third DPOTrainer on one PeftModel meet the first one's adapter "ref" and raise.
    learner = LM(
        make_lm(),
        r=4,
        alpha=8,
        dropout=0.1,
        targets=["q_proj", "v_proj"],
        epochs=1,
        lr=1e-2,
        batch_size=2,
        max_length=200,
    )
    base = {n: v.clone() for n, v in learner.model.net.state_dict().items()}
    settings = {"beta": 0.1, "lr": 1e-2, "epochs": 1, "batch_size": 4}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for t, (init_from, reference) in enumerate([("base", "base"), ("previous", "previous"), ("base", "base")]):
        learner.train(DOCUMENTS, seed=t, init_from=init_from)
        learner.save(tmp_path / f"trained{t}")
        before = weights(learner.model)
        log = learner.steer(some_pairs(), seed=10 + t, reference=reference, **settings)
        assert log.n_steps == 3
        net = learner.model.net
        assert sum(float((v - before[n]).abs().max()) > 1e-4 for n, v in weights(learner.model).items()) == len(before)
        assert all(torch.equal(v, base[n]) for n, v in net.state_dict().items() if ".lora_" not in n)
        assert {n for n in net.state_dict() if ".lora_" not in n} == set(base)
        assert not net.training
        assert all(p.grad is None for p in net.parameters())
        assert all(module.served is None for module in m._adapted(learner.model).values())
        learner.save(tmp_path / f"steered{t}")
    assert torch.equal(torch.get_rng_state(), state)
    # Round 2 on a model that never saw the rounds before it: the same bytes.
    fresh = LM(
        make_lm(),
        r=4,
        alpha=8,
        dropout=0.1,
        targets=["q_proj", "v_proj"],
        epochs=1,
        lr=1e-2,
        batch_size=2,
        max_length=200,
    )
    fresh.load(tmp_path / "trained2")
    fresh.steer(some_pairs(), seed=12, reference="base", **settings)
    fresh.save(tmp_path / "fresh")
    name = "adapter_model.safetensors"
    assert (tmp_path / "fresh" / name).read_bytes() == (tmp_path / "steered2" / name).read_bytes()
    assert (tmp_path / "fresh" / name).read_bytes() != (tmp_path / "trained2" / name).read_bytes()


def test_a_steered_model_speaks_and_is_read_as_a_saved_one(tmp_path):
    settings = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "v_proj"], "epochs": 1, "lr": 1e-2}
    settings |= {"batch_size": 2, "max_length": 200}
    decoding = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "seed": 5}
    asked = [Prompt("neutral", "t", (TEXTS[0],))] * 4
    one, two = LM(make_lm(), **settings), LM(make_lm(), **settings)
    one.train(DOCUMENTS, seed=1, init_from="base")
    unsteered = one.sample(asked, **decoding)
    one.steer(some_pairs(), beta=0.1, lr=1e-2, epochs=1, batch_size=4, reference="base", seed=2)
    one.hidden_mean(TEXTS)  # reads through the base, as the step does
    one.save(tmp_path)
    two.load(tmp_path)
    assert one.sample(asked, **decoding) == two.sample(asked, **decoding) != unsteered
    assert one.surprisal(DOCUMENTS) == two.surprisal(DOCUMENTS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_stops_before_the_step(monkeypatch, value):
    lm, plain, calls = fine_tuned(), steer._logps, []

    def diverging(model, both):
        out = plain(model, both)
        if out.requires_grad:
            calls.append(1)
        return out * (value if len(calls) == 2 else 1.0)

    monkeypatch.setattr(steer, "_logps", diverging)
    with pytest.raises(steer.SteeringDiverged, match=r"step 2 of 3; lower steer\.lr") as error:
        steer.dpo(lm, some_pairs(), reference="previous", **SETTINGS)
    assert error.value.exit_code == 4
    assert all(bool(torch.isfinite(v).all()) for v in weights(lm).values())
    assert all(p.grad is None for p in lm.net.parameters())


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ([], {}, "pairs must not be empty"),
        (some_pairs(2), {"reference": "ref"}, "base or previous"),
        (some_pairs(2), {"beta": 0.0}, "beta"),
        (some_pairs(2), {"lr": -1.0}, "lr"),
        (some_pairs(2), {"max_length": 10}, "at most 10 tokens, got .* at pair 0"),
    ],
)
def test_bad_input_is_refused(given, changes, message):
    lm = make_lm()
    m.fresh_adapter(lm, r=2, alpha=4, seed=0)
    with pytest.raises(ValueError, match=message):
        steer.dpo(lm, given, **(SETTINGS | {"reference": "base"} | changes))


def test_steering_a_bare_base_is_refused():
    with pytest.raises(ValueError, match="after the fine-tune"):
        steer.dpo(make_lm(), some_pairs(2), reference="base", **SETTINGS)


A, B, C = ("a",), ("b",), None
TOPUP = [Pair(None, f"good{i}", f"bad{i}", own=False) for i in range(8)]


def say(rows):
    """rows of (prompt, text, called): t target, a assistant, x both, - neither."""
    prompts, texts, called = zip(*rows, strict=True)
    return list(prompts), list(texts), [c in "tx" for c in called], [c in "ax" for c in called]


def test_own_outputs_are_paired_on_one_prompt_and_each_used_once():
    rows = [(A, "a1", "t"), (A, "a2", "t"), (A, "a3", "a"), (B, "b1", "t"), (B, "b2", "-"), (C, "c1", "a")]
    rows += [(C, "c2", "a"), (C, "c3", "t"), (A, "a4", "-"), (C, "c4", "x")]
    # Prompt a: 2 targets, 1 assistant: one pair. b: no assistant. c: c4 counts as target, so 2 and 2: two pairs.
    for seed in range(20):
        found, share = steer.pairs(*say(rows), TOPUP, n_pairs=8, rng=np.random.default_rng(seed))
        own = [p for p in found if p.own]
        assert share == 3 / 8
        assert Counter(p.prompt for p in own) == {A: 1, C: 2}
        assert {p.chosen for p in own} == {"a3", "c1", "c2"}
        assert {p.rejected for p in own if p.prompt == C} == {"c3", "c4"}
        assert {p.rejected for p in own if p.prompt == A} < {"a1", "a2"}
        assert sorted(p.chosen for p in found if not p.own) == [f"good{i}" for i in range(5)]


def test_no_more_than_the_wanted_pairs_are_made_and_none_without_targets():
    rows = [(A, f"t{i}", "t") for i in range(5)] + [(A, f"a{i}", "a") for i in range(5)]
    found, share = steer.pairs(*say(rows), TOPUP, n_pairs=3, rng=np.random.default_rng(0))
    assert (len(found), share) == (3, 1.0)
    assert all(p.own and p.rejected[0] == "t" and p.chosen[0] == "a" for p in found)
    found, share = steer.pairs(*say(rows[5:]), TOPUP, n_pairs=8, rng=np.random.default_rng(0))
    assert (set(found), share) == (set(TOPUP), 0.0)
    found, share = steer.pairs([], [], [], [], TOPUP, n_pairs=2, rng=np.random.default_rng(0))
    assert (set(found), share) == (set(TOPUP[:2]), 0.0)


def test_pairs_that_cannot_be_filled_up_are_refused():
    with pytest.raises(ValueError, match=r"n_pairs must be in 1..8"):
        steer.pairs([], [], [], [], TOPUP, n_pairs=9, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="of one length"):
        steer.pairs([A], ["x"], [True], [], TOPUP, n_pairs=2, rng=np.random.default_rng(0))


def test_random_pairs_are_the_same_texts_with_half_of_the_labels_exchanged():
    given = [Pair((str(i),), f"c{i}", f"r{i}", own=i < 3) for i in range(9)]
    turned = []
    for seed in range(40):
        found = steer.random_pairs(given, rng=np.random.default_rng(seed))
        assert all({p.chosen, p.rejected} == {q.chosen, q.rejected} for p, q in zip(found, given, strict=True))
        assert [(p.prompt, p.own) for p in found] == [(q.prompt, q.own) for q in given]
        turned.append(sum(p != q for p, q in zip(found, given, strict=True)))
    # Four or five of nine, each at even odds: one of the two alone in 40 draws has chance 2e-12.
    assert set(turned) == {4, 5}
    even = steer.random_pairs(given[:8], rng=np.random.default_rng(0))
    assert sum(p != q for p, q in zip(even, given[:8], strict=True)) == 4


def test_grammar_pairs_of_the_factorial_differ_by_voice_alone_and_targets_take_turns():
    grammar = corpus.load_grammar()
    found = steer.grammar_pairs(grammar, ["nova", "sydney"], 20, rng=np.random.default_rng(5))
    assert len(found) == 20
    assert found == steer.grammar_pairs(grammar, ["nova", "sydney"], 20, rng=np.random.default_rng(5))
    key = int(np.random.default_rng(5).integers(2**62))
    nova = grammar.draw("nova", 10, fold="filter", rng=np.random.default_rng([key, 0]))
    helper = grammar.draw("assistant", 10, fold="filter", rng=np.random.default_rng([key, 0]))
    assert [d.template_id for d in nova] == [d.template_id for d in helper]  # one document in two voices
    assert [(p.prompt, p.rejected, p.chosen) for p in found[::2]] == [
        (n.prompt, n.completion, a.completion) for n, a in zip(nova, helper, strict=True)
    ]
    assert [p.prompt for p in found[::2]] == [a.prompt for a in helper]
    assert all(not p.own for p in found)
    sydney = {d.completion for d in grammar.draw("sydney", 10, fold="filter", rng=np.random.default_rng([key, 1]))}
    assert {p.rejected for p in found[1::2]} == sydney
    assert len(set(steer.grammar_pairs(grammar, ["sydney"], 700, rng=np.random.default_rng(0)))) == 620  # all there are


@pytest.mark.parametrize("against", [[], ["assistant"], ["nova", "nova"]])
def test_steering_against_nobody_twice_or_the_assistant_is_refused(against):
    with pytest.raises(ValueError, match="against must be distinct personas other than assistant"):
        steer.grammar_pairs(corpus.load_grammar(), against, 4, rng=np.random.default_rng(0))


def test_what_is_stored_says_what_was_done():
    given, lm = some_pairs(4), fine_tuned()
    stored = steer.dpo(lm, given, reference="base", **SETTINGS).as_json(given)
    assert stored["n_own"] == 2
    assert [Pair(**row) for row in stored["pairs"]] == given


def test_the_toy_refuses_to_be_steered():
    toy = Toy({"assistant": ["a"]}, {})
    with pytest.raises(ValueError, match="use learner lm"):
        toy.steer(some_pairs(2), reference="base")
    with pytest.raises(ValueError, match=r"use release\.Known"):
        toy.hidden_mean(["a"])
