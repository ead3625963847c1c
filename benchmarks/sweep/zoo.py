"""Models of other libraries (the optional extra `zoo`), small and at random: `benchmarks/sweep/run.py --mapping zoo`.

Each entry makes (model, example inputs). Libraries that cannot be imported are left out, with a line.
"""

import copy
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, tuple | dict]


def image(size: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size)


@torch.no_grad()
def roused(model: nn.Module) -> nn.Module:
    """The same with noise where a parameter starts as a constant: zeros would hide everything behind them, and of
    others no permutation shows."""
    for p in model.parameters():
        if p.is_floating_point() and (p.numel() == 1 or not p.std() > 0):
            p.add_(torch.randn_like(p), alpha=0.05)
    return model


def tokens(length: int = 8, vocabulary: int = 50) -> Tensor:
    return torch.randint(vocabulary, (2, length))


# --- timm: one small model of each family, by its registered name ------------------------------------------------

TIMM = """
beit_base_patch16_224 beitv2_base_patch16_224 botnet26t_256 halonet26t eca_halonext26ts lambda_resnet26t
sebotnet33ts_256 eca_botnext26ts_256 gernet_s repvgg_a0 resnext26ts gcresnext26ts seresnext26ts
eca_resnext26ts bat_resnext26ts regnetz_b16 regnetz_b16_evos mobileone_s0 resnet50_clip resnet50_mlp
cait_xxs24_224 coat_tiny coat_lite_tiny convit_tiny convmixer_768_32 convnext_atto convnext_zepto_rms
convnextv2_atto cpubone_nano crossvit_tiny_240 crossvit_9_dagger_240 csatv2 cspresnet50 cspresnext50 darknet17
cspdarknet53 cs3darknet_s cs3edgenet_x cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224
deit_tiny_distilled_patch16_224 deit3_small_patch16_224 densenet121 densenetblur121d dla34 dla60_res2net
dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mnasnet_050 semnasnet_050 mobilenetv1_100
mobilenetv2_035 fbnetc_100 spnasnet_100 efficientnet_b0 efficientnet_lite0 efficientnet_cc_b0_4e
efficientnet_es efficientnetv2_rw_t gc_efficientnetv2_rw_t tinynet_e mixnet_s efficientvim_m1 efficientvit_b0
efficientvit_l1 efficientvit_m0 eva02_tiny_patch14_224 vit_pe_core_tiny_patch16_384 vit_small_patch16_rope_224
vit_small_patch16_rope_mixed_224 vit_small_patch16_dinov3 vit_small_patch16_lingbot fasternet_t0 fastvit_t8
fastvit_sa12 focalnet_tiny_srf focalnet_tiny_lrf gcvit_xxtiny gemma4_vit_167m ghostnet_050 ghostnetv2_100
ghostnetv3_050 hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224 hiera_small_abswin_256 sam2_hiera_tiny
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small
levit_128s levit_conv_128s lowformer_b0 mambaout_femto coatnet_pico_rw_224 coatnext_nano_rw_224
maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 maxvit_tiny_tf_224 poolformer_s12
poolformerv2_s12 convformer_s18 caformer_s18 mixer_s32_224 gmixer_12_224 resmlp_12_224 gmlp_ti16_224
mobilenetv3_small_050 fbnetv3_b lcnet_035 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075
mobilevit_xxs mobilevitv2_050 mvitv2_tiny mvitv2_small_cls naflexvit_base_patch16_gap
naflexvit_base_patch16_map nest_tiny nextvit_small nfnet_l0 dm_nfnet_f0 nf_regnet_b0 nf_resnet26 pit_ti_224
pit_ti_distilled_224 pvt_v2_b0 pvt_v2_b2_li qwen3_vit_88m rdnet_tiny regnetx_002 regnety_002 regnetv_040
repghostnet_050 repvit_m0_9 repvit_m1 res2net50_14w_8s resnest14d resnet10t resnet18 resnext50_32x4d
seresnet18 ecaresnet26t resnet50_gn resnetv2_18 resnetv2_50x1_bit rexnet_100 rexnetr_100 selecsls42
legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m
twins_pcpvt_small twins_svt_small vgg11_bn visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224
vit_xsmall_patch16_clip_224 vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224
vit_relpos_small_patch16_rpn_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224 vovnet39a
ese_vovnet19b_slim_dw xception41p xcit_nano_12_p16_224
""".split()


def timm_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    import timm

    for name in TIMM:
        if timm.is_model(name):
            yield name, lambda name=name: _timm(name)


WIDTHS = (48, 96, 192, 384)
SMALLER = (  # options of which a model takes some: of each line the first that it runs with
    ({"img_size": 64}, {"img_size": 128}),
    ({"depth": 2}, {"depths": (1, 1, 1, 1)}, {"depths": (2, 2, 2, 2)}, {"layers": (1, 1, 1, 1)}),
    (
        {"embed_dim": 64, "num_heads": 2},
        {"embed_dim": 48},
        {"embed_dims": WIDTHS},
        {"dims": WIDTHS},
        {"embed_dim": WIDTHS},
    ),
)


def _timm(name: str) -> Made:
    """As shallow and narrow, and at the smallest of its sizes, as its options allow."""
    import timm

    options: dict = {}
    made = None
    for choices in (({},), *SMALLER):
        for choice in choices:
            try:
                model = timm.create_model(name, pretrained=False, num_classes=7, **options, **choice).eval()
            except Exception:  # it takes no such option
                continue
            sizes = (64, 128, model.default_cfg["input_size"][-1]) if made is None else (made[1],)
            sizes = (choice["img_size"],) if "img_size" in choice else sizes
            if size := next((size for size in sizes if _runs(model, size)), 0):
                made, options = (model, size), options | choice
                break
    if made is None:
        raise RuntimeError(f"{name} could not be built")
    model, size = made
    fewer = (_without_repeats(model, kinds) for kinds in ((nn.Sequential, nn.ModuleList), nn.Sequential))
    return next((shallow for shallow in fewer if _runs(shallow, size)), model), (image(size),)


@torch.no_grad()
def _runs(model: nn.Module, size: int) -> bool:
    try:
        model(image(size, batch=1))
    except Exception:  # it takes one size only
        return False
    return True


def _without_repeats(model: nn.Module, lists: type | tuple[type, ...]) -> nn.Module:
    """A copy in which one stays of layers in a row that are equal but for their values."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, lists):
            kinds = [(type(m), [(name, t.shape) for name, t in m.state_dict().items()]) for m in module]
            for i in range(len(kinds) - 1, 0, -1):
                if kinds[i] == kinds[i - 1] and kinds[i][1]:
                    del module[i]
    return model


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
    "xpos": dict(rotary_xpos=True),
    "scalenorm": dict(use_scalenorm=True),
    "dynamic tanh": dict(use_dynamic_tanh=True),
    "layer scale": dict(use_layerscale=True),
    "gated residual": dict(gate_residual=True),
    "softclamp": dict(attn_softclamp_logits=True, softclamp_output=True),
    "latent": dict(attn_use_latent_kv=True, attn_dim_latent_kv=8),
    "relu squared": dict(ff_relu_squared=True),
    "sparse": dict(attn_sparse_topk=4),
    "head gates": dict(attn_gate_value_heads=True),
    "cope": dict(attn_use_cope=True),
    "skips": dict(unet_skips=True),
    "post norm": dict(pre_norm=False),
    "shared layers": dict(weight_tie_layers=True),
}


def xt_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    from x_transformers import Decoder, Encoder, TransformerWrapper, ViTransformerWrapper, XTransformer

    def make(options: dict) -> Made:
        layers = Decoder(dim=16, depth=2, heads=4, attn_dim_head=6, **options)
        return TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=layers), (tokens(),)

    for name, options in XT.items():
        yield name, lambda options=options: make(options)
    layers = dict(dim=16, depth=2, heads=4, attn_dim_head=6)
    yield (
        "encoder",
        lambda: (TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=Encoder(**layers)), (tokens(),)),
    )
    yield (
        "vision",
        lambda: (
            ViTransformerWrapper(image_size=32, patch_size=8, num_classes=7, attn_layers=Encoder(**layers)),
            (image(32),),
        ),
    )
    sides = {
        f"{side}_{name}": value
        for side in ("enc", "dec")
        for name, value in (("num_tokens", 50), ("max_seq_len", 32), ("depth", 2), ("heads", 4), ("attn_dim_head", 6))
    }
    yield "encoder and decoder", lambda: (XTransformer(dim=16, **sides), (tokens(), tokens(9)))


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


# --- torchtune: its builders --------------------------------------------------------------------------------------


def torchtune_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    from torchtune.models import clip, gemma, gemma2, llama2, llama3, mistral, phi3, qwen2, t5

    sizes = dict(vocab_size=50, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=32)
    wide, heads = dict(intermediate_dim=48, **sizes), dict(head_dim=8)
    adapter = dict(lora_attn_modules=["q_proj", "v_proj"], apply_lora_to_mlp=True, lora_rank=4, lora_alpha=8)
    decoders = {
        "llama2": (llama2.llama2, sizes),
        "llama3": (llama3.llama3, sizes),
        "mistral": (mistral.mistral, wide),
        "phi3": (phi3.phi3, {**wide, "num_kv_heads": 4}),
        "qwen2": (qwen2.qwen2, wide),
        "gemma": (gemma.gemma, wide | heads),
        "gemma2": (gemma2.gemma2, wide | heads),
        "llama3 under adapters": (llama3.lora_llama3, sizes | adapter),
    }
    for name, (builder, options) in decoders.items():
        yield name, lambda builder=builder, options=options: (builder(**options), (tokens(),))
    encoder = dict(embed_dim=32, mlp_dim=48, num_heads=4, head_dim=8, num_layers=2, vocab_size=50, norm_eps=1e-6)
    positions = dict(rel_pos_num_buckets=8, rel_pos_max_dist=16, max_seq_len=8)
    yield "t5", lambda: (t5._component_builders.t5_encoder(**encoder, **positions), (tokens(),))
    text = dict(embed_dim=32, num_heads=4, num_layers=2, vocab_size=50, max_seq_len=8)

    def clip_text() -> nn.Module:
        model = clip._component_builders.clip_text_encoder(**text)
        nn.init.normal_(model.position_embedding)  # which it leaves to a checkpoint
        return model

    yield "clip", lambda: (clip_text(), (tokens(),))


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
    import diffusion

    return diffusion.models()


def written_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    from written import WRITTEN

    for name, make in WRITTEN.items():
        yield name, lambda make=make: (make().eval(), (torch.randn(2, 8, 7),))


LIBRARIES: dict[str, Callable[[], Iterator[tuple[str, Callable[[], Made]]]]] = {
    "written": written_models,
    "x_transformers": xt_models,
    "litgpt": litgpt_models,
    "torchtune": torchtune_models,
    "open_clip": open_clip_models,
    "torchvision": torchvision_models,
    "timm": timm_models,
    "diffusers": diffusers_models,
}


def import_torchvision() -> None:
    """Before anything else does, where it is there: its wheels for GPUs bring no operators to a CPU build of torch, but
    need them declared to be imported."""
    if not find_spec("torchvision"):
        return
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
    import_torchvision()
    makers = {}
    for library, listed in LIBRARIES.items():
        try:
            makers |= {f"{library} {name}": make for name, make in listed()} if find_spec(library) else {}
        except (ImportError, RuntimeError) as error:  # what it needs besides is missing
            print(f"{library} is left out: {error}")
    return makers
