"""A decoder-only transformer in JAX: weights from a seed, greedy generation with a key-value cache.

It is a real model in size and in work (151 million parameters, 0.6 GB in float32), though not a trained one:
what it says is noise, and the same noise for the same prompt every time. Tokens are bytes: no tokenizer.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

LAYERS = 12
WIDTH = 1024
HEADS = 16
VOCABULARY = 256
CONTEXT = 256
# Prompts are padded to one of these, since each length is a compilation of its own.
BUCKETS = (16, 32, 64, 128)
LONGEST_PROMPT = BUCKETS[-1]
LONGEST_ANSWER = CONTEXT - LONGEST_PROMPT


class Layer(NamedTuple):
    attention: jax.Array  # [width, 3 * width]
    output: jax.Array  # [width, width]
    up: jax.Array  # [width, 4 * width]
    down: jax.Array  # [4 * width, width]


class Weights(NamedTuple):
    embedding: jax.Array  # [vocabulary, width]
    position: jax.Array  # [context, width]
    layers: list[Layer]
    head: jax.Array  # [width, vocabulary]


class Cache(NamedTuple):
    """Keys and values of every position so far: [layers, heads, context, width / heads] each."""

    keys: jax.Array
    values: jax.Array


def make_weights(seed: int) -> Weights:
    keys = iter(jax.random.split(jax.random.key(seed), 4 * LAYERS + 3))

    def normal(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns), jnp.float32) / jnp.sqrt(rows)

    return Weights(
        embedding=normal(VOCABULARY, WIDTH),
        position=normal(CONTEXT, WIDTH),
        layers=[
            Layer(
                attention=normal(WIDTH, 3 * WIDTH),
                output=normal(WIDTH, WIDTH),
                up=normal(WIDTH, 4 * WIDTH),
                down=normal(4 * WIDTH, WIDTH),
            )
            for _ in range(LAYERS)
        ],
        head=normal(WIDTH, VOCABULARY),
    )


def empty_cache() -> Cache:
    shape = (LAYERS, HEADS, CONTEXT, WIDTH // HEADS)
    return Cache(jnp.zeros(shape), jnp.zeros(shape))


def _norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _heads(x: jax.Array) -> jax.Array:
    """[tokens, width] -> [heads, tokens, width / heads]"""
    return x.reshape(x.shape[0], HEADS, -1).transpose(1, 0, 2)


@partial(jax.jit, donate_argnums=1)
def step(
    weights: Weights, cache: Cache, tokens: jax.Array, start: jax.Array, last: jax.Array
) -> tuple[Cache, jax.Array]:
    """Runs `tokens`, at positions from `start` on, through the model; reads the next token off at `last`.

    Compiled once for every length of `tokens`: a bucket for the prompt, and 1 for each token generated.
    """
    positions = start + jnp.arange(tokens.shape[0])
    x = weights.embedding[tokens] + weights.position[positions]
    # A query sees the keys at its own position and before: [tokens, context]
    visible = jnp.arange(CONTEXT)[None, :] <= positions[:, None]

    keys, values = cache
    for index, layer in enumerate(weights.layers):
        query, key, value = (_heads(part) for part in jnp.split(_norm(x) @ layer.attention, 3, axis=-1))
        keys = jax.lax.dynamic_update_slice(keys, key[None], (index, 0, start, 0))
        values = jax.lax.dynamic_update_slice(values, value[None], (index, 0, start, 0))
        scores = jnp.einsum("htd,hcd->htc", query, keys[index]) / jnp.sqrt(WIDTH / HEADS)
        attended = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1) @ values[index]
        x = x + attended.transpose(1, 0, 2).reshape(x.shape) @ layer.output
        x = x + jax.nn.gelu(_norm(x) @ layer.up) @ layer.down
    return Cache(keys, values), jnp.argmax(_norm(x[last]) @ weights.head)


class Generator:
    """Greedy generation from one set of weights. Not for use by two threads at once."""

    def __init__(self, seed: int) -> None:
        self.weights = jax.block_until_ready(make_weights(seed))

    def warm_up(self) -> None:
        """Compiles every program that a request may need."""
        for length in BUCKETS:
            self.generate("x" * length, 2)

    def generate(self, prompt: str, count: int) -> list[int]:
        """The `count` tokens that follow `prompt` (ValueError where either is out of bounds)."""
        given = list(prompt.encode())
        if not 1 <= len(given) <= LONGEST_PROMPT or not 1 <= count <= LONGEST_ANSWER:
            raise ValueError(f"1 to {LONGEST_PROMPT} bytes of prompt, 1 to {LONGEST_ANSWER} tokens of answer")
        bucket = next(size for size in BUCKETS if size >= len(given))
        padded = jnp.array(given + [0] * (bucket - len(given)), jnp.int32)
        cache, token = step(self.weights, empty_cache(), padded, jnp.int32(0), jnp.int32(len(given) - 1))
        answer = [int(token)]
        # The padding's keys beyond the prompt are overwritten one by one before any query sees them.
        while len(answer) < count:
            at = jnp.int32(len(given) + len(answer) - 1)
            cache, token = step(self.weights, cache, token[None].astype(jnp.int32), at, jnp.int32(0))
            answer.append(int(token))
        return answer
