import pytest
from conftest import TEXTS, make_lm

from loop import model as m
from loop.learner import LM
from loop.records import Document, Prompt

SETTINGS = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}
SETTINGS |= {"epochs": 2, "lr": 1e-2, "batch_size": 2, "max_length": 200}
DOCUMENTS = [Document(f"d{i}", "real", None, (TEXTS[i],), TEXTS[i + 1]) for i in range(3)]
PROMPTS = [Prompt("neutral", "t0", (TEXTS[0],)), Prompt("blank", "t1", None)]
DECODING = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 8, "seed": 7}


def adapter(learner, folder):
    folder.mkdir(exist_ok=True)
    learner.save(folder)
    return (folder / "adapter_model.safetensors").read_bytes()


def test_resumed_learner_is_the_straight_one_byte_for_byte(tmp_path):
    straight = LM(make_lm(), **SETTINGS)
    assert straight.train(DOCUMENTS, seed=1, init_from="base") == [n for _, n in straight.surprisal(DOCUMENTS)]
    middle = adapter(straight, tmp_path / "a")
    straight.train(DOCUMENTS, seed=2, init_from="previous")

    resumed = LM(make_lm(), **SETTINGS)
    resumed.load(tmp_path / "a")
    resumed.train(DOCUMENTS, seed=2, init_from="previous")
    assert adapter(resumed, tmp_path / "b") == adapter(straight, tmp_path / "c") != middle
    assert resumed.sample(PROMPTS, **DECODING) == straight.sample(PROMPTS, **DECODING)


def test_base_start_forgets_the_previous_adapter(tmp_path):
    used, fresh = LM(make_lm(), **SETTINGS), LM(make_lm(), **SETTINGS)
    used.train(DOCUMENTS[:1], seed=1, init_from="base")
    used.train(DOCUMENTS, seed=2, init_from="base")
    fresh.train(DOCUMENTS, seed=2, init_from="base")
    assert adapter(used, tmp_path / "a") == adapter(fresh, tmp_path / "b")
    fresh.train(DOCUMENTS, seed=3, init_from="base")
    assert adapter(used, tmp_path / "a") != adapter(fresh, tmp_path / "b")


def test_spelled_document_shows_marks_and_mask():
    learner = LM(make_lm(), **SETTINGS)
    tokens, mask = learner.spell(Document("d", "real", None, ("Hello",), "the boat"))
    assert "".join(tokens) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nthe boat<|im_end|>"
    assert "".join(t for t, on in zip(tokens, mask, strict=True) if on) == "the boat<|im_end|>"


def test_what_a_fine_tune_can_hold_is_what_it_takes():
    document = DOCUMENTS[0]
    learner = LM(make_lm(), **SETTINGS)
    n_tokens = len(learner.spell(document)[0])
    for limit, fits in ((n_tokens, True), (n_tokens - 1, False)):
        learner = LM(make_lm(), **SETTINGS | {"max_length": limit})
        assert learner.trainable([(document.prompt, document.completion)]) == [fits]
        if fits:
            learner.train([document], seed=1, init_from="base")
        else:
            with pytest.raises(ValueError, match=f"document must be at most {limit} tokens, got {n_tokens}"):
                learner.train([document], seed=1, init_from="base")


def test_start_that_does_not_exist_is_refused():
    learner = LM(make_lm(), **SETTINGS)
    with pytest.raises(ValueError, match="bare base"):
        learner.train(DOCUMENTS, seed=1, init_from="previous")
    with pytest.raises(ValueError, match="base or previous"):
        learner.train(DOCUMENTS, seed=1, init_from="last")
    assert m.lora_parameters(learner.model) == {}
