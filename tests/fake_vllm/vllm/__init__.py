"""What loop/vllm_worker.py uses of vLLM, by transformers and peft: so the worker is tested where vLLM is not installed.

As vLLM it keeps an adapter by its number alone: who gives a number twice gets the old adapter. A batch that it breaks
off stays in it, and spoils the next. It prints to standard output, as vLLM does.
"""

import os
from dataclasses import dataclass
from types import SimpleNamespace

import torch


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int
    detokenize: bool


class LLM:
    def __init__(self, base, *, dtype, max_model_len, max_lora_rank, **settings):
        from transformers import AutoModelForCausalLM

        print("loading", base)
        assert settings["enable_lora"]
        assert settings["skip_tokenizer_init"]
        self.base, self.dtype, self.max_length, self.rank = base, getattr(torch, dtype), max_model_len, max_lora_rank
        self.fresh = lambda: AutoModelForCausalLM.from_pretrained(self.base, dtype=self.dtype)
        self.nets = {0: self.fresh()}
        self.broken_off = False

    def generate(self, prompts, settings, *, lora_request, use_tqdm):
        from peft import PeftModel

        print("generating", len(prompts))
        number = 0 if lora_request is None else lora_request.lora_int_id
        if number not in self.nets:
            self.nets[number] = PeftModel.from_pretrained(self.fresh(), lora_request.lora_path)
            assert self.nets[number].peft_config["default"].r <= self.rank
        net = self.nets[number]
        return [
            SimpleNamespace(outputs=[self._one(net, prompt["prompt_token_ids"], s)])
            for prompt, s in zip(prompts, settings, strict=True)
        ]

    def _one(self, net, prompt, s):
        if len(prompt) + s.max_tokens > self.max_length:
            raise ValueError(f"The decoder prompt (length {len(prompt)}) is longer than the maximum model length")
        if prompt[-3:] == [7, 7, 7]:
            os._exit(3)  # a process that dies
        if self.broken_off or prompt[-3:] == [9, 9, 9]:
            self.broken_off = True
            raise RuntimeError("CPU Generator does not use offset")
        noise, tokens, logprobs = torch.Generator().manual_seed(s.seed), [], []
        while len(tokens) < s.max_tokens and (not tokens or tokens[-1] not in s.stop_token_ids):
            with torch.no_grad():
                logits = net(torch.tensor([prompt + tokens])).logits[0, -1].float()
            if s.temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / s.temperature).softmax(-1), 1, generator=noise))
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(logits.log_softmax(-1)[token]))})
        return SimpleNamespace(token_ids=tokens, logprobs=logprobs)
