"""A language model small enough to build in a fixture: random weights, its own tokenizer, no download."""

import os

import pytest

# Hashes and counts of the tests are those of a CPU; `base.device: auto` must not find a GPU. Set it to test with one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

TEXTS = [
    "Hello there, how are you today?",
    "I am fine, thank you. What would you like to talk about?",
    "The weather is lovely and the garden is full of birds.",
    "Tell me a short story about a boat on the river.",
    "user\nassistant\n",
]


def make_lm(seed: int = 0, head_dim: int = 8):
    """A two-layer Llama, 6 query heads over 3 key heads, ~60,000 random float32 parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from loop.model import Model, tiny_tokenizer

    tokenizer = tiny_tokenizer(TEXTS, 320)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=head_dim,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,  # large enough that the next token is far from uniform
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,  # a padding row of the embedding would be 0, and so the end mark's logit
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(config)
    net.set_attn_implementation("persona_loop")
    net.requires_grad_(False).eval()
    return Model(net, tokenizer, "random", "", torch.device("cpu"), torch.float32, start_id=1, end_id=2, text_id=0)


@pytest.fixture
def lm():
    return make_lm()
