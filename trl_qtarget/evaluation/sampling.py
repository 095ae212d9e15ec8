"""Samples that depend on the seed alone: the same completions whatever the batch size or the order of rows.

    argmax_v (z_v / T + g_v)   with g_v independent Gumbel(0, 1)   is a draw from   softmax(z / T)

So sampling is greedy decoding of noisy logits, and the noise of (seed, row, sample, position, token) is a hash of
these five. Nothing else enters: two models that share a tokenizer are compared under the same noise, so that their
difference is less noisy than their scores. What a batch's composition still changes is rounding, which may decide a
near tie: seen in none of 30,000 tokens in float32, in one of some 250 in bfloat16.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


GAMMA = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's constants, as the signed integers that torch has
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def stream(seed: int, row: int, sample: int) -> int:
    """A 64-bit key for one completion."""
    digest = hashlib.blake2b(f"{seed},{row},{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function: a bijection of 64-bit integers, every bit out depending on every bit in."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * FACTORS[0]  # the mask makes the shift logical; the product wraps
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * FACTORS[1]
    return x ^ (x >> 31 & (1 << 33) - 1)


def gumbel(
    keys: Tensor,  # (B,) int64
    vocab_size: int,
) -> Tensor:  # (B, V) fp32
    """Gumbel(0, 1) noise; a token's noise depends on its row's key and its own id, not on V."""
    tokens = torch.arange(1, vocab_size + 1, device=keys.device) * GAMMA
    block = max(1, 2**16 // vocab_size) if keys.device.type == "cpu" else len(keys)  # stays in a core's cache
    return torch.cat([_gumbel_block(part, tokens) for part in keys.split(block)])


def _gumbel_block(keys: Tensor, tokens: Tensor) -> Tensor:
    bits = mix(keys[:, None] + tokens) & (1 << 63) - 1
    # 63 bits before rounding: the small draws, which win, keep a relative error of 2**-24 in any vocabulary
    uniform = bits.float().add_(0.5).mul_(2**-63)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def nucleus(
    z: Tensor,  # (B, V)
    top_p: float,
) -> Tensor:  # (B, V)
    """Logits with -inf outside the smallest set of tokens that holds `top_p` of the mass."""
    if top_p >= 1:
        return z
    ordered, order = z.sort(dim=-1, descending=True)
    p = ordered.softmax(-1)
    outside = p.cumsum(-1) - p >= top_p  # the mass before a token; never true of the first
    return z.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)


class SeededNoise:
    """Logits processor under which greedy decoding samples; a row whose sample is None stays greedy."""

    def __init__(
        self,
        seed: int,
        jobs: list[tuple[int, int | None]],  # B of (row, sample)
        prompt_length: int,
        device: torch.device,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ):
        keys = [0 if sample is None else stream(seed, row, sample) for row, sample in jobs]
        self.keys = torch.tensor(keys, device=device)  # (B,)
        self.greedy = torch.tensor([[sample is None] for _, sample in jobs], device=device)  # (B, 1)
        self.prompt_length = prompt_length
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        z = nucleus(scores.float() / self.temperature, self.top_p)
        keys = mix(self.keys + torch.full_like(self.keys, position) * GAMMA)  # a product of tensors wraps
        noise = gumbel(keys, z.shape[-1])
        return torch.where(self.greedy, scores.float(), z + noise)


@dataclass(frozen=True)
class Completion:
    """What a model wrote: `ids` without the token that ended it, `sample` None for the greedy one."""

    row: int
    sample: int | None
    ids: list[int]
    ended: bool

    @property
    def length(self) -> int:
        """Tokens generated, the one that ended it among them."""
        return len(self.ids) + self.ended


def complete(
    model,
    prompts: list[list[int]],
    eos_ids: list[int],
    k: int,
    seed: int = 0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Iterator[list[Completion]]:
    """Batches of completions, k samples and a greedy one for each prompt, longest prompts first.

    The model's own generation settings (top-k, repetition penalty, ...) are not used: what is sampled is the model at
    `temperature` and `top_p`.
    """
    from transformers import GenerationConfig
    from transformers.generation.logits_process import LogitsProcessorList

    pad = eos_ids[0] if eos_ids else 0  # masked wherever it stands
    # generate fills what is left open from the model's own settings, so these are replaced and not only overridden
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos_ids or None, pad_token_id=pad
    )
    rows = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    jobs = [(row, sample) for row in rows for sample in (None, *range(k))]
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        input_ids, mask = left_padded([prompts[row] for row, _ in batch], pad, model.device)
        width = input_ids.shape[1]
        noise = SeededNoise(seed, batch, width, model.device, temperature, top_p)
        with torch.inference_mode():
            output = model.generate(
                input_ids=input_ids, attention_mask=mask, logits_processor=LogitsProcessorList([noise])
            )
        written = output[:, width:].tolist()
        yield [cut(row, sample, ids, eos_ids) for (row, sample), ids in zip(batch, written, strict=True)]


def left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (B, longest prompt) each."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def cut(row: int, sample: int | None, ids: list[int], eos_ids: list[int]) -> Completion:
    end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
    return Completion(row, sample, ids[:end], end is not None)
