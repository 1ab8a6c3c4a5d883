"""Small models for graphs, sequences and sound of further libraries, and for diffusion."""

# ruff: noqa: E501, SIM905  (one expression a line)

from __future__ import annotations

import torch

from tests.benchmarks.zoo.families import Inputs, Make, ids, table

NODES = 4
"""Of each graph; they stand in a ring."""


def nodes(*shape: int) -> Make:
    """Random numbers for every node of a batch of graphs."""
    return lambda generator, batch: torch.randn(NODES * batch, *shape, generator=generator)


def edges(*shape: int) -> Make:
    """Random numbers for every edge of a batch of graphs."""
    return lambda generator, batch: torch.rand(2 * NODES * batch, *shape, generator=generator)


def rings(generator: torch.Generator, batch: int) -> torch.Tensor:
    """The edges of the graphs, in both directions."""
    start = torch.arange(NODES * batch)
    end = (start + 1) % NODES + start // NODES * NODES
    return torch.stack([torch.cat([start, end]), torch.cat([end, start])])


def members(generator: torch.Generator, batch: int) -> torch.Tensor:
    """The graph of each node."""
    return torch.arange(batch).repeat_interleave(NODES)


CONVOLUTIONS = """
    GCNConv(8, 8) SAGEConv(8, 8) GraphConv(8, 8) GATConv(8,4,heads=2) GATv2Conv(8,4,heads=2) TransformerConv(8,4,heads=2)
    TAGConv(8, 8) ARMAConv(8, 8) SGConv(8, 8, K=2) ChebConv(8, 8, K=2) LEConv(8, 8) MFConv(8, 8) EGConv(8, 8, num_heads=2) ClusterGCNConv(8, 8)
    FeaStConv(8, 8, heads=2) GeneralConv(8, 8) SuperGATConv(8,4,heads=2) ResGatedGraphConv(8, 8) FiLMConv(8, 8) GatedGraphConv(8, 2)
    EdgeConv(nn.Linear(16,8)) GINConv(nn.Linear(8,8)) AntiSymmetricConv(8) APPNP(2, 0.1) GENConv(8, 8) SSGConv(8, 8, alpha=0.1)
    """.replace(", ", ",").split()  # fmt: skip
GNN = """
    {0}(8, 16, 4, 3)
    {0}(8, 16, 4, 3, dropout=0.1, norm='batch', jk='cat')
    {0}(8, 16, 4, 3, act='gelu', norm='layer', jk='lstm')
    """  # fmt: skip

TORCH_GEOMETRIC = [
    *(
        table("torch_geometric.nn", Inputs(x=nodes(8), edge_index=rings), f"Sequential('x, edge_index', [({conv}, 'x, edge_index -> x'), nn.ReLU(), ({conv}, 'x, edge_index -> x'), nn.ReLU(), ({conv}, 'x, edge_index -> x'), nn.Linear(8, 3)])")
        for conv in CONVOLUTIONS
    ),
    *(table("torch_geometric.nn", Inputs(nodes(8), rings), GNN.format(name)) for name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN")),
    table("torch_geometric.nn", Inputs(nodes(8), rings), """
        PNA(8, 16, 4, 3, aggregators=['mean', 'min', 'max', 'std'], scalers=['identity', 'amplification'], deg=torch.tensor([0, 2, 4, 1]))
        GAT(8, 16, 4, 3, v2=True, heads=2, concat=True)
        GraphUNet(8, 16, 3, 3)
        PMLP(8, 16, 3, 4)
        ARLinkPredictor(8, 16, 8, 4)
        """),
    table("torch_geometric.nn", Inputs(nodes(8), rings, members), """
        Polynormer(8, 16, 3, local_layers=3, global_layers=2, heads=2)
        SGFormer(8, 16, 3, trans_num_layers=3)
        NeuralFingerprint(8, 16, 3, 4)
        """),
    table("torch_geometric.nn", Inputs(x=nodes(8), edge_index=rings), """
        Sequential('x, edge_index', [(DeepGCNLayer(GENConv(8, 8), LayerNorm(8), nn.ReLU(), 'res+'), 'x, edge_index -> x'), (DeepGCNLayer(GENConv(8, 8), LayerNorm(8), nn.ReLU(), 'res'), 'x, edge_index -> x'), (DeepGCNLayer(GENConv(8, 8), LayerNorm(8), nn.ReLU(), 'dense'), 'x, edge_index -> x'), nn.Linear(16, 3)])
        """),
    table("torch_geometric.nn", Inputs(x=nodes(8), edge_index=rings, batch=members), """
        Sequential('x, edge_index, batch', [(GCNConv(8, 8), 'x, edge_index -> x'), nn.ReLU(), (GCNConv(8, 8), 'x, edge_index -> x'), (global_mean_pool, 'x, batch -> x'), nn.Linear(8, 3)])
        Sequential('x, edge_index, batch', [(GraphNorm(8), 'x, batch -> x'), (GINConv(MLP([8, 16, 8])), 'x, edge_index -> x'), (PairNorm(), 'x, batch -> x'), (GINConv(MLP([8, 16, 8])), 'x, edge_index -> x'), (global_add_pool, 'x, batch -> x'), MLP([8, 16, 3])])
        Sequential('x, edge_index, batch', [(GCNConv(8, 8), 'x, edge_index -> x'), (GCNConv(8, 8), 'x, edge_index -> x'), (SetTransformerAggregation(8, 2, 2), 'x, batch -> x'), nn.Linear(16, 3)])
        Sequential('x, edge_index, batch', [(GCNConv(8, 8), 'x, edge_index -> x'), (GCNConv(8, 8), 'x, edge_index -> x'), (SortAggregation(2), 'x, batch -> x'), nn.Linear(16, 3)])
        """),
    table("torch_geometric.nn", Inputs(x=nodes(8), edge_index=rings, edge_attr=edges(), batch=members), "\n".join(
        f"Sequential('x, edge_index, edge_attr, batch', [(GCNConv(8, 8), 'x, edge_index -> x'), ({pool}, 'x, edge_index, edge_attr, batch -> x, edge_index, edge_attr, batch, *_'), (GCNConv(8, 8), 'x, edge_index -> x'), (global_max_pool, 'x, batch -> x'), nn.Linear(8, 3)])".replace("*_", names)
        for pool, names in [("TopKPooling(8, 0.5)", "p, s"), ("SAGPooling(8, 0.5)", "p, s"), ("ASAPooling(8, 0.5)", "p")])),
    table("torch_geometric.nn", Inputs(nodes(8), rings, edges(5), members), "AttentiveFP(8, 16, 3, 5, 3, 2)"),
    table("torch_geometric.nn", Inputs(nodes(8), rings, edge_attr=edges(5)), "GAT(8, 16, 4, 3, edge_dim=5)\nGIN(8, 16, 4, 3)"),
    table("torch_geometric.nn", Inputs(nodes(8), rings, edge_weight=edges()), "GCN(8, 16, 4, 3)"),
    table("torch_geometric.nn", Inputs(nodes(8)), "MLP([8, 16, 16, 16, 3], dropout=0.1)\nMLP([8, 16, 16, 16, 3], norm=None, act='elu', plain_last=False)"),
    table("torch_geometric.nn", Inputs(rings), "LightGCN(12, 8, 3)"),
    table("torch_geometric.nn", Inputs(nodes(8), rings, rings), "SignedGCN(8, 16, 3)"),
]  # fmt: skip

TORCHAUDIO = [
    table("torchaudio.models", Inputs((12, 16), lambda generator, batch: torch.full((batch,), 12)), """
        Conformer(16, 2, 32, 4, 3, dropout=0.1)
        Conformer(16, 2, 32, 4, 3, use_group_norm=True, convolution_first=True)
        """),
    table("torchaudio.models", Inputs((16, 16), lambda generator, batch: torch.full((batch,), 12)), "Emformer(16, 2, 32, 4, 4, right_context_length=4)\nEmformer(16, 2, 32, 4, 4, left_context_length=4, right_context_length=4, max_memory_size=2)"),
    table("torchaudio.models", Inputs((1, 400)), "ConvTasNet(2, 16, 8, 3, 8, 16, 3, 2)\nWav2Letter(5)"),
    table("torchaudio.models", Inputs((1, 20, 12)), "DeepSpeech(12, 16, 5)"),
    table("torchaudio.models", Inputs((2, 4096)), "HDemucs(['a', 'b'], channels=4, nfft=256, depth=4, dconv_depth=1)", ("freq_encoder.0", "freq_encoder.1", "freq_encoder.2", "freq_decoder.1")),
    table("torchaudio.models", Inputs((800,)), """
        wav2vec2_model('group_norm', [(16, 10, 5), (16, 3, 2)], False, 16, 0., 3, 2, 4, 2, 0.1, 32, 0.1, 0.1, False, 0., 5)
        wav2vec2_model('layer_norm', [(16, 10, 5), (16, 3, 2)], True, 16, 0., 3, 2, 4, 2, 0., 32, 0., 0., True, 0., None)
        wav2vec2_model('group_norm', [(16, 10, 5), (16, 3, 2)], False, 16, 0., 3, 2, 4, 2, 0., 32, 0., 0., False, 0.1, 5)
        wavlm_model('group_norm', [(16, 10, 5), (16, 3, 2)], False, 16, 0., 3, 2, 4, 2, 8, 16, 0., 32, 0., 0., False, 0., 5)
        squim_objective_model(16, 8, 8, 2, 16, 3, 'LSTM', 10)
        """),
    table("torchaudio.models", Inputs((1, 144), (1, 16, 16)), "WaveRNN([2, 2, 3], 8, 12, 2, 16, 16, 5, 16, 8, 8)", ("rnn1", "rnn2", "fc1", "fc2")),
    table("torchaudio.models", Inputs(ids(20, 8), lambda generator, batch: torch.full((batch,), 8), (6, 12), lambda generator, batch: torch.full((batch,), 12)), "Tacotron2(n_mels=6, n_symbol=20, symbol_embedding_dim=16, encoder_embedding_dim=16, decoder_rnn_dim=16, attention_rnn_dim=16, attention_hidden_dim=8, prenet_dim=8, postnet_embedding_dim=16)"),
    table("torchaudio.models", Inputs((12, 8), lambda generator, batch: torch.full((batch,), 8, dtype=torch.int32), ids(16, 4), lambda generator, batch: torch.full((batch,), 4, dtype=torch.int32)), "emformer_rnnt_model(input_dim=8, encoding_dim=8, num_symbols=16, segment_length=4, right_context_length=4, time_reduction_input_dim=8, time_reduction_stride=1, transformer_num_heads=2, transformer_ffn_dim=16, transformer_num_layers=3, transformer_dropout=0.1, transformer_activation='gelu', transformer_left_context_length=4, transformer_max_memory_size=0, transformer_weight_init_scale_strategy='depthwise', transformer_tanh_on_mem=False, symbol_embedding_dim=8, num_lstm_layers=2, lstm_layer_norm=True, lstm_layer_norm_epsilon=1e-5, lstm_dropout=0.1)"),
    *(table("torchaudio.transforms", Inputs((800,)), f"nn.Sequential({first}, nn.Conv1d({channels}, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3))", ("1", "2", "3", "4"))
      for first, channels in [("MelSpectrogram(8000, 64, n_mels=8)", 8), ("MFCC(8000, 8, melkwargs={'n_fft': 64, 'n_mels': 12})", 8), ("nn.Sequential(Spectrogram(62), AmplitudeToDB(), FrequencyMasking(4))", 32), ("LFCC(8000, 16, n_lfcc=8, speckwargs={'n_fft': 64})", 8)]),
]  # fmt: skip

DECODERS = """
    attn_flash=True|rotary_pos_emb=True alibi_pos_bias=True|alibi_num_heads=1 rel_pos_bias=True dynamic_pos_bias=True use_rmsnorm=True
    use_simple_rmsnorm=True use_scalenorm=True ff_glu=True ff_swish=True|ff_glu=True ff_relu_squared=True attn_qk_norm=True attn_pre_talking_heads=True
    attn_one_kv_head=True attn_kv_heads=1 residual_attn=True macaron=True sandwich_norm=True pre_norm=False shift_tokens=1
    gate_residual=True scale_residual=True attn_gate_values=True attn_sparse_topk=2 attn_num_mem_kv=2 attn_on_attn=True
    sandwich_coef=1 layer_dropout=0.1 ff_post_act_ln=True add_value_residual=True num_residual_streams=2 rotary_xpos=True use_dynamic_tanh=True
    attn_dropout=0.1|ff_dropout=0.1 unet_skips=True softclamp_output=True attn_laser=True attn_data_dependent_alibi=True integrate_layers=True
    """.split()  # fmt: skip
X_TRANSFORMERS = [
    *(table("x_transformers", Inputs(ids(32, 12)), f"TransformerWrapper(num_tokens=32, max_seq_len=16, attn_layers=Decoder(dim=16, depth=4, heads=2, attn_dim_head=8, {option.replace('|', ', ')}))")
      for option in DECODERS),
    table("x_transformers", Inputs(ids(32, 12)), """
        TransformerWrapper(num_tokens=32, max_seq_len=16, attn_layers=Encoder(dim=16, depth=4, heads=2, attn_dim_head=8), num_memory_tokens=2, use_cls_token=True)
        TransformerWrapper(num_tokens=32, max_seq_len=16, attn_layers=Encoder(dim=16, depth=4, heads=2, attn_dim_head=8), emb_dropout=0.1, tie_embedding=True, l2norm_embed=True, emb_frac_gradient=0.5)
        TransformerWrapper(num_tokens=32, max_seq_len=16, attn_layers=Encoder(dim=16, depth=4, heads=2, attn_dim_head=8), average_pool_embed=True, logits_dim=5, post_emb_norm=True)
        TransformerWrapper(num_tokens=32, max_seq_len=16, attn_layers=Decoder(dim=16, depth=4, heads=2, attn_dim_head=8), scaled_sinu_pos_emb=True, num_output_heads=2)
        AutoregressiveWrapper(TransformerWrapper(num_tokens=32, max_seq_len=16, attn_layers=Decoder(dim=16, depth=4, heads=2, attn_dim_head=8)))
        """),
    table("x_transformers", Inputs(ids(32, 12)), "TransformerWrapper(num_tokens=32, max_seq_len=16, attn_layers=Decoder(dim=16, depth=4, heads=2, attn_dim_head=8, weight_tie_layers=True))", ("attn_layers.layers.0.2", "attn_layers.layers.1.2", "attn_layers.layers.1.2@2", "attn_layers.layers.1.2@3")),
    table("x_transformers", Inputs((3, 32, 32)), "ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=Encoder(dim=16, depth=4, heads=2, attn_dim_head=8))\nViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, num_register_tokens=2, attn_layers=Encoder(dim=16, depth=4, heads=2, attn_dim_head=8, ff_glu=True))"),
    table("x_transformers", Inputs((12, 8)), "ContinuousTransformerWrapper(dim_in=8, dim_out=4, max_seq_len=16, attn_layers=Encoder(dim=16, depth=4, heads=2, attn_dim_head=8))"),
    table("x_transformers", Inputs(ids(32, 12), ids(32, 10)), "XTransformer(dim=16, enc_num_tokens=32, enc_depth=2, enc_heads=2, enc_max_seq_len=16, dec_num_tokens=32, dec_depth=4, dec_heads=2, dec_max_seq_len=16)"),
    table("x_transformers.neo_mlp", Inputs((5,)), "NeoMLP(dim_in=5, dim_hidden=8, dim_out=4, dim_model=16, depth=4)"),
]  # fmt: skip

ONES: Make = lambda generator, batch: torch.ones(batch)  # noqa: E731
LOBES = "speechbrain.lobes.models"
SPEECHBRAIN = [
    table(f"{LOBES}.ContextNet", Inputs((24, 8)), "ContextNet((2, 24, 8), 16, [8] * 6, 3, [1, 2, 1, 1, 1, 1], 6, 2, 4)"),
    table(f"{LOBES}.CRDNN", Inputs((16, 8)), "CRDNN(input_shape=(2, 16, 8), cnn_channels=[4, 8], rnn_layers=2, rnn_neurons=8, dnn_neurons=16)\nCRDNN(input_shape=(2, 16, 8), cnn_channels=[4, 8], rnn_class=__import__('speechbrain').nnet.RNN.LSTM, rnn_layers=2, rnn_neurons=8, dnn_neurons=16, time_pooling=True)", ("CNN.block_0", "CNN.block_1", "DNN.block_0", "DNN.block_1")),
    table(f"{LOBES}.ECAPA_TDNN", Inputs((16, 8)), "ECAPA_TDNN(8, lin_neurons=8, channels=[16, 16, 16, 16, 32], attention_channels=8, se_channels=8, res2net_scale=4)"),
    table(f"{LOBES}.ECAPA_TDNN", Inputs((16, 8), ONES), "ECAPA_TDNN(8, lin_neurons=8, channels=[16, 16, 16, 16, 32], attention_channels=8, se_channels=8, res2net_scale=4, dropout=0.1)"),
    table(f"{LOBES}.Xvector", Inputs((24, 8)), "Xvector(tdnn_channels=[8, 8, 8, 8, 16], lin_neurons=8, in_channels=8)", ("blocks.2", "blocks.5", "blocks.8", "blocks.11")),
    table(f"{LOBES}.ResNet", Inputs((24, 16)), "ResNet(16, channels=[8, 8, 16, 16], block_sizes=[1, 1, 1, 1], lin_neurons=8)"),
    table(f"{LOBES}.Cnn14", Inputs((96, 64)), "Cnn14(64, 8)"),
    table(f"{LOBES}.conv_tasnet", Inputs((8, 20)), "MaskNet(8, 8, 16, 3, 3, 2, 2)\nMaskNet(8, 8, 16, 3, 3, 2, 2, norm_type='cLN', causal=True)"),
    table(f"{LOBES}.dual_path", Inputs((400,)), "SepformerWrapper(encoder_kernel_size=16, encoder_out_nchannels=16, masknet_chunksize=10, masknet_numlayers=2, intra_numlayers=2, inter_numlayers=2, intra_nhead=2, inter_nhead=2, intra_dffn=16, inter_dffn=16)", ("masknet.dual_mdl.0.intra_mdl", "masknet.dual_mdl.0", "masknet.dual_mdl.1.intra_mdl", "masknet.dual_mdl.1")),
    table(f"{LOBES}.dual_path", Inputs((8, 40)), "Dual_Path_Model(8, 8, SBRNNBlock(8, 4, 1), SBRNNBlock(8, 4, 1), num_layers=3, K=10)"),
    table(f"{LOBES}.RNNLM", Inputs(ids(16, 8)), "RNNLM(16, 8, rnn_neurons=8, dnn_neurons=16, dnn_blocks=3)"),
    table(f"{LOBES}.VanillaNN", Inputs((8, 6)), "VanillaNN((2, 8, 6), dnn_blocks=4, dnn_neurons=16)"),
    table(f"{LOBES}.MetricGAN", Inputs((12, 257), ONES), "EnhancementGenerator(num_layers=1)", ("blstm", "linear1", "linear2", "Learnable_sigmoid")),
    table(f"{LOBES}.MetricGAN", Inputs((2, 40, 40)), "MetricDiscriminator(base_channels=4)"),
    table(f"{LOBES}.convolution", Inputs((24, 8)), "ConvolutionFrontEnd((2, 24, 8), 3, 2, [4, 8, 8])"),
    table(f"{LOBES}.GatedNN", Inputs((8, 6)), "GatedNN((2, 8, 6), blocks=4, neurons=16)"),
    table(f"{LOBES}.ESPnetVGG", Inputs((16, 8)), "ESPnetVGG((2, 16, 8), cnn_channels=[4, 8], rnn_layers=2, rnn_neurons=8, projection_neurons=16)"),
    table(f"{LOBES}.HifiGAN", Inputs((8, 12)), "HifiganGenerator(8, 1, '1', [[1, 3, 5], [1, 3, 5]], [3, 5], [4, 4], 16, [2, 2])\nHifiganGenerator(8, 1, '2', [[1, 3], [1, 3]], [3, 5], [4, 4], 16, [2, 2])", ("ups.0", "resblocks.1", "ups.1", "resblocks.3")),
    table(f"{LOBES}.HifiGAN", Inputs((1, 2000)), "MultiPeriodDiscriminator()"),
    table(f"{LOBES}.transformer.TransformerASR", Inputs((12, 16), ids(20, 6), ONES), """
        TransformerASR(20, 16, 16, 2, 3, 2, 32, kernel_size=3)
        TransformerASR(20, 16, 16, 2, 3, 2, 32, kernel_size=3, encoder_module='conformer', attention_type='RelPosMHAXL', normalize_before=True, causal=False)
        TransformerASR(20, 16, 16, 2, 3, 2, 32, kernel_size=3, encoder_module='branchformer', attention_type='RelPosMHAXL', csgu_linear_units=16, normalize_before=True, causal=False)
        """, ("encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1")),
    table(f"{LOBES}.transformer.TransformerLM", Inputs(ids(20, 8)), "TransformerLM(20, 16, 2, 4, 0, 32)", ("encoder.layers.0", "encoder.layers.1", "encoder.layers.2", "encoder.layers.3")),
    table(f"{LOBES}.transformer.TransformerSE", Inputs((12, 9)), "CNNTransformerSE(9, 9, nhead=3, num_layers=4, d_ffn=16)", ("encoder.layers.0", "encoder.layers.1", "encoder.layers.2", "encoder.layers.3")),
    table(f"{LOBES}.transformer.Conformer", Inputs((12, 16)), "ConformerEncoder(4, 16, 32, 2, kernel_size=3, attention_type='regularMHA')"),
    table(f"{LOBES}.transformer.Transformer", Inputs((12, 16)), "TransformerEncoder(4, 2, 32, d_model=16, dropout=0.1)\nTransformerEncoder(4, 2, 32, d_model=16, ffn_type='1dcnn', normalize_before=True, output_hidden_states=True)\nTransformerEncoder(4, 2, 32, d_model=16, layerdrop_prob=0.2)"),
]  # fmt: skip

DIFFUSERS = [
    table("diffusers", Inputs((3, 16, 16), ids(1000), return_dict=False), """
        UNet2DModel(**small, down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'))
        UNet2DModel(**small, down_block_types=('ResnetDownsampleBlock2D',) * 3, up_block_types=('ResnetUpsampleBlock2D',) * 3, resnet_time_scale_shift='scale_shift', dropout=0.1)
        """, block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16, attention_head_dim=4),
    table("diffusers", Inputs((3, 16, 16), ids(1000)), "UNet2DModel(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'), attention_head_dim=4)"),
    table("diffusers", Inputs((4, 16, 16), ids(1000), (5, 16), return_dict=False), """
        UNet2DConditionModel(**small)
        UNet2DConditionModel(**small, use_linear_projection=True, only_cross_attention=True, resnet_time_scale_shift='scale_shift', upcast_attention=True)
        UNet2DConditionModel(**small, mid_block_type='UNetMidBlock2DSimpleCrossAttn', transformer_layers_per_block=2, time_embedding_type='fourier')
        """, block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4, sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")),
    table("diffusers", Inputs((4, 16, 16), ids(1000), (5, 16), (3, 128, 128), return_dict=False), "ControlNetModel(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'), conditioning_embedding_out_channels=(8, 8, 8, 16))"),
    table("diffusers", Inputs((4, 3, 8, 8), ids(1000), (5, 16), return_dict=False), "UNet3DConditionModel(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4, down_block_types=('DownBlock3D', 'CrossAttnDownBlock3D', 'DownBlock3D'), up_block_types=('UpBlock3D', 'CrossAttnUpBlock3D', 'UpBlock3D'))"),
    table("diffusers", Inputs((3, 16, 16), return_dict=False), """
        AutoencoderKL(down_block_types=('DownEncoderBlock2D',) * 3, up_block_types=('UpDecoderBlock2D',) * 3, block_out_channels=(8, 8, 16), norm_num_groups=4)
        VQModel(down_block_types=('DownEncoderBlock2D',) * 3, up_block_types=('UpDecoderBlock2D',) * 3, block_out_channels=(8, 8, 16), norm_num_groups=4, num_vq_embeddings=8)
        AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8))
        AsymmetricAutoencoderKL(down_block_types=('DownEncoderBlock2D',) * 3, up_block_types=('UpDecoderBlock2D',) * 3, down_block_out_channels=(8, 8, 16), up_block_out_channels=(8, 8, 16), norm_num_groups=4)
        AutoencoderDC(latent_channels=4, attention_head_dim=4, encoder_block_types=('ResBlock', 'EfficientViTBlock', 'EfficientViTBlock'), decoder_block_types=('ResBlock', 'EfficientViTBlock', 'EfficientViTBlock'), encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (3,), ()), decoder_qkv_multiscales=((), (3,), ()), encoder_out_shortcut=True)
        """),
    table("diffusers", Inputs((3, 5, 16, 16), return_dict=False), "AutoencoderKLWan(4, z_dim=2, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True], latents_mean=[0., 0.], latents_std=[1., 1.])"),
    table("diffusers", Inputs((1, 64), return_dict=False), "AutoencoderOobleck(8, [2, 2, 4], [1, 2, 2], 8, 4, 1)"),
    table("diffusers", Inputs((4, 8, 8), ids(10), ids(10), return_dict=False), "DiTTransformer2DModel(2, 8, 4, num_layers=4, norm_num_groups=4, sample_size=8, num_embeds_ada_norm=10)"),
    table("diffusers", Inputs((4, 8, 8), (5, 16), ids(10), return_dict=False), "PixArtTransformer2DModel(2, 8, 4, num_layers=4, norm_num_groups=4, cross_attention_dim=16, caption_channels=16, sample_size=8, use_additional_conditions=False)\nSanaTransformer2DModel(4, 4, 2, 8, 4, 2, 8, 16, 16, sample_size=8)\nAuraFlowTransformer2DModel(8, 2, 4, 2, 4, 8, 2, 16, 16, 4, 16)"),
    table("diffusers", Inputs((4, 8, 8), (5, 16), (16,), ids(10), return_dict=False), "SD3Transformer2DModel(8, 2, 4, 4, 8, 2, 16, 16, 16, 4, 8)\nSD3Transformer2DModel(8, 2, 4, 4, 8, 2, 16, 16, 16, 4, 8, dual_attention_layers=(0, 1), qk_norm='rms_norm')"),
    table("diffusers", Inputs((16, 8), (5, 16), (16,), lambda generator, batch: torch.rand(batch, generator=generator), torch.ones(16, 3), torch.zeros(5, 3), return_dict=False), "FluxTransformer2DModel(1, 8, None, 2, 4, 16, 2, 16, 16, axes_dims_rope=(4, 4, 8))"),
    table("diffusers", Inputs((16,), ids(10), (16,), (5, 16), return_dict=False), "PriorTransformer(2, 8, 4, 16, 5)"),
    table("diffusers", Inputs((3, 4, 8, 8), (6, 16), ids(10), return_dict=False), "CogVideoXTransformer3DModel(2, 8, 4, 4, time_embed_dim=8, text_embed_dim=16, num_layers=4, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=6)"),
    table("diffusers", Inputs((4, 2, 8, 8), ids(10), (5, 16), return_dict=False), "WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=16, num_layers=4, rope_max_seq_len=16)\nLatteTransformer3DModel(2, 8, 4, 4, 4, cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=16, video_length=2, norm_type='ada_norm_single', num_embeds_ada_norm=10)"),
    table("diffusers", Inputs((4, 8, 8), ids(10), (5, 16), return_dict=False), "PRXTransformer2DModel(4, 2, 16, 16, 2., 2, 4, [4, 4])"),
    table("diffusers", Inputs((8, 16, 16), return_dict=False), "Transformer2DModel(2, 8, 8, num_layers=4, norm_num_groups=4)\nTransformer2DModel(2, 8, 8, num_layers=4, norm_num_groups=4, double_self_attention=True, dropout=0.1, use_linear_projection=True)"),
]  # fmt: skip

BASE = "nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 5))"
LINEAR = "nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))"
BERT = "__import__('transformers').BertForSequenceClassification(__import__('transformers').BertConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, vocab_size=32, max_position_embeddings=16))"
LAYERS = tuple(f"base_model.model.bert.encoder.layer.{index}" for index in range(4))
PEFT = [
    table("peft", Inputs((8,)), "\n".join(f"{call}" for config in (
        "LoraConfig(target_modules=['0', '2', '4'], r=2)", "LoraConfig(target_modules=['0', '2', '4'], r=2, use_dora=True, lora_dropout=0.1)", "LoHaConfig(target_modules=['0', '2', '4'], r=2)",
        "LoKrConfig(target_modules=['0', '2', '4'], r=2)", "IA3Config(target_modules=['0', '2', '4'], feedforward_modules=['2'])", "OFTConfig(target_modules=['2', '4'], r=0, oft_block_size=4)",
        "BOFTConfig(target_modules=['2', '4'], boft_block_size=4)", "HRAConfig(target_modules=['2', '4'], r=2)", "FourierFTConfig(target_modules=['2', '4'], n_frequency=8)",
        "LNTuningConfig(target_modules=['2'])",
    ) for call in [f"inject_adapter_in_model({config}, {LINEAR})"])),
    table("peft", Inputs((8,)), "\n".join(f"get_peft_model({LINEAR}, {config})" for config in (
        "LoraConfig(target_modules=['0', '2', '4'], r=2)", "VeraConfig(target_modules=['2', '4'], r=2)", "VBLoRAConfig(target_modules=['2', '4'], r=2, num_vectors=4, vector_length=4, topk=2)")), ("base_model.model.1", "base_model.model.3", "base_model.model.5", "base_model.model.6")),
    table("peft", Inputs((3, 16, 16)), f"inject_adapter_in_model(LoraConfig(target_modules=['0', '2', '6'], r=2), {BASE})\ninject_adapter_in_model(LoHaConfig(target_modules=['0', '2', '6'], r=2), {BASE})"),
    table("peft", Inputs(input_ids=ids(32, 8)), f"get_peft_model({BERT}, LoraConfig(task_type='SEQ_CLS', r=2))\nget_peft_model({BERT}, LoraConfig(task_type='SEQ_CLS', r=2, modules_to_save=['classifier'], use_rslora=True, lora_dropout=0.1))\nget_peft_model({BERT}, IA3Config(task_type='SEQ_CLS'))", LAYERS),
    table("peft", Inputs(input_ids=ids(32, 8), attention_mask=lambda generator, batch: torch.ones(batch, 8, dtype=torch.int64)), f"get_peft_model({BERT}, PromptTuningConfig(task_type='SEQ_CLS', num_virtual_tokens=4))\nget_peft_model({BERT}, PromptEncoderConfig(task_type='SEQ_CLS', num_virtual_tokens=4, encoder_hidden_size=8))", tuple(f"base_model.bert.encoder.layer.{index}" for index in range(4))),
]  # fmt: skip
LORALIB = [
    table("loralib", Inputs((8,)), "nn.Sequential(Linear(8, 16, r=2), nn.ReLU(), Linear(16, 16, r=2, lora_dropout=0.1), nn.ReLU(), MergedLinear(16, 16, r=2, enable_lora=[True, False]), nn.ReLU(), Linear(16, 3, r=2, merge_weights=False))"),
    table("loralib", Inputs((3, 16, 16)), "nn.Sequential(Conv2d(3, 8, 3, r=2), nn.ReLU(), Conv2d(8, 8, 3, r=2), nn.ReLU(), Conv2d(8, 8, 3, r=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(8, 3, r=2))"),
    table("loralib", Inputs(ids(16, 6)), "nn.Sequential(Embedding(16, 8, r=2), Linear(8, 8, r=2), nn.ReLU(), Linear(8, 8, r=2), nn.ReLU(), Linear(8, 3, r=2))"),
]  # fmt: skip
NNAUDIO = [
    table("nnAudio.features", Inputs((2000,)), "\n".join(
        f"nn.Sequential({first}, nn.Conv1d({channels}, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3))"
        for first, channels in [
            ("STFT(n_fft=64, output_format='Magnitude', verbose=False)", 33), ("STFT(n_fft=64, output_format='Magnitude', trainable=True, verbose=False)", 33),
            ("MelSpectrogram(8000, 64, n_mels=8, hop_length=32, verbose=False)", 8), ("MelSpectrogram(8000, 64, n_mels=8, hop_length=32, trainable_mel=True, trainable_STFT=True, verbose=False)", 8),
            ("MFCC(8000, 8, n_fft=64, n_mels=12, hop_length=32, verbose=False)", 8), ("CQT1992v2(8000, 64, fmin=500, n_bins=12, verbose=False)", 12), ("CQT2010v2(8000, 64, fmin=500, n_bins=12, verbose=False)", 12),
            ("Gammatonegram(8000, 64, n_bins=12, hop_length=32, verbose=False)", 12), ("VQT(8000, 64, fmin=500, n_bins=12, verbose=False)", 12),
        ]), ("1", "2", "3", "4")),
]  # fmt: skip
BYOL = [
    table("byol_pytorch", Inputs((3, 32, 32)), "BYOL(__import__('torchvision').models.resnet18(num_classes=16), 32, hidden_layer='avgpool', projection_size=8, projection_hidden_size=16)", ("net.layer1", "net.layer2", "net.layer3", "net.layer4")),
]  # fmt: skip

SEQUENCES = [
    *TORCH_GEOMETRIC,
    *TORCHAUDIO,
    *X_TRANSFORMERS,
    *SPEECHBRAIN,
    *DIFFUSERS,
    *PEFT,
    *LORALIB,
    *NNAUDIO,
    *BYOL,
]
