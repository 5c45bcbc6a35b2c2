"""The first group's torchvision models: real widths, small images."""

from __future__ import annotations

from torchvision.models import detection, optical_flow, segmentation, video
from torchvision.models.video.mvit import MSBlockConfig

from .builders import small_mvit, vision_case
from .inputs import clips, image_pairs, scenes


def _block(heads: int, inputs: int, outputs: int, strided: bool) -> MSBlockConfig:
    return MSBlockConfig(
        num_heads=heads,
        input_channels=inputs,
        output_channels=outputs,
        kernel_q=[3, 3, 3] if strided else [],
        kernel_kv=[3, 3, 3],
        stride_q=[1, 2, 2] if strided else [],
        stride_kv=[1, 2, 2],
    )


_mvit_v1 = small_mvit(
    block_setting=[
        _block(1, 24, 48, False),
        _block(2, 48, 48, True),
        _block(2, 48, 96, False),
        _block(4, 96, 96, True),
    ],
    residual_pool=False,
    rel_pos_embed=False,
    proj_after_attn=False,
)

_CLASSIFICATION = (
    vision_case("alexnet", "features.6"),
    vision_case("vgg11_bn", "features.15"),
    vision_case("resnet18", "layer3"),
    vision_case("resnext50_32x4d", "layer3"),
    vision_case("wide_resnet50_2", "layer3"),
    vision_case("mobilenet_v2", "features.9"),
    vision_case("mobilenet_v3_small", "features.6"),
    vision_case("shufflenet_v2_x0_5", "stage3"),
    vision_case("squeezenet1_1", "features.7"),
    vision_case("densenet121", "features.denseblock3"),
    vision_case("googlenet", "inception4b", init_weights=False, aux_logits=True),
    vision_case("inception_v3", "Mixed_6b", size=299, init_weights=False),
    vision_case("mnasnet0_5", "layers.10"),
    vision_case("efficientnet_b0", "features.4"),
    vision_case("efficientnet_v2_s", "features.4"),
    vision_case("regnet_y_400mf", "trunk_output.block3"),
    vision_case("convnext_tiny", "features.4"),
    vision_case("vit_b_16", "encoder.layers.encoder_layer_6", image_size=64),
    vision_case("swin_t", "features.4"),
    vision_case("swin_v2_t", "features.4"),
    vision_case("maxvit_t", "blocks.2", size=224),
)

_SEGMENTATION = tuple(
    vision_case(name, cut, family="segmentation", function=function, weights_backbone=None)
    for name, cut, function in (
        ("fcn_resnet50", "backbone.layer3", segmentation.fcn_resnet50),
        ("deeplabv3_mobilenet", "backbone.8", segmentation.deeplabv3_mobilenet_v3_large),
        ("lraspp_mobilenet", "backbone.8", segmentation.lraspp_mobilenet_v3_large),
    )
)

_VIDEO = tuple(
    vision_case(name, cut, family="video", function=function, inputs=inputs)
    for name, cut, function, inputs in (
        ("r3d_18", "layer3", video.r3d_18, clips(4, 32)),
        ("mvit_v1_small", "blocks.2", _mvit_v1, clips(4, 32)),
        ("swin3d_t", "features.4", video.swin3d_t, clips(4, 64)),
    )
)

_FLOW = (
    vision_case(
        "raft_small",
        "context_encoder",
        family="optical flow",
        function=optical_flow.raft_small,
        inputs=image_pairs(128),
    ),
)

_DETECTION = (
    vision_case(
        "fasterrcnn_mobilenet",
        "rpn",
        family="detection",
        function=detection.fasterrcnn_mobilenet_v3_large_320_fpn,
        inputs=scenes(96),
        weights_backbone=None,
        min_size=96,
        max_size=96,
    ),
    vision_case(
        "retinanet_resnet50",
        "head",
        family="detection",
        function=detection.retinanet_resnet50_fpn,
        inputs=scenes(96),
        weights_backbone=None,
        min_size=96,
        max_size=96,
    ),
    vision_case(
        "ssdlite320",
        "head",
        family="detection",
        function=detection.ssdlite320_mobilenet_v3_large,
        inputs=scenes(96),
        weights_backbone=None,
    ),
)

CASES = (*_CLASSIFICATION, *_SEGMENTATION, *_VIDEO, *_FLOW, *_DETECTION)
