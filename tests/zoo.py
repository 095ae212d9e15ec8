"""Families of models, each as small as it gets: made from a configuration, with random weights and nothing downloaded.

`FAMILIES[name]()` makes the student (`seed=1`) or a teacher (another seed, wider where the family allows).
"""

import copy
import random
from collections.abc import Callable
from typing import Any

import conftest
import torch
import transformers
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
)
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)


try:  # the processors without torchvision, under the names of transformers 5 and of 4
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
except ImportError:
    from transformers import Gemma3ImageProcessor as Gemma3ImageProcessorPil
    from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil
ROPE = "rope_scaling" if transformers.__version__.startswith("4.") else "rope_parameters"


SHAPE = {
    "vocab_size": 640, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 3,
}  # fmt: skip


def family(name: str, **options: Any) -> Callable[..., PreTrainedModel]:
    """A maker of `<name>ForCausalLM`; `None` drops an option that the configuration lacks."""

    def make(seed: int = 1, wider: int = 1, **more: Any) -> PreTrainedModel:
        given = {**SHAPE, **options, **more}
        given["hidden_size"] *= wider
        config = getattr(transformers, f"{name}Config")(**given)
        torch.manual_seed(seed)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}

FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "Qwen3, tied": family("Qwen3", tie_word_embeddings=True),
    "Qwen3, untied": family("Qwen3", tie_word_embeddings=False),
    "Phi, a head with a bias": family("Phi", tie_word_embeddings=False),
    "Gemma2, a softcap": family("Gemma2", final_logit_softcapping=2.0),
    "Cohere, a logit scale": family("Cohere", logit_scale=0.2),
    "Granite, logits divided": family("Granite", logits_scaling=3.0),
    "Qwen3-MoE": family("Qwen3Moe", **EXPERTS, num_experts=4, moe_intermediate_size=24, tie_word_embeddings=False),
    "Mixtral": family("Mixtral", **EXPERTS, num_local_experts=4),
    "GPT-OSS": family("GptOss", **EXPERTS, num_local_experts=4),
}
MIXTURES = ("Qwen3-MoE", "Mixtral", "GPT-OSS")


# Adapters


def lora(**options: Any) -> LoraConfig:
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "init_lora_weights": False}
    return LoraConfig(**{**given, **options})


def prompt(config: type, **options: Any) -> Any:
    return config(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)


ADAPTERS = {
    "LoRA": lora(),
    "DoRA": lora(use_dora=True),
    "LoRA, head saved": lora(modules_to_save=["lm_head"]),
    "LoRA, head and embeddings saved": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "LoRA, new tokens": lora(trainable_token_indices={"embed_tokens": [2, 3]}),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "trainable tokens": TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[2, 3, 5]),
    "prompt tuning": prompt(PromptTuningConfig),
    "P-tuning": prompt(PromptEncoderConfig, encoder_hidden_size=16),
    "prefix tuning": prompt(PrefixTuningConfig),
}


def adapter(name: str) -> PeftConfig:
    """A configuration of one's own, since PEFT writes into the one it is given."""
    return copy.deepcopy(ADAPTERS[name])


# Vision-language models, with a processor that needs neither torchvision nor a download

IMAGE_TOKENS = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
VISION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vision_tokenizer() -> Any:
    """The tests' tokenizer with the special tokens of images behind its own ids."""
    plain = conftest.make_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, pad_token=plain.pad_token, unk_token=plain.unk_token,
        eos_token=plain.eos_token, extra_special_tokens=IMAGE_TOKENS, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def gemma3_processor() -> Any:
    tokenizer = vision_tokenizer()
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 16, "width": 16}), tokenizer, image_seq_length=4,
        chat_template=VISION_TEMPLATE.replace("PLACEHOLDER", tokenizer.boi_token),
    )  # fmt: skip


def gemma3(seed: int = 1, wider: int = 1) -> PreTrainedModel:
    """Gemma 3: whether tokens of an image see each other is told by `token_type_ids`."""
    tokenizer = vision_tokenizer()
    torch.manual_seed(seed)
    config = Gemma3Config(
        text_config={**SHAPE, "hidden_size": wider * SHAPE["hidden_size"]},
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4,
        },
        mm_tokens_per_image=4, boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


class ImagesOnly(Qwen2_5_VLProcessor):
    """Qwen's processor without videos, which would need torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)

    def save_pretrained(self, save_directory, **kwargs):
        return self.tokenizer.save_pretrained(save_directory, **kwargs)


def qwen_vl_processor() -> Any:
    tokenizer = vision_tokenizer()
    tokenizer.video_token, tokenizer.video_token_id = tokenizer.eoi_token, tokenizer.eoi_token_id
    return ImagesOnly(
        Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256), tokenizer,
        chat_template=VISION_TEMPLATE.replace("PLACEHOLDER", tokenizer.image_token),
    )  # fmt: skip


def qwen_vl(seed: int = 1, wider: int = 1) -> PreTrainedModel:
    """Qwen2.5-VL: positions in three dimensions, computed from the grid of each image."""
    tokenizer = vision_tokenizer()
    torch.manual_seed(seed)
    shape = {**SHAPE, "hidden_size": wider * SHAPE["hidden_size"], "num_attention_heads": wider * 2}
    config = Qwen2_5_VLConfig(
        text_config={**shape, ROPE: {"rope_type": "default", "mrope_section": [2, 2, 4]}},
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": shape["hidden_size"],
            "window_size": 16, "fullatt_block_indexes": [0], "initializer_range": 0.3,
        },
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.eoi_token_id,
        vision_start_token_id=tokenizer.boi_token_id, vision_end_token_id=tokenizer.eoi_token_id,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


VISION = {"Gemma3": (gemma3, gemma3_processor), "Qwen2.5-VL": (qwen_vl, qwen_vl_processor)}


def picture_rows(n: int = 16, images: bool = True) -> list[dict]:
    """`n` questions about the colour of a small picture, or the same without the picture."""
    draw = random.Random(0)
    rows = []
    for i in range(n):
        colour = tuple(draw.randrange(256) for _ in range(3))
        row = {
            "prompt": [{"role": "user", "content": "Red, green and blue" + "?" * (i % 3 + 1)}],
            "completion": [{"role": "assistant", "content": " ".join(map(str, colour))}],
        }
        rows.append({**row, "images": [Image.new("RGB", (16, 16), colour)]} if images else row)
    return rows
