"""Samples with vLLM, in an environment of its own that has vLLM and nothing of this project; see loop/engine.py.

    THAT_ENVIRONMENT/bin/python -I loop/vllm_worker.py

JSON lines in, JSON lines out. The first names the base and is answered when it is loaded; every other is a batch. An
answer {"error": ...} says what vLLM refused, and is the last: requests that it broke off would still lie in the engine.
The process ends with its input, too.
"""

import json
import os
import sys
from typing import Any, TextIO


def main() -> None:
    # vLLM and what it loads write to standard output; answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this process is one of its own already
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    serve(sys.stdin, answers)


def serve(requests: TextIO, answers: TextIO) -> None:
    llm = None
    for line in requests:
        request = json.loads(line)
        try:
            if llm is None:
                llm, answer = load(**request), {"loaded": request["base"]}
            else:
                answer = sample(llm, **request)
        except Exception as error:  # whatever it is, whoever waits must hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "error" in answer:
            return


def load(base: str, dtype: str, max_length: int, rank: int, trust_remote_code: bool) -> Any:
    """Loads a base that takes one adapter at a time of at most this rank."""
    import vllm

    on_cpu = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # as loop/engine.py says it
    return vllm.LLM(
        base,
        dtype=dtype,
        max_model_len=max_length,
        trust_remote_code=trust_remote_code,
        skip_tokenizer_init=True,  # tokens in, tokens out
        generation_config="vllm",  # not what the base's own generation_config.json asks for
        logprobs_mode="raw_logprobs",  # at temperature 1, before top_p
        gpu_memory_utilization=0.4,  # training has the rest
        enable_prefix_caching=True,
        # On a CPU a prompt that is read in parts ends a request that has a seed of its own.
        **({"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_length)} if on_cpu else {}),
        enable_lora=True,
        max_loras=1,
        max_lora_rank=next((size for size in (8, 16, 32, 64, 128, 256, 320) if size >= rank), 512),
    )


def sample(
    llm: Any,
    prompts: list[list[int]],
    seeds: list[int],
    adapter: str | None,
    adapter_id: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    end_id: int,
) -> dict[str, Any]:
    """One completion per prompt. An adapter needs an id that none before it had: vLLM caches by id."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    settings = [
        SamplingParams(
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_new_tokens,
            seed=seed,
            stop_token_ids=[end_id],
            ignore_eos=True,  # the end token above is the only one
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )
        for seed in seeds
    ]
    lora = None if adapter is None else LoRARequest(f"adapter-{adapter_id}", adapter_id, adapter)
    said = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], settings, lora_request=lora, use_tqdm=False
    )
    out = [request.outputs[0] for request in said]
    return {
        "tokens": [list(one.token_ids) for one in out],
        "logprobs": [
            sum(step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)) for one in out
        ],
    }


if __name__ == "__main__":
    main()
