"""The documentation's vLLM example on a CPU, with made-up weights in the shape of Qwen2.5-0.5B.

docs/vllm.md lists each line that differs from the published example, and why.
"""

import os

# One GB of KV cache; the checkpoint's size follows it. No report home.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import http
import urllib

from vllm import AsyncLLMEngine, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs

# Init vLLM engine
engine_args = AsyncEngineArgs(
    model="/cortex/model",
    load_format="dummy",  # no weights to download: they are made from a seed
    skip_tokenizer_init=True,
    max_model_len=2048,
    enforce_eager=True,  # no C++ compiler in the image
    async_scheduling=False,  # Async scheduling is incompatible with checkpoint restore
)
engine = AsyncLLMEngine.from_engine_args(engine_args)

# The published block, byte for byte.
# fmt: off
# Trigger checkpoint
try:
    import json
    req = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST")
    with urllib.request.urlopen(req, timeout=300) as response:
        result = response.read()
        print(json.loads(result))
except http.client.RemoteDisconnected:
    # TCP connections disconnect on restore and throw remote
    pass
# fmt: on


async def generate(prompt: list[int], run_id: str, max_tokens: int = 16):
    """Greedy tokens for a prompt of token ids."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, detokenize=False, ignore_eos=True)
    final = None
    async for output in engine.generate({"prompt_token_ids": prompt}, sampling, run_id):
        final = output
    return {"tokens": list(final.outputs[0].token_ids)}
