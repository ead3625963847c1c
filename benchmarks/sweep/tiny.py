"""A tiny model of any type of transformers, with random weights, and inputs that its forward takes.

A configuration is the type's own default with every size that its name explains made small, and nothing else; a model
is random in every parameter (a norm of ones would hide a wrong permutation).
"""

import re

import torch

LARGEST = 150e6  # parameters
BACKBONE = "resnet10t"  # of timm, in whose place a configuration names one

# --- a tiny configuration: (what an attribute's name looks like, its size), the first that matches ------------------

CORE = (
    (r"num_feat_extract_layers", 10**9),  # lists have an entry for each: as it is
    (r"num_kv_shared_layers|num_nextn_predict_layers|.*mtp.*layers", 0),
    (r"first_k_dense_replace|num_dense_layers|n_dense_layers", 1),
    (r".*vocab_size(_per_layer_input)?", 97),
    (r"(.*_)?(num_)?(hidden_|encoder_|decoder_|n_)?layers?|depth", 2),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|num_key_heads)", 2),
    (
        r"n_head|n_heads|(.*_)?num_heads|(.*_)?attention_heads|(.*_)?num_value_heads|index_n_heads"
        r"|swa_num_attention_heads",
        4,
    ),
    (
        r"hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|(input|output)_embedding_size|word_embed_proj_dim"
        r"|(attention|audio)_hidden_size|projection_dim|backbone_hidden_size|lru_width|emb_dim|channels",
        32,
    ),
    (
        r"(.*_)?(intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|ff_dim)|d_ff|dff|dim_ff|n_inner"
        r"|feed_forward_size|mlp_dim",
        48,
    ),
    (
        r"(.*_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_sequence_length"
        r"|context_length",
        64,
    ),
)
DETAIL = (
    (r"(.*_)?(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k|num_selected_experts|experts_per_token", 2),
    (r"(n|num)_shared_experts|moe_num_shared_experts|n_group|topk_group|num_expert_group", 1),
    (
        r"head_dim|d_kv|kv_channels|v_head_dim|attention_head_(size|dim)|qk_nope_head_dim|(linear|swa|index)(_\w+)?_head_dim"
        r"|global_head_dim|(linear_(key|value)_head_dim)",
        8,
    ),
    (r"rotary_dim", 4),
    (r"qk_rope_head_dim", 8),
    (r"qk_head_dim", 16),
    (r"(q|kv|o)_lora_rank", 12),
    (r".*_(period|interval)", 2),
    (r".*_layer_offset", 1),
    (r"mamba_(n|num)_heads|n_mamba_heads|mamba_(d_head|head_dim)", 8),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r"hidden_size_per_layer_input", 8),
    (r"num_(feature_levels|codebooks)", 2),
    (r"index_topk", 4),
    (r"o_groups|n_groups", 2),
)

# --- configurations that sizes explained by names do not make: what else to set, by type ----------------------------

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = dict(mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)
BY_HAND: dict[str, dict] = {
    "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4, window_size=8, **SIZES),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=2, state_size=8, chunk_size=8, **SIZES),
    "zamba": dict(
        attention_hidden_size=64,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        layers_block_type=["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        **{**SIZES, **MAMBA, "num_hidden_layers": 5},
    ),
    "zamba2": dict(
        num_attention_heads=4,
        num_key_value_heads=4,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        mamba_headdim=8,
        mamba_d_state=4,
        n_mamba_heads=8,
        adapter_rank=4,
        chunk_size=8,
        use_mem_rope=False,
        **{**SIZES, "num_hidden_layers": 4},
    ),
    "nemotron": {**SIZES, **HEADS},
    "nemotron_h": dict(
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        use_mamba_kernels=False,
        **{**SIZES, **HEADS, "num_hidden_layers": 4},
    ),
    "lfm2_moe": dict(
        layer_types=["full_attention", "conv"],
        num_dense_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SIZES,
    ),
    "dbrx": dict(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=97,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "reformer": dict(
        is_decoder=True,
        attn_layers=["local", "lsh"],
        axial_pos_shape=(8, 8),
        axial_pos_embds_dim=(16, 16),
        attention_head_size=8,
        num_attention_heads=4,
        feed_forward_size=48,
        local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
        num_buckets=4,
        max_position_embeddings=64,
        vocab_size=97,
        hidden_size=32,
    ),
    "xmod": dict(default_language="en_XX", is_decoder=True, num_attention_heads=4, **SIZES),
    "esm": dict(pad_token_id=1, mask_token_id=5, num_attention_heads=4, **SIZES),
    "dots1": dict(
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        layer_types=["full_attention"] * 2,
        **{**SIZES, **HEADS},
    ),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE},
        **{**SIZES, **HEADS},
    ),
    "qwen4_exp_text": dict(
        layer_types=["linear_attention", "indexed_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        hc_count=2,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=4,
        indexer_compress_ratio=2,
        **{**SIZES, **HEADS},
    ),
    "blt": dict(
        patch_in_forward=True,
        encoder_hash_byte_group_size=[3, 4],
        encoder_hash_byte_group_vocab=97,
        **{
            f"{part}_config": {**SIZES, "vocab_size": 260, "num_attention_heads": 4, "num_key_value_heads": 4}
            | {"head_dim": 8, "hidden_size_global": 32}
            for part in ("patcher", "encoder", "decoder", "global")
        },
    ),
    "wav2vec2-bert": dict(num_attention_heads=4, output_hidden_size=32, classifier_proj_size=8, **SIZES),
    "wav2vec2-conformer": dict(
        num_attention_heads=4,
        output_hidden_size=32,
        classifier_proj_size=8,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **SIZES,
    ),
    "gemma4_assistant": dict(
        text_config=dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, **{**SIZES, **HEADS})
    ),
    "perceiver": dict(
        num_latents=8,
        d_latents=32,
        d_model=32,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        vocab_size=97,
        max_position_embeddings=11,
        image_size=8,
    ),
    "siglip2": dict(
        vision_config=dict(num_patches=16, patch_size=4, num_attention_heads=4, **SIZES),
        text_config=dict(num_attention_heads=4, **SIZES),
    ),
}
BY_HAND["granite_speech5_ctc"] = dict(
    vocab_size=97, encoder_config=dict(num_attention_heads=4, max_position_embeddings=16, context_size=8, **SIZES)
)
AUDIO = dict(num_filters=8, downsampling_ratios=[2, 2], depths=[1, 1, 1], hidden_size=16)
BY_HAND["vibevoice_asr"] = dict(
    acoustic_tokenizer_encoder_config=AUDIO,
    semantic_tokenizer_encoder_config=AUDIO,
    text_config={**SIZES, **HEADS},
    audio_token_id=90,
    audio_bos_token_id=91,
    audio_eos_token_id=92,
    acoustic_tokenizer_chunk_size=64,
)
BY_HAND["shieldgemma2"] = dict(  # two of its tokens have fixed numbers
    mm_tokens_per_image=16,
    text_config=dict(vocab_size=10_800, **{k: v for k, v in (SIZES | HEADS).items() if k != "vocab_size"}),
    vision_config=dict(image_size=32, patch_size=8, num_attention_heads=4, hidden_size=32, intermediate_size=48)
    | {"num_hidden_layers": 2},
)
BY_HAND["dots3_note"] = dict(
    text_config=dict(
        pad_token_id=0,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        **{**SIZES, **HEADS, "num_key_value_heads": 4},
    ),
    vision_config=dict(
        num_attention_heads=4,
        moe_intermediate_size=24,
        mlp_layer_types=["dense", "sparse"],
        num_local_experts=4,
        adapter_in_dim=32,
        adapter_out_dim=32,
        **SIZES,
    ),
    audio_config=dict(
        num_attention_heads=4, adapter_input_size=32, adapter_out_dim=32, downsample_hidden_size=16, **SIZES
    ),
)
BY_HAND["qwen4_exp"] = dict(text_config=BY_HAND["qwen4_exp_text"])


def tiny(config_class, rules, depth: int = 0):
    """A configuration with its class's defaults and small sizes; configurations inside it likewise."""
    default = config_class()
    sizes = layer_lists(default)
    inner = dict(getattr(config_class, "sub_configs", {}) or {})
    for name, value in vars(default).items():
        if name in inner or (hasattr(value, "to_dict") and hasattr(type(value), "model_type")):
            if value is not None and hasattr(value, "to_dict") and depth < 3:
                sizes[name] = tiny(type(value), rules, depth + 1).to_dict()
        elif name == "architecture":
            sizes[name] = BACKBONE
        elif value is None and name in ("head_dim", "num_experts_per_tok", "topk_group", "n_group"):
            for size in (n for pattern, n in rules if re.fullmatch(pattern, name)):
                sizes[name] = size  # the last rule that matches
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((n for pattern, n in rules if re.fullmatch(pattern, name)), None)
            if "key_value" in name and value == vars(default).get("num_attention_heads"):
                size = 4  # no groups where the default has none: some attention allows none
            if size is not None and size < max(value, 1):
                sizes.setdefault(name, size)
            elif name.endswith("token_id") and value >= 97:
                sizes[name] = 1
    return config_class(**sizes)


def layer_lists(config) -> dict:
    """Lists with an entry for each layer, cut to one layer of each kind (at least two), and the number of layers."""
    count = vars(config).get("num_hidden_layers")
    lists = {
        k: v
        for k, v in vars(config).items()
        if isinstance(v, (list, tuple)) and count and len(v) == count > 4 and all(isinstance(x, (str, int)) for x in v)
    }
    kinds = list(zip(*lists.values()))
    chosen = sorted({kinds.index(k) for k in kinds[::-1]}) if all(len(set(v)) < 5 for v in lists.values()) else [0, 1]
    if not lists:
        return {}
    chosen = (chosen + [i for i in range(count) if i not in chosen])[: max(2, min(len(chosen), 4))]
    return {"num_hidden_layers": len(chosen), **{k: [v[i] for i in sorted(chosen)] for k, v in lists.items()}}


def attempts(config_class):
    """What is made by hand, then configurations from the smallest to the default with fewer layers."""
    if config_class.model_type in BY_HAND:
        yield lambda: config_class(**BY_HAND[config_class.model_type])
        yield lambda: config_class(**BY_HAND[config_class.model_type]).get_text_config(decoder=True)
    layers = tuple(r for r in CORE if "layers" in r[0] or "vocab" in r[0])
    for rules in (CORE + DETAIL, CORE, layers):
        yield lambda rules=rules: tiny(config_class, rules)
        yield lambda rules=rules: tiny(config_class, rules).get_text_config(decoder=True)
    yield lambda: _encoder(tiny(config_class, CORE + DETAIL))


def _encoder(config):
    config.is_encoder_decoder = False
    return config


# --- a model and its inputs -----------------------------------------------------------------------------------------


def candidates(model, config):
    """Inputs worth trying, by what the forward's main argument is called."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    random = torch.Generator().manual_seed(0)
    high = min([n for n in (getattr(text, "vocab_size", None), getattr(config, "vocab_size", None)) if n] or [97])
    ids = torch.randint(3, max(high, 4), (2, 11), generator=random)
    seq2seq = {"decoder_input_ids": ids[:, :7]} if getattr(config, "is_encoder_decoder", False) else {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" or hasattr(config, "image_size") and not hasattr(text, "vocab_size"):
        size = getattr(config, "image_size", None) or 64
        size = size if isinstance(size, (list, tuple)) else (size, size)
        for s in (size, (64, 64), (224, 224)):
            yield {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), *s, generator=random)}
    if patches := getattr(getattr(config, "vision_config", config), "num_patches", None):
        vision, side = getattr(config, "vision_config", config), int(patches**0.5)
        yield {
            "pixel_values": torch.randn(2, patches, 3 * vision.patch_size**2, generator=random),
            "pixel_attention_mask": torch.ones(2, patches, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * 2),
        }
    if main == "inputs" and hasattr(config, "image_size"):
        yield {"inputs": torch.randn(2, 3, config.image_size, config.image_size, generator=random)}
    if main == "input_values":
        for samples in (2000, 4000):
            yield {"input_values": torch.randn(2, samples, generator=random)}
        frames, bins = getattr(config, "max_length", 1024), getattr(config, "num_mel_bins", 128)
        yield {"input_values": torch.randn(2, frames, bins, generator=random)}
    if main == "input_features":
        for shape in (
            (2, 40, getattr(config, "num_mel_bins", 80)),
            (2, 40, getattr(config, "feature_size", 160)),
            (2, 40, 4 * getattr(getattr(config, "encoder_config", config), "num_mel_bins", 80)),
            (2, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 100)),
            (2, 40, 128),
            (2, 40, 80),
        ):
            features = torch.randn(shape, generator=random)
            yield {"input_features": features, **seq2seq}
            yield {"input_features": features, "attention_mask": torch.ones(shape[:2], dtype=torch.long), **seq2seq}
    text_inputs = {"input_ids": ids, **seq2seq}
    yield text_inputs
    yield {**text_inputs, "attention_mask": torch.ones_like(ids)}
    yield {**text_inputs, "bbox": torch.zeros(2, 11, 4, dtype=torch.long)}
    long = torch.randint(3, max(high, 4), (2, 64), generator=random)
    yield {"input_ids": long, **({"decoder_input_ids": long} if seq2seq else {})}
    yield dict(getattr(model, "dummy_inputs", {}))
    yield {"input_features": torch.randn(2, 40, 80, generator=random)}
    bins = getattr(getattr(config, "audio_config", config), "num_mel_bins", 80)
    yield {"input_ids": ids, "input_features": torch.randn(2, bins, 8 * ids.shape[1], generator=random)}


def configs(config):
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from configs(value)


def parameters(model_class, config) -> int:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in model_class(config).parameters())
    except TypeError:  # one that makes its tensors in a way that no device can be set for
        return 0


def build(config_class, model_class):
    """The first configuration that makes a model whose forward runs, and inputs that it takes in train mode too if
    there are any: (model, inputs). Raises the last failure."""
    failure = None
    for make in attempts(config_class):
        try:
            torch.manual_seed(0)
            config = make()
            if parameters(model_class, config) > LARGEST:
                raise ValueError("the sizes that can be made small leave it too large")
            model = model_class(config).float().eval()
            for config in configs(model.config):
                config.use_cache = False
        except Exception as error:  # whatever an invalid combination of sizes raises
            failure = failure or error
            continue
        with torch.no_grad():
            for p in model.parameters():
                if p.is_floating_point():
                    p.add_(torch.randn_like(p), alpha=0.1)
        runs = []
        for inputs in candidates(model, model.config):
            try:
                with torch.no_grad():
                    model.eval()(**inputs)
                    runs.append(inputs)
                    model.train()(**inputs)
                return model.eval(), inputs
            except Exception as error:
                failure = error if failure is None or "input_ids" in inputs else failure
        if runs:
            return model.eval(), runs[0]
    raise failure
