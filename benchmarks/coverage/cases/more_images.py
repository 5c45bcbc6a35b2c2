"""More torchvision models: real widths, small images."""

from __future__ import annotations

from torchvision.models import detection, optical_flow, segmentation, video
from torchvision.models.video.mvit import MSBlockConfig

from .builders import small_mvit, vision_case
from .inputs import clips, image_pairs, scenes

_CLASSIFICATION = (
    vision_case("resnet34", "layer3"),
    vision_case("resnet50", "layer3.2"),
    vision_case("squeezenet1_0", "features.8"),
    vision_case("densenet169", "features.denseblock3.denselayer9"),
    vision_case("mnasnet1_0", "layers.9"),
    vision_case("shufflenet_v2_x1_0", "stage3.4"),
    vision_case("mobilenet_v3_large", "features.8"),
    vision_case("efficientnet_b1", "features.5"),
    vision_case("regnet_x_400mf", "trunk_output.block4"),
    vision_case("convnext_small", "features.5.9"),
    vision_case("swin_s", "features.5.6"),
    vision_case("vit_b_32", "encoder.layers.encoder_layer_4", image_size=64),
)

_SEGMENTATION = tuple(
    vision_case(name, cut, family="segmentation", function=function, weights_backbone=None, aux_loss=auxiliary)
    for name, cut, function, auxiliary in (
        ("deeplabv3_resnet50", "backbone.layer4", segmentation.deeplabv3_resnet50, False),
        ("fcn_resnet50_auxiliary", "classifier", segmentation.fcn_resnet50, True),
    )
)


def _block(heads: int, inputs: int, outputs: int, stride: int) -> MSBlockConfig:
    return MSBlockConfig(
        num_heads=heads,
        input_channels=inputs,
        output_channels=outputs,
        kernel_q=[3, 3, 3],
        kernel_kv=[3, 3, 3],
        stride_q=[1, stride, stride],
        stride_kv=[1, 2, 2],
    )


_mvit_v2 = small_mvit(
    block_setting=[_block(1, 24, 24, 1), _block(2, 24, 48, 2), _block(2, 48, 48, 1), _block(4, 48, 96, 2)],
    residual_pool=True,
    rel_pos_embed=True,
    proj_after_attn=True,
)

_VIDEO = tuple(
    vision_case(name, cut, family="video", function=function, inputs=inputs)
    for name, cut, function, inputs in (
        ("mc3_18", "layer2.1", video.mc3_18, clips(4, 32)),
        ("r2plus1d_18", "layer3", video.r2plus1d_18, clips(4, 32)),
        ("mvit_v2_small", "blocks.2", _mvit_v2, clips(4, 32)),
        ("swin3d_s", "features.4.6", video.swin3d_s, clips(4, 32)),
    )
)

_FLOW = (
    vision_case(
        "raft_large",
        "context_encoder",
        family="optical flow",
        function=optical_flow.raft_large,
        inputs=image_pairs(128),
    ),
)

_FEW_BOXES = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}

_DETECTION = tuple(
    vision_case(
        name,
        cut,
        family="detection",
        function=function,
        inputs=inputs,
        weights_backbone=None,
        min_size=96,
        max_size=96,
        **options,
    )
    for name, cut, function, inputs, options in (
        ("fcos_resnet50", "head", detection.fcos_resnet50_fpn, scenes(96), {}),
        (
            "fasterrcnn_resnet50_v2",
            "roi_heads",
            detection.fasterrcnn_resnet50_fpn_v2,
            scenes(96),
            {**_FEW_BOXES, "num_classes": 3},
        ),
        (
            "maskrcnn_resnet50",
            "rpn",
            detection.maskrcnn_resnet50_fpn,
            scenes(96, masks=True),
            {**_FEW_BOXES, "num_classes": 3},
        ),
        (
            "keypointrcnn_resnet50",
            "roi_heads",
            detection.keypointrcnn_resnet50_fpn,
            scenes(96, keypoints=17),
            _FEW_BOXES,
        ),
    )
)

CASES = (*_CLASSIFICATION, *_SEGMENTATION, *_VIDEO, *_FLOW, *_DETECTION)
