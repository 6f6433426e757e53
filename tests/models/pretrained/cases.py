"""Tiny models of every family, in the words of transformers' configs."""

SIZES = {
  "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "intermediate_size": 12, "max_position_embeddings": 64,
  "initializer_range": 0.2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LATENT = {
  "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 8,
  "first_k_dense_replace": 1, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
  "v_head_dim": 5, "n_group": 4, "topk_group": 2, "num_key_value_heads": 4,
}  # fmt: skip
YARN = {
  "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16
}
LLAMA3 = {
  "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
  "high_freq_factor": 4.0, "original_max_position_embeddings": 1024,
}  # fmt: skip
LONG = {
  "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1, 1.7], "factor": 4.0,
  "long_factor": [1.5, 9.0], "original_max_position_embeddings": 64, "short_mscale": 1.1,
  "long_mscale": 1.3,
}  # fmt: skip

# As many traits of a family at once as go together; each has a golden file.
GOLDEN = {
  "deepseek_v2": {**LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy",
                  "routed_scaling_factor": 1.7},
  "deepseek_v3": {**LATENT, "q_lora_rank": 12,
                  "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
  "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5,
              "swiglu_limit": 0.8, "rope_parameters": {**YARN, "truncate": False}},
  "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.3,
                 "residual_multiplier": 1.7, "embedding_multiplier": 1.3, "logits_scaling": 0.49,
                 "tie_word_embeddings": True},
  "llama": {"num_key_value_heads": 4, "attention_bias": True,
            "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}},
  "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
  "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 1.0},
  "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True,
             "lm_head_bias": True, "router_jitter_noise": 0.3, "rope_parameters": LONG},
  "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
                "shared_expert_intermediate_size": 10, "norm_topk_prob": True},
  "qwen3": {"head_dim": 8, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5,
            "max_window_layers": 1, "num_key_value_heads": 1},
  "qwen3_moe": {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 3,
                "moe_intermediate_size": 8, "mlp_only_layers": [1], "norm_topk_prob": True},
}  # fmt: skip

# More shapes, compared only where transformers is installed.
LIVE = {
  "deepseek_v2 greedy": ("deepseek_v2", {**LATENT, "q_lora_rank": 12, "topk_method": "greedy"}),
  "deepseek_v3 halves": ("deepseek_v3", {**LATENT, "q_lora_rank": None, "rope_interleave": False,
                                         "norm_topk_prob": False, "first_k_dense_replace": 0}),
  "gpt_oss plain": ("gpt_oss", {"head_dim": 4, "num_local_experts": 3, "num_experts_per_tok": 1,
                                "attention_bias": False, "num_hidden_layers": 3,
                                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
  "granitemoe untied": ("granitemoe", {"num_local_experts": 3, "attention_bias": True}),
  "llama tied": ("llama", {"tie_word_embeddings": True, "head_dim": 6, "num_key_value_heads": 1}),
  "mixtral tied": ("mixtral", {"tie_word_embeddings": True, "num_local_experts": 3,
                               "num_key_value_heads": 1, "num_hidden_layers": 3}),
  "olmoe normed": ("olmoe", {"norm_topk_prob": True, "num_experts": 4, "num_experts_per_tok": 1,
                             "attention_bias": True, "num_key_value_heads": 4,
                             "rope_parameters": {**YARN, "rope_type": "linear"}}),
  "phimoe plain": ("phimoe", {"num_local_experts": 6, "sliding_window": 7}),
  "qwen2_moe windows": ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 6,
                                      "num_experts_per_tok": 2, "num_hidden_layers": 4,
                                      "shared_expert_intermediate_size": 8, "qkv_bias": False,
                                      "decoder_sparse_step": 2, "use_sliding_window": True,
                                      "sliding_window": 4, "max_window_layers": 3}),
  "qwen3 tied": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 4,
                           "initializer_range": 0.4}),
  "qwen3_moe windows": ("qwen3_moe", {"head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2,
                                      "moe_intermediate_size": 6, "use_sliding_window": True,
                                      "sliding_window": 6, "decoder_sparse_step": 2,
                                      "tie_word_embeddings": True, "num_hidden_layers": 4}),
}  # fmt: skip
