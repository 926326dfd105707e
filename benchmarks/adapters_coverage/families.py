"""The smallest network of each family of torchvision and timm, with random weights, for 64 pixels if it can be."""

from contextlib import suppress
from typing import Any

import torch
from torch import nn

CLASSES = 10

#: ``library/name``, a small network of each family and of unlike ones in a family; small ones first, as a budget may
# end.
FAMILIES = (
    *("timm/test_byobnet", "timm/test_mambaout", "timm/test_nfnet", "torchvision/squeezenet1_1"),
    *("timm/starnet_s050", "timm/lcnet_050", "timm/mobilenetv4_conv_small_035", "torchvision/shufflenet_v2_x0_5"),
    *("timm/tinynet_e", "timm/dla46_c", "timm/mnasnet_050", "torchvision/mnasnet0_5", "timm/edgenext_xx_small"),
    *("timm/ese_vovnet19b_slim", "torchvision/mobilenet_v3_small", "timm/cspnext_tiny", "timm/mobilevitv2_050"),
    *("timm/cs3darknet_focus_s", "timm/mobilevit_xxs", "timm/efficientvit_b0", "timm/fasternet_t0"),
    *("torchvision/mobilenet_v2", "timm/lcnetv2_small", "timm/convnext_atto", "timm/convnextv2_atto"),
    *("timm/resnet10t", "timm/repghostnet_050", "timm/efficientnet_lite0", "timm/tf_efficientnet_lite0"),
    *("timm/ghostnet_050", "timm/hgnetv2_b0", "timm/iformer_t", "timm/pvt_v2_b0", "timm/inception_next_atto"),
    *("timm/cpubone_nano", "timm/hardcorenas_a", "timm/fastvit_t8", "timm/swiftformer_xs", "timm/pit_ti_224"),
    *("timm/rexnet_100", "timm/xcit_nano_12_p16_224", "timm/efficientformerv2_s0", "timm/deit_tiny_patch16_224"),
    *("timm/eva02_tiny_patch14_224", "timm/vit_tiny_patch16_224", "timm/coat_lite_tiny"),
    *("timm/deit_tiny_distilled_patch16_224", "timm/efficientvit_m0", "torchvision/efficientnet_b0"),
    *("torchvision/regnet_y_400mf", "timm/efficientvim_m1", "timm/tiny_vit_5m_224", "torchvision/googlenet"),
    *("timm/gernet_s", "timm/vit_tiny_r_s16_p8_224", "torchvision/regnet_x_400mf", "timm/mixnet_s"),
    *("timm/convit_tiny", "timm/gmlp_ti16_224", "timm/levit_128s", "timm/levit_conv_128s", "timm/shvit_s1"),
    *("torchvision/swin_t", "torchvision/densenet121", "torchvision/vit_b_32", "timm/resnest14d", "timm/repvgg_a0"),
    *("timm/coat_tiny", "timm/lambda_resnet26t", "timm/repvit_m0_9", "timm/regnetz_005", "timm/crossvit_tiny_240"),
    *("timm/dpn48b", "timm/botnet26t_256", "timm/resnetv2_18", "torchvision/resnet18", "timm/visformer_tiny"),
    *("timm/poolformer_s12", "timm/legacy_seresnet18", "timm/seresnet18", "timm/coatnet_pico_rw_224"),
    *("timm/skresnet18", "timm/mobileone_s0", "timm/maxvit_pico_rw_256", "timm/efficientnet_cc_b0_4e"),
    *("timm/lowformer_b0", "timm/nf_resnet26", "timm/halonet26t", "timm/hrnet_w18_small"),
    *("timm/mobilenetv4_hybrid_medium", "timm/gcvit_xxtiny", "timm/resmlp_12_224", "timm/efficientformer_l1"),
    *("torchvision/alexnet", "torchvision/vgg11", "torchvision/maxvit_t", "timm/ghostnetv3_050", "timm/nest_tiny"),
    *("timm/cait_xxs24_224", "timm/mixer_s32_224", "timm/cspresnet50", "timm/legacy_xception"),
    *("timm/vit_relpos_small_patch16_224", "timm/convmixer_1024_20_ks9_p14", "torchvision/resnext50_32x4d"),
    *("timm/resnetv2_50x1_bit", "timm/vitamin_small_224", "timm/rdnet_tiny", "timm/mvitv2_tiny"),
    *("timm/twins_svt_small", "timm/caformer_s18", "timm/twins_pcpvt_small", "torchvision/efficientnet_v2_s"),
    *("timm/xception41", "timm/hiera_tiny_224", "timm/tnt_s_patch16_224", "timm/swin_s3_tiny_224"),
    *("timm/sequencer2d_s", "timm/volo_d1_224", "timm/res2net50_14w_8s", "torchvision/convnext_tiny"),
    *("timm/selecsls42", "timm/davit_tiny", "timm/swinv2_cr_tiny_224", "timm/swinv2_tiny_window8_256"),
    *("torchvision/swin_v2_t", "timm/focalnet_tiny_srf", "timm/tresnet_m", "torchvision/inception_v3"),
    *("timm/nextvit_small", "timm/hieradet_small", "timm/inception_v4", "timm/samvit_base_patch16_224"),
)


#: Pixels where 64 leave the last attention a single token, whose queries and keys then get no gradient.
SIZES = {"timm/efficientvit_m0": 128}


def build(family: str) -> tuple[nn.Module, int]:
    """Build a network with random weights; return it, in training mode, and the side of images that it takes.

    Args:
        family: One of ``FAMILIES``.
    """
    library, name = family.split("/")
    torch.manual_seed(0)
    network, own = _torchvision(name) if library == "torchvision" else _timm(name, SIZES.get(family, 64))
    network.eval()
    for size in (SIZES.get(family, 64), 128, own):
        with suppress(Exception), torch.no_grad():  # each library and layer refuses in its own way
            network(torch.zeros(1, 3, size, size))
            return network.train(), size
    raise RuntimeError(f"{family} takes no image of 64, 128 or {own} pixels")


def _torchvision(name: str) -> tuple[nn.Module, int]:
    from torchvision.models import get_model

    options: dict[str, Any] = {"num_classes": CLASSES}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False, "transform_input": False}
    if name.startswith("vit_"):
        options["image_size"] = 64
    return get_model(name, weights=None, **options), 299 if name == "inception_v3" else 224


def _timm(name: str, size: int) -> tuple[nn.Module, int]:
    import timm

    with suppress(Exception):  # most convolutional networks have no such argument, some window sizes no such image
        network = timm.create_model(name, pretrained=False, num_classes=CLASSES, img_size=size)
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, size, size))
        return network, size
    network = timm.create_model(name, pretrained=False, num_classes=CLASSES)
    return network, int(network.default_cfg["input_size"][-1])
