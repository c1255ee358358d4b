"""What the engine knows of each architecture of transformers: one record a family."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """A causal decoder whose logits are head(backbone(ids)) and whose attention is softmax
    attention, causal or within a sliding window.

    Classes and functions are named as in the modeling file. They are recognised by exactly these
    classes, with the forwards and functions that transformers ships: anything else may compute
    something else.

    Attributes:
        file: the modeling file, ``transformers.models.…``.
        causal_lm: the class of the whole; its forward is never run, the losses replace the head.
        attention: the class whose forward is replaced, with ``functions``, where ``qkv`` says how
            it makes queries, keys and values; None where only its attention function is.
        qkv: "separate" (q_proj, k_proj, v_proj), or "fused" (query_key_value).
        out_projection: what follows attention.
        head_norms: queries and keys of every head are normed (q_norm, k_norm).
        rotary: queries and keys are turned by their positions.
        functions: what the replaced forward would call.
        gated_mlp: the class of down_proj(act_fn(gate_proj(x)) * up_proj(x)), whose forward and
            activation are replaced; None if the MLP runs as it is.
        rms_norm: the class of its RMSNorms; None where it has torch's LayerNorm.
        decoder_layer: the class of h = x + self_attn(input_layernorm(x)), h +
            mlp(post_attention_layernorm(h)), whose forward is replaced; None if it runs as it is.
        learned_positions: rows can be no longer than ``max_position_embeddings``.
        scaled_embedding: the class of token embeddings that are multiplied by their
            ``embed_scale``; None for torch's.
        position_table: the class of positions that are a buffer, added to the embeddings.
        attention_registry: its attention is the function that the configuration names; otherwise
            it is part of ``attention``'s forward, and takes a mask that is a matrix.
        blocks: the backbone's transformer blocks.
        self_attention: a block's module that gives what is added to the residual.
        final_norm: the backbone's norm before the head.
    """

    file: str
    causal_lm: str
    attention: str | None = None
    qkv: str = "separate"
    out_projection: str = "o_proj"
    head_norms: bool = False
    rotary: bool = True
    functions: tuple[str, ...] = ("apply_rotary_pos_emb", "rotate_half")
    gated_mlp: str | None = None
    rms_norm: str | None = None
    decoder_layer: str | None = None
    learned_positions: bool = False
    scaled_embedding: str | None = None
    position_table: str | None = None
    attention_registry: bool = True
    blocks: str = "layers"
    self_attention: str = "self_attn"
    final_norm: str = "norm"

    def named(self, name: str) -> str:
        """The full name of one of its classes."""
        return f"transformers.models.{self.file}.{name}"


FAMILIES = (
    Family(
        "llama.modeling_llama",
        "LlamaForCausalLM",
        attention="LlamaAttention",
        gated_mlp="LlamaMLP",
        rms_norm="LlamaRMSNorm",
        decoder_layer="LlamaDecoderLayer",
    ),
    Family(
        "mistral.modeling_mistral",
        "MistralForCausalLM",
        attention="MistralAttention",
        gated_mlp="MistralMLP",
        rms_norm="MistralRMSNorm",
        decoder_layer="MistralDecoderLayer",
    ),
    Family(
        "qwen2.modeling_qwen2",
        "Qwen2ForCausalLM",
        attention="Qwen2Attention",
        gated_mlp="Qwen2MLP",
        rms_norm="Qwen2RMSNorm",
        decoder_layer="Qwen2DecoderLayer",
    ),
    Family(
        "qwen3.modeling_qwen3",
        "Qwen3ForCausalLM",
        attention="Qwen3Attention",
        head_norms=True,
        gated_mlp="Qwen3MLP",
        rms_norm="Qwen3RMSNorm",
        decoder_layer="Qwen3DecoderLayer",
    ),
    Family(
        "gpt_neox.modeling_gpt_neox",
        "GPTNeoXForCausalLM",
        attention="GPTNeoXAttention",
        qkv="fused",
        out_projection="dense",
        self_attention="attention",
        final_norm="final_layer_norm",
    ),
    Family(
        "xglm.modeling_xglm",
        "XGLMForCausalLM",
        attention="XGLMAttention",
        out_projection="out_proj",
        rotary=False,
        functions=(),
        scaled_embedding="XGLMScaledWordEmbedding",
        position_table="XGLMSinusoidalPositionalEmbedding",
        attention_registry=False,
        final_norm="layer_norm",
    ),
    Family(
        "gpt2.modeling_gpt2",
        "GPT2LMHeadModel",
        learned_positions=True,
        blocks="h",
        self_attention="attn",
        final_norm="ln_f",
    ),
)
RMS_NORMS = frozenset(f.named(f.rms_norm) for f in FAMILIES if f.rms_norm)
SCALED_EMBEDDINGS = frozenset(f.named(f.scaled_embedding) for f in FAMILIES if f.scaled_embedding)
_BY_CAUSAL_LM = {family.named(family.causal_lm): family for family in FAMILIES}


def type_name(module: nn.Module) -> str:
    """``package.module.Class``."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def plain_attention(model_type: str) -> str:
    """The name of an attention that PyTorch has every derivative of, for models of this type."""
    families = {family.file.partition(".")[0]: family for family in FAMILIES}
    family = families.get(model_type)
    return "sdpa" if family is None or family.attention_registry else "eager"


def family_of(causal_lm: nn.Module) -> Family | None:
    """The family of a causal LM of exactly a known class."""
    return _BY_CAUSAL_LM.get(type_name(causal_lm))
