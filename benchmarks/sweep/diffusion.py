"""Models of diffusers for `zoo.py`, small and at random."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

# --- inputs: x of any shape, text (batch, tokens, width), a time step for each of the batch -------------------------

x = torch.randn


def text(width: int = 12, length: int = 5) -> Tensor:
    return x(2, length, width)


def positions(length: int, axes: int = 3) -> Tensor:
    """(length, axes): where each token of an image or a text is."""
    return torch.arange(length)[:, None].expand(length, axes).float()


STEP, KEPT = torch.tensor([3, 7]), torch.ones(2, 5, dtype=torch.bool)

# --- sizes that many share ------------------------------------------------------------------------------------------

HEADS = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2)
JOINT = {**HEADS, "joint_attention_dim": 12}
PACKED = dict(in_channels=4, axes_dims_rope=(4, 2, 2), num_single_layers=2, **JOINT)
COGVIEW = dict(
    in_channels=4,
    out_channels=4,
    text_embed_dim=12,
    time_embed_dim=8,
    condition_dim=4,
    pos_embed_max_size=8,
    sample_size=8,
    **HEADS,
)
BLOCKS = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
ACROSS = dict(cross_attention_dim=12, **BLOCKS)
LATENT = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)


def unet(down: str, up: str, kind: str, first: bool = False) -> dict:
    """Down- and up-blocks with attention in one of two resolutions."""
    plain = (f"DownBlock{kind}", f"UpBlock{kind}")
    downs, ups = ((down, plain[0]), (plain[1], up)) if first else ((plain[0], down), (up, plain[1]))
    return dict(down_block_types=downs, up_block_types=ups)


def tokens_of(image: int = 16, **more) -> dict:
    """Tokens of an image beside those of a text, for a joint attention."""
    return dict(hidden_states=x(2, image, 4), encoder_hidden_states=text(), timestep=STEP, **more)


SIZES_OF_IMAGES = dict(original_size=x(2, 2), target_size=x(2, 2), crop_coords=x(2, 2))

# Class -> (what its constructor takes, what its forward takes).
DIFFUSERS: dict[str, tuple[dict, tuple | dict]] = {
    # convolutions
    "UNet1DModel": (dict(sample_size=64, extra_in_channels=64), (x(2, 2, 64), STEP)),
    "UNet2DModel": (
        dict(sample_size=16, attention_head_dim=8, **unet("AttnDownBlock2D", "AttnUpBlock2D", "2D"), **BLOCKS),
        (x(2, 3, 16, 16), STEP),
    ),
    "UNet2DConditionModel": (
        dict(attention_head_dim=4, **unet("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "2D", True), **ACROSS),
        (x(2, 4, 16, 16), STEP, text()),
    ),
    "UNet3DConditionModel": (
        dict(attention_head_dim=4, **unet("CrossAttnDownBlock3D", "CrossAttnUpBlock3D", "3D", True), **ACROSS),
        (x(2, 4, 3, 16, 16), STEP, text()),
    ),
    "UNetSpatioTemporalConditionModel": (
        dict(
            in_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            num_attention_heads=(2, 4),
            cross_attention_dim=12,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            **unet("CrossAttnDownBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal", "SpatioTemporal", True),
        ),
        (x(2, 3, 4, 16, 16), STEP, text(), x(2, 3)),
    ),
    "ControlNetModel": (
        dict(
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            conditioning_embedding_out_channels=(4, 8),
            **ACROSS,
        ),
        (x(2, 4, 16, 16), STEP, text(), x(2, 3, 32, 32)),
    ),
    "AutoencoderKL": ({**LATENT, **BLOCKS}, (x(2, 3, 16, 16),)),
    "AsymmetricAutoencoderKL": (
        dict(down_block_out_channels=(8, 16), up_block_out_channels=(8, 16), norm_num_groups=4, **LATENT),
        (x(2, 3, 16, 16),),
    ),
    "AutoencoderKLTemporalDecoder": (
        dict(down_block_types=LATENT["down_block_types"], block_out_channels=(32, 64), layers_per_block=1),
        dict(sample=x(2, 3, 16, 16), num_frames=1),
    ),
    "AutoencoderTiny": (
        dict(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 2),
            num_decoder_blocks=(2, 1),
        ),
        (x(2, 3, 16, 16),),
    ),
    "AutoencoderDC": (
        dict(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            decoder_norm_types="rms_norm",
        ),
        (x(2, 3, 16, 16),),
    ),
    "AutoencoderOobleck": (
        dict(
            encoder_hidden_size=12,
            decoder_channels=12,
            decoder_input_channels=6,
            downsampling_ratios=[1, 2],
            channel_multiples=[1, 2],
        ),
        (x(2, 2, 32),),
    ),
    "VQModel": ({"num_vq_embeddings": 16, **LATENT, **BLOCKS}, (x(2, 3, 16, 16),)),
    # one stream, conditioned by scales and shifts or by attention to a text
    "DiTTransformer2DModel": (
        dict(in_channels=4, out_channels=8, sample_size=8, num_embeds_ada_norm=9, norm_num_groups=4, **HEADS),
        (x(2, 4, 8, 8), STEP, STEP),
    ),
    "PixArtTransformer2DModel": (
        dict(in_channels=4, out_channels=8, sample_size=8, cross_attention_dim=16, caption_channels=12, **HEADS),
        dict(
            hidden_states=x(2, 4, 8, 8),
            encoder_hidden_states=text(),
            timestep=STEP,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
    ),
    "Transformer2DModel": (
        dict(in_channels=16, norm_num_groups=4, cross_attention_dim=12, **HEADS),
        (x(2, 16, 4, 4), text()),
    ),
    "TransformerTemporalModel": (
        dict(in_channels=16, norm_num_groups=4, **HEADS),
        dict(hidden_states=x(4, 16, 4, 4), num_frames=2),
    ),
    "HunyuanDiT2DModel": (
        dict(
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=16,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=8,
            text_len=5,
            text_len_t5=5,
            use_style_cond_and_image_meta_size=False,
            **HEADS,
        ),
        dict(
            hidden_states=x(2, 4, 8, 8),
            timestep=STEP.float(),
            encoder_hidden_states=text(16),
            text_embedding_mask=KEPT,
            encoder_hidden_states_t5=text(16),
            text_embedding_mask_t5=KEPT,
            image_rotary_emb=(x(16, 8), x(16, 8)),
        ),
    ),
    "LatteTransformer3DModel": (
        dict(
            in_channels=4,
            out_channels=8,
            sample_size=8,
            patch_size=2,
            video_length=3,
            cross_attention_dim=16,
            caption_channels=12,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            **HEADS,
        ),
        dict(hidden_states=x(2, 4, 3, 8, 8), timestep=STEP, encoder_hidden_states=text()),
    ),
    "SanaTransformer2DModel": (
        dict(
            in_channels=4,
            out_channels=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=12,
            sample_size=8,
            **HEADS,
        ),
        dict(hidden_states=x(2, 4, 8, 8), encoder_hidden_states=text(), timestep=STEP),
    ),
    "StableAudioDiTModel": (
        dict(
            sample_size=4,
            in_channels=4,
            out_channels=4,
            num_key_value_attention_heads=2,
            cross_attention_dim=12,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=12,
            **HEADS,
        ),
        dict(
            hidden_states=x(2, 4, 4),
            timestep=STEP.float(),
            encoder_hidden_states=text(),
            global_hidden_states=x(2, 1, 8),
            rotary_embedding=(x(5, 4), x(5, 4)),
        ),
    ),
    "PriorTransformer": (
        dict(embedding_dim=16, num_embeddings=5, additional_embeddings=4, **HEADS),
        dict(hidden_states=x(2, 16), timestep=STEP, proj_embedding=x(2, 16), encoder_hidden_states=text(16)),
    ),
    "UVit2DModel": (
        dict(
            hidden_size=16,
            cond_embed_dim=12,
            micro_cond_encode_dim=4,
            micro_cond_embed_dim=20,
            encoder_hidden_size=12,
            vocab_size=40,
            codebook_size=32,
            in_channels=16,
            block_out_channels=16,
            num_res_blocks=1,
            block_num_heads=2,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            sample_size=8,
        ),
        (torch.randint(32, (2, 4, 4)), text(), x(2, 12), x(2, 5)),
    ),
    "LTXVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, cross_attention_dim=16, caption_channels=12, **HEADS),
        tokens_of(12, encoder_attention_mask=torch.ones(2, 5), num_frames=3, height=2, width=2),
    ),
    "WanTransformer3DModel": (
        dict(in_channels=4, out_channels=4, text_dim=12, freq_dim=8, ffn_dim=24, rope_max_seq_len=16, **HEADS),
        (x(2, 4, 2, 4, 4), STEP, text()),
    ),
    "AllegroTransformer3DModel": (
        dict(
            caption_channels=12,
            sample_height=8,
            sample_width=8,
            sample_frames=2,
            **{**HEADS, "attention_head_dim": 12, "cross_attention_dim": 24},
        ),
        (x(2, 4, 2, 8, 8), text(), STEP),
    ),
    "Lumina2Transformer2DModel": (
        dict(
            sample_size=8,
            in_channels=4,
            hidden_size=16,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(16, 16, 16),
            cap_feat_dim=12,
        ),
        (x(2, 4, 8, 8), STEP.float(), text(), KEPT),
    ),
    # two streams in one attention
    "SD3Transformer2DModel": (
        dict(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            caption_projection_dim=16,
            pooled_projection_dim=6,
            pos_embed_max_size=8,
            **JOINT,
        ),
        dict(hidden_states=x(2, 4, 8, 8), encoder_hidden_states=text(), pooled_projections=x(2, 6), timestep=STEP),
    ),
    "FluxTransformer2DModel": (
        {"pooled_projection_dim": 6, **PACKED},
        tokens_of(pooled_projections=x(2, 6), img_ids=positions(16), txt_ids=positions(5)),
    ),
    "BriaTransformer2DModel": (PACKED, tokens_of(img_ids=positions(16), txt_ids=positions(5))),
    "ChromaTransformer2DModel": (
        dict(approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1, **PACKED),
        tokens_of(img_ids=positions(16), txt_ids=positions(5)),
    ),
    "Flux2Transformer2DModel": (
        {**PACKED, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 8, "guidance_embeds": False},
        tokens_of(img_ids=positions(16, 4), txt_ids=positions(5, 4)),
    ),
    "QwenImageTransformer2DModel": (
        dict(in_channels=4, out_channels=1, axes_dims_rope=(4, 2, 2), **JOINT),
        tokens_of(encoder_hidden_states_mask=KEPT, img_shapes=[[(1, 4, 4)]] * 2),
    ),
    "AuraFlowTransformer2DModel": (
        dict(
            sample_size=8,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pos_embed_max_size=16,
        ),
        dict(hidden_states=x(2, 4, 8, 8), encoder_hidden_states=text(), timestep=STEP.float()),
    ),
    "CogVideoXTransformer3DModel": (
        dict(
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=12,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=5,
            **HEADS,
        ),
        (x(2, 2, 4, 8, 8), text(), STEP),
    ),
    "CogView3PlusTransformer2DModel": (
        COGVIEW,
        dict(hidden_states=x(2, 4, 8, 8), encoder_hidden_states=text(), timestep=STEP, **SIZES_OF_IMAGES),
    ),
    "CogView4Transformer2DModel": (
        dict(rope_axes_dim=(16, 16), **COGVIEW),
        dict(hidden_states=x(2, 4, 8, 8), encoder_hidden_states=text(), timestep=STEP, **SIZES_OF_IMAGES),
    ),
    "MochiTransformer3DModel": (
        dict(
            pooled_projection_dim=16,
            in_channels=4,
            qk_norm="rms_norm",
            text_embed_dim=16,
            time_embed_dim=8,
            max_sequence_length=5,
            **HEADS,
        ),
        (x(2, 4, 2, 8, 8), text(16), STEP, KEPT),
    ),
    "HunyuanVideoTransformer3DModel": (
        dict(
            in_channels=4,
            out_channels=4,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=12,
            pooled_projection_dim=6,
            rope_axes_dim=(4, 2, 2),
            guidance_embeds=False,
            **HEADS,
        ),
        (x(2, 4, 2, 8, 8), STEP, text(), KEPT, x(2, 6)),
    ),
    "PRXTransformer2DModel": (
        dict(in_channels=4, context_in_dim=12, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4]),
        (x(2, 4, 8, 8), STEP.float(), text()),
    ),
}


def models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, tuple | dict]]]]:
    import diffusers

    for name, (options, inputs) in DIFFUSERS.items():
        if hasattr(diffusers, name):
            yield name, lambda name=name, options=options, inputs=inputs: (getattr(diffusers, name)(**options), inputs)
