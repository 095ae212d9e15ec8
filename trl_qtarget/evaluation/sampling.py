"""Draw samples that depend on the seed alone: neither the batch size nor the order of rows changes a completion.

    argmax_v (z_v / T + g_v)   with g_v independent Gumbel(0, 1)   is a draw from   softmax(z / T)

Sampling is therefore greedy decoding of noisy logits, where the noise is a hash of (seed, row, sample, position,
token) and of nothing else. Two models that share a tokenizer are compared under the same noise, which makes their
difference less noisy than their scores. The composition of a batch still changes rounding, which may decide a near
tie: in none of 30,000 tokens in float32, in one of some 250 in bfloat16.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


GAMMA = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's constants as signed integers: torch computes in int64
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def stream(seed: int, row: int, sample: int) -> int:
    """Hash the coordinates of one completion into a 64-bit key."""
    digest = hashlib.blake2b(f"{seed},{row},{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's output function, a bijection of 64-bit integers; each output bit depends on all input."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * FACTORS[0]  # the mask makes the shift logical; the product wraps around
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * FACTORS[1]
    return x ^ (x >> 31 & (1 << 33) - 1)


def gumbel(
    keys: Tensor,  # (B,) int64
    vocab_size: int,
) -> Tensor:  # (B, V) fp32
    """Return Gumbel(0, 1) noise that depends on the row's key and the token's id, and not on V."""
    tokens = torch.arange(1, vocab_size + 1, device=keys.device) * GAMMA
    block = max(1, 2**16 // vocab_size) if keys.device.type == "cpu" else len(keys)  # fits a core's cache
    return torch.cat([_gumbel_block(part, tokens) for part in keys.split(block)])


def _gumbel_block(keys: Tensor, tokens: Tensor) -> Tensor:
    bits = mix(keys[:, None] + tokens) & (1 << 63) - 1
    # 63 bits before rounding: small uniform draws win the argmax, and keep a relative error of 2**-24
    uniform = bits.float().add_(0.5).mul_(2**-63)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def nucleus(
    z: Tensor,  # (B, V)
    top_p: float,
) -> Tensor:  # (B, V)
    """Set logits to -inf outside the smallest set of tokens that holds `top_p` of the mass."""
    if top_p >= 1:
        return z
    ordered, order = z.sort(dim=-1, descending=True)
    p = ordered.softmax(-1)
    outside = p.cumsum(-1) - p >= top_p  # the mass before a token, which is 0 for the first
    return z.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)


class SeededNoise:
    """Logits processor that turns greedy decoding into sampling; a row whose sample is None stays greedy."""

    def __init__(
        self,
        seed: int,
        jobs: list[tuple[int, int | None]],  # (row, sample) for each of B sequences
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
        keys = mix(self.keys + torch.full_like(self.keys, position) * GAMMA)  # a product of tensors wraps around
        noise = gumbel(keys, z.shape[-1])
        return torch.where(self.greedy, scores.float(), z + noise)


@dataclass(frozen=True)
class Generation:
    """The tokens that a model generated for a row.

    `ids` leaves out the end-of-sequence token; `sample` is None for the greedy generation.
    """

    row: int
    sample: int | None
    ids: list[int]
    ended: bool

    @property
    def length(self) -> int:
        """The number of generated tokens, the end-of-sequence token included."""
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
) -> Iterator[list[Generation]]:
    """Yield batches of generations: k samples and a greedy one for each prompt, longest prompts first.

    The generation settings saved with the model (top-k, repetition penalty, ...) are replaced, so that the model is
    sampled at `temperature` and `top_p` alone.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    pad = eos_ids[0] if eos_ids else 0  # any id will do: padding is masked
    # settings are replaced, not passed to `generate`, which would fill open fields from the model's own
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
    """Return token ids and attention mask, each (B, longest prompt)."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def cut(row: int, sample: int | None, ids: list[int], eos_ids: list[int]) -> Generation:
    """Cut the generated tokens at the first end-of-sequence token."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
    return Generation(row, sample, ids[:end], end is not None)
