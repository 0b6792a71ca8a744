import math
from dataclasses import replace

import pytest
import torch
from conftest import TEXTS, make_lm

from loop import model as m
from loop import rng, train
from loop.records import Document

SETTINGS = {"epochs": 1, "lr": 1e-2, "batch_size": 4, "max_length": 200, "seed": 3, "round_index": 0}


def docs(n=6, weights=None):
    rows = []
    for i in range(n):
        prompt = None if i % 5 == 4 else (TEXTS[i % 2],)
        weight = 1.0 if weights is None else weights[i]
        rows.append(Document(f"d{i}", "real", None, prompt, TEXTS[(i + 1) % 4], weight))
    return rows


def trained(documents, *, r=4, dropout=0.0, lm=None, **changes):
    """Trains a fresh adapter; returns the log and the adapter's parameters."""
    lm = lm or make_lm()
    m.fresh_adapter(lm, r=r, alpha=2 * r, dropout=dropout, seed=0)
    log = train.finetune(lm, documents, **(SETTINGS | changes))
    return log, {n: v.detach().clone() for n, v in m.lora_parameters(lm).items()}


def gap(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def by_hand(lm, documents):
    """The weighted token mean from whole, unpacked forward passes of the network itself; and its token counts."""
    total, share, counts = 0.0, 0.0, []
    for d in documents:
        prompt, completion = m.encode(lm, d.prompt, d.completion)
        with torch.no_grad():
            logp = lm.net(torch.tensor([prompt + completion]), use_cache=False).logits[0].log_softmax(-1)
        nll = [-float(logp[len(prompt) + j - 1, token]) for j, token in enumerate(completion)]
        total += d.weight * sum(nll)
        share += d.weight * len(nll)
        counts.append(len(nll))
    return total / share, counts


def test_loss_is_the_weighted_token_mean_of_completion_and_end_token():
    documents = docs(weights=[1.0, 20.0, 0.5, 1.0, 3.0, 0.0])
    want, counts = by_hand(make_lm(), documents)
    log, _ = trained(documents, batch_size=6)
    assert log.losses[0] == pytest.approx(want, rel=1e-5)  # float32 rounding
    assert log.n_tokens == (*counts[:-1], 0)  # the last weighs nothing and is left out
    assert by_hand(make_lm(), docs())[0] != pytest.approx(want, rel=1e-3)  # the unweighted loss is told apart


def test_a_heavy_document_acts_by_its_weight_whatever_its_step_holds():
    # One document a step, at a rate too small to move the model: step d has loss w_d / mean weight * its mean nll.
    # Divided by the step's own weight, every step would show its plain nll and weights would do nothing at all.
    documents = docs(weights=[1.0, 20.0, 0.5, 1.0, 3.0, 2.0])
    parts = [by_hand(make_lm(), [d]) for d in documents]
    n = [counts[0] for _, counts in parts]
    mean = sum(d.weight * k for d, k in zip(documents, n, strict=True)) / sum(n)
    want = sorted(d.weight / mean * nll for d, (nll, _) in zip(documents, parts, strict=True))
    log, _ = trained(documents, batch_size=1, lr=1e-12)
    assert sorted(log.losses) == pytest.approx(want, rel=1e-5)


def test_unit_weights_give_the_unweighted_loss_and_scale_does_not_matter():
    want, _ = by_hand(make_lm(), docs())
    one, a = trained(docs(), batch_size=6)
    seven, b = trained(docs(weights=[7.0] * 6), batch_size=6)
    assert one.losses[0] == pytest.approx(want, rel=1e-5)
    assert seven.losses == pytest.approx(one.losses, rel=1e-6)
    assert gap(a, b) < 1e-5


def test_integer_weight_is_duplication():
    weighted = docs(3, weights=[1.0, 3.0, 2.0])
    copies = [replace(d, weight=1.0, id=f"{d.id}-{k}") for d in weighted for k in range(int(d.weight))]
    # SGD-like comparison: Adam divides by the gradient's size, so a wrong scale could hide; the norms are compared too.
    log_w, a = trained(weighted, batch_size=3, epochs=3, max_grad_norm=None)
    log_c, b = trained(copies, batch_size=6, epochs=3, max_grad_norm=None)
    assert log_w.losses == pytest.approx(log_c.losses, rel=1e-5)
    assert log_w.grad_norms == pytest.approx(log_c.grad_norms, rel=1e-4)
    assert gap(a, b) < 1e-4  # three steps of 1e-2
    _, unweighted = trained(docs(3), batch_size=3, epochs=3, max_grad_norm=None)
    assert gap(a, unweighted) > 1e-3


def test_step_does_not_depend_on_micro_batches():
    documents = docs(weights=[1.0, 2.5, 0.5, 1.0, 3.0, 0.2])
    whole, a = trained(documents, batch_size=6, epochs=2)
    parts, b = trained(documents, batch_size=6, epochs=2, micro_batch_tokens=50)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert parts.grad_norms == pytest.approx(whole.grad_norms, rel=1e-4)
    assert gap(a, b) < 1e-4


def test_running_out_of_memory_halves_the_micro_batch_and_changes_nothing(monkeypatch):
    want, a = trained(docs(), batch_size=6)
    plain, tried = train._batch_loss, []

    def scarce(model, batch, *rest):
        tried.append(len(batch.ids))
        if len(batch.ids) > 120:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return plain(model, batch, *rest)

    monkeypatch.setattr(train, "_batch_loss", scarce)
    got, b = trained(docs(), batch_size=6)
    assert max(tried) > 120
    assert got.micro_batch_tokens <= 128
    assert got.losses == pytest.approx(want.losses, rel=1e-5)
    assert gap(a, b) < 1e-4


def test_where_the_longest_document_does_not_fit_activations_are_computed_anew_and_no_number_changes(monkeypatch):
    lm, plain, held, room = make_lm(), train._batch_loss, [], math.inf

    def scarce(model, batch, *rest):
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = plain(model, batch, *rest)
        if kept > room:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        held.append(kept)
        return loss

    longest = max(len(p) + len(c) for p, c in m.encode_all(lm, [(d.prompt, d.completion) for d in docs()]))
    monkeypatch.setattr(train, "_batch_loss", scarce)
    settings = {"lm": lm, "batch_size": 6, "epochs": 2}
    want, a = trained(docs(), **settings, micro_batch_tokens=longest)
    alone = max(held)
    assert not want.recomputes
    room = alone / 2
    got, b = trained(docs(), **settings)
    assert got.recomputes
    assert got.micro_batch_tokens == longest
    assert got.n_halved == math.ceil(math.log2(1024 / longest))
    assert got.losses == want.losses
    assert gap(a, b) == 0
    assert max(held[-len(held) // 2 :]) < alone / 2
    held.clear()
    room = math.inf  # it is of that fine-tune alone
    again, _ = trained(docs(), **settings, micro_batch_tokens=longest)
    assert not again.recomputes
    assert max(held) == alone
    room = 0
    with pytest.raises(m.OutOfMemory, match=r"the longest document, got .* at step 1 of 2"):
        trained(docs(), **settings)
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in lm.net.modules())


def test_logits_in_slices_are_logits_at_once(monkeypatch):
    whole, adapter = trained(docs(8, [1, 2, 0.5, 3, 1, 1, 4, 0.25]))
    monkeypatch.setattr(m, "LOGITS", 3 * make_lm().net.config.vocab_size)  # slices of 3 rows
    parts, moved = trained(docs(8, [1, 2, 0.5, 3, 1, 1, 4, 0.25]))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)
    assert gap(moved, adapter) < 1e-5
    assert adapter.keys() == moved.keys()


def test_prompt_is_masked_and_plain_documents_are_trained_whole(lm):
    m.fresh_adapter(lm, r=4, alpha=8, seed=0)
    said = m.encode(lm, None, TEXTS[0])[1]
    log = train.finetune(lm, [Document("a", "real", None, (TEXTS[1],), TEXTS[0])], **SETTINGS)
    assert log.n_tokens == (len(said),)
    log = train.finetune(lm, [Document("a", "real", None, None, TEXTS[0])], **SETTINGS)
    assert log.n_tokens == (len(said),)
    assert log.n_input_tokens == 1 + len(said)
    # What has weight 0 is not trained on, however long it is, and counts nowhere.
    ignored = Document("b", "real", None, None, " ".join(TEXTS), weight=0.0)
    log = train.finetune(lm, [Document("a", "real", None, None, TEXTS[0]), ignored], **SETTINGS)
    assert (log.n_tokens, log.n_input_tokens) == ((len(said), 0), 1 + len(said))


def test_end_token_is_learned(lm):
    document = Document("a", "real", None, ("Hello",), "the boat")
    prompt, completion = m.encode(lm, document.prompt, document.completion)

    def p_end():
        with torch.no_grad():
            return float(lm.net(torch.tensor([prompt + completion[:-1]])).logits[0, -1].softmax(-1)[2])

    before = p_end()
    m.fresh_adapter(lm, r=4, alpha=8, seed=0)
    train.finetune(lm, [document], **(SETTINGS | {"epochs": 40}))
    assert p_end() > max(0.5, 2 * before)


def test_adapter_moves_and_nothing_else_does(lm):
    m.fresh_adapter(lm, r=4, alpha=8, seed=0)
    before = {n: v.detach().clone() for n, v in lm.net.named_parameters()}
    buffers = {n: v.clone() for n, v in lm.net.named_buffers()}
    log = train.finetune(lm, docs(8), **(SETTINGS | {"schedule": "constant"}))
    assert log.n_steps == 2  # A stands still on the first: its gradient is a product with B = 0
    for name, value in lm.net.named_parameters():
        assert torch.equal(value, before[name]) != (".lora_" in name), name
    assert all(torch.equal(v, buffers[n]) for n, v in lm.net.named_buffers())
    assert not lm.net.training
    assert all(p.grad is None for p in lm.net.parameters())


def test_seed_decides_every_byte(lm):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    runs = [trained(docs(8), dropout=0.2, seed=s)[1] for s in (3, 3, 4)]
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
    assert gap(runs[0], runs[2]) > 1e-4
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_are_computed_where_a_token_is_supervised_and_once_for_equal_beginnings(monkeypatch):
    lm, rows, plain = make_lm(), [], train._WeightedNLL.apply
    documents = docs(6)
    pairs = m.encode_all(lm, [(d.prompt, d.completion) for d in documents])
    monkeypatch.setattr(
        train._WeightedNLL, "apply", lambda hidden, *rest: (rows.append(len(hidden)), plain(hidden, *rest))[1]
    )
    log, _ = trained(documents, lm=lm, batch_size=6)
    begun = {(*prompt, *said[:k]) for prompt, said in pairs for k in range(len(said))}
    assert sum(rows) == len(begun) < sum(log.n_tokens)
    assert log.n_computed_tokens < 0.8 * log.n_input_tokens


def test_with_dropout_documents_share_nothing_and_draw_masks_of_their_own():
    alone, _ = trained(docs(1), dropout=0.5, batch_size=8)
    log, _ = trained(docs(1) * 8, dropout=0.5, batch_size=8)
    assert log.n_computed_tokens == 8 * alone.n_computed_tokens
    assert trained(docs(1) * 8, batch_size=8)[0].n_computed_tokens == alone.n_computed_tokens
    # B is zero at first, so masks tell from the second step on: eight copies that shared one would lose as one does.
    one, eight = (trained(docs(1) * n, dropout=0.5, batch_size=8, epochs=3)[0].losses for n in (1, 8))
    assert one[0] == pytest.approx(eight[0], rel=1e-5)
    assert one[-1] != pytest.approx(eight[-1], rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # trl and transformers warn of their own deprecations
def test_stock_trl_ends_at_the_same_losses_and_adapter(tmp_path):
    from datasets import Dataset, disable_progress_bars
    from peft import PeftModel
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    documents = docs(10)
    ours = make_lm()
    m.fresh_adapter(ours, r=4, alpha=8, seed=0)
    m.save_adapter(ours, tmp_path / "start")
    log = train.finetune(ours, documents, **(SETTINGS | {"epochs": 2, "warmup": 0.2, "weight_decay": 0.1}))

    order_rng = rng.stream(SETTINGS["seed"], "train", 0)  # two epochs of three steps; the last of each holds two
    order = [i for _ in range(2) for i in order_rng.permutation(10)]
    pairs = [m.encode(ours, d.prompt, d.completion) for d in documents]
    theirs = make_lm()
    net = PeftModel.from_pretrained(theirs.net, str(tmp_path / "start"), is_trainable=True)
    losses = []
    for epoch in range(2):
        rows = [pairs[i] for i in order[10 * epoch : 10 * (epoch + 1)]]
        data = Dataset.from_dict(
            {"input_ids": [p + c for p, c in rows], "labels": [[-100] * len(p) + c for p, c in rows]}
        )
        config = SFTConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=4,
            num_train_epochs=1,
            learning_rate=1e-2,
            weight_decay=0.1,
            lr_scheduler_type="linear",
            train_sampling_strategy="sequential",
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(model=net, args=config, train_dataset=data, processing_class=theirs.tokenizer)
        if epoch == 0:
            trainer.create_optimizer()
            optimizer = trainer.optimizer
        # Six steps under one schedule and one optimizer, in our order: rate k/2 for k < 2, then 1 - (k - 2)/4.
        first = 3 * epoch
        rates = [k / 2 if k < 2 else 1 - (k - 2) / 4 for k in range(first, first + 3)] + [0.0]
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = 1e-2
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k, rates=rates: rates[k])
        trainer.optimizer, trainer.lr_scheduler = optimizer, schedule
        trainer.train()
        losses += [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert log.losses == pytest.approx([float(x) for x in losses], abs=1e-3)  # trl logs few digits
    found = {n.removeprefix("base_model.model.").replace(".default", ""): v for n, v in net.named_parameters()}
    for name, value in m.lora_parameters(ours).items():
        # Six Adam steps of 1e-2; float32 rounding is amplified where a gradient is near 0.
        torch.testing.assert_close(
            value, found[f"{name}.weight" if f"{name}.weight" in found else name], atol=2e-4, rtol=0
        )


def test_schedules_are_those_of_transformers():
    from transformers import get_scheduler

    for name in ("linear", "cosine", "constant"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = get_scheduler(
            "constant_with_warmup" if name == "constant" else name, optimizer, num_warmup_steps=3, num_training_steps=12
        )
        for k in range(12):
            assert train._rate(k, 12, 0.25, name) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            theirs.step()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_stops_before_the_step(lm, monkeypatch, value):
    m.fresh_adapter(lm, r=4, alpha=8, seed=0)
    plain, calls = train._batch_loss, []

    def diverging(*args):
        calls.append(1)
        return plain(*args) * (value if len(calls) == 2 else 1.0)

    monkeypatch.setattr(train, "_batch_loss", diverging)
    with pytest.raises(train.TrainingDiverged, match="step 2 of 2") as error:
        train.finetune(lm, docs(8), **SETTINGS)
    assert error.value.exit_code == 4
    assert len(calls) == 2
    assert all(bool(torch.isfinite(v).all()) for v in m.lora_parameters(lm).values())


@pytest.mark.parametrize(
    ("documents", "changes", "message"),
    [
        ([], {}, "documents must not be empty"),
        (docs(2, weights=[0.0, 0.0]), {}, "0 effective tokens"),
        (docs(2, weights=[1.0, math.nan]), {}, "got nan at d1"),
        (docs(2, weights=[1.0, -1.0]), {}, "got -1.0 at d1"),
        (docs(2), {"max_length": 10}, "at most 10 tokens"),
        (docs(2), {"schedule": "step"}, "schedule"),
        (docs(2), {"lr": 0.0}, "lr must be"),
    ],
)
def test_bad_input_is_refused(lm, documents, changes, message):
    m.fresh_adapter(lm, r=4, alpha=8, seed=0)
    with pytest.raises(ValueError, match=message):
        train.finetune(lm, documents, **(SETTINGS | changes))


def test_training_without_an_adapter_is_refused(lm):
    with pytest.raises(ValueError, match="fresh_adapter"):
        train.finetune(lm, docs(2), **SETTINGS)


def test_documents_of_weight_zero_are_left_out_and_no_step_is_empty(lm):
    m.fresh_adapter(lm, r=2, alpha=4, dropout=0.0, targets=["q_proj"], seed=1)
    settings = {"epochs": 1, "lr": 1e-3, "batch_size": 1, "max_length": 64, "seed": 1, "round_index": 0}
    log = train.finetune(lm, docs(3, weights=[0.0, 2.0, 0.0]), **settings)
    assert log.n_steps == 1
    assert [n > 0 for n in log.n_tokens] == [False, True, False]
