"""Small models for images of further libraries."""

# ruff: noqa: E501  (one expression a line)

import torch

from tests.benchmarks.zoo.families import Inputs, ids, table

IMAGE = Inputs((3, 32, 32))
VIT = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 16, "depth": 4, "heads": 2, "mlp_dim": 32}
VIT_WITHOUT_SIZE = {name: value for name, value in VIT.items() if name != "image_size"}
VIT_WITHOUT_DEPTH = {name: value for name, value in VIT.items() if name != "depth"}
CLIP = {"image_size": 16, "frames": 4, "frame_patch_size": 2, "num_classes": 5, "dim": 16, "heads": 2, "mlp_dim": 32}

VIT_PYTORCH = [
    *(
        table(f"vit_pytorch.{module}", IMAGE, f"{name}(**small, dim_head=8)", **VIT)
        for module, name in [
            ("vit", "ViT"), ("deepvit", "DeepViT"), ("jumbo_vit", "JumboViT"), ("learnable_memory_vit", "ViT"),
            ("mp3", "ViT"), ("normalized_vit", "nViT"), ("parallel_vit", "ViT"),
            ("rvt", "RvT"), ("simple_flash_attn_vit", "SimpleViT"), ("simple_uvit", "SimpleUViT"),
            ("simple_vit", "SimpleViT"), ("simple_vit_attn_residual", "SimpleViTAttnResidual"),
            ("simple_vit_orthog_residual_update", "SimpleViT"), ("simple_vit_with_patch_dropout", "SimpleViT"),
            ("simple_vit_with_qk_norm", "SimpleViT"), ("simple_vit_with_register_tokens", "SimpleViT"),
            ("simple_vit_with_relative_proj_pos_bias", "SimpleViT"), ("simple_vit_with_value_residual", "SimpleViT"),
            ("simple_vit_with_sparse_gating", "SimpleViTWithSparseGating"), ("vit_5", "ViT"), ("vaat", "ViT"),
            ("simple_vit_with_specialized_cls", "SimpleViT"), ("vit_detpool", "ViTDetPool"), ("vat", "ViT"),
            ("vit_for_small_dataset", "ViT"), ("vit_with_decorr", "ViT"), ("vit_with_keel_post_ln", "ViT"),
            ("vit_with_patch_dropout", "ViT"), ("vit_with_patch_merger", "ViT"),
            ("attn_residual_with_dca_simple_vit", "SimpleViT"), ("jet_vit", "JetViT"),
        ]
    ),
    table("vit_pytorch.vit", IMAGE, "ViT(**small, pool='mean', dropout=0.1, emb_dropout=0.1)", **VIT),
    table("vit_pytorch.simple_vit_with_hyper_connections", IMAGE, "SimpleViT(**small, num_residual_streams=2)", **VIT),
    table("vit_pytorch.simple_vit_with_fft", IMAGE, "SimpleViT(**small, freq_patch_size=8)", **VIT),
    table("vit_pytorch.ats_vit", IMAGE, "ViT(**small, max_tokens_per_depth=(16, 12, 8, 8))", **VIT),
    table("vit_pytorch.cait", IMAGE, "CaiT(**small, cls_depth=2, layer_dropout=0.05)\nCaiT(**small, cls_depth=2)", **VIT),
    table("vit_pytorch.xcit", IMAGE, "XCiT(**small, cls_depth=2)", **VIT),
    table("vit_pytorch.looped_vit", IMAGE, "LoopedViT(**small, pre_loop_depth=2, num_looped_blocks=2, post_loop_depth=2)", ("pre_loop.layers.0.1", "pre_loop.layers.1.1"), **VIT_WITHOUT_DEPTH),
    table("vit_pytorch.wwt", IMAGE, "WWT(**small, num_slots=4)", **VIT),
    table("vit_pytorch.cct", IMAGE, """
        CCT(img_size=32, embedding_dim=16, n_conv_layers=1, num_layers=4, num_heads=2, mlp_ratio=2, num_classes=5)
        CCT(img_size=32, embedding_dim=16, n_conv_layers=2, num_layers=4, num_heads=2, mlp_ratio=2, num_classes=5, stochastic_depth_rate=0., positional_embedding='learnable')
        """),
    table("vit_pytorch.cross_vit", Inputs((3, 48, 48)), "CrossViT(image_size=48, num_classes=5, sm_dim=16, lg_dim=24, sm_enc_mlp_dim=16, lg_enc_mlp_dim=16, lg_enc_depth=2)"),
    table("vit_pytorch.crossformer", Inputs((3, 64, 64)), "CrossFormer(dim=(64, 64, 64, 64), depth=(1, 1, 2, 1), local_window_size=2, global_window_size=(2, 2, 2, 1), num_classes=5)"),
    table("vit_pytorch.cvt", Inputs((3, 32, 32)), "CvT(num_classes=5, s1_emb_dim=16, s2_emb_dim=16, s3_emb_dim=32, s3_depth=2, s1_mlp_mult=2)"),
    table("vit_pytorch.levit", Inputs((3, 64, 64)), "LeViT(image_size=64, num_classes=5, dim=(16, 24, 32), depth=2, heads=(2, 2, 2), mlp_mult=2)\nLeViT(image_size=64, num_classes=5, dim=(16, 24, 32), depth=1, heads=2, mlp_mult=2, num_distill_classes=4)"),
    table("vit_pytorch.look_vit", IMAGE, "LookViT(dim=16, image_size=32, num_classes=5, depth=3, patch_size=16, highres_patch_size=8, heads=2)"),
    table("vit_pytorch.max_vit", Inputs((3, 64, 64)), "MaxViT(num_classes=5, dim=16, depth=(1, 1, 2), dim_head=8, window_size=2)"),
    table("vit_pytorch.max_vit_with_registers", Inputs((3, 64, 64)), "MaxViT(num_classes=5, dim=16, depth=(1, 1, 2), dim_head=8, window_size=2)"),
    table("vit_pytorch.mobile_vit", Inputs((3, 64, 64)), "MobileViT((64, 64), [16, 24, 32], [8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 24], 5, depths=(1, 1, 1))"),
    table("vit_pytorch.nest", IMAGE, "NesT(image_size=32, patch_size=4, dim=16, heads=2, num_hierarchies=3, block_repeats=(1, 1, 2), num_classes=5)"),
    table("vit_pytorch.pit", IMAGE, "PiT(image_size=32, patch_size=8, dim=16, num_classes=5, depth=(1, 1, 1), heads=2, mlp_dim=32)"),
    table("vit_pytorch.regionvit", Inputs((3, 64, 64)), "RegionViT(dim=(8, 16, 16, 32), depth=(1, 1, 2, 1), window_size=2, num_classes=5)"),
    table("vit_pytorch.scalable_vit", Inputs((3, 64, 64)), "ScalableViT(num_classes=5, dim=16, heads=(1, 2, 2, 2), depth=(1, 1, 1, 1), ssa_dim_key=(8,) * 4, reduction_factor=(4, 2, 1, 1), window_size=(4, 4, None, None))"),
    table("vit_pytorch.t2t", IMAGE, "T2TViT(image_size=32, num_classes=5, dim=16, depth=3, heads=2, mlp_dim=32)"),
    table("vit_pytorch.twins_svt", Inputs((3, 64, 64)), "TwinsSVT(num_classes=5, s1_emb_dim=8, s2_emb_dim=8, s3_emb_dim=16, s4_emb_dim=16, s1_local_patch_size=2, s2_local_patch_size=2, s3_local_patch_size=2, s4_local_patch_size=2, s1_global_k=2, s2_global_k=2, s3_global_k=2, s4_global_k=2, s3_depth=1, s4_depth=1)"),
    table("vit_pytorch.na_vit", Inputs([torch.ones(3, 32, 16), torch.ones(3, 16, 16)]), "NaViT(**small)", **VIT),
    table("vit_pytorch.vaat", Inputs((800,)), "AST(16, 4, 32, 5, patch_size=8)"),
    table("vit_pytorch.vat_siglip", Inputs((3, 28, 28)), "SigLIP(28, 14, 16, 4, 2, 32)"),
    table("vit_pytorch.vit_1d", Inputs((3, 32)), "ViT(seq_len=32, **small)", **VIT_WITHOUT_SIZE),
    table("vit_pytorch.simple_vit_1d", Inputs((3, 32)), "SimpleViT(seq_len=32, **small)", **VIT_WITHOUT_SIZE),
    table("vit_pytorch.vit_3d", Inputs((3, 4, 16, 16)), "ViT(image_patch_size=8, depth=4, **small)", **CLIP),
    table("vit_pytorch.simple_vit_3d", Inputs((3, 4, 16, 16)), "SimpleViT(image_patch_size=8, depth=4, **small)", **CLIP),
    table("vit_pytorch.vivit", Inputs((3, 4, 16, 16)), "ViViT(image_patch_size=8, spatial_depth=3, temporal_depth=2, **small)\nViViT(image_patch_size=8, spatial_depth=3, temporal_depth=3, variant='factorized_self_attention', **small)", **CLIP),
]  # fmt: skip

SMP = [
    table("segmentation_models_pytorch", Inputs((3, 64, 64)), "\n".join(
        f"{decoder}('{encoder}', encoder_weights=None, classes=2)"
        for decoder, encoders in {
            "Unet": "resnet18 mobilenet_v2 efficientnet-b0 timm-efficientnet-b0 timm-skresnet18 mit_b0 mobileone_s0 vgg11 densenet121 "
                    "dpn68 se_resnet50 xception tu-test_resnet tu-test_efficientnet tu-test_convnext2",
            "UnetPlusPlus": "resnet18 mobilenet_v2", "MAnet": "resnet18 mobilenet_v2", "Linknet": "resnet18 mobilenet_v2",
            "FPN": "resnet18 mit_b0", "PSPNet": "resnet18 mobilenet_v2", "DeepLabV3": "resnet18",
            "DeepLabV3Plus": "resnet18 mobilenet_v2", "UPerNet": "resnet18 mit_b0",
            "Segformer": "resnet18 mit_b0", "DPT": "tu-test_vit",
        }.items() for encoder in encoders.split())),
    table("segmentation_models_pytorch", Inputs((3, 64, 64)), """
        Unet('tu-test_resnet', encoder_weights=None, decoder_attention_type='scse', aux_params={'classes': 3, 'dropout': 0.2})
        Unet('tu-test_resnet', encoder_weights=None, decoder_interpolation='bilinear', activation='softmax2d', classes=3)
        """),
    table("segmentation_models_pytorch", Inputs((3, 64, 64)), "Unet('resnet18', encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8))",
           ("encoder.layer2", "decoder.blocks.1", "decoder.blocks.2", "decoder.blocks.3")),
]  # fmt: skip

MONAI = [
    table("monai.networks.nets", Inputs((1, 32, 32)), """
        UNet(2, 1, 2, (4, 8, 16, 16), (2, 2, 2))
        UNet(2, 1, 2, (4, 8, 16, 16), (2, 2, 2), num_res_units=2, norm='BATCH', dropout=0.1)
        AttentionUnet(2, 1, 2, (4, 8, 16, 16), (2, 2, 2))
        AutoEncoder(2, 1, 2, (4, 8, 16), (2, 2, 2), inter_channels=[8, 8, 8])
        VarAutoEncoder(2, (1, 32, 32), 1, 4, (4, 8, 16), (2, 2, 2))
        BasicUNet(2, 1, 2, (4, 4, 8, 8, 16, 4))
        BasicUNetPlusPlus(2, 1, 2, (4, 4, 8, 8, 16, 4))
        BasicUNetPlusPlus(2, 1, 2, (4, 4, 8, 8, 16, 4), deep_supervision=True)
        DenseNet(2, 1, 5, 8, 4, (2, 2, 2, 2))
        DynUNet(2, 1, 2, (3, 3, 3, 3), (1, 2, 2, 2), (2, 2, 2), filters=(4, 8, 8, 16))
        DynUNet(2, 1, 2, (3, 3, 3, 3), (1, 2, 2, 2), (2, 2, 2), filters=(4, 8, 8, 16), deep_supervision=True, res_block=True)
        FlexibleUNet(1, 2, 'resnet10', decoder_channels=(16, 16, 8, 8, 4), spatial_dims=2)
        SegResNet(2, 8, 1, 2, blocks_down=(1, 1, 1, 1))
        SegResNetVAE((32, 32), spatial_dims=2, init_filters=8, blocks_down=(1, 1, 1, 1), vae_nz=8)
        SegResNetDS(2, 8, 1, 2, blocks_down=(1, 1, 1, 1), dsdepth=2)
        SegResNetDS2(2, 8, 1, 2, blocks_down=(1, 1, 1, 1))
        VNet(2, 1, 2, dropout_dim=2)
        UNETR(1, 2, 32, 4, 16, 32, 2, spatial_dims=2)
        ViT(1, 32, 8, 16, 32, 4, 2, classification=True, spatial_dims=2)
        ViT(1, 32, 8, 16, 32, 4, 2, proj_type='perceptron', pos_embed_type='sincos', save_attn=True, spatial_dims=2)
        MaskedAutoEncoderViT(1, 32, 8, 16, 32, 4, 2, decoder_hidden_size=16, decoder_mlp_dim=32, decoder_num_layers=2, decoder_num_heads=2, spatial_dims=2)
        AutoencoderKL(2, 1, 1, (1, 1, 1), (8, 8, 16), (False, False, True), norm_num_groups=4)
        VQVAE(2, 1, 1, (8, 8), 1, (8, 8), ((2, 4, 1, 1), (2, 4, 1, 1)), ((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)), num_embeddings=8, embedding_dim=4)
        RegUNet(2, 1, 4, 3)
        LocalNet(2, 1, 4, (0, 1, 2))
        GlobalNet((32, 32), 2, 1, 4, 2)
        MedNeXt(2, 4, 1, 2, kernel_size=3, blocks_down=(1, 1, 1, 1), blocks_bottleneck=1, blocks_up=(1, 1, 1, 1))
        MedNeXt(2, 4, 1, 2, kernel_size=3, blocks_down=(1, 1, 1, 1), blocks_bottleneck=1, blocks_up=(1, 1, 1, 1), deep_supervision=True, use_residual_connection=True)
        Classifier((1, 32, 32), 5, (4, 8, 16), (2, 2, 2))
        Critic((1, 32, 32), (4, 8, 16), (2, 2, 2))
        Discriminator((1, 32, 32), (4, 8, 16), (2, 2, 2))
        Regressor((1, 32, 32), (3,), (4, 8, 16), (2, 2, 2))
        PatchDiscriminator(2, 4, 1, num_layers_d=2)
        MultiScalePatchDiscriminator(2, 2, 2, 4, 1, minimum_size_im=32)
        Quicknat(2, 1, 8)
        ResNet('basic', [1, 1, 1, 1], [4, 8, 8, 16], 2, 1, num_classes=5)
        ResNet('bottleneck', [1, 1, 1, 1], [4, 8, 8, 16], 2, 1, num_classes=5, shortcut_type='A')
        HighResNet(2, 1, 2, layer_params=({'name': 'conv_0', 'n_features': 4, 'kernel_size': 3}, {'name': 'res_1', 'n_features': 4, 'kernels': (3, 3), 'repeat': 2}, {'name': 'res_2', 'n_features': 8, 'kernels': (3, 3), 'repeat': 2}, {'name': 'conv_1', 'n_features': 8, 'kernel_size': 1}, {'name': 'conv_2', 'kernel_size': 1}))
        EfficientNetBN('efficientnet-b0', False, in_channels=1, num_classes=5)
        """),
    table("monai.networks.nets", Inputs((1, 32, 32, 32)), """
        UNet(3, 1, 2, (4, 8, 8), (2, 2))
        HighResNet(3, 1, 2, layer_params=({'name': 'conv_0', 'n_features': 2, 'kernel_size': 3}, {'name': 'res_1', 'n_features': 2, 'kernels': (3, 3), 'repeat': 2}, {'name': 'conv_1', 'n_features': 4, 'kernel_size': 1}, {'name': 'conv_2', 'kernel_size': 1}))
        DiNTS(TopologySearch(channel_mul=0.1, num_blocks=2, num_depths=2), 1, 2)
        """),
    table("monai.networks.nets.senet", Inputs((1, 32, 32)), """
        SENet(2, 1, SEResNeXtBottleneck, (1, 1, 1, 1), 4, 4, inplanes=16, num_classes=5)
        SENet(2, 1, SEResNetBottleneck, (1, 1, 1, 1), 1, 4, inplanes=16, num_classes=5)
        """),
    table("monai.networks.nets", Inputs((1, 64, 64)), """
        SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_size=2, spatial_dims=2)
        SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_size=2, spatial_dims=2, use_v2=True)
        """),
    table("monai.networks.nets.restormer", Inputs((1, 32, 32)), "Restormer(2, 1, 1, 8, (1, 1, 1, 1), (1, 1, 2, 2))"),
    table("monai.networks.nets", Inputs((1, 32, 32)), "ViTAutoEnc(1, 32, 4, 1, 4, 16, 32, 4, 2, spatial_dims=2)"),
    table("monai.networks.nets", Inputs((1, 32, 32), ids(1000), (1, 64, 64)), "ControlNet(2, 1, (1, 1, 1), (8, 8, 16), (False, False, True), norm_num_groups=4, num_head_channels=8, conditioning_embedding_num_channels=(4, 8))"),
    table("monai.networks.nets", Inputs((3, 64, 64)), "TorchVisionFCModel('resnet18', 5, pool=None, use_conv=False)"),
    table("monai.networks.nets", Inputs((4, 3, 32, 32)), """
        MILModel(3, 'att', backbone=ResNet('basic', [1, 1, 1, 1], [4, 8, 8, 16], 2, 3, feed_forward=False), backbone_num_features=16)
        MILModel(3, 'att_trans', backbone=ResNet('basic', [1, 1, 1, 1], [4, 8, 8, 16], 2, 3, feed_forward=False), backbone_num_features=16, trans_blocks=2)
        """),
    table("monai.networks.nets", Inputs((16,)), "FullyConnectedNet(16, 5, (16, 16, 8))"),
    table("monai.networks.nets", Inputs(ids(16, 12)), "DecoderOnlyTransformer(16, 12, 16, 4, 2)"),
    table("monai.networks.nets", Inputs((1, 32, 32), ids(1000)), """
        DiffusionModelUNet(2, 1, 1, (1, 1, 1), (8, 8, 16), (False, False, True), norm_num_groups=4, num_head_channels=8)
        DiffusionModelUNet(2, 1, 1, (1, 1, 1), (8, 8, 16), (False, True, True), norm_num_groups=4, num_head_channels=8, resblock_updown=True)
        """),
    table("monai.networks.nets", Inputs((1, 32, 32), ids(1000), (3, 8)), "DiffusionModelUNet(2, 1, 1, (1, 1, 1), (8, 8, 16), (False, False, True), norm_num_groups=4, num_head_channels=8, with_conditioning=True, cross_attention_dim=8)"),
    table("monai.networks.nets", Inputs((3, 32, 32), (1, 32, 32)), "SPADENet(2, 1, 1, 3, (32, 32), [8, 16], 8, True)"),
    table("monai.networks.nets", Inputs((1, 32, 32), (3, 32, 32)), "SPADEAutoencoderKL(2, 3, 1, 1, (1, 1), (8, 16), (False, True), norm_num_groups=4, spade_intermediate_channels=8)"),
    table("monai.networks.nets", Inputs((1, 32, 32), ids(1000), (3, 32, 32)), "SPADEDiffusionModelUNet(2, 1, 1, 3, (1, 1), (8, 16), (False, True), norm_num_groups=4, num_head_channels=8, spade_intermediate_channels=8)"),
    table("monai.networks.nets", Inputs((1, 32, 32), (1, 32, 32)), "VoxelMorph(VoxelMorphUNet(2, 2, 4, (4, 4, 8, 8, 8, 4), (4, 4)), 2, spatial_dims=2)"),
]  # fmt: skip

OPEN_CLIP = [
    table("open_clip.model", Inputs((3, 32, 32), ids(64, 8)), """
        CLIP(16, CLIPVisionCfg(**small), CLIPTextCfg(context_length=8, vocab_size=64, width=16, heads=2, layers=2))
        CLIP(16, CLIPVisionCfg(**small, patch_dropout=0.25), CLIPTextCfg(context_length=8, vocab_size=64, width=16, heads=2, layers=2))
        CLIP(16, CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, image_size=32), CLIPTextCfg(context_length=8, vocab_size=64, width=16, heads=2, layers=2), quick_gelu=True)
        CustomTextCLIP(16, CLIPVisionCfg(**small, attentional_pool=True, attn_pooler_heads=2), CLIPTextCfg(context_length=8, vocab_size=64, width=16, heads=2, layers=2))
        CustomTextCLIP(16, CLIPVisionCfg(timm_model_name='test_vit', image_size=32), CLIPTextCfg(context_length=8, vocab_size=64, width=16, heads=2, layers=2), init_logit_bias=-10.)
        CustomTextCLIP(16, CLIPVisionCfg(**small, pool_type='avg', final_ln_after_pool=True), CLIPTextCfg(context_length=8, vocab_size=64, width=16, heads=2, layers=2, no_causal_mask=True, pool_type='last', proj_bias=True))
        """, layers=4, width=16, head_width=8, patch_size=8, image_size=32),
    table("open_clip.coca_model", Inputs((3, 32, 32), ids(64, 8)), "CoCa(16, MultimodalCfg(context_length=8, vocab_size=64, width=16, heads=2, layers=2, mlp_ratio=2), CLIPTextCfg(context_length=8, vocab_size=64, width=16, heads=2, layers=2, embed_cls=True, output_tokens=True), CLIPVisionCfg(layers=4, width=16, head_width=8, patch_size=8, image_size=32, attentional_pool=True, attn_pooler_heads=2, output_tokens=True))"),
    table("open_clip.transformer", IMAGE, """
        VisionTransformer(32, 8, 16, 4, 2, 2., output_dim=8)
        VisionTransformer(32, 8, 16, 4, 2, 2., ls_init_value=0.1, patch_dropout=0.5, output_dim=8, pos_embed_type='sin_cos_2d', pool_type='avg')
        """),
    table("open_clip.transformer", Inputs(ids(64, 8)), "TextTransformer(8, 64, 16, 2, 4, output_dim=8)\nTextTransformer(8, 64, 16, 2, 4, embed_cls=True, pad_id=0, output_dim=8)"),
    table("open_clip.modified_resnet", IMAGE, "ModifiedResNet((1, 1, 1, 1), 8, 2, 32, 8)"),
]  # fmt: skip

IMAGES = [*VIT_PYTORCH, *SMP, *MONAI, *OPEN_CLIP]
