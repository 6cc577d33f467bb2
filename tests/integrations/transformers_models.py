"""Small models of Transformers with random weights, in float64 throughout, and inputs for them."""

import pytest
import torch
from torch.func import functional_call

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(0))
ONES = torch.ones(3, 9, dtype=torch.long)
RIGHT, LEFT = ONES.clone(), ONES.clone()
RIGHT[1, 6:] = LEFT[1, :3] = LEFT[2, :1] = 0
MASKS = {"none": None, "ones": ONES, "right": RIGHT, "left": LEFT}

PLAIN = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {**PLAIN, "vocab_size": 40}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
MIXED = ["sliding_attention", "full_attention"]
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
CONFIGS = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 4}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": MIXED}),
    "gpt_oss": ("GptOssConfig", {**GROUPED, **EXPERTS, "head_dim": 8, "sliding_window": 4, "layer_types": MIXED}),
    "llama4": (
        "Llama4TextConfig",
        {
            **GROUPED,
            **EXPERTS,
            "attention_chunk_size": 4,
            "intermediate_size_mlp": 16,
            "layer_types": ["chunked_attention", "full_attention"],
            "moe_layers": [],
            "no_rope_layers": [1, 0],
            "use_qk_norm": False,
        },
    ),
    "mixtral": ("MixtralConfig", {**GROUPED, **EXPERTS, "sliding_window": None}),
    "gpt2": ("GPT2Config", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bloom": ("BloomConfig", {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "bert": ("BertConfig", SIZES),
    "modernbert": ("ModernBertConfig", {**SIZES, "local_attention": 4, "global_attn_every_n_layers": 2}),
    "vit": ("ViTConfig", {**PLAIN, "image_size": 6, "patch_size": 2}),
    "t5": ("T5Config", {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 4}),
}
DECODERS = ["llama", "qwen3", "mistral", "gemma3", "gpt_oss", "llama4", "gpt2"]
HEADS = {"bert": "AutoModelForMaskedLM", "modernbert": "AutoModelForMaskedLM", "vit": "AutoModelForImageClassification"}


def build(name, implementation="metaattn", experts="batched_mm", **options):
    """Return a model of ``CONFIGS`` in evaluation mode."""
    config, sizes = CONFIGS[name]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = getattr(transformers, config)(**sizes, **special, **options)
    kind = "AutoModelForSeq2SeqLM" if name == "t5" else HEADS.get(name, "AutoModelForCausalLM")
    # grouped_mm, the default for experts, supports neither float64 nor forward mode.
    more = {"experts_implementation": experts} if name in ("gpt_oss", "mixtral") else {}
    model = getattr(transformers, kind).from_config(config, attn_implementation=implementation, **more)
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = _Norm
    return model


class _Norm(torch.nn.Module):
    """Transformers' RMS norms round to float32, which would hide differences in attention."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def logits(model, state=None, ids=IDS, **inputs):
    """Return the logits of a call, with parameters in place of the model's."""
    if model.config.model_type == "vit":
        image = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        inputs = {"pixel_values": image}
    else:
        inputs = {"input_ids": ids, **inputs}
        if model.config.model_type == "t5":
            inputs["labels"] = ids
    return functional_call(model, state or {}, (), inputs).logits
