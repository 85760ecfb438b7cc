import pytest

from pelt_jax.models import read_config
from tests.test_models.helpers import CONFIGS


def test_what_the_file_leaves_out_is_the_familys_default():
  llama, mistral = read_config({"model_type": "llama"}), read_config({"model_type": "mistral"})
  assert (llama.vocab_size, llama.num_key_value_heads, llama.windows[0]) == (32000, 32, None)
  assert (mistral.num_key_value_heads, mistral.windows[0]) == (8, 4096)
  assert read_config({"model_type": "qwen3"}).head_dim == 128
  assert read_config({"model_type": "roberta"}).pad_token_id == 1


def test_an_explicit_null_window_means_full_attention():
  assert set(read_config({"model_type": "mistral", "sliding_window": None}).windows) == {None}


def test_old_and_new_rope_settings_mean_the_same():
  scaling = {"rope_type": "linear", "factor": 4.0}
  old = {"model_type": "llama", "rope_theta": 5e4, "rope_scaling": scaling}
  new = {"model_type": "llama", "rope_parameters": scaling | {"rope_theta": 5e4}}
  assert read_config(old).rope == read_config(new).rope
  assert (read_config(old).rope.rope_theta, read_config(old).rope.factor) == (5e4, 4.0)


def test_layer_types_choose_the_windows():
  assert read_config(CONFIGS["qwen2-mixed"]).windows == (None, 4, 4)
  types = ["sliding_attention", "full_attention", "sliding_attention"]
  assert read_config(CONFIGS["qwen2-mixed"] | {"layer_types": types}).windows == (4, None, 4)


def test_configurations_are_hashable_and_equal_whatever_file_they_came_from():
  a = read_config(CONFIGS["llama"], source="a")
  b = read_config(CONFIGS["llama"] | {"transformers_version": "9"}, source="b")
  assert a == b and hash(a) == hash(b)
  assert a != a.replace(num_labels=7)


@pytest.mark.parametrize(
  ("raw", "message"),
  [
    ({"model_type": "gpt_neox"}, "'gpt_neox' is not supported; known: llama"),
    ({}, "model_type None"),
    ({"model_type": "llama", "rope_scaling": {"type": "longrope", "factor": 2}}, "'longrope'"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}, "needs a 'factor'"),
    ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"model_type": "llama", "quantization_config": {"a": 1}}, "quantization_config"),
    ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
    ({"model_type": "llama", "num_key_value_heads": 5}, "num_key_value_heads"),
    ({"model_type": "bert", "position_embedding_type": "relative_key"}, "relative_key"),
    ({"model_type": "bert", "is_decoder": True}, "is_decoder=True"),
    (
      CONFIGS["qwen2-mixed"] | {"layer_types": ["full_attention", "chunked_attention"] * 2},
      "each of the 3 layers, got 4 entries, among them .'chunked_attention'.",
    ),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(raw, message):
  with pytest.raises(ValueError, match=message):
    read_config(raw)
