"""Models of other libraries (the optional extra `zoo`), small and at random: `benchmarks/sweep.py --mapping zoo`.

Each entry makes (model, example inputs). Libraries that cannot be imported are left out, with a line.
"""

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, tuple | dict]
TINY = {"img_size": 64}


def image(size: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size)


def tokens(length: int = 8, vocabulary: int = 50) -> Tensor:
    return torch.randint(vocabulary, (2, length))


# --- timm: one small model of each family, by its registered name ------------------------------------------------

TIMM = (
    "vit_tiny_patch16_224 deit_tiny_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 "
    "swin_tiny_patch4_window7_224 "
    "swinv2_tiny_window8_256 convnext_atto convnextv2_atto mixer_s32_224 gmixer_12_224 resmlp_12_224 cait_xxs24_224 "
    "xcit_nano_12_p16_224 levit_128s mobilevit_xxs mobilevitv2_050 mobilenetv3_small_050 efficientnet_b0 resnet18 "
    "regnetx_002 poolformer_s12 metaformer caformer_s18 pvt_v2_b0 twins_svt_small coat_lite_tiny crossvit_tiny_240 "
    "volo_d1_224 edgenext_xx_small efficientformer_l1 fastvit_t8 ghostnet_050 hiera_tiny_224 maxvit_nano_rw_256 "
    "nextvit_small repvit_m0_9 tiny_vit_5m_224 visformer_tiny vit_relpos_small_patch16_224 samvit_base_patch16_224"
).split()


def timm_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    import timm

    for name in TIMM:
        if timm.is_model(name):
            yield name, lambda name=name: _timm(name)


def _timm(name: str) -> Made:
    """At the smallest of its sizes that builds; depth as it is, where it cannot be less."""
    import timm

    shallow = [{"depth": 2}, {"depths": (1, 1, 1, 1)}, {"depths": (2, 2, 2, 2)}, {"layers": (1, 1, 1, 1)}]
    for options in (*({**TINY, **less} for less in shallow), *shallow, TINY, {}):
        try:
            model = timm.create_model(name, pretrained=False, num_classes=7, **options)
        except (TypeError, ValueError, AssertionError, RuntimeError):
            continue
        size = options.get("img_size") or (64 if "img_size" not in options else model.default_cfg["input_size"][-1])
        for size in (64, model.default_cfg["input_size"][-1]):
            try:
                with torch.no_grad():
                    model.eval()(image(size, batch=1))
            except Exception:  # it takes one size only
                continue
            return model, (image(size),)
    raise RuntimeError(f"{name} could not be built")


# --- torchvision -----------------------------------------------------------------------------------------------------

TORCHVISION = (
    "mobilenet_v3_small resnet18 shufflenet_v2_x0_5 squeezenet1_0 mnasnet0_5 densenet121 regnet_y_400mf".split()
)


def torchvision_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2
    from torchvision.models.video.swin_transformer import PatchMerging, SwinTransformer3d
    from torchvision.models.vision_transformer import VisionTransformer

    small = dict(embed_dim=16, depths=[2, 2], num_heads=[2, 4], stochastic_depth_prob=0.1, num_classes=7)
    yield "vit", lambda: (VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=7), (image(32),))
    yield "swin", lambda: (SwinTransformer([4, 4], window_size=[4, 4], **small), (image(32),))
    yield (
        "swin_v2",
        lambda: (SwinTransformer([4, 4], window_size=[4, 4], block=SwinTransformerBlockV2, **small), (image(32),)),
    )
    yield (
        "swin3d",
        lambda: (
            SwinTransformer3d([2, 4, 4], window_size=[8, 4, 4], downsample_layer=PatchMerging, **small),
            (torch.randn(2, 3, 4, 32, 32),),
        ),
    )
    yield "convnext", lambda: (ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)]), (image(32),))
    for name in TORCHVISION:
        yield name, lambda name=name: (models.get_model(name, num_classes=7), (image(64),))


# --- x-transformers: its options ----------------------------------------------------------------------------------

XT = {
    "plain": {},
    "rope": dict(rotary_pos_emb=True, use_rmsnorm=True),
    "swiglu": dict(ff_swish=True, ff_glu=True, ff_no_bias=True),
    "gqa": dict(attn_kv_heads=2),
    "mqa": dict(attn_one_kv_head=True),
    "talking": dict(attn_pre_talking_heads=True, attn_post_talking_heads=True),
    "qk norm": dict(attn_qk_norm=True),
    "alibi": dict(alibi_pos_bias=True),
    "t5 bias": dict(rel_pos_bias=True),
    "gated": dict(attn_gate_values=True),
    "sandwich": dict(sandwich_norm=True),
    "macaron": dict(macaron=True),
    "hyper": dict(num_residual_streams=3),
    "memory": dict(attn_num_mem_kv=3),
    "shift": dict(shift_tokens=1),
    "residual attention": dict(residual_attn=True),
    "deepnorm": dict(scale_residual=True),
    "value residual": dict(add_value_residual=True),
}


def xt_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    from x_transformers import Decoder, TransformerWrapper

    def make(options: dict) -> Made:
        layers = Decoder(dim=16, depth=2, heads=4, attn_dim_head=6, **options)
        return TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=layers), (tokens(),)

    for name, options in XT.items():
        yield name, lambda options=options: make(options)


# --- litgpt: its configurations -----------------------------------------------------------------------------------

LITGPT = (
    "Llama-3-8B pythia-14m phi-2 gemma-2b Gemma-2-2b Mixtral-8x7B-v0.1 falcon-7b stablelm-3b-4e1t Qwen2.5-0.5B "
    "OLMo-1B-hf"
).split()


def litgpt_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    from litgpt.config import Config
    from litgpt.model import GPT

    def make(name: str) -> Made:
        few = dict(
            n_layer=2, n_embd=32, n_head=4, block_size=32, padded_vocab_size=50, vocab_size=50, intermediate_size=48
        )
        config = Config.from_name(name)
        groups = {config.n_head: 4, 1: 1}.get(config.n_query_groups, 2)
        more = {"n_expert": 3, "n_expert_per_token": 2, "moe_intermediate_size": 48} if config.n_expert else {}
        return GPT(Config.from_name(name, **few, **more, n_query_groups=groups, head_size=8)), (tokens(),)

    for name in LITGPT:
        yield name, lambda name=name: make(name)


# --- open_clip, diffusers -------------------------------------------------------------------------------------------


def open_clip_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    from open_clip import CLIP
    from open_clip.transformer import TextTransformer, VisionTransformer

    vision = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=8)
    text = dict(context_length=8, vocab_size=50, width=32, heads=4, layers=2)
    yield "clip", lambda: (CLIP(16, vision, text), (image(32), tokens()))
    yield "vision", lambda: (VisionTransformer(32, 8, 32, 2, 4, 2.0, output_dim=16), (image(32),))
    yield "text", lambda: (TextTransformer(8, 50, 32, 4, 2, output_dim=16), (tokens(),))


def diffusers_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    import diffusers as d

    step, heads = torch.tensor([3, 7]), dict(num_attention_heads=2, attention_head_dim=8, num_layers=2)
    yield (
        "UNet2D",
        lambda: (
            d.UNet2DModel(
                16,
                3,
                3,
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=8,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            ),
            (image(16), step),
        ),
    )
    yield (
        "UNet2DCondition",
        lambda: (
            d.UNet2DConditionModel(
                16,
                4,
                4,
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=4,
                cross_attention_dim=12,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            ),
            (image(16, 4), step, torch.randn(2, 5, 12)),
        ),
    )
    yield (
        "AutoencoderKL",
        lambda: (
            d.AutoencoderKL(
                block_out_channels=(8, 16),
                norm_num_groups=4,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            ),
            (image(16),),
        ),
    )
    yield (
        "DiT",
        lambda: (
            d.DiTTransformer2DModel(
                in_channels=4, out_channels=8, sample_size=8, num_embeds_ada_norm=9, norm_num_groups=4, **heads
            ),
            (image(8, 4), step, step),
        ),
    )
    yield (
        "SD3",
        lambda: (
            d.SD3Transformer2DModel(
                8,
                2,
                4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=12,
                caption_projection_dim=16,
                pooled_projection_dim=6,
                out_channels=4,
                pos_embed_max_size=8,
            ),
            dict(
                hidden_states=image(8, 4),
                encoder_hidden_states=torch.randn(2, 5, 12),
                pooled_projections=torch.randn(2, 6),
                timestep=step,
            ),
        ),
    )
    yield (
        "Pixart",
        lambda: (
            d.PixArtTransformer2DModel(
                in_channels=4, out_channels=8, sample_size=8, cross_attention_dim=16, caption_channels=12, **heads
            ),
            dict(
                hidden_states=image(8, 4),
                encoder_hidden_states=torch.randn(2, 5, 12),
                timestep=step,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ),
        ),
    )


def written_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    from written import WRITTEN

    for name, make in WRITTEN.items():
        yield name, lambda make=make: (make().eval(), (torch.randn(2, 8, 7),))


LIBRARIES: dict[str, Callable[[], Iterator[tuple[str, Callable[[], Made]]]]] = {
    "written": written_models,
    "x_transformers": xt_models,
    "litgpt": litgpt_models,
    "open_clip": open_clip_models,
    "diffusers": diffusers_models,
    "torchvision": torchvision_models,
    "timm": timm_models,
}


def import_torchvision() -> None:
    """Its wheels for GPUs bring no operators to a CPU build of torch, but need them declared to be imported."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    DECLARED.append(library)
    while True:
        try:
            import torchvision  # noqa: F401

            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library.define(f"{missing[1]}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]


DECLARED: list[torch.library.Library] = []  # an operator lives as long as its library's object


@cache
def models() -> dict[str, Callable[[], Made]]:
    """ "library name" -> what makes it, of the libraries that are installed."""
    if find_spec("torchvision"):
        import_torchvision()
    makers = {}
    for library, listed in LIBRARIES.items():
        try:
            makers |= {f"{library} {name}": make for name, make in listed()} if find_spec(library) else {}
        except (ImportError, RuntimeError) as error:  # what it needs besides is missing
            print(f"{library} is left out: {error}")
    return makers
