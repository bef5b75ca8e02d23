"""What is read from a config.json: parameters as published, bytes per GPU, and one line for what cannot be read."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_heddle.latency.shape import KV_CONTEXT, known, read_shape, shape_of

# Published counts: of the checkpoint's index (exact ones), of the model card (B, one decimal). Without biases, vision and MTP layers.
PARAMETERS = {
    "Qwen2.5-1.5B": 1.54e9,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "GLM-4.5-Air": 106_852_245_504,
    "DeepSeek-V3": 671e9,
    "Kimi-K2": 1.026e12,
    "gpt-oss-20b": 20.9e9,
    "gpt-oss-120b": 116.8e9,
}
ACTIVE = {"Qwen3-30B-A3B": 3.3e9, "Qwen3-235B-A22B": 22e9, "DeepSeek-V3": 37e9, "Kimi-K2": 32e9}

PLAIN = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "vocab_size": 1000,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameters_are_those_published(model):
    assert known()[model].parameters == pytest.approx(PARAMETERS[model], rel=3e-3)


def test_every_known_model_is_checked():
    assert set(PARAMETERS) == set(known()) and len(known()) >= 12


@pytest.mark.parametrize("model", ACTIVE)
def test_active_parameters_are_those_published(model):
    assert known()[model].active_parameters == pytest.approx(ACTIVE[model], rel=0.04)


def test_active_parameters_of_small_experts_without_the_table_that_is_only_looked_up():
    for model, published in {"gpt-oss-20b": 3.6e9, "gpt-oss-120b": 5.1e9, "GLM-4.5-Air": 12e9}.items():
        shape = known()[model]
        active = shape.active_parameters - (2 if model.startswith("GLM") else 1) * shape.vocab * shape.hidden
        assert active == pytest.approx(published, rel=0.02)


def test_weight_bytes_are_those_of_the_checkpoints():
    assert known()["gpt-oss-120b"].weight_bytes(1) == pytest.approx(65.25e9, rel=5e-3)
    assert known()["gpt-oss-20b"].weight_bytes(1) == pytest.approx(13.76e9, rel=5e-3)
    assert known()["Qwen2.5-7B"].weight_bytes(1) == pytest.approx(15.23e9, rel=2e-3)
    # A byte a parameter and two for the tables; the checkpoint's 689 GB hold 14 B more parameters, for speculative decoding.
    assert 671e9 < known()["DeepSeek-V3"].weight_bytes(1) < 680e9


def test_kv_heads_are_copied_beyond_their_number_and_a_latent_is_copied_everywhere():
    sparse, latent = known()["Qwen3-30B-A3B"], known()["DeepSeek-V3"]
    assert [sparse.kv_bytes_per_token(tp) for tp in (1, 2, 4, 8)] == [98304, 49152, 24576, 24576]
    assert {latent.kv_bytes_per_token(tp) for tp in (1, 2, 4, 8)} == {61 * (512 + 64) * 2}
    assert latent.in_precision(kv="fp8").kv_bytes_per_token(8) == 61 * (512 + 64)


def test_layers_with_a_window_keep_only_the_window():
    shape = known()["gpt-oss-120b"]
    per_layer = 2 * 8 * 64 * 2
    assert (shape.window, shape.window_layers) == (128, 18)
    assert shape.kv_bytes_per_token(1) == pytest.approx(per_layer * (18 + 18 * 128 / KV_CONTEXT), abs=1)


@pytest.mark.parametrize(
    ("extra", "layers"),
    [
        ({"sliding_window": 64}, 4),
        ({"sliding_window": None}, 0),
        ({"sliding_window": 64, "use_sliding_window": False}, 0),
        ({"sliding_window": 64, "model_type": "qwen2"}, 0),
        ({"sliding_window": 64, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3}, 1),
        ({"sliding_window": 64, "model_type": "gemma2"}, 2),
        ({"sliding_window": 64, "sliding_window_pattern": 4}, 3),
        ({"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}, 2),
    ],
)
def test_which_layers_slide(extra, layers):
    assert read_shape(PLAIN | extra, "m").window_layers == layers


@pytest.mark.parametrize(
    ("extra", "moe"),
    [
        ({"num_experts": 8, "num_experts_per_tok": 2}, 4),
        ({"n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1}, 3),
        ({"num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [0, 1]}, 2),
        ({"num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 2}, 2),
        ({"num_experts": 0}, 0),
    ],
)
def test_which_layers_have_experts(extra, moe):
    shape = read_shape(PLAIN | {"moe_intermediate_size": 128} | extra, "m")
    assert shape.expert_layers == moe and (shape.top_k > 0) == (moe > 0)


@pytest.mark.parametrize(
    ("quantised", "name", "size"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 1.0),
        ({"quant_method": "awq", "bits": 4}, "int4", 0.5 + 1 / 64),
        ({"quant_method": "gptq", "bits": 8}, "int8", 1.0),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}}, "fp8", 1.0),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}}, "int4", 0.5 + 1 / 64),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", 0.5 + 1 / 16),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4", 0.5 + 1 / 64),
    ],
)
def test_quantised_weights(quantised, name, size):
    shape = read_shape(PLAIN | {"quantization_config": quantised}, "m")
    assert (shape.weights, shape.mlp_bytes, shape.attention_bytes) == (name, size, size)
    assert shape.fp8_compute == (name == "fp8") and shape.kv == "bf16"
    assert shape.weight_bytes(1) < read_shape(PLAIN, "m").weight_bytes(1)


def test_fp8_kv_of_a_config():
    assert read_shape(PLAIN | {"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}}}, "m").kv == "fp8"


def test_a_degree_must_divide_heads_and_blocks():
    assert [tp for tp in (1, 2, 4, 8) if known()["Qwen2.5-7B"].splits(tp)] == [1, 2, 4]  # 28 heads
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    shape = read_shape(known()["Qwen3-30B-A3B"].config | {"quantization_config": block}, "m")
    assert [tp for tp in (1, 2, 4, 8) if shape.splits(tp)] == [1, 2]  # experts 768 wide: six blocks
    assert shape.in_precision("bf16").splits(8)


@given(st.sampled_from(sorted(known())), st.sampled_from([None, "bf16", "fp8"]))
def test_more_gpus_hold_less_each_and_never_less_together(model, weights):
    shape = known()[model].in_precision(weights)
    for few, many in ((1, 2), (2, 4), (4, 8)):
        assert shape.weight_bytes(many) < shape.weight_bytes(few) <= 2 * shape.weight_bytes(many)
        assert shape.kv_bytes_per_token(many) <= shape.kv_bytes_per_token(few) <= 2 * shape.kv_bytes_per_token(many) + 1
    assert shape.in_precision("fp8").weight_bytes(1) <= shape.in_precision("bf16").weight_bytes(1)


def test_a_config_a_folder_and_a_name_are_one_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(known()["Qwen3-8B"].config))
    for way in (tmp_path, tmp_path / "config.json"):
        assert replace(shape_of(str(way)), name="Qwen3-8B") == known()["Qwen3-8B"] == shape_of("Qwen/qwen3-8b-base")
    assert shape_of(str(tmp_path)).name == tmp_path.name


def test_a_snapshot_of_the_hubs_cache_has_the_models_name(tmp_path):
    folder = tmp_path / "models--acme--Qwen3-8B-Tuned" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PLAIN))
    assert shape_of(str(folder)).name == shape_of(str(folder / "config.json")).name == "Qwen3-8B-Tuned"


@pytest.mark.parametrize(
    "kept", [["model.layers.*.self_attn"], ["re:.*self_attn.*"], [f"model.layers.{index}.self_attn.q_proj" for index in range(4)]]
)
def test_attention_that_is_not_quantised(kept):
    quantised = {"quant_method": "compressed-tensors", "ignore": kept, "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}}
    shape = read_shape(PLAIN | {"quantization_config": quantised}, "m")
    assert (shape.attention_bytes, shape.mlp_bytes) == (2.0, 0.5 + 1 / 64)


def test_a_folder_without_a_config_is_looked_up_by_its_name(tmp_path):
    (tmp_path / "Qwen3-8B").mkdir()
    assert shape_of(str(tmp_path / "Qwen3-8B")) == known()["Qwen3-8B"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json at"):
        shape_of(str(tmp_path / "mine"))


def test_the_language_model_of_a_multimodal_config():
    text = {key: value for key, value in known()["Qwen3-4B"].config.items() if key != "tie_word_embeddings"}
    shape = read_shape({"model_type": "qwen3_vl", "text_config": text, "tie_word_embeddings": True, "vision_config": {}}, "vl")
    assert replace(shape, name="Qwen3-4B") == known()["Qwen3-4B"]


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size"])
def test_a_missing_field_is_named_in_one_line(field):
    with pytest.raises(ValueError, match=f"lacks {field}$"):
        read_shape({key: value for key, value in PLAIN.items() if key != field}, "m")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"hidden_size": "wide"}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": 0}, "must be positive"),
        ({"layer_types": ["linear_attention"]}, "layer_types has linear_attention"),
        ({"layer_types": ["sliding_attention"]}, "lacks sliding_window"),
        ({"index_topk": 2048}, "index_topk indicates sparse attention"),
        ({"num_experts": 8}, "lacks num_experts_per_tok"),
        ({"kv_lora_rank": 512}, "lacks qk_rope_head_dim"),
        ({"quantization_config": {"quant_method": "secret"}}, "does not give the bits per weight"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_field(extra, says):
    with pytest.raises(ValueError) as caught:
        read_shape(PLAIN | extra, "m", "x/config.json")
    assert says in str(caught.value) and str(caught.value).startswith("x/config.json") and "\n" not in str(caught.value)


def test_a_file_that_is_no_config(tmp_path):
    file = tmp_path / "config.json"
    for text, says in (("{", "is not JSON"), ("[]", "no JSON object")):
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            shape_of(str(file))
